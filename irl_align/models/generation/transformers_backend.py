"""Sampling with a transformers model in this process.

Rows, one per sample, decode together in one batch over one key-value cache. Every row writes its
next token into the same cache column, so rows are padded on the left, and a row that joins later
starts at a later column. When a quarter of the rows are done, the live rows and newly prefilled
prompts are copied, right-aligned, into a new cache. So nearly every step is a full batch, no step
concatenates the cache, and nothing is padded to the longest completion.

Dimensions: B rows in a batch, N samples per prompt, P prompt tokens, T completion tokens,
V vocabulary, C cache columns.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from irl_align.errors import UserError
from irl_align.models.attention import grouped_attention
from irl_align.models.generation.column_cache import ColumnLayer, clone_rows, gather_cache
from irl_align.models.generation.decoding_rows import DecodingRows
from irl_align.models.generation.protocol import (
    Completion,
    Sampling,
    check_prompts,
    sample_uniforms,
)
from irl_align.models.generation.sampler import sample_tokens
from irl_align.models.loading import evaluating
from irl_align.models.packing import context_length

HEADROOM = 16  # cache columns (decoding steps) between two rebuilds of the cache, at most
MOST_ROWS = 128  # default of the most rows in a batch
DONE_FRACTION = 0.25  # share of finished rows at which the batch is compacted and refilled


class TransformersGenerator:
    """Samples from a causal language model of transformers, on the device of the model.

    Samples are a function of the weights, the prompt's ids, ``Sampling`` and rounding. Except for
    rounding, the other prompts and the limits below change nothing (see ``sample_uniforms``).

    Args:
        model: the policy. It is in eval mode while it samples; its training flags are restored.
        eos_token_ids: any of these ends a completion. The first is the end of text, which replaces
            the others (see ``completed``).
        pad_token_id: fills the left of shorter prompts; masked out.
        max_batch_tokens: most cache positions of a batch, rows times columns. Prompts that are
            prefilled, and one layer's copy while the batch is refilled, need memory besides these.
        max_batch_rows: most rows of a batch; bounds the memory of rows times vocabulary.

    Raises:
        UserError: the model's cache has layers without attention, such as Mamba's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_batch_tokens: int = 32_768,
        max_batch_rows: int = MOST_ROWS,
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        self.model = model
        self.eos = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_rows = max_batch_rows
        self.context_length = context_length(model)
        self.vocab_size: int = config.vocab_size
        layers = DynamicCache(config=model.config).layers
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            names = sorted({type(layer).__name__ for layer in layers})
            raise UserError(
                f"model {config.model_type}: its cache has {', '.join(names)}, "
                "expected attention layers only; sample from it with vLLM"
            )
        self._layer_count = len(layers)
        core = getattr(model, "get_base_model", lambda: model)()  # a PEFT wrapper hides it
        accepted = inspect.signature(core.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (prompt index, its N completions by sample index), in order of completion.

        Raises:
            UserError: a prompt is empty, has ids outside the vocabulary, leaves no room in the
                context or does not fit ``max_batch_tokens``; or the model's logits are not finite.
        """
        run = _Decoding(self, self._checked(prompts, sampling), sampling)
        while run.unfinished:
            # These modes must be off while the consumer handles the results.
            with torch.inference_mode(), evaluating(self.model), grouped_attention():
                ready = run.advance()
            yield from ready

    def columns(self, prompt_length: int, sampling: Sampling) -> int:
        """Most cache columns that a sample of a prompt of P tokens may need."""
        longest = prompt_length + sampling.max_new_tokens
        return min(longest, self.context_length or longest) + HEADROOM

    def _checked(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[np.ndarray]:
        arrays = check_prompts(prompts, self.vocab_size, self.context_length)
        for index, ids in enumerate(arrays):
            if (columns := self.columns(len(ids), sampling)) > self.max_batch_tokens:
                raise UserError(
                    f"max_batch_tokens: found {self.max_batch_tokens}, expected at least {columns} "
                    f"for one sample of prompt {index} ({len(ids)} tokens)"
                )
        return arrays

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """Logits (B, V) float32 after the last of ids (B, S), with mask (B, C), positions (B, S).

        The cache, of C - S filled columns, grows by S.
        """
        logits: torch.Tensor = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
        ).logits
        return logits[:, -1].float()

    def new_cache(self) -> Cache:
        """An empty cache for this model."""
        return Cache(layers=[ColumnLayer() for _ in range(self._layer_count)])


@dataclass
class _Prefilled:
    """Prompts that the model has processed, and whose samples have not all started."""

    cache: Cache
    logits: torch.Tensor  # (k, V) float32, after the last prompt token
    prompts: list[int]  # (k,) indices
    started: int = 0  # of the k * N samples, prompt by prompt


class _Decoding:
    """State of one call of ``stream``: the waiting prompts, the prefilled ones and the batch."""

    def __init__(
        self, generator: TransformersGenerator, prompts: list[np.ndarray], sampling: Sampling
    ) -> None:
        self.generator = generator
        self.prompts = prompts
        self.sampling = sampling
        self.device = generator.model.device
        # Longest first: adjacent prompts need the least padding, and the last batch ends fast.
        self.queue = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
        self.prefilled: _Prefilled | None = None
        self.rows: DecodingRows | None = None
        self.cache = generator.new_cache()
        self.partial: dict[int, dict[int, Completion]] = {}
        self.ready: list[tuple[int, list[Completion]]] = []
        self.unfinished = len(prompts)

    def advance(self) -> list[tuple[int, list[Completion]]]:
        """Refill the batch and decode until the next refill; returns the prompts that are done."""
        filled, room = self._refill()
        if self.rows is not None:
            self._decode(self.rows, filled, room)
        ready, self.ready = self.ready, []
        self.unfinished -= len(ready)
        return ready

    def _refill(self) -> tuple[int, int]:
        """Gather live rows and new ones that fit; returns the cache's filled and free columns."""
        parts: list[tuple[Cache, torch.Tensor]] = []
        kept: list[DecodingRows] = []
        if self.rows is not None:
            self._keep_live(self.rows, np.arange(len(self.rows)), self.cache, parts, kept)
        # Samples that end with their first token never join: yield them before starting more.
        while not self.ready and (free := self._free(kept)) > 0:
            prefilled = self.prefilled or self._prefill(-(-free // self.sampling.n))
            rows, source = self._start(prefilled, free)
            self._keep_live(rows, source, prefilled.cache, parts, kept)
        self.rows = DecodingRows.concatenate(kept) if kept else None
        if self.rows is None:
            return 0, 0
        filled = int(self.rows.cached.max())
        room = min(HEADROOM, int((self.rows.limit - self.rows.count).max()))
        self.cache = gather_cache(parts, filled, room)
        return filled, room

    def _keep_live(
        self,
        rows: DecodingRows,
        source: np.ndarray,
        cache: Cache,
        parts: list[tuple[Cache, torch.Tensor]],
        kept: list[DecodingRows],
    ) -> None:
        """Add the live ones of ``rows``; ``source`` are the numbers of their rows in ``cache``."""
        live = np.flatnonzero(rows.live)
        if len(live):
            parts.append((cache, self._to_device(source[live])))
            kept.append(rows.take(live))

    def _free(self, kept: list[DecodingRows]) -> int:
        """How many more rows fit; 0 when no sample is left to start."""
        if self.prefilled is not None:
            longest = len(self.prompts[self.prefilled.prompts[0]])
        elif self.queue:
            longest = len(self.prompts[self.queue[0]])
        else:
            return 0
        longest = max([longest, *(int(rows.prompt_length.max()) for rows in kept)])
        generator = self.generator
        fitting = generator.max_batch_tokens // generator.columns(longest, self.sampling)
        return min(fitting, generator.max_batch_rows) - sum(len(rows) for rows in kept)

    def _prefill(self, count: int) -> _Prefilled:
        """Run the next prompts, at most ``count``, through the model."""
        indices = [self.queue.popleft() for _ in range(min(count, len(self.queue)))]
        width = max(len(self.prompts[index]) for index in indices)
        ids = np.full((len(indices), width), self.generator.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, index in enumerate(indices):
            ids[row, width - len(self.prompts[index]) :] = self.prompts[index]
            mask[row, width - len(self.prompts[index]) :] = 1
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        cache = self.generator.new_cache()
        logits = self.generator.forward(
            self._to_device(ids), self._to_device(mask), self._to_device(positions), cache
        )
        return _Prefilled(cache, logits, indices)

    def _start(self, prefilled: _Prefilled, free: int) -> tuple[DecodingRows, np.ndarray]:
        """Draw the first token of the next ``free`` samples.

        Returns their rows, and the number of each one's prompt among the prefilled. All samples of
        a prompt start from its one prefill; ``self.prefilled`` keeps the rest.
        """
        n = self.sampling.n
        total = len(prefilled.prompts) * n
        flat = np.arange(prefilled.started, min(prefilled.started + free, total))
        source, sample = flat // n, flat % n
        rows = self._new_rows(np.asarray(prefilled.prompts)[source], sample)
        uniforms = self._to_device(rows.uniforms[:, :1])
        logits = prefilled.logits[self._to_device(source)]
        self._record(rows, *sample_tokens(logits, uniforms, self.sampling))
        prefilled.started = int(flat[-1]) + 1
        if prefilled.started < total:
            first = prefilled.started // n
            self.prefilled = _Prefilled(
                clone_rows(prefilled.cache, first),
                prefilled.logits[first:].clone(),
                prefilled.prompts[first:],
                prefilled.started - first * n,
            )
        else:
            self.prefilled = None
        return rows, source

    def _new_rows(self, prompt: np.ndarray, sample: np.ndarray) -> DecodingRows:
        longest, seed = self.sampling.max_new_tokens, self.sampling.seed
        lengths = np.array([len(self.prompts[index]) for index in prompt])
        limit = np.full(len(prompt), longest)
        if self.generator.context_length is not None:
            limit = np.minimum(limit, self.generator.context_length - lengths)
        shape = (len(prompt), longest)
        uniforms = np.zeros(shape)
        if not self.sampling.greedy:
            for row, (index, which) in enumerate(zip(prompt, sample, strict=True)):
                uniforms[row] = sample_uniforms(seed, self.prompts[index], int(which), longest)
        return DecodingRows(
            prompt=prompt,
            sample=sample,
            prompt_length=lengths,
            limit=limit,
            count=np.zeros(len(prompt), dtype=np.int64),
            live=np.ones(len(prompt), dtype=bool),
            uniforms=uniforms,
            tokens=np.zeros(shape, dtype=np.int64),
            logprobs=np.zeros(shape, dtype=np.float32),
        )

    def _decode(self, rows: DecodingRows, filled: int, room: int) -> None:
        """Take up to ``room`` steps; stop early once enough rows are done."""
        first = np.minimum(rows.count[:, None] + np.arange(room), rows.uniforms.shape[1] - 1)
        uniforms = self._to_device(np.take_along_axis(rows.uniforms, first, axis=1))
        start = self._to_device(filled - rows.cached)
        mask = (torch.arange(filled + room, device=self.device) >= start[:, None]).long()
        positions = self._to_device(rows.cached[:, None])
        tokens = self._to_device(rows.tokens[np.arange(len(rows)), rows.count - 1])
        for step in range(room):
            logits = self.generator.forward(
                tokens[:, None], mask[:, : filled + step + 1], positions, self.cache
            )
            tokens, logprobs = sample_tokens(logits, uniforms[:, step : step + 1], self.sampling)
            self._record(rows, tokens, logprobs)
            if len(rows) - rows.live.sum() >= DONE_FRACTION * len(rows):
                return
            positions = positions + 1
            if self.generator.context_length is not None:
                # Done rows still decode, unread, until the next refill: keep them in context.
                positions = positions.clamp_(max=self.generator.context_length - 1)

    def _record(self, rows: DecodingRows, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Append one sampled token (B,) to each live row, and collect the complete prompts."""
        eos = self.generator.eos
        for row in rows.append(tokens.cpu().numpy(), logprobs.cpu().numpy(), eos):
            index = int(rows.prompt[row])
            samples = self.partial.setdefault(index, {})
            samples[int(rows.sample[row])] = rows.completion(row, eos)
            if len(samples) == self.sampling.n:
                del self.partial[index]
                self.ready.append((index, [samples[i] for i in range(self.sampling.n)]))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
