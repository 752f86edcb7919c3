"""The learner: one rollout's update of policy and critic, by micro-batches on accelerate.

Legend of shapes: B samples, R rows, T completion tokens, M tokens of a micro-batch.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PreTrainedModel

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.lora import has_adapter, load_trained, save_trained
from irl_align.models.packing import can_pack, row_lengths, share_prompts
from irl_align.models.sharding import copy_back
from irl_align.policy.ppo import losses
from irl_align.policy.ppo.distributed import (
    is_sharded,
    prepare,
    sum_gradients,
    to_shard,
    whole_number,
)
from irl_align.policy.ppo.network import (
    CRITIC,
    Entropy,
    MicroBatch,
    Network,
    Outputs,
    micro_batch,
    tokens_of,
)
from irl_align.policy.ppo.rollout import RolloutBatch
from irl_align.utils import distributed

_PADDING = 0.03  # most padding of a micro-batch, as a share of its slots
_FEW = 512  # slots below which another row is cheaper than another forward pass
_SUMS = ("policy_loss", "value_loss", "entropy", "update_kl", "clip_fraction", "log_ratio")
_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"


class Diverged(Exception):
    """Training cannot go on; the message is one line for the user."""


class LogProbGap(NamedTuple):
    """|log pi - log pi'| over the tokens of a rollout or a minibatch, in nats."""

    mean: float
    largest: float

    def beyond_rounding(self, bf16: bool) -> str | None:
        """By how much two that are one function differ, where it is more than rounding."""
        limit = _SAME[bf16]
        if self.mean > limit.mean:
            return f"by {self.mean:.2g} per token, expected at most {limit.mean:g}"
        if self.largest > limit.largest:  # a mean over many tokens hides a wrong one
            return f"by {self.largest:.2g} at a token, expected at most {limit.largest:g}"
        return None


# By bf16: there a logit of 16 is rounded to 0.125 already, and rare tokens' are the worst.
_SAME = {False: LogProbGap(1e-3, 5e-2), True: LogProbGap(5e-2, 1.0)}


@dataclass(frozen=True)
class Batch:
    """What an update reads of a rollout: samples, and (B, T) float32 arrays on the CPU."""

    samples: RolloutBatch
    old_logps: Tensor
    advantages: Tensor
    reference_logps: Tensor | None
    """For a KL in the loss."""
    kl_coef: float
    """Of the KL in the loss; 0 without one."""
    old_values: Tensor | None
    targets: Tensor | None
    """The critic's: rewards-to-go, estimated."""
    weights: Tensor | None = None
    """Of the policy loss: truncated importance weights."""


class Micro:
    """A rollout's samples as micro-batches: packed once, and cut anew for every minibatch."""

    def __init__(
        self, samples: RolloutBatch, share: bool, pad: int, device: torch.device, even: bool = False
    ) -> None:
        self.prompts, self.completions = samples.prompts, samples.completions
        self.rows = share_prompts(self.prompts, self.completions, share)
        self.lengths = row_lengths(self.prompts, self.completions, self.rows)
        self.shape = samples.mask.shape
        self.pad, self.device, self.even = pad, device, even

    def batches(self, rows: Sequence[int], max_tokens: int) -> list[MicroBatch]:
        """The rows with these numbers, sorted by length; of several processes this one's share.

        Where they must be as many in each (even), the last ones of some do not count.
        """
        cuts = []
        for share in distributed.shares([self.lengths[r] for r in rows], distributed.count()):
            mine = [rows[i] for i in share]
            lengths = [self.lengths[r] for r in mine]
            cuts.append([[mine[i] for i in cut] for cut in padded_batches(lengths, max_tokens)])
        own = cuts[distributed.rank() % len(cuts)]
        found = [self._packed(cut) for cut in own]
        if idle := max(map(len, cuts)) - len(own) if self.even else 0:
            filler = replace(self._packed(own[-1] if own else cuts[0][0]), counted=False)
            found += [filler] * idle
        return found

    def _packed(self, rows: Sequence[int]) -> MicroBatch:
        shared = [self.rows[row] for row in rows]
        where = (self.pad, self.shape[1], self.device)
        return micro_batch(self.prompts, self.completions, shared, *where)


def padded_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length: at most max_tokens slots, little of it padding.

    A row longer than max_tokens has a batch to itself.
    """
    batch: list[int] = []
    longest = real = 0
    for number in np.argsort(-np.asarray(lengths), kind="stable"):
        length = int(lengths[number])
        slots = (len(batch) + 1) * longest
        wasted = slots - real - length
        if batch and (slots > max_tokens or (slots > _FEW and wasted > _PADDING * slots)):
            yield batch
            batch, real = [], 0
        if not batch:
            longest = length
        batch.append(int(number))
        real += length
    if batch:
        yield batch


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
        self.bf16 = accelerator.mixed_precision == "bf16"  # what is asked may be float32 on a CPU
        self.sharded = is_sharded(accelerator)
        self.whole_policy = network.policy
        if self.sharded:
            network = to_shard(network)
        _quiet(network, options.gradient_checkpointing)
        groups = [{"params": network.policy_parameters(), "lr": options.learning_rate}]
        if critic := network.critic_parameters():
            rate = options.critic_learning_rate or options.learning_rate
            groups.append({"params": critic, "lr": rate})
        self.norms = ("grad_norm", "critic_grad_norm")[: len(groups)]
        self.rates = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
        # eps 1e-5 as in arXiv:2403.17031; one fused kernel instead of several per weight
        optimizer = torch.optim.AdamW(
            groups, eps=1e-5, weight_decay=options.weight_decay, fused=True
        )
        prepared = prepare(accelerator, network, optimizer)
        self.network: Network = prepared[0]
        if has_adapter(network.policy):
            _checkpoint_trained(accelerator)
        self.optimizer = prepared[1]
        self.switch = network.critic.switch if network.critic is not None else None
        # (log-probs, values) of each pass: adapters on one trunk take turns, backward pass included
        alone = self.switch is None
        self.passes = ((True, True),) if alone else ((True, False), (False, True))
        self.trunks: list[Any] = [network.policy]
        if network.critic is not None and network.critic.trunk is not None:
            self.trunks.append(network.critic.trunk)

    def micro(self, samples: RolloutBatch) -> Micro:
        """Samples ready to be cut into micro-batches; a prompt's completions share its tokens."""
        rows = zip(samples.prompts, samples.completions, strict=True)
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        share = all(can_pack(trunk, longest) for trunk in self.trunks)
        return Micro(samples, share, self.pad, self.device, self.sharded)

    def whole(self, micro: Micro) -> list[MicroBatch]:
        """All rows of a rollout."""
        return micro.batches(range(len(micro.rows)), self.options.max_batch_tokens)

    @torch.no_grad()
    def infer(
        self, micro: Micro, batches: Sequence[MicroBatch], logps: bool, values: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Log-probs and values of a rollout's tokens as the weights are now: (B, T) each."""
        out = [torch.zeros(micro.shape).flatten() if asked else None for asked in (logps, values)]
        for batch in batches:
            found: Outputs = self.network(batch, logps=logps, values=values)
            for array, part in zip(out, (found.logps, found.values), strict=True):
                if array is not None and part is not None and batch.counted:
                    array[batch.index.cpu()] = part.float().cpu()
        first, second = (None if a is None else distributed.total(a).view(micro.shape) for a in out)
        return first, second

    @torch.no_grad()
    def logps_of(
        self, model: PreTrainedModel, micro: Micro, batches: Sequence[MicroBatch]
    ) -> Tensor:
        """Log-probs of a rollout's tokens under another model, at the same temperature: (B, T)."""
        out = torch.zeros(micro.shape).flatten()
        for batch in batches:
            with self.accelerator.autocast():
                logps = tokens_of(model, batch, self.options.temperature).logps
            assert logps is not None
            if batch.counted:
                out[batch.index.cpu()] = logps.float().cpu()
        return distributed.total(out).view(micro.shape)

    def update(
        self, number: int, batch: Batch, micro: Micro, whole: Sequence[MicroBatch]
    ) -> dict[str, float]:
        """Train on one rollout for its epochs; returns means over tokens of the last one, and such.

        Raises Diverged for a loss or a gradient that is not finite, before the step with it.
        """
        options = self.options
        arrays = self._on_device(batch)
        report = {"learning_rate": self.rates[0] * self._schedule(number)}
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._schedule(number)
        for epoch in range(options.epochs):
            totals, tokens = torch.zeros(len(_SUMS), device=self.device), 0
            for step, minibatch in enumerate(self._minibatches(number, epoch, micro, whole)):
                sums, count, largest = self._accumulate(minibatch, arrays, batch.kl_coef, epoch)
                means = dict(zip(_SUMS, (sums / count).tolist(), strict=True))
                self._check(number, means)
                if epoch == 0 and step == 0:
                    apart = LogProbGap(means["log_ratio"], max(distributed.gather(float(largest))))
                    self._check_start(number, apart)
                    report["first_log_ratio"], report["first_log_ratio_max"] = apart
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
        """Have the policy that is sampled and saved be the one that is trained, where it is not."""
        if self.sharded:
            copy_back(self.network.policy, self.whole_policy)

    def _accumulate(
        self, minibatch: Sequence[MicroBatch], arrays: dict[str, Tensor], kl_coef: float, epoch: int
    ) -> tuple[Tensor, int, Tensor]:
        """Gradients of a minibatch's loss, the mean over its tokens however it is cut.

        Returns its sums, its tokens, and the largest |log ratio| in this process.
        """
        options = self.options
        own_tokens = sum(len(micro.index) for micro in minibatch if micro.counted)
        count = int(distributed.total(torch.tensor(own_tokens, device=self.device)))
        averaged = (
            distributed.count() if self.sharded else 1
        )  # what gradients are divided by after this
        sums = torch.zeros(len(_SUMS), device=self.device)
        largest = torch.zeros((), device=self.device)
        entropy: Entropy = "none"
        if self._entropy(epoch):
            entropy = "loss" if options.entropy_coef else "monitor"
        for micro in minibatch:
            own = {name: array[micro.index] for name, array in arrays.items()}
            for logps, values in self.passes:
                # Until the backward pass is over: checkpointing computes the forward pass again.
                with self._turn(logps):
                    out = self.network(micro, logps=logps, values=values, entropy=entropy)
                    loss, parts, moved = self._loss(out, own, kl_coef)
                    weight = averaged * micro.counted
                    self.accelerator.backward(loss.sum() / count * weight)
                sums += parts * micro.counted
                largest = torch.maximum(largest, moved * micro.counted)
        if not self.sharded:
            sum_gradients(w for group in self.optimizer.param_groups for w in group["params"])
        return distributed.total(sums), count, largest

    def _turn(self, policy: bool) -> contextlib.AbstractContextManager[None]:
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
            if "weights" in own:
                policy = own["weights"] * policy
            loss = loss + policy
            if kl_coef:
                loss = loss + kl_coef * losses.k3(out.logps, own["reference_logps"])
            if options.entropy_coef and out.entropy is not None:
                loss = loss - options.entropy_coef * out.entropy
            with torch.no_grad():
                logps = out.logps.detach()
                spread = policy.new_zeros(1) if out.entropy is None else out.entropy
                clipped = losses.clipped_share(logps, old, options.clip) * len(logps)
                kl = losses.k3(old, logps).sum()  # KL(pi_old || pi), on samples of pi_old
                moved = (logps - old).abs()
                largest, zero = moved.max(), torch.zeros_like(kl)
                sums += torch.stack([policy.sum(), zero, spread.sum(), kl, clipped, moved.sum()])
        if out.values is not None:
            value = losses.value_loss(
                out.values, own["old_values"], own["targets"], options.value_clip
            )
            loss = loss + options.vf_coef * value
            sums[_SUMS.index("value_loss")] += value.detach().sum()
        return loss, sums, largest

    def _step(self, number: int) -> dict[str, float]:
        """Clip and apply the gradients of policy and critic; their norms before."""
        report = {}
        limit = self.options.max_grad_norm
        for name, group in zip(self.norms, self.optimizer.param_groups, strict=True):
            norm = whole_number(self.accelerator.clip_grad_norm_(group["params"], limit))
            if not math.isfinite(norm):
                raise Diverged(f"update {number + 1}: the {name} is {norm}; lower learning_rate")
            report[name] = norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        return report

    def _check(self, number: int, means: dict[str, float]) -> None:
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(
                f"update {number + 1}: {bad[0]} is {means[bad[0]]}; lower learning_rate or "
                "max_grad_norm"
            )

    def _check_start(self, number: int, apart: LogProbGap) -> None:
        """Ratio 1 at every token before the first step, but for rounding."""
        if told := apart.beyond_rounding(self.bf16):
            raise UserError(
                f"PPO: update {number + 1}: before its first step the policy's log-probs differ "
                f"from those it sampled with {told}: the model is not the same function in "
                "sampling and in training"
            )

    def _minibatches(
        self, number: int, epoch: int, micro: Micro, whole: Sequence[MicroBatch]
    ) -> Iterator[Sequence[MicroBatch]]:
        if self.options.minibatches == 1:
            yield whole
            return
        order = np.random.default_rng([self.seed, number, epoch]).permutation(len(micro.rows))
        for rows in np.array_split(order, min(self.options.minibatches, len(order))):
            yield micro.batches(rows.tolist(), self.options.max_batch_tokens)

    def _entropy(self, epoch: int) -> bool:
        """Whether an epoch computes entropies: the first, as a monitor, or all, for the loss."""
        return epoch == 0 or self.options.entropy_coef > 0.0

    def _measured(self, means: dict[str, float], epoch: int) -> dict[str, float]:
        """Those that an epoch measures."""
        found = {"entropy": self._entropy(epoch), "value_loss": self.options.advantage == "gae"}
        return {name: value for name, value in means.items() if found.get(name, True)}

    def _schedule(self, number: int) -> float:
        """Factor of the learning rates in an update, counted from 0."""
        return 1.0 - number / self.options.updates if self.options.lr_schedule == "linear" else 1.0

    def _on_device(self, batch: Batch) -> dict[str, Tensor]:
        names = ("old_logps", "advantages", "reference_logps", "old_values", "targets", "weights")
        found = {name: getattr(batch, name) for name in names}
        return {n: a.flatten().to(self.device) for n, a in found.items() if a is not None}


def make_accelerator(device: torch.device, bf16: bool, **options: Any) -> Accelerator:
    """An accelerator for this device; the state that a trainer before it left behind is dropped.

    Under a DeepSpeed config PPO holds weights and optimiser whole in every process.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # as transformers' trainers do
    deepspeed = os.environ.pop(_DEEPSPEED, None)
    try:
        return Accelerator(
            cpu=device.type == "cpu", mixed_precision="bf16" if bf16 else "no", **options
        )
    finally:
        if deepspeed is not None:
            os.environ[_DEEPSPEED] = deepspeed


def _checkpoint_trained(accelerator: Accelerator) -> None:
    """Have checkpoints hold the weights that are trained, and not a frozen base."""

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()  # of the whole models, which accelerate would write
        for number, model in enumerate(models if accelerator.is_main_process else ()):
            save_trained(accelerator.unwrap_model(model), Path(folder) / f"trained-{number}")

    def load(models: list[Any], folder: str) -> None:
        for number, model in enumerate(models):
            load_trained(accelerator.unwrap_model(model), Path(folder) / f"trained-{number}")
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _quiet(network: nn.Module, checkpointing: bool) -> None:
    """No dropout. Eval mode, unless checkpointing, which transformers' layers do when training."""
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
