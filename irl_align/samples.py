"""Samples of a policy as an artefact: written in parts that survive a kill, read back as columns.

A part is a fixed run of prompts, so the batches, and with them every bit, are the same after a
resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from irl_align.errors import UserError
from irl_align.generate import Completion, Generator, Sampling, generate

PROMPTS_PER_PART = 1024
_SCHEMA = pa.schema(
    {
        "prompt": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "truncated": pa.bool_(),
    }
)


@dataclass(frozen=True)
class SampleSet:
    """Samples of M prompts, N each: completions[i][j] answers prompts[i] (token ids)."""

    prompts: list[list[int]]
    completions: list[list[Completion]]

    def flat(self) -> tuple[list[list[int]], list[Completion]]:
        """Prompt ids and completion of every sample, M * N rows."""
        rows = [
            (p, c) for p, group in zip(self.prompts, self.completions, strict=True) for c in group
        ]
        return [p for p, _ in rows], [c for _, c in rows]


def write_samples(
    work: Path, generator: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> None:
    """Sample every prompt into work/samples.parquet, going on after the parts that are there."""
    parts = work / "scratch" / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(prompts), PROMPTS_PER_PART):
        path = parts / f"{start:09d}.parquet"
        paths.append(path)
        if path.exists():
            continue
        chosen = prompts[start : start + PROMPTS_PER_PART]
        completions = generate(generator, chosen, sampling, progress=True)
        _write(path, enumerate(completions, start))
    with pq.ParquetWriter(work / "samples.parquet", _SCHEMA) as writer:
        for path in paths:
            writer.write_table(pq.read_table(path, schema=_SCHEMA))


def write_chosen(work: Path, completions: Sequence[Sequence[Completion]]) -> None:
    """Write completions that were picked from other samples to work/samples.parquet."""
    _write(work / "samples.parquet", enumerate(completions))


def read_samples(folder: Path, prompts: Sequence[Sequence[int]]) -> SampleSet:
    """Read what :func:`write_samples` wrote for the same prompts; UserError if it is damaged."""
    path = folder / "samples.parquet"
    try:
        table = pq.read_table(path, schema=_SCHEMA)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: not a whole samples file: {error}") from error
    rows = table.column("prompt").to_numpy()
    found = int(rows.max()) + 1 if len(rows) else 0
    if found != len(prompts):
        raise UserError(f"{path}: samples of {found} prompts, expected {len(prompts)}")
    completions: list[list[Completion]] = [[] for _ in prompts]
    columns = (table.column(name).to_pylist() for name in _SCHEMA.names)
    for prompt, ids, logprobs, truncated in zip(*columns, strict=True):
        completions[prompt].append(
            Completion(ids, np.asarray(logprobs, dtype=np.float32), truncated)
        )
    return SampleSet([list(p) for p in prompts], completions)


def _write(path: Path, groups: Iterable[tuple[int, Sequence[Completion]]]) -> None:
    """Write groups of samples aside and rename them in."""
    rows = [
        {
            "prompt": prompt,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "truncated": completion.truncated,
        }
        for prompt, group in groups
        for completion in group
    ]
    aside = path.with_suffix(".writing")
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), aside)
    aside.rename(path)
