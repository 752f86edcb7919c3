"""The learner: one rollout's update of policy and critic, by micro-batches on accelerate.

Letters beyond the package's legend of shapes: M completion tokens of a micro-batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.lora import has_adapter
from irl_align.models.packing import Ids, can_pack
from irl_align.models.sharding import copy_back
from irl_align.policy.ppo import losses
from irl_align.policy.ppo.distributed import (
    checkpoint_trained_weights,
    is_sharded,
    prepare,
    sum_gradients,
    to_number,
    to_shard,
)
from irl_align.policy.ppo.faults import Diverged, LogProbGap
from irl_align.policy.ppo.micro_batches import MicroBatch, PackedRollout
from irl_align.policy.ppo.network import CRITIC, Entropy, Network, Outputs, token_outputs
from irl_align.utils import distributed

_SUMS = ("policy_loss", "value_loss", "entropy", "update_kl", "clip_fraction", "log_ratio")


@dataclass(frozen=True)
class UpdateBatch:
    """What an update reads of a rollout: its rows, and (B, T) float32 arrays on the CPU."""

    packed: PackedRollout
    old_logps: Tensor
    advantages: Tensor
    reference_logps: Tensor | None = None
    """For a KL in the loss."""
    kl_coef: float = 0.0
    """Weight of the KL in the loss; 0 without one."""
    old_values: Tensor | None = None
    targets: Tensor | None = None
    """Estimated rewards-to-go, which the critic fits."""
    weights: Tensor | None = None
    """Truncated importance weights of the policy loss, and of an exact KL in the loss."""

    def on_device(self, device: torch.device) -> dict[str, Tensor]:
        """The arrays by name, flattened, on a device."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {name: array.flatten().to(device) for name, array in arrays.items()}


class Learner:
    """Holds the network, its optimiser and the accelerator; `update` is PPO's inner loop."""

    def __init__(
        self,
        network: Network,
        options: PPOOptions,
        device: torch.device,
        seed: int,
        pad: int,
        accelerator: Accelerator,
    ) -> None:
        self.options = options
        self.seed, self.pad, self.device = seed, pad, device
        self.accelerator = accelerator
        self.bf16 = accelerator.mixed_precision == "bf16"  # a CPU may use float32 instead
        self.sharded = is_sharded(accelerator)
        self.whole_policy = network.policy
        if self.sharded:
            network = to_shard(network)
        _disable_dropout(network, options.gradient_checkpointing)
        self.rates = [options.learning_rate]
        weights = [network.policy_parameters()]
        if critic := network.critic_parameters():
            self.rates.append(options.critic_learning_rate or options.learning_rate)
            weights.append(critic)
        self.norms = ("grad_norm", "critic_grad_norm")[: len(weights)]
        # eps 1e-5 as in arXiv:2403.17031; one fused kernel instead of several per weight
        optimizer = torch.optim.AdamW(
            [{"params": w, "lr": rate} for w, rate in zip(weights, self.rates, strict=True)],
            eps=1e-5,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.network: Network
        self.network, self.optimizer = prepare(accelerator, network, optimizer)
        if has_adapter(network.policy):
            checkpoint_trained_weights(accelerator)
        self.switch = network.critic.switch if network.critic is not None else None
        # (log-probs, values) of each pass: adapters on one trunk take turns, backward pass included
        together = self.switch is None
        self.passes = ((True, True),) if together else ((True, False), (False, True))
        self.trunks: list[Any] = [network.policy]
        if network.critic is not None and network.critic.trunk is not None:
            self.trunks.append(network.critic.trunk)

    def pack(self, prompts: Ids, completions: Ids) -> PackedRollout:
        """A rollout ready to be cut into micro-batches; a prompt's completions share its tokens."""
        pairs = zip(prompts, completions, strict=True)
        longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
        return PackedRollout(
            prompts,
            completions,
            share=all(can_pack(trunk, longest) for trunk in self.trunks),
            pad=self.pad,
            max_tokens=self.options.max_batch_tokens,
            device=self.device,
            even=self.sharded,
        )

    @torch.no_grad()
    def infer(
        self, packed: PackedRollout, *, logps: bool, values: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Log-probs and values of a rollout's tokens under the present weights: (B, T) each."""
        arrays = [_zeros(packed) if wanted else None for wanted in (logps, values)]
        for batch in packed.whole:
            out: Outputs = self.network(batch, logps=logps, values=values)
            for array, part in zip(arrays, (out.logps, out.values), strict=True):
                _fill(array, batch, part)
        first, second = (None if a is None else _shared(a, packed) for a in arrays)
        return first, second

    @torch.no_grad()
    def logps_of(self, model: PreTrainedModel, packed: PackedRollout) -> Tensor:
        """Log-probs of a rollout's tokens under another model, at the same temperature: (B, T)."""
        array = _zeros(packed)
        for batch in packed.whole:
            with self.accelerator.autocast():
                logps = token_outputs(model, batch, self.options.temperature).logps
            _fill(array, batch, logps)
        return _shared(array, packed)

    def update(self, number: int, batch: UpdateBatch) -> dict[str, float]:
        """Train on one rollout for its epochs; returns means over tokens of the last epoch, norms
        and learning rate.

        Raises Diverged for a loss or a gradient that is not finite, before the step with it, and
        UserError if the first ratios are not 1.
        """
        options = self.options
        arrays = batch.on_device(self.device)
        report = {"learning_rate": self.rates[0] * self._schedule(number)}
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._schedule(number)
        for epoch in range(options.epochs):
            totals, tokens = torch.zeros(len(_SUMS), device=self.device), 0
            for step, minibatch in enumerate(self._minibatches(number, epoch, batch.packed)):
                sums, count, largest = self.accumulate(minibatch, arrays, batch.kl_coef, epoch)
                means = dict(zip(_SUMS, (sums / count).tolist(), strict=True))
                _require_finite_means(number, means)
                if epoch == 0 and step == 0:
                    gap = LogProbGap(means["log_ratio"], max(distributed.gather(float(largest))))
                    self._check_first_ratios(number, gap)
                    report["first_log_ratio"], report["first_log_ratio_max"] = gap
                if options.epoch_kl is not None and means["update_kl"] > options.epoch_kl:
                    self.optimizer.zero_grad()
                    report.update(self._measured(means, epoch))
                    return {**report, "epochs": epoch + step / options.minibatches}
                report.update(self._step(number))
                totals, tokens = totals + sums, tokens + count
            means = dict(zip(_SUMS, (totals / tokens).tolist(), strict=True))
            report.update(self._measured(means, epoch))
        return {**report, "epochs": float(options.epochs)}

    def publish(self) -> None:
        """Copy the trained weights to the policy that is sampled and saved, if that is another."""
        if self.sharded:
            copy_back(self.network.policy, self.whole_policy)

    def accumulate(
        self, minibatch: Sequence[MicroBatch], arrays: dict[str, Tensor], kl_coef: float, epoch: int
    ) -> tuple[Tensor, int, Tensor]:
        """Add up gradients of a minibatch's loss, the mean over its tokens however it is cut.

        arrays: from UpdateBatch.on_device. Returns the sums of _SUMS over the minibatch's tokens,
        the number of tokens, and the largest |log ratio| in this process.
        """
        own_tokens = sum(len(micro.targets) for micro in minibatch if micro.counted)
        count = int(distributed.total(torch.tensor(own_tokens, device=self.device)))
        # FSDP will divide gradients by the number of processes.
        averaged = distributed.count() if self.sharded else 1
        sums = torch.zeros(len(_SUMS), device=self.device)
        largest = torch.zeros((), device=self.device)
        entropy: Entropy = "none"
        if self._has_entropy(epoch):
            entropy = "loss" if self.options.entropy_coef else "monitor"
        for micro in minibatch:
            own = {name: array[micro.token_index] for name, array in arrays.items()}
            for logps, values in self.passes:
                # The block includes the backward pass, since checkpointing repeats the forward.
                with self._active(logps):
                    out = self.network(micro, logps=logps, values=values, entropy=entropy)
                    loss, parts, moved = self._loss(out, own, kl_coef)
                    weight = averaged * micro.counted
                    self.accelerator.backward(loss.sum() / count * weight)
                sums += parts * micro.counted
                largest = torch.maximum(largest, moved * micro.counted)
        if not self.sharded:
            sum_gradients(w for group in self.optimizer.param_groups for w in group["params"])
        return distributed.total(sums), count, largest

    def _active(self, policy: bool) -> contextlib.AbstractContextManager[None]:
        """A block in which the policy, or a critic that is an adapter on its trunk, is active."""
        if policy or self.switch is None:
            return contextlib.nullcontext()
        return self.switch.on(CRITIC)

    def _loss(
        self, out: Outputs, own: dict[str, Tensor], kl_coef: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (M,) of a forward pass, its part of the sums _SUMS, and its largest |log ratio|."""
        options, old = self.options, own["old_logps"]
        loss, sums = torch.zeros_like(old), torch.zeros(len(_SUMS), device=self.device)
        largest = torch.zeros((), device=self.device)
        if out.logps is not None:
            policy = losses.policy_loss(out.logps, old, own["advantages"], options.clip)
            # The samples are the sampler's: whatever is a mean over pi_old has its weights.
            weights = own.get("weights", 1.0)
            policy = weights * policy
            loss = loss + policy
            if kl_coef and options.kl == "grpo":
                loss = loss + kl_coef * losses.k3(out.logps, own["reference_logps"])
            elif kl_coef:
                kl = losses.exact_kl(out.logps, old, own["reference_logps"])
                loss = loss + kl_coef * weights * kl
            if options.entropy_coef and out.entropy is not None:
                loss = loss - options.entropy_coef * out.entropy
            with torch.no_grad():
                logps = out.logps.detach()
                entropy = policy.new_zeros(1) if out.entropy is None else out.entropy
                clipped = losses.clipped_share(logps, old, options.clip) * len(logps)
                kl = losses.k3(old, logps).sum()  # KL(pi_old || pi), on samples of pi_old
                moved = (logps - old).abs()
                largest, zero = moved.max(), torch.zeros_like(kl)
                sums += torch.stack([policy.sum(), zero, entropy.sum(), kl, clipped, moved.sum()])
        if out.values is not None:
            value = losses.value_loss(
                out.values, own["old_values"], own["targets"], options.value_clip
            )
            loss = loss + options.vf_coef * value
            sums[_SUMS.index("value_loss")] += value.detach().sum()
        return loss, sums, largest

    def _step(self, number: int) -> dict[str, float]:
        """Clip and apply the gradients of policy and critic; returns their norms before that."""
        report = {}
        limit = self.options.max_grad_norm
        for name, group in zip(self.norms, self.optimizer.param_groups, strict=True):
            norm = to_number(self.accelerator.clip_grad_norm_(group["params"], limit))
            if not math.isfinite(norm):
                raise Diverged(f"update {number + 1}: the {name} is {norm}; lower learning_rate")
            report[name] = norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        return report

    def _check_first_ratios(self, number: int, gap: LogProbGap) -> None:
        """Raise UserError unless every ratio is 1 before the first step, up to rounding."""
        if difference := gap.beyond_rounding(self.bf16):
            raise UserError(
                f"PPO: update {number + 1}: before its first step the policy's log-probs differ "
                f"from those it sampled with {difference}: the model is not the same function in "
                "sampling and in training"
            )

    def _minibatches(
        self, number: int, epoch: int, packed: PackedRollout
    ) -> Iterator[Sequence[MicroBatch]]:
        """The minibatches of an epoch; their order depends on seed, update and epoch only."""
        if self.options.minibatches == 1:
            yield packed.whole
            return
        count = len(packed.completions)
        order = np.random.default_rng([self.seed, number, epoch]).permutation(count)
        for numbers in np.array_split(order, self.options.minibatches):
            yield packed.batches(sorted(numbers.tolist()))

    def _has_entropy(self, epoch: int) -> bool:
        """Whether an epoch computes entropies: the first, as a monitor, or all, for the loss."""
        return epoch == 0 or self.options.entropy_coef > 0.0

    def _measured(self, means: dict[str, float], epoch: int) -> dict[str, float]:
        """The means that this epoch has measured."""
        measured = {
            "entropy": self._has_entropy(epoch),
            "value_loss": self.options.advantage == "gae",
        }
        return {name: value for name, value in means.items() if measured.get(name, True)}

    def _schedule(self, number: int) -> float:
        """Factor of the learning rates in an update, counted from 0."""
        return 1.0 - number / self.options.updates if self.options.lr_schedule == "linear" else 1.0


def _zeros(packed: PackedRollout) -> Tensor:
    """Zeros for each token of a rollout, flattened: (B * T,) on the CPU."""
    return torch.zeros(packed.shape).flatten()


def _fill(array: Tensor | None, batch: MicroBatch, values: Tensor | None) -> None:
    """Write a micro-batch's values (M,) into an array (B * T,), if both exist."""
    if array is not None and values is not None and batch.counted:
        array[batch.token_index.cpu()] = values.float().cpu()


def _shared(array: Tensor, packed: PackedRollout) -> Tensor:
    """The arrays (B * T,) of all processes, each of which filled a part, as one (B, T)."""
    return distributed.total(array).view(packed.shape)


def _require_finite_means(number: int, means: dict[str, float]) -> None:
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(
            f"update {number + 1}: {bad[0]} is {means[bad[0]]}; lower learning_rate or "
            "max_grad_norm"
        )


def _disable_dropout(network: nn.Module, checkpointing: bool) -> None:
    """Remove dropout, and set eval mode; only checkpointing needs training mode."""
    network.eval()
    for module in network.modules():
        if checkpointing and isinstance(module, PreTrainedModel):
            module.gradient_checkpointing_enable({"use_reentrant": False})
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "dropout" in name:
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    network.train(checkpointing)
