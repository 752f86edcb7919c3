"""An exported reward in vLLM's pooling runner, with the options that its card tells."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_runs import BEST, tiny_recipe
from support.vllm_models import needs_vllm
from transformers import AutoTokenizer

from irl_align.hub.check import chat_texts
from irl_align.hub.export import export
from irl_align.reward.model import RewardModel
from irl_align.training.train import train

pytestmark = [pytest.mark.vllm, needs_vllm, pytest.mark.timeout(300)]
PROMPTS = ["name[the red lion], food[thai], area[suburbs]", "name[Blue Heron], price[cheap]"]
ANSWERS = ["The red lion serves thai food in the suburbs.", "the blue heron is cheap."]
# In a process of its own: a process has one engine at most, and this one is the learner's.
SCORES = """
import json, sys
from vllm import LLM
from vllm.config import PoolerConfig

folder, runner, convert, pooler, rows = sys.argv[1:]
model = LLM(
    folder, runner=runner, convert=convert, pooler_config=PoolerConfig(**json.loads(pooler)),
    dtype="float32", max_model_len=192, enforce_eager=True,
)
ids, texts = json.loads(rows)
scores = [
    model.classify([{"prompt_token_ids": row} for row in ids]),
    model.classify(texts, tokenization_kwargs={"add_special_tokens": False}),
]
print(json.dumps([[one.outputs.probs[0] for one in way] for way in scores]))
"""
QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


def test_vllm_classifies_with_the_runs_scores(tmp_path: Path) -> None:
    run = train(tiny_recipe(tmp_path, *BEST, "model.from_scratch.num_attention_heads=1"))
    assert run.reward is not None
    expected = RewardModel.from_pretrained(run.reward).score(PROMPTS, ANSWERS)
    folder = tmp_path / "reward"
    export(run.folder, "reward", folder)

    card = (folder / "README.md").read_text(encoding="utf-8")
    options = re.search(
        r"--runner (\w+) --convert (\w+).*?--pooler-config '(.+?)'", card, re.DOTALL
    )
    assert options is not None and "logit_mean" in options[3]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = chat_texts(tokenizer, PROMPTS, ANSWERS, tokenize=False)
    rows = [chat_texts(tokenizer, PROMPTS, ANSWERS), texts]
    command = [sys.executable, "-c", SCORES, str(folder), *options.groups(), json.dumps(rows)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET})
    assert done.returncode == 0, done.stderr[-3000:]
    scores = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(scores, expected.expand(2, -1), atol=1e-5, rtol=0)
