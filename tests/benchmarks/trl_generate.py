"""A script that a user would write between TRL's commands: sample, score, select the best.

    python trl_generate.py pairs POLICY rows.jsonl FOLDER
    python trl_generate.py best POLICY rows.jsonl FOLDER --reward REWARD --n 8 --prompts 128

``pairs`` writes FOLDER/train.jsonl with prompt, chosen (the demonstration) and rejected (a sample),
for ``trl reward``; ``best`` writes prompt and completion, the best of n samples, for ``trl sft``.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

ROWS = 64


def sample(
    path: str, tokenizer: PreTrainedTokenizerBase, prompts: list[str], n: int, longest: int
) -> list[list[str]]:
    """n completions of each prompt, in batches in the given order."""
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    out: list[list[str]] = []
    per_batch = max(1, ROWS // n)
    for start in range(0, len(prompts), per_batch):
        batch = prompts[start : start + per_batch]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=False)
        sampled = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=n,
            max_new_tokens=longest,
            pad_token_id=tokenizer.pad_token_id,
        )[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(sampled, skip_special_tokens=True)
        out += [texts[i : i + n] for i in range(0, len(texts), n)]
    return out


@torch.inference_mode()
def score(path: str, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[float]:
    """The reward model's scores of full texts."""
    tokenizer.padding_side = "right"
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    scores: list[float] = []
    for start in range(0, len(texts), ROWS):
        batch = texts[start : start + ROWS]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=False)
        scores += model(**inputs).logits[:, 0].tolist()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("pairs", "best"))
    parser.add_argument("policy")
    parser.add_argument("rows", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reward")
    parser.add_argument("--n", type=int, default=1)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[: options.prompts]
    tokenizer = AutoTokenizer.from_pretrained(options.policy)
    samples = sample(options.policy, tokenizer, prompts, options.n, options.max_new_tokens)
    by_prompt = dict(zip(prompts, samples, strict=True))
    if options.what == "pairs":
        out = [
            {
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": by_prompt[row["prompt"]][0],
            }
            for row in rows
        ]
    else:
        texts = [prompt + text for prompt, group in by_prompt.items() for text in group]
        scores = iter(score(options.reward, tokenizer, texts))
        out = []
        for prompt, group in by_prompt.items():
            ranked = sorted(((next(scores), text) for text in group), reverse=True)
            out.append({"prompt": prompt, "completion": ranked[0][1]})
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in out)
    (options.folder / "train.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
