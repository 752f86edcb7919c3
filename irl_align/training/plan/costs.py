"""What each kind of work in a run costs: operations, tokens, memory and disk.

Legend of shapes: R rows, L columns of a row, P prompt tokens, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
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

TRL_TOKENS = 4096  # TRL's losses hold the logits of so many tokens at once
SAVED = 2  # number of checkpoints that a training keeps for resuming
PER_TOKEN = 12  # bytes on disk of a sampled token: id, log-prob and text

NOTHING = Use({}, 0.0)


@dataclass(frozen=True)
class Cost:
    """Cost of a stage: rows and tokens that it reads and samples, work, memory and disk."""

    rows: int = 0
    tokens: float = 0.0
    """Tokens that models read in all passes, without padding."""
    sampled: float = 0.0
    work: tuple[Work, ...] = ()
    use: Use = NOTHING
    disk: float = 0.0
    """Bytes that remain in the store."""
    scratch: float = 0.0
    """Bytes of checkpoints while the stage runs."""


def disk_of(costs: Sequence[Cost]) -> float:
    """Bytes that stages leave, plus the largest checkpoints of one of them."""
    scratch = max((cost.scratch for cost in costs), default=0.0)
    return sum(cost.disk for cost in costs) + scratch


class Costs:
    """Costs of a recipe's work, for a model of this shape and data of these counts."""

    def __init__(self, recipe: Recipe, shape: Shape, counts: Counts, on_cpu: bool) -> None:
        self.recipe, self.shape, self.counts, self.on_cpu = recipe, shape, counts, on_cpu
        self.stored = Precision(*(2 * [HALF if recipe.model.dtype == "bfloat16" else FLOAT]))
        self.prompt, self.answer = counts.prompt, counts.completion
        limit = recipe.generation.max_new_tokens
        self.sample_mean = min(self.answer.mean, limit)
        self.sample_longest = limit
        model, reward = recipe.model, recipe.reward
        self.adapter = model.lora and adapter_size(model, model.lora)
        """Parameters of a policy's adapter; None if all weights are trained."""
        self.reward_adapter = reward.lora and adapter_size(model, reward.lora)

    def model_bytes(self) -> int:
        """Bytes of a policy's weights. Below an adapter the matrices may have 4 bits."""
        if self.recipe.model.quantization is not None:
            matrices = self.shape.matrices // 2
            return matrices + (self.shape.parameters - self.shape.matrices) * self.stored.weights
        return self.shape.parameters * self.stored.weights

    def reward_bytes(self) -> int:
        """Bytes of a reward model's weights: a trunk and one row of a head, in float32; or the
        models of a log-ratio."""
        options = self.recipe.reward
        if options.kind == "implicit":
            references = {"none": 0, "mixture": 2}.get(options.reference, 1)
            return (1 + references) * self.model_bytes()
        return FLOAT * (self.shape.trunk + self.shape.width)

    def reward_models(self) -> int:
        """Models that score a text: those of an ensemble; none for functions only."""
        ensemble, kind = self.recipe.reward.ensemble, self.recipe.reward.kind
        if kind == "functions":
            return 0
        return ensemble.members if ensemble and ensemble.kind == "models" else 1

    def _forward(self, rows: float, length: float, head: float | None = None) -> float:
        tokens = rows * length
        asked = None if head is None else rows * head
        return forward_flops(self.shape, tokens, length / 2, asked)

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

    def sample(self, prompts: int, n: int, resident: Mapping[str, float] | None = None) -> Cost:
        """n samples of each prompt. resident: models in memory, in bytes; by default the policy."""
        length, new = self.prompt.mean, self.sample_mean
        rows = self._batch_rows()
        steps = prompts * n * new / rows  # each reads all weights, and the batch's cache
        cached = key_values(self.shape, int(rows * (length + new / 2)), self.stored.weights)
        flops = self._forward(prompts, length, 0) + self._forward(prompts * n, new)
        moved = steps * (self.model_bytes() + cached)
        parts = {**(resident or {"weights": self.model_bytes()}), **self._sampling_parts(rows)}
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
        # While a batch is refilled, the cache of one layer exists twice, and prefilled prompts have
        # caches too.
        refill = cache / self.shape.layers
        prefilled = key_values(self.shape, rows * self.prompt.longest, self.stored.weights)
        return {
            "key-values": cache + refill + prefilled,
            "logits": float(logits_of(self.shape, rows)),
        }

    def score(
        self, rows: int, length: float, models: Mapping[str, float], head: float = 0.0
    ) -> Cost:
        """One pass of each model over rows. head: tokens of a row whose log-probs are computed."""
        work = Work(len(models) * self._forward(rows, length, head), 0.0, self.stored)
        use = Use(dict(models), sum(models.values()))
        return Cost(rows=rows, tokens=len(models) * rows * length, work=(work,), use=use)

    def measure(self, rows: int) -> Cost:
        """Log-probs of samples or demonstrations."""
        length = self.prompt.mean + self.sample_mean
        return self.score(rows, length, {"weights": self.model_bytes()}, length)

    def sft(self, rows: float, config: str, args: Mapping[str, Any], full: bool = False) -> Cost:
        """TRL's SFTTrainer, or with pairs (DPOConfig) its DPOTrainer. rows: of each side.

        full: train all weights, even if the recipe has adapters.
        """
        trainer, sides = trl_args(config, args), 2 if config == "DPOConfig" else 1
        mean = self.prompt.mean + (self.answer.mean if sides == 1 else self._pair_mean())
        batch_rows = sides * int(trainer.per_device_train_batch_size)
        batches = _Batches(rows, sides * mean, batch_rows, self._columns(sides))
        logits = logits_of(self.shape, min(batches.tokens, TRL_TOKENS))
        loss = logits + FLOAT * self.shape.vocabulary * self.shape.width
        trained = (None if full else self.adapter) or self.shape.parameters
        return self._trained(trainer, batches, loss, trained, self.model_bytes())

    def reward_fit(self, pairs: float, args: Mapping[str, Any]) -> Cost:
        """The explicit reward on pairs. Both sides of a prompt share a row where they can."""
        trainer = trl_args("RewardConfig", args)
        rows = int(trainer.per_device_train_batch_size)
        sides = self.answer.longest + max(self.answer.longest, self.sample_longest)
        columns = self.prompt.longest + sides
        mean = self.prompt.mean + 2 * self._pair_mean()
        if self.shape.family not in PACKABLE or columns > row_limit(self.prompt.longest):
            rows, columns = 2 * rows, self._columns(2)
            mean = 2 * (self.prompt.mean + self._pair_mean())
        trained = self.reward_adapter or self.shape.trunk + self.shape.width
        batches = _Batches(pairs, mean, rows, columns)
        return self._trained(trainer, batches, 0.0, trained, self.reward_bytes())

    def _pair_mean(self) -> float:
        return (self.answer.mean + self.sample_mean) / 2

    def _columns(self, sides: int) -> int:
        longest = self.answer.longest
        if sides == 2:
            longest = max(longest, self.sample_longest)
        return self.prompt.longest + longest

    def _trained(
        self, trainer: SimpleNamespace, batches: _Batches, loss: float, trained: int, weights: int
    ) -> Cost:
        """A training by one of TRL's trainers. loss: bytes; weights: bytes of the whole model.

        With adapters the activations are those of training all weights, which is an upper bound.
        """
        shape = self.shape
        asked = trainer.bf16 if trainer.bf16 is not None else not self.on_cpu
        half = in_bf16(asked, self.on_cpu)
        precision = Precision(self.stored.weights, HALF if half else self.stored.weights)
        accumulation = int(trainer.gradient_accumulation_steps)
        passes = batches.rows * float(trainer.num_train_epochs)
        if trainer.max_steps > 0:
            steps = trainer.per_device_train_batch_size * accumulation
            passes = float(trainer.max_steps * steps)
        again = bool(trainer.gradient_checkpointing)
        flops = (4 if again else 3) * self._forward(passes, batches.mean, None if loss else 0)
        state = float(optimiser_state(trained, str(trainer.optim)))
        adapted = trained < shape.trunk
        use = training(
            trained,
            weights + FLOAT * trained if adapted else weights,
            state,
            kept=activations(
                shape, batches.batch_rows, batches.columns, precision, masked=True,
                checkpointing=again,
            ),
            loss=loss,
            copies=weight_copies(shape, precision),
            later=float(accumulation > 1),
        )  # fmt: skip
        saved = FLOAT * trained if adapted else weights
        return Cost(
            rows=round(batches.rows),
            tokens=passes * batches.mean,
            work=(Work(flops, 0.0, precision),),
            use=use,
            disk=float(saved),
            scratch=SAVED * (saved + state),
        )

    def ppo(self, options: PPOOptions) -> Cost:
        """Rollouts and updates. The peak is the larger of the two."""
        shape = self.shape
        critic = options.advantage == "gae" and options.critic == "separate"
        trained = shape.parameters + (shape.trunk if critic else 0)
        weights = FLOAT * trained
        # The reference computes in float32, as the policy does, unless its weights are quantised.
        reference = FLOAT * shape.parameters
        if self.recipe.model.quantization is not None:
            reference = self.model_bytes()
        reward = float(self.reward_bytes() * self.reward_models())
        resident = {"reference": float(reference), "reward": reward}
        if self.adapter:
            shared = options.backbone == "shared"
            trained = self.adapter * (1 + critic)
            weights = self.model_bytes() * (1 if shared else 1 + critic) + FLOAT * trained
            adapter = float(FLOAT * self.adapter)
            resident = {"reference": adapter, "reward": adapter} if shared else resident
        state = float(optimiser_state(trained, "adamw"))
        use = self._ppo_update(
            options, critic=critic, trained=trained, weights=weights, state=state, resident=resident
        )
        held = {"weights": float(weights), "optimiser": state, **resident}
        rollout = self.sample(1, 1, held).use
        length = self.prompt.mean + self.sample_mean
        episodes = float(options.updates * options.batch_size)
        drawn = self.sample(round(episodes / options.n), options.n)
        read = self._forward(episodes, length, self.sample_mean)
        trunks = 1 + critic
        # Reward, reference and critic read the rollout once. An epoch is forward and backward.
        scorers = 1 + self.reward_models() + critic
        scored = Work(scorers * read, 0.0, self._products(options))
        again = 4 if options.gradient_checkpointing else 3
        updates = Work(again * options.epochs * trunks * read, 0.0, self._products(options))
        return Cost(
            rows=round(episodes),
            tokens=episodes * length * (scorers + options.epochs * trunks),
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
        *,
        critic: bool,
        trained: int,
        weights: int,
        state: float,
        resident: dict[str, float],
    ) -> Use:
        shape, precision = self.shape, self._products(options)
        columns = self.prompt.longest + self.sample_longest
        minibatch = options.batch_size // options.minibatches
        rows = max(1, min(options.max_batch_tokens // columns, minibatch))
        # Adapters of one backbone take turns, with a forward and backward pass for each.
        turns = bool(self.adapter) and options.backbone == "shared"
        trunks = 1 if turns else 1 + critic
        completion_tokens = rows * self.sample_longest  # the loss reads their logits in pieces
        piece = min(completion_tokens, max(1, LOGITS_AT_ONCE // shape.vocabulary))
        return training(
            trained,
            weights,
            state,
            kept=activations(
                shape,
                rows,
                columns,
                precision,
                masked=options.n > 1,
                checkpointing=options.gradient_checkpointing,
                trunks=trunks,
            ),
            loss=logits_of(shape, piece),
            copies=weight_copies(shape, precision) * trunks,
            later=min(rows, minibatch - rows) / rows,
            resident=resident,
        )


@dataclass(frozen=True)
class _Batches:
    """Data of a training."""

    rows: float
    """Rows (or pairs) of one epoch."""
    mean: float
    """Mean tokens of a row."""
    batch_rows: int
    """R of one forward pass."""
    columns: int
    """L of one forward pass."""

    @property
    def tokens(self) -> int:
        return self.batch_rows * self.columns


def trl_args(config: str, args: Mapping[str, Any]) -> SimpleNamespace:
    """Fields of a TRL config: a recipe's, or else the defaults that irl-align uses."""
    defaults = {field.name: field.default for field in dataclasses.fields(getattr(trl, config))}
    return SimpleNamespace(**{**defaults, "gradient_checkpointing": False, **args})
