"""Samples on disk: written in parts that survive a kill, and read back."""

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from irl_align.errors import UserError
from irl_align.models.generation import samples
from irl_align.models.generation.protocol import Completion, Sampling
from irl_align.models.generation.samples import (
    SampleSet,
    StoredSamples,
    write_chosen,
    write_samples,
)
from irl_align.policy.best_of_n import best_columns
from irl_align.reward import ranking
from irl_align.reward.ranking import rank_samples, sample_rewards

PROMPTS = [[10, i] for i in range(7)]


class Echo:
    """A generator whose samples repeat their prompt and index; it can fail at one prompt."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.asked: list[int] = []

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        for place, prompt in reversed(list(enumerate(prompts))):
            if prompt[1] == self.fails_at:
                raise KeyboardInterrupt
            self.asked.append(prompt[1])
            yield place, [completion(prompt[1], n) for n in range(sampling.n)]


def completion(prompt: int, n: int) -> Completion:
    ids = [prompt, n, *range(n)]
    values = np.linspace(-1, -prompt - 1 / 3, len(ids), dtype=np.float32)
    return Completion(ids, values, n == 1, stop=7 if n == 2 else None)


@pytest.fixture(autouse=True)
def three_prompts_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "PROMPTS_PER_PART", 3)


def check(got: StoredSamples, prompts: list[list[int]], n: int) -> None:
    assert got.prompts == prompts
    for prompt, group in zip(prompts, got.completions, strict=True):
        assert len(group) == n
        for index, one in enumerate(group):
            expected = completion(prompt[1], index)
            assert (one.token_ids, one.truncated) == (expected.token_ids, expected.truncated)
            assert one.stop == expected.stop
            assert one.logprobs.dtype == np.float32
            assert one.logprobs.tobytes() == expected.logprobs.tobytes()


def test_stored_samples_are_what_write_samples_wrote(tmp_path: Path) -> None:
    generator = Echo()
    write_samples(tmp_path, generator, PROMPTS, Sampling(n=3))
    assert sorted(generator.asked) == list(range(7))
    check(StoredSamples(tmp_path, PROMPTS), PROMPTS, 3)


def test_flat_repeats_each_prompt_for_its_samples(tmp_path: Path) -> None:
    write_samples(tmp_path, Echo(), PROMPTS[:2], Sampling(n=2))
    prompts, completions = StoredSamples(tmp_path, PROMPTS[:2]).flat()
    assert prompts == [[10, 0], [10, 0], [10, 1], [10, 1]]
    assert [c.token_ids for c in completions] == [[0, 0], [0, 1, 0], [1, 0], [1, 1, 0]]


def test_write_samples_keeps_finished_parts_after_a_kill(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path, Echo(fails_at=4), PROMPTS, Sampling(n=2))
    assert not (tmp_path / "samples.parquet").exists()
    # A kill in the middle of a write leaves a file of another name.
    (tmp_path / "scratch" / "parts" / "000000003.writing").write_bytes(b"half")
    again = Echo()
    write_samples(tmp_path, again, PROMPTS, Sampling(n=2))
    assert sorted(again.asked) == [3, 4, 5, 6]  # the first part's 0 to 2 are there
    check(StoredSamples(tmp_path, PROMPTS), PROMPTS, 2)
    whole = tmp_path / "whole"
    write_samples(whole, Echo(), PROMPTS, Sampling(n=2))
    kept, fresh = ((folder / "samples.parquet").read_bytes() for folder in (tmp_path, whole))
    assert kept == fresh


def test_stored_samples_are_what_write_chosen_wrote(tmp_path: Path) -> None:
    write_chosen(tmp_path, [[completion(prompt[1], 1)] for prompt in PROMPTS])
    got = StoredSamples(tmp_path, PROMPTS)
    assert [group[0].token_ids for group in got.completions] == [[i, 1, 0] for i in range(7)]
    assert all(group[0].truncated for group in got.completions)


def test_write_samples_of_no_prompts(tmp_path: Path) -> None:
    write_samples(tmp_path, Echo(), [], Sampling(n=2))
    assert StoredSamples(tmp_path, []).completions == []


def test_stored_samples_refuse_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"samples\.parquet: not a complete samples file"):
        StoredSamples(tmp_path, PROMPTS)
    write_samples(tmp_path, Echo(), PROMPTS, Sampling(n=2))
    path = tmp_path / "samples.parquet"
    whole = path.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], whole[:-4] + b"XXXX"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"samples\.parquet: not a complete samples file"):
            StoredSamples(tmp_path, PROMPTS)


def test_stored_samples_refuse_other_prompts(tmp_path: Path) -> None:
    write_samples(tmp_path, Echo(), PROMPTS, Sampling(n=2))
    with pytest.raises(UserError, match=r"samples of 7 prompts, expected 5"):
        StoredSamples(tmp_path, PROMPTS[:5])


class Noise:
    """A generator of long random samples; their reward is their first token."""

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        rng = np.random.default_rng(0)
        for place in rng.permutation(len(prompts)).tolist():
            tokens = rng.integers(2, 1000, size=(sampling.n, 100))
            logprobs = np.full((sampling.n, 100), -1.0, np.float32)
            yield (
                place,
                [
                    Completion(row.tolist(), values.copy(), False)
                    for row, values in zip(tokens, logprobs, strict=True)
                ],
            )

    def score_ids(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        return torch.tensor([float(ids[0]) for ids in completions])


def test_best_of_many_samples_needs_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling, storing, scoring and choosing hold a small part of all samples at a time."""
    for module in (samples, ranking):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 64)
    prompts = [[i] for i in range(30)]
    tracemalloc.start()
    write_samples(tmp_path, Noise(), prompts, Sampling(n=128))
    stored = StoredSamples(tmp_path, prompts)
    rewards = sample_rewards(stored, Noise())
    scores = rank_samples(stored, rewards, "reward")
    best = best_columns(stored, scores, keep=1)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    whole = SampleSet(prompts, StoredSamples(tmp_path, prompts).completions)
    everything = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert most < 0.3 * everything

    firsts = np.array([[c.token_ids[0] for c in group] for group in whole.completions])
    assert (rewards.reshape(30, 128) == firsts).all()
    for prompt, group, row, ids in zip(
        prompts, whole.completions, firsts, best["input_ids"], strict=True
    ):
        assert ids == [*prompt, *group[int(row.argmax())].token_ids]
