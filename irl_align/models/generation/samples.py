"""Samples of a policy on disk: written in parts that survive a kill, and read back.

A part is a fixed range of prompts, so that batches and samples are bit-identical after a resume.
Groups of samples are written as they are drawn and read one after another, so that memory does not
grow with N, the samples per prompt, of which Best-of-N keeps few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Generator, Sampling, stream
from irl_align.utils import distributed
from irl_align.utils.files import is_sealed, seal

PROMPTS_PER_PART = 1024
ROWS_AT_ONCE = 4096  # samples in memory, written and read
_SCHEMA = pa.schema(
    {
        "prompt": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "truncated": pa.bool_(),
        "stop": pa.int32(),  # Completion.stop
    }
)


Group = tuple[int, list[Completion]]
"""A prompt's index and its N completions."""


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

    def groups(self) -> Iterator[Group]:
        """Every prompt's index with its completions."""
        yield from enumerate(self.completions)


class StoredSamples:
    """The samples in a folder; only :meth:`groups` does not read all of them at once.

    Raises:
        UserError: the file is damaged, or of another number of prompts.
    """

    def __init__(self, folder: Path, prompts: Sequence[Sequence[int]]) -> None:
        self.path = folder / "samples.parquet"
        self.prompts = [list(prompt) for prompt in prompts]
        with self._damage_reported():
            rows = pq.read_table(self.path, columns=["prompt"]).column("prompt").to_numpy()
        stored = int(rows.max()) + 1 if len(rows) else 0
        if stored != len(prompts):
            raise UserError(f"{self.path}: samples of {stored} prompts, expected {len(prompts)}")

    def groups(self) -> Iterator[Group]:
        """Every prompt's index with its completions, in the order in which they were sampled."""
        with self._damage_reported(), pq.ParquetFile(self.path) as file:
            index, group = -1, list[Completion]()
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=_SCHEMA.names):
                columns = (batch.column(name).to_pylist() for name in _SCHEMA.names)
                for prompt, ids, logprobs, truncated, stop in zip(*columns, strict=True):
                    if prompt != index and group:
                        yield index, group
                        group = []
                    index = prompt
                    values = np.asarray(logprobs, dtype=np.float32)
                    group.append(Completion(ids, values, truncated, stop))
            if group:
                yield index, group

    @cached_property
    def completions(self) -> list[list[Completion]]:
        """All completions, by prompt."""
        by_prompt = dict(self.groups())
        return [by_prompt[index] for index in range(len(self.prompts))]

    def flat(self) -> tuple[list[list[int]], list[Completion]]:
        """As :meth:`SampleSet.flat`."""
        return SampleSet(self.prompts, self.completions).flat()

    @contextmanager
    def _damage_reported(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path}: not a complete samples file: {error}") from error


Samples = SampleSet | StoredSamples


def write_samples(
    work: Path, generator: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> int:
    """Sample every prompt into work/samples.parquet; parts from before a kill are not drawn again.

    Each of several processes samples its share of every part's prompts. Returns the number of
    sampled tokens.
    """
    parts = work / "scratch" / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(prompts), PROMPTS_PER_PART):
        chosen = prompts[start : start + PROMPTS_PER_PART]
        for rank, share in enumerate(
            distributed.shares([len(p) for p in chosen], distributed.count())
        ):
            of = f".{rank}-of-{distributed.count()}" if distributed.count() > 1 else ""
            path = parts / f"{start:09d}{of}.parquet"
            paths.append(path)
            if rank != distributed.rank() or is_sealed(path):
                continue
            mine = [chosen[i] for i in share]
            groups = stream(generator, mine, sampling, progress=distributed.is_main())
            _write(path, ((start + share[index], group) for index, group in groups))
            seal(path)
    distributed.barrier()
    return distributed.on_main(lambda: _join(paths, work / "samples.parquet"))


def _join(paths: Sequence[Path], whole: Path) -> int:
    """Join parts into one file, in their order; returns the number of their tokens."""
    tokens = 0
    with pq.ParquetWriter(whole, _SCHEMA) as writer:
        for path in paths:
            with pq.ParquetFile(path) as part:
                for batch in part.iter_batches(ROWS_AT_ONCE):
                    writer.write_batch(batch)
                    tokens += len(batch.column("token_ids").flatten())
    return tokens


def write_chosen(work: Path, completions: Sequence[Sequence[Completion]]) -> None:
    """Write completions that were chosen from other samples to work/samples.parquet."""
    _write(work / "samples.parquet", enumerate(completions))


def _write(path: Path, groups: Iterable[tuple[int, Sequence[Completion]]]) -> None:
    """Write groups of samples to a temporary file as they come, and rename it at the end."""
    temporary = path.with_suffix(".writing")
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(temporary, _SCHEMA) as writer:
        for prompt, group in groups:
            for completion in group:
                rows.append(
                    {
                        "prompt": prompt,
                        "token_ids": completion.token_ids,
                        "logprobs": completion.logprobs,
                        "truncated": completion.truncated,
                        "stop": completion.stop,
                    }
                )
                if len(rows) == ROWS_AT_ONCE:
                    writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
                    rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    temporary.rename(path)
