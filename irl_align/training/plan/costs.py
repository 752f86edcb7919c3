"""What each kind of step of a run costs: operations, tokens, memory and disk.

Legend of shapes: R rows, L columns of a row, P prompt tokens, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import trl

from irl_align.config.policy_update import PPOOptions
from irl_align.config.schema import Recipe
from irl_align.models.generation.transformers_backend import HEADROOM, MOST_ROWS
from irl_align.models.lm_head import LOGITS_AT_ONCE
from irl_align.models.packing import PACKABLE, row_limit
from irl_align.training.plan.data import Counts
from irl_align.training.plan.devices import Work
from irl_align.training.plan.memory import (
    FLOAT,
    HALF,
    Precision,
    Shape,
    Use,
    activations,
    forward_flops,
    key_values,
    logits_of,
    optimiser_state,
    training,
    weight_copies,
)
from irl_align.training.plan.model_shapes import adapter_size
from irl_align.utils.hardware import in_bf16

TRL_TOKENS = 4096  # whose logits TRL's losses hold at once
SAVED = 2  # checkpoints that a training keeps for resuming
PER_TOKEN = 12  # bytes on disk of a sampled token: id, log-prob, and its text elsewhere

NOTHING = Use({}, 0.0)


@dataclass(frozen=True)
class Cost:
    """A stage: rows and tokens that it reads and samples, its work, memory and disk."""

    rows: int = 0
    tokens: float = 0.0
    """Read by a model, padding aside, in all passes."""
    sampled: float = 0.0
    work: tuple[Work, ...] = ()
    use: Use = NOTHING
    disk: float = 0.0
    """Bytes that stay in the store."""
    scratch: float = 0.0
    """Bytes of checkpoints while it runs."""


class Costs:
    """Costs of a recipe's steps, for a model of this shape and data of these counts."""

    def __init__(self, recipe: Recipe, shape: Shape, counts: Counts, on_cpu: bool) -> None:
        self.recipe, self.shape, self.counts, self.on_cpu = recipe, shape, counts, on_cpu
        self.stored = Precision(*(2 * [HALF if recipe.model.dtype == "bfloat16" else FLOAT]))
        self.prompt, self.answer = counts.prompt, counts.completion
        limit = recipe.generation.max_new_tokens
        self.sample_mean = min(self.answer.mean, limit)
        self.sample_longest = limit
        model, reward = recipe.model, recipe.reward
        self.adapter = model.lora and adapter_size(model, model.lora)
        """Parameters that a policy's training trains, where it is an adapter."""
        self.reward_adapter = reward.lora and adapter_size(model, reward.lora)

    # ---- what several steps share

    def model_bytes(self) -> int:
        """Of a policy's weights; below an adapter the matrices may have 4 bits."""
        if self.recipe.model.quantization is not None:
            matrices = self.shape.matrices // 2
            return matrices + (self.shape.parameters - self.shape.matrices) * self.stored.weights
        return self.shape.parameters * self.stored.weights

    def reward_bytes(self) -> int:
        """Of a reward's weights: a trunk and one row of a head, in float32."""
        return FLOAT * (self.shape.trunk + self.shape.width)

    def _forward(self, rows: float, length: float, head: float | None = None) -> float:
        tokens = rows * length
        asked = None if head is None else rows * head
        return forward_flops(self.shape, tokens, length / 2, asked)

    # ---- steps

    def start(self) -> Cost:
        """The model before SFT, copied or made."""
        return Cost(disk=self.model_bytes(), use=Use({"weights": self.model_bytes()}, 0.0))

    def encode(self) -> Cost:
        """Demonstrations as token ids."""
        rows = sum(self.counts.rows[part] for part in ("sft", "held_out", "evaluation"))
        if self.recipe.data.reward_data == "disjoint":
            rows += self.counts.rows["reward"]
        tokens = rows * (self.prompt.mean + self.answer.mean)
        return Cost(rows=rows, tokens=tokens, disk=tokens * PER_TOKEN)

    def sample(self, prompts: int, n: int, beside: Mapping[str, float] | None = None) -> Cost:
        """n samples of each prompt; beside: what else is in memory."""
        length, new = self.prompt.mean, self.sample_mean
        rows = self._batch_rows()
        steps = prompts * n * new / rows  # each reads all weights, and the batch's cache
        cached = key_values(self.shape, int(rows * (length + new / 2)), self.stored.weights)
        flops = self._forward(prompts, length, 0) + self._forward(prompts * n, new)
        moved = steps * (self.model_bytes() + cached)
        parts = {**(beside or {"weights": self.model_bytes()}), **self._sampling_parts(rows)}
        return Cost(
            rows=prompts * n,
            tokens=prompts * length,
            sampled=prompts * n * new,
            work=(Work(flops, moved, self.stored),),
            use=Use(parts, sum(parts.values())),
            disk=prompts * n * new * PER_TOKEN,
        )

    def _batch_rows(self) -> int:
        columns = self.prompt.longest + self.sample_longest + HEADROOM
        return max(1, min(MOST_ROWS, self.recipe.generation.max_batch_tokens // columns))

    def _sampling_parts(self, rows: int) -> dict[str, float]:
        columns = rows * (self.prompt.longest + self.sample_longest + HEADROOM)
        cache = key_values(self.shape, columns, self.stored.weights)
        # While a batch is refilled, one layer is there twice; prompts prefilled have caches too.
        refill = cache / self.shape.layers
        prefilled = key_values(self.shape, rows * self.prompt.longest, self.stored.weights)
        return {
            "key-values": cache + refill + prefilled,
            "logits": float(logits_of(self.shape, rows)),
        }

    def score(
        self, rows: int, length: float, models: Mapping[str, float], head: float = 0.0
    ) -> Cost:
        """One pass of each model over rows; head: tokens of a row whose log-prob is asked for."""
        work = Work(len(models) * self._forward(rows, length, head), 0.0, self.stored)
        use = Use(dict(models), sum(models.values()))
        return Cost(rows=rows, tokens=len(models) * rows * length, work=(work,), use=use)

    def measure(self, prompts: int, samples: int) -> Cost:
        """Log-probs of samples and demonstrations."""
        length = self.prompt.mean + self.sample_mean
        return self.score(samples + prompts, length, {"weights": self.model_bytes()}, length)

    def sft(self, rows: float, config: str, args: Mapping[str, Any], full: bool = False) -> Cost:
        """TRL's SFTTrainer, and with pairs (DPOConfig) its DPOTrainer: rows of each side.

        full: all weights are trained, also where the recipe has adapters.
        """
        sides = 2 if config == "DPOConfig" else 1
        batch, columns = self._batch(config, args), self._columns(sides)
        mean = self.prompt.mean + (self.answer.mean if sides == 1 else self._pair_mean())
        tokens = batch * sides * columns
        whole = min(tokens, TRL_TOKENS)
        loss = logits_of(self.shape, whole) + FLOAT * self.shape.vocabulary * self.shape.width
        trained = (None if full else self.adapter) or self.shape.parameters
        work = (rows, sides * mean, sides * batch, columns)
        return self._trained(config, args, work, loss, trained, self.model_bytes())

    def reward_fit(self, pairs: float, args: Mapping[str, Any]) -> Cost:
        """The explicit reward on pairs; both sides of a prompt share a row where they can."""
        batch = self._batch("RewardConfig", args)
        both = self.answer.longest + max(self.answer.longest, self.sample_longest)
        columns = self.prompt.longest + both
        rows, mean = batch, self.prompt.mean + 2 * self._pair_mean()
        if self.shape.family not in PACKABLE or columns > row_limit(self.prompt.longest):
            rows, columns = 2 * batch, self._columns(2)
            mean = 2 * (self.prompt.mean + self._pair_mean())
        whole = self.shape.trunk + self.shape.width
        trained, work = self.reward_adapter or whole, (pairs, mean, rows, columns)
        return self._trained("RewardConfig", args, work, 0.0, trained, self.reward_bytes())

    def _pair_mean(self) -> float:
        return (self.answer.mean + self.sample_mean) / 2

    def _columns(self, sides: int) -> int:
        longest = self.answer.longest
        if sides == 2:
            longest = max(longest, self.sample_longest)
        return self.prompt.longest + longest

    def _trained(
        self,
        config: str,
        args: Mapping[str, Any],
        size: tuple[float, float, int, int],
        loss: float,
        trained: int,
        weights: int,
    ) -> Cost:
        """A training by one of TRL's trainers. size: rows, their mean tokens, and R and L.

        With adapters the activations are those of training all weights: an upper bound.
        """
        rows, mean, batch_rows, columns = size
        shape, option = self.shape, _Args(config, args)
        asked = option.bf16 if option.bf16 is not None else not self.on_cpu
        half = in_bf16(asked, self.on_cpu)
        precision = Precision(self.stored.weights, HALF if half else self.stored.weights)
        steps = option.per_device_train_batch_size * option.gradient_accumulation_steps
        passes = rows * float(option.num_train_epochs)
        if option.max_steps > 0:
            passes = float(option.max_steps * steps)
        again = bool(option.gradient_checkpointing)
        flops = (4 if again else 3) * self._forward(passes, mean, None if loss else 0)
        state = float(optimiser_state(trained, str(option.optim)))
        adapted = trained < shape.trunk
        held = weights + FLOAT * trained if adapted else weights
        use = training(
            trained,
            held,
            state,
            activations(shape, batch_rows, columns, precision, True, again),
            loss,
            weight_copies(shape, precision),
            later=float(int(option.gradient_accumulation_steps) > 1),
        )
        saved = FLOAT * trained if adapted else weights
        return Cost(
            rows=round(rows),
            tokens=passes * mean,
            work=(Work(flops, 0.0, precision),),
            use=use,
            disk=float(saved),
            scratch=SAVED * (saved + state),
        )

    def _batch(self, config: str, args: Mapping[str, Any]) -> int:
        return int(_Args(config, args).per_device_train_batch_size)

    def ppo(self, options: PPOOptions) -> Cost:
        """Rollouts and updates; the fuller of the two moments is the peak."""
        shape = self.shape
        critic = options.advantage == "gae" and options.critic == "separate"
        trained = shape.parameters + (shape.trunk if critic else 0)
        weights = FLOAT * trained
        # The reference computes in float32, as the policy does, unless its weights are quantised.
        reference = FLOAT * shape.parameters
        if self.recipe.model.quantization is not None:
            reference = self.model_bytes()
        beside = {"reference": float(reference), "reward": float(self.reward_bytes())}
        if self.adapter:
            shared = options.backbone == "shared"
            trained = self.adapter * (1 + critic)
            weights = self.model_bytes() * (1 if shared else 1 + critic) + FLOAT * trained
            adapter = float(FLOAT * self.adapter)
            beside = {"reference": adapter, "reward": adapter} if shared else beside
        state = float(optimiser_state(trained, "adamw"))
        use = self._ppo_update(options, critic, trained, weights, state, beside)
        held = {"weights": float(weights), "optimiser": state, **beside}
        rollout = self.sample(1, 1, held).use
        length = self.prompt.mean + self.sample_mean
        episodes = float(options.updates * options.batch_size)
        drawn = self.sample(round(episodes / options.n), options.n)
        read = self._forward(episodes, length, self.sample_mean)
        trunks = 1 + critic
        # Reward and reference once, and the critic's values; then each epoch forward and backward.
        scored = Work((2 + critic) * read, 0.0, self._products(options))
        again = 4 if options.gradient_checkpointing else 3
        updates = Work(again * options.epochs * trunks * read, 0.0, self._products(options))
        return Cost(
            rows=round(episodes),
            tokens=episodes * length * (2 + critic + options.epochs * trunks),
            sampled=episodes * self.sample_mean,
            work=(*drawn.work, scored, updates),
            use=Use({**rollout.parts, **use.parts}, max(use.peak, rollout.peak)),
            disk=float(self.model_bytes()),
            scratch=SAVED * (weights + state) + self.model_bytes(),
        )

    def _products(self, options: PPOOptions) -> Precision:
        return Precision(FLOAT, HALF if in_bf16(options.bf16, self.on_cpu) else FLOAT)

    def _ppo_update(
        self,
        options: PPOOptions,
        critic: bool,
        trained: int,
        weights: int,
        state: float,
        beside: dict[str, float],
    ) -> Use:
        shape, precision = self.shape, self._products(options)
        columns = self.prompt.longest + self.sample_longest
        minibatch = options.batch_size // options.minibatches
        rows = max(1, min(options.max_batch_tokens // columns, minibatch))
        # Adapters of one backbone take turns: a pass forward and backward for each.
        turns = bool(self.adapter) and options.backbone == "shared"
        trunks = 1 if turns else 1 + critic
        kept = activations(
            shape, rows, columns, precision, options.n > 1, options.gradient_checkpointing, trunks
        )
        asked = rows * self.sample_longest  # completion tokens, by pieces of the logits
        loss = logits_of(shape, min(asked, max(1, LOGITS_AT_ONCE // shape.vocabulary)))
        return training(
            trained,
            weights,
            state,
            kept,
            loss,
            weight_copies(shape, precision) * trunks,
            later=min(rows, minibatch - rows) / rows,
            beside=beside,
        )


class _Args:
    """Fields of a TRL config that a recipe gives, or their defaults as irl-align has them."""

    def __init__(self, config: str, args: Mapping[str, Any]) -> None:
        fields = dataclasses.fields(getattr(trl, config))
        self.values = {field.name: field.default for field in fields}
        self.values |= {"gradient_checkpointing": False, **args}

    def __getattr__(self, name: str) -> Any:
        return self.values[name]
