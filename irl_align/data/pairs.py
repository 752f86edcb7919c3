"""Pairs (x, preferred) over (x, rejected) that need no preference label.

Demonstrations are preferred to samples, and samples of one model to those of another. Pairs depend
on the content and the seed, not on the order of rows or of dicts.
"""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from irl_align.config.reward import PairSource
from irl_align.data.columns import column
from irl_align.errors import UserError
from irl_align.utils.files import atomic_write

_IDS = List(Value("int32"))
FEATURES = Features(
    {
        "prompt_ids": _IDS,
        "chosen_ids": _IDS,
        "rejected_prompt_ids": _IDS,  # equal to prompt_ids except in contrast pairs
        "rejected_ids": _IDS,
        "source": Value("string"),
        "iteration": Value("int32"),
        "sample_index": Value("int32"),  # number of the sample or contrast prompt of its prompt
        "rejected_truncated": Value("bool"),
        "generator": Value("string"),  # key of the stage that sampled; empty for contrast
        "temperature": Value("float32"),  # null for contrast
        "rejected_logp": Value("float64"),  # under its generator; null if that is not known
        "prompt_key": Value("string"),
    }
)
"""Columns of a set of pairs."""


class Sample(Protocol):
    """What pairs read of a generated completion."""

    @property
    def token_ids(self) -> list[int]:
        """T ids."""

    @property
    def truncated(self) -> bool:
        """Whether it lacks the end of text."""

    @property
    def logprobs(self) -> np.ndarray:
        """(T,) log-probs under the distribution that was sampled from."""

    @property
    def stop(self) -> int | None:
        """The stop id that was sampled, if the end of text stands in its place."""


class Sampled(Protocol):
    """What pairs read of the sampling settings."""

    @property
    def temperature(self) -> float:
        """Sampling temperature."""

    @property
    def plain(self) -> bool:
        """Whether samples come from the model's own distribution."""


class Pairs(NamedTuple):
    """Pairs with FEATURES as columns, and the count of dropped ones by reason."""

    rows: Dataset
    dropped: dict[str, int]


class NoPairs(UserError):
    """A source gives no pair."""


PairRow = dict[str, Any]
Truncated = Literal["drop", "keep"]


def policy_pairs(
    demonstrations: Iterable[Mapping[str, Any]],
    samples: Mapping[str, Sequence[Sample]],
    *,
    iteration: int,
    generator: str,
    sampling: Sampled,
    truncated: Truncated = "drop",
    max_tokens: int | None = None,
    demonstrations_per_prompt: int | None = None,
    seed: int = 0,
    source: PairSource = "demonstration/policy",
) -> Pairs:
    """Demonstrations over samples of the same prompt.

    demonstrations: rows of encode_demonstrations. samples: prompt key -> its samples; a prompt
    without samples makes no pair. A prompt with D demonstrations and N samples makes max(D, N)
    pairs, which use every demonstration and every sample as evenly as possible. Truncated samples
    are first dropped, or kept without an end. max_tokens: the samples' limit; longer demonstrations
    are dropped, since a reward that sees long texts on one side only learns to count tokens. Pairs
    of equal ids are dropped. Raises NoPairs when no pair is left, and UserError when demonstrations
    and finished samples end in different ids.
    """
    rows: list[PairRow] = []
    dropped = Counter({"identical": 0, "truncated": 0, "overlong": 0})
    for key, group in by_prompt(demonstrations).items():
        rng = random.Random(f"{seed}/{source}/{iteration}/{key}")
        rng.shuffle(group)
        chosen = [list(row["completion_ids"]) for row in group]
        fitting = [ids for ids in chosen if max_tokens is None or len(ids) <= max_tokens]
        dropped["overlong"] += len(chosen) - len(fitting)
        chosen = fitting[:demonstrations_per_prompt]
        rejected = _usable(samples.get(key, ()), truncated, dropped)
        rows += _matched(key, list(group[0]["prompt_ids"]), chosen, rejected, rng, dropped)
    return finish_pairs(rows, dropped, source, iteration, generator, sampling)


def sample_pairs(
    prompts: Mapping[str, Sequence[int]],
    chosen: Mapping[str, Sequence[Sample]],
    rejected: Mapping[str, Sequence[Sample]],
    *,
    iteration: int,
    generator: str,
    sampling: Sampled,
    truncated: Truncated = "drop",
    seed: int = 0,
    source: PairSource = "sft/init",
) -> Pairs:
    """Samples of one model over samples of another, which `generator` and `sampling` describe.

    prompts: prompt key -> prompt ids. Truncated samples are never preferred. The rest is as in
    policy_pairs.
    """
    rows: list[PairRow] = []
    dropped = Counter({"identical": 0, "truncated": 0})
    for key in sorted(prompts):
        rng = random.Random(f"{seed}/{source}/{iteration}/{key}")
        better = [list(s.token_ids) for _, s in _usable(chosen.get(key, ()), "drop", dropped)]
        rng.shuffle(better)
        worse = _usable(rejected.get(key, ()), truncated, dropped)
        rows += _matched(key, list(prompts[key]), better, worse, rng, dropped)
    return finish_pairs(rows, dropped, source, iteration, generator, sampling)


def window(by_iteration: Sequence[Dataset], name: str) -> Dataset:
    """Pairs of the iterations that "latest", "last-k" or "all" names, oldest first."""
    if name == "all":
        last = len(by_iteration)
    else:
        last = 1 if name == "latest" else int(name.removeprefix("last-"))
    return concatenate_datasets(list(by_iteration[-last:]))


def in_shares(parts: Sequence[Dataset], shares: Sequence[float], seed: int) -> list[Dataset]:
    """As many rows of each part as possible in proportion to the shares, chosen by the seed."""
    unit = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    return [
        part.shuffle(seed=seed).select(range(round(unit * share)))
        for part, share in zip(parts, shares, strict=True)
    ]


def stats(pairs: Dataset, dropped: Mapping[str, int]) -> dict[str, float]:
    """Numbers of pairs, in all and by source, and of dropped ones; mean lengths in tokens."""
    numbers: dict[str, float] = {"pairs": len(pairs)}
    for source, count in sorted(Counter(column(pairs, "source")).items()):
        numbers[f"pairs/{source}"] = count
    for reason, count in sorted(dropped.items()):
        numbers[f"dropped/{reason}"] = count
    for side in ("chosen", "rejected"):
        numbers[f"mean_{side}_tokens"] = float(
            np.mean([len(ids) for ids in column(pairs, f"{side}_ids")])
        )
    numbers["rejected_truncated"] = sum(column(pairs, "rejected_truncated"))
    return numbers


def save_pairs(pairs: Dataset, path: str | Path) -> None:
    """Write pairs to a parquet file, completely or not at all."""
    import pyarrow.parquet

    table = pairs.with_format("arrow")[:]
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    atomic_write(Path(path), content.getvalue())


def load_pairs(path: str | Path) -> Dataset:
    """Read pairs that save_pairs wrote. Raises UserError: the file is missing or damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        return Dataset(table.select(list(FEATURES)).cast(FEATURES.arrow_schema))
    except FileNotFoundError as error:
        raise UserError(f"{path}: found no file, expected pairs in parquet") from error
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a complete parquet file of pairs: {cause}") from error


def by_prompt(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by prompt key; keys and rows are in the order of their content."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows.to_list() if isinstance(rows, Dataset) else rows:
        groups.setdefault(row["prompt_key"], []).append(row)
    return {
        key: sorted(groups[key], key=lambda row: list(row["completion_ids"]))
        for key in sorted(groups)
    }


def _usable(
    samples: Sequence[Sample], truncated: Truncated, dropped: Counter[str]
) -> list[tuple[int, Sample]]:
    """The samples that make pairs, each with its index."""
    usable = [
        (index, sample)
        for index, sample in enumerate(samples)
        if truncated == "keep" or not sample.truncated
    ]
    dropped["truncated"] += len(samples) - len(usable)
    return usable


def _matched(
    key: str,
    prompt_ids: list[int],
    chosen: list[list[int]],
    rejected: list[tuple[int, Sample]],
    rng: random.Random,
    dropped: Counter[str],
) -> list[PairRow]:
    """max(D, N) pairs that use the D chosen and N rejected as evenly as possible."""
    if not chosen or not rejected:
        return []
    rng.shuffle(rejected)
    rows = []
    for j in range(max(len(chosen), len(rejected))):
        better = chosen[j % len(chosen)]
        index, sample = rejected[j % len(rejected)]
        if better == list(sample.token_ids):
            dropped["identical"] += 1
            continue
        rows.append(pair_row(key, prompt_ids, better, prompt_ids, list(sample.token_ids), index))
        rows[-1]["rejected_truncated"] = bool(sample.truncated)
        if sample.stop is None:  # else the log-prob is not that of the pair's ids
            rows[-1]["rejected_logp"] = float(sample.logprobs.sum(dtype=np.float64))
    return rows


def pair_row(
    key: str,
    prompt_ids: list[int],
    chosen_ids: list[int],
    rejected_prompt_ids: list[int],
    rejected_ids: list[int],
    index: int,
) -> PairRow:
    """One pair; `index` is that of the sample or contrast prompt."""
    return {
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_prompt_ids": rejected_prompt_ids,
        "rejected_ids": rejected_ids,
        "sample_index": index,
        "rejected_truncated": False,
        "rejected_logp": None,
        "prompt_key": key,
    }


def finish_pairs(
    rows: list[PairRow],
    dropped: Counter[str],
    source: PairSource,
    iteration: int,
    generator: str,
    sampling: Sampled | None,
) -> Pairs:
    """Pairs with the columns that all rows share.

    Raises NoPairs where there is no row, and UserError where finished texts do not end in the same
    id.
    """
    if not rows:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        raise NoPairs(f"pairs.sources: {source} gives no pair (left out: {why})")
    preferred = {row["chosen_ids"][-1] for row in rows}
    finished = {row["rejected_ids"][-1] for row in rows if not row["rejected_truncated"]}
    if len(preferred | finished) > 1:
        raise UserError(
            f"pairs.sources: {source}: preferred texts end in the token ids {sorted(preferred)}, "
            f"finished rejected ones in {sorted(finished)}; expected one id, or the reward would "
            "only read it: make eos_token of the model's tokenizer the end of its answers"
        )
    constant = {
        "source": source,
        "iteration": iteration,
        "generator": generator,
        "temperature": None if sampling is None else sampling.temperature,
    }
    if sampling is not None and not sampling.plain:  # log-probs of another distribution
        constant["rejected_logp"] = None
    columns = {
        name: [constant[name]] * len(rows) if name in constant else [row[name] for row in rows]
        for name in FEATURES
    }
    return Pairs(Dataset.from_dict(columns, features=FEATURES), dict(dropped))
