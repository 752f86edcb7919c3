"""Slot errors of a run's policies on edited E2E prompts, which nobody demonstrated.

    python tests/benchmarks/edited_gold.py runs/e2e-irl-rloo-edits-seed1 [--edits 2] [--split test]

The validation prompts ask for nothing that the train split does not have, so they hardly
distinguish policies. The test prompts do, but settings must not be chosen on them. Each distinct
prompt of the split is edited `--edits` times (the same for every run); prompts of any split are
left out. Samples are greedy. The output has a line per policy: errors over all slots asked for;
errors without `near` of pairs that train never has; errors of `near` for pairs that train has and
for pairs that it never has; and the mean length in tokens.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from slot_gold import SEEN, UNSEEN, count_errors, share, summary, venues

from irl_align.config.generation import GenerationOptions
from irl_align.data.cards import load_card
from irl_align.data.encoding import encode_prompts
from irl_align.data.loading import load_demonstrations
from irl_align.models.generation.offline import saved_sampler
from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.loading import load_tokenizer
from irl_align.tasks import e2e
from irl_align.training.run_folder import Run

SEED = 0


def edited_prompts(prompts: list[str], edits: int, known: set[str]) -> list[str]:
    """Every distinct prompt after this many edits, without the known prompts."""
    edited = []
    for prompt in sorted(set(prompts)):
        rng = random.Random(f"{SEED}/{prompt}")
        for _ in range(edits):
            prompt = e2e.edit(prompt, rng)
        edited.append(prompt)
    return [prompt for prompt in dict.fromkeys(edited) if prompt not in known]


def main(folder: Path, edits: int, split: str) -> None:
    """Print a line per policy of the run."""
    view = Run.load(folder)
    data = view.recipe["data"]
    card = load_card(data["card"])
    rows = {
        part: [str(row["prompt"]) for row in load_demonstrations(card, part, data["path"])]
        for part in ("train", "validation", "test")
    }
    known = {prompt for part in rows.values() for prompt in part}
    prompts = edited_prompts(rows[split], edits, known)
    together = {venues(prompt) for prompt in rows["train"]}
    options = GenerationOptions(max_new_tokens=view.recipe["generation"]["max_new_tokens"])
    sampling = Sampling(temperature=0.0, max_new_tokens=options.max_new_tokens)
    for role, where in view.stages.items():
        if role != "sft" and not role.startswith("policy-"):
            continue
        path = folder / where["path"] / "model"
        tokenizer = load_tokenizer(path)
        ids = encode_prompts(prompts, tokenizer, card)
        with saved_sampler(
            path, tokenizer, ids, options, "transformers", torch.device("cpu")
        ) as generator:
            completions = [row[0] for row in generate(generator, ids, sampling)]
        texts = [str(tokenizer.decode(c.token_ids, skip_special_tokens=True)) for c in completions]
        length = sum(len(c.token_ids) for c in completions) / len(completions)
        asked, wrong = count_errors(zip(prompts, texts, strict=True), together)
        near = ", ".join(f"{kind} {share(asked, wrong, kind)}" for kind in (SEEN, UNSEEN))
        counts = f"{summary(asked, wrong)}; {near}; length {length:.1f}"
        print(f"{folder.name}, {role}: {counts}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--edits", type=int, default=2)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    arguments = parser.parse_args()
    for run in arguments.runs:
        main(run, arguments.edits, arguments.split)
