"""Fixtures shared by the tests: tiny seeded models and a tokenizer, made without a network."""

import os

# Before torch or the Hugging Face libraries are imported by any test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's would be among the requests that tests count
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_models import cached_model, cached_tokenizer
from support.tiny_runs import session_folder, start_session
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture(scope="session", autouse=True)
def tiny_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One store of stages for the tiny runs of all workers; see support/tiny_runs.py."""
    base = tmp_path_factory.getbasetemp()
    start_session(base, base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(scope="module")
def tiny_folder(request: pytest.FixtureRequest) -> Path:
    """A folder for a test file's tiny runs, in front of the session's store of stages."""
    return session_folder(request.module.__name__)


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens; pad, bos and eos are distinct, none is added by encoding."""
    return copy.deepcopy(cached_tokenizer())


@pytest.fixture
def tiny_model() -> Callable[[str], PreTrainedModel]:
    """``tiny_model(arch)``: a fresh copy of a random two-layer causal LM, H=32, float32, in eval.

    Weights are the same in every call and every test. ``arch`` is one of ``TINY_ARCHITECTURES``;
    llama, qwen3 (tied embeddings) and mistral (window of 8) have grouped-query attention.
    """
    return lambda arch: copy.deepcopy(cached_model(arch))
