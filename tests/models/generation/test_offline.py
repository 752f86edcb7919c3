"""Sampling from policies on disk outside a run: the backends are interchangeable."""

import json
import sys
from pathlib import Path

import pytest
from support.tiny_runs import irl_align
from support.vllm_models import needs_vllm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from irl_align.config.generation import GenerationOptions
from irl_align.errors import UserError
from irl_align.evaluation.inference import sampling_backend
from irl_align.models.generation.offline import with_backend


@pytest.fixture
def policy(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a model of heads that vLLM has a CPU kernel for, and a file of prompts."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=96,
        initializer_range=0.2,
        pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "policy")
    tiny_tokenizer.save_pretrained(tmp_path / "policy")
    rows = [{"prompt": text} for text in ("name = Loch Fyne", "The Punter", "food")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "policy"


@pytest.mark.vllm
@needs_vllm
def test_generate_gives_the_same_greedy_text_by_vllm_and_transformers(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {}
    for backend in ("transformers", "vllm"):
        command = ("generate", policy, "--input", policy.parent / "prompts.jsonl")
        settings = ("--temperature", 0, "--max-new-tokens", 12, "--n", 2, "--backend", backend)
        ended = irl_align(capsys, *command, *settings)
        assert ended.status == 0, ended.err
        rows[backend] = [json.loads(line) for line in ended.out.splitlines()]
    assert len(rows["vllm"]) == 6
    assert rows["vllm"] == rows["transformers"]


def test_generate_refuses_a_backend_that_is_not_installed(
    policy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    prompts = policy.parent / "prompts.jsonl"
    ended = irl_align(capsys, "generate", policy, "--input", prompts, "--backend", "vllm")
    assert ended.status == 2 and "vllm is not installed" in ended.err


def test_sampling_backend_takes_servers_for_vllm_server_only() -> None:
    options = sampling_backend("vllm-server", ["http://a:1"])
    assert options.server.urls == ["http://a:1"]
    with pytest.raises(UserError, match="--server: an option of --backend vllm-server"):
        sampling_backend("vllm", ["http://a:1"])


def test_with_backend_drops_options_of_the_previous_backend() -> None:
    options = GenerationOptions.model_validate(
        {"backend": "vllm-server", "server": {"urls": ["http://a:1"]}, "max_new_tokens": 7}
    )
    assert with_backend(options, None) is options
    assert with_backend(options, "vllm-server") is options
    other = with_backend(options, "transformers")
    assert other == GenerationOptions(backend="transformers", max_new_tokens=7)
