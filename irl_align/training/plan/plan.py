"""What a recipe would do: its stages in order, their memory, time and disk. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from irl_align.config.policy_update import BestOfNOptions, MoreSFTOptions, PPOOptions
from irl_align.config.schema import Recipe
from irl_align.data.cards import load_card
from irl_align.data.loading import load_prompts
from irl_align.policy.roles import Role
from irl_align.training.plan.costs import Cost, Costs
from irl_align.training.plan.data import Counts, count_data
from irl_align.training.plan.devices import GIB, Device
from irl_align.training.plan.dry_run import found_stages
from irl_align.training.plan.memory import Shape
from irl_align.training.plan.model_shapes import shape_of_recipe
from irl_align.training.reward_step import NORMALISED, scheduled

MATCHING = 6
"""Temperatures at which pi_0 is sampled until its entropy is another policy's: 5 or 6 on E2E."""


@dataclass(frozen=True)
class Step:
    """A stage of the run, under the role that the run's stages.json gives it."""

    role: str
    reads: tuple[str, ...]
    """Roles of the stages that it reads."""
    cost: Cost
    found: bool = False
    """Whether the store has it."""


@dataclass(frozen=True)
class Assumptions:
    """What hours follow from."""

    device: Device
    mfu: float
    """Share of the device's peak operations that training and scoring use."""
    mbu: float
    """Share of its memory's bandwidth that sampling uses."""

    def hours(self, cost: Cost) -> float | None:
        """Of a stage; None where the device's speed is not known."""
        each = [work.hours(self.device, self.mfu, self.mbu) for work in cost.work]
        return None if None in each else sum(h for h in each if h is not None)


@dataclass(frozen=True)
class Plan:
    """A recipe's stages and what they need."""

    recipe: Recipe
    shape: Shape
    counts: Counts
    assumptions: Assumptions
    steps: list[Step]
    store: str
    """What of the store was looked at, in words."""

    @property
    def to_do(self) -> list[Step]:
        """Stages that the store does not have."""
        return [step for step in self.steps if not step.found]

    @property
    def peak(self) -> Step | None:
        """The stage to do that needs most memory."""
        return max(self.to_do, key=lambda step: step.cost.use.peak, default=None)

    @property
    def hours(self) -> float | None:
        """Of all stages to do, one after another on one device."""
        each = [self.assumptions.hours(step.cost) for step in self.to_do]
        return None if None in each else sum(h for h in each if h is not None)

    @property
    def disk(self) -> float:
        """Bytes that the stages to do will leave, and the largest checkpoints among them."""
        scratch = max((step.cost.scratch for step in self.to_do), default=0.0)
        return sum(step.cost.disk for step in self.to_do) + scratch

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        device = self.assumptions.device
        peak = self.peak
        return {
            "recipe": self.recipe.name,
            "parameters": self.shape.parameters,
            "data": {"rows": self.counts.rows, "prompts": self.counts.prompts},
            "tokens": {
                "prompt": vars(self.counts.prompt),
                "completion": vars(self.counts.completion),
            },
            "counted": self.counts.how,
            "store": self.store,
            "device": device.name,
            "device_bytes": device.memory * GIB,
            "mfu": self.assumptions.mfu,
            "mbu": self.assumptions.mbu,
            "stages": [self._step_dict(step) for step in self.steps],
            "peak_bytes": peak.cost.use.peak if peak else 0.0,
            "peak_stage": peak.role if peak else None,
            "hours": self.hours,
            "disk_bytes": self.disk,
        }

    def _step_dict(self, step: Step) -> dict[str, Any]:
        cost = step.cost
        return {
            "role": step.role,
            "reads": list(step.reads),
            "found": step.found,
            "rows": cost.rows,
            "tokens": cost.tokens,
            "sampled": cost.sampled,
            "peak_bytes": cost.use.peak,
            "bytes": cost.use.parts,
            "hours": self.assumptions.hours(cost),
            "disk_bytes": cost.disk,
        }


def make_plan(recipe: Recipe, assumptions: Assumptions) -> Plan:
    """The plan of a recipe that runs to its last iteration; UserError where sizes are unknown."""
    counts = count_data(recipe)
    shape = shape_of_recipe(recipe.model, counts.vocabulary)
    costs = Costs(recipe, shape, counts, on_cpu=assumptions.device.name == "cpu")
    first: dict[str, Step] = {}
    for step in _Stages(recipe, counts, costs).all():
        first.setdefault(step.role, step)  # samples that two stages read are drawn once
    found, looked_at = found_stages(recipe, counts.local)
    steps = [replace(step, found=step.role in found) for step in first.values()]
    return Plan(recipe, shape, counts, assumptions, steps, looked_at)


class _Stages:
    """The stages of irl_align.training.loop.bilevel, in its order."""

    def __init__(self, recipe: Recipe, counts: Counts, costs: Costs) -> None:
        self.recipe, self.counts, self.costs = recipe, counts, costs
        self.policy = self.first
        update = recipe.policy_update
        self.selects = isinstance(update, BestOfNOptions) and update.use == "select"
        self.base = self.policy
        """The policy that is sampled: of a selecting one, the model that it selects from."""

    @property
    def first(self) -> str:
        """Name of pi_0."""
        return "policy-0" if self.recipe.sft.enabled else "start"

    def all(self) -> Iterator[Step]:
        """Every stage; some come twice."""
        recipe, costs = self.recipe, self.costs
        yield Step("start", (), costs.start())
        yield Step("data", ("start",), costs.encode())
        if recipe.sft.enabled:
            rows = self.counts.rows["sft"]
            args, full = recipe.sft.args, recipe.sft.full
            yield Step("sft", ("start", "data"), costs.sft(rows, "SFTConfig", args, full))
        yield from self._measure(0, None)
        for k in range(recipe.loop.iterations):
            reward = None
            if recipe.reward.kind != "none":
                yield from self._reward_level(k)
                reward = f"reward/{k}"
            yield from self._policy_level(k, reward)
            yield from self._measure(k + 1, reward)
        if recipe.loop.pick == "nearest" and recipe.reward.kind != "none":
            last = f"reward/{recipe.loop.iterations - 1}"
            cost = costs.measure(self.counts.prompts["held_out"], self.counts.prompts["held_out"])
            yield Step("pick", (last,), cost)

    def _samples(self, role: str, prompts: int, n: int, temperature: float) -> Iterator[Step]:
        """Samples of the policy as it is; of a selecting one, of its candidates."""
        update = self.recipe.policy_update
        if self.policy != self.base and isinstance(update, BestOfNOptions):
            name = f"samples/{role}-candidates/{self.base}/t{update.temperature:g}"
            drawn = self.costs.sample(prompts, n * update.n)
            yield Step(name, (self._made_by(self.base), "data"), drawn)
            length = self.costs.prompt.mean + self.costs.sample_mean
            reward = {"reward": float(self.costs.reward_bytes())}
            cost = self.costs.score(prompts * n * update.n, length, reward)
            latest = f"reward/{int(self.policy.split('-')[1]) - 1}"
            yield Step(f"selected/{role}/{self.policy}", (name, latest), cost)
            return
        name = f"samples/{role}/{self.policy}/t{temperature:g}"
        yield Step(name, (self._made_by(self.policy), "data"), self.costs.sample(prompts, n))

    def _made_by(self, policy: str) -> str:
        """Role of the stage that holds a policy."""
        if policy in ("start", "policy-0"):
            return {"start": "start", "policy-0": "sft"}[policy]
        number = int(policy.split("-")[1])
        return f"reward/{number - 1}" if self.recipe.reward.kind == "implicit" else policy

    def _reward_level(self, k: int) -> Iterator[Step]:
        recipe, generation = self.recipe, self.recipe.generation
        used = {side for source in recipe.pairs.sources for side in source.split("/")}
        drawn: list[str] = []
        others = {"sft": self.first, "init": "start"}
        for name in sorted(used & {"policy", *others}):
            now, self.policy = self.policy, others.get(name, self.policy)
            base, self.base = self.base, others.get(name, self.base)
            for part, of in (("train", "reward"), ("held_out", "held_out")):
                prompts, n = self.counts.prompts[of], generation.samples_per_prompt
                steps = list(self._samples(part, prompts, n, generation.temperature))
                drawn.append(steps[-1].role)
                yield from steps
            self.policy, self.base = now, base
        pairs = self._pairs()
        yield Step(f"pairs/{k}", ("data", *drawn), Cost(rows=pairs))
        window = recipe.pairs.window
        last = {"latest": 1, "all": k + 1}.get(window) or int(window.removeprefix("last-"))
        many = pairs * min(last, k + 1)
        many = min(many, recipe.reward.max_pairs or many)
        args = scheduled(recipe.reward.args, recipe.reward.schedule, k)
        reads = tuple(f"pairs/{i}" for i in range(k + 1 - min(last, k + 1), k + 1))
        reads = (*reads, self._made_by(others["sft"]))
        if recipe.reward.kind == "log_prob":
            rows = self.counts.rows["reward"]
            cost, reads = self.costs.measure(0, min(rows, NORMALISED)), (reads[-1], "data")
        elif recipe.reward.kind == "implicit":
            cost = self.costs.sft(many, "DPOConfig", args)
            reads = (*reads, self._made_by(self.policy))
        else:
            cost = self.costs.reward_fit(many, args)
            if recipe.reward.init == "warm" and k:
                reads = (*reads, f"reward/{k - 1}")
        yield Step(f"reward/{k}", tuple(dict.fromkeys(reads)), cost)
        report = self.costs.measure(self.counts.rows["held_out"], self.counts.rows["held_out"])
        yield Step(f"reward-report/{k}", (f"reward/{k}", f"pairs/{k}"), report)

    def _pairs(self) -> int:
        """Pairs of an iteration: of every demonstration, by source."""
        options, rows = self.recipe.pairs, self.counts.rows["reward"]
        prompts = self.counts.prompts["reward"]
        if options.demonstrations_per_prompt is not None:
            rows = min(rows, prompts * options.demonstrations_per_prompt)
        n = self.recipe.generation.samples_per_prompt
        total = 0
        for source in options.sources:
            if source.endswith("contrast"):
                each = options.contrast_per_demonstration * options.contrast_edits
                each *= 1 + options.contrast_crossed
                total += self.counts.rows["reward"] * each
            elif source.startswith("demonstration"):
                total += max(rows, prompts * n)  # a prompt's demonstrations and samples take turns
            else:
                total += prompts * n
        return total

    def _policy_level(self, k: int, reward: str | None) -> Iterator[Step]:
        update, now, role = self.recipe.policy_update, self.policy, f"policy-{k + 1}"
        held = self._made_by(now) if now == self.base else self._made_by(self.base)
        if isinstance(update, BestOfNOptions) and update.use != "select":
            yield from self._best_of_n(k, update, held)
        elif isinstance(update, PPOOptions):
            start = self._made_by(self.first)
            reads = (held if update.start == "current" else start, str(reward), "data")
            yield Step(role, reads, self.costs.ppo(update))
        elif isinstance(update, MoreSFTOptions):
            rows = self.counts.rows["sft" if reward is None else "reward"]
            yield Step(role, (held, "data"), self.costs.sft(rows, "SFTConfig", update.args))
        elif not self.selects and self.recipe.reward.kind != "implicit":
            # An update of the user's own, or one whose costs are those of SFT at least.
            rows = self.counts.rows["sft" if reward is None else "reward"]
            args = getattr(update, "args", {})
            yield Step(role, (held, "data"), self.costs.sft(rows, "SFTConfig", args))
        self.policy = role
        self.base = self.base if self.selects else role

    def _best_of_n(self, k: int, update: BestOfNOptions, held: str) -> Iterator[Step]:
        costs = self.costs
        prompts = self.counts.prompts["reward"] * (2 if update.edited_prompts else 1)
        if update.prompts_from is not None:
            prompts += len(load_prompts(load_card(self.recipe.data.card), update.prompts_from))
        prompts = min(update.prompts or prompts, prompts)
        candidates = f"samples/candidates/{self.policy}/t{update.temperature:g}"
        yield Step(candidates, (held, "data"), costs.sample(prompts, update.n))
        reads: Sequence[str] = (held, candidates)
        if update.score != "logprob":
            length = costs.prompt.mean + costs.sample_mean
            reward: Mapping[str, float] = {"reward": float(costs.reward_bytes())}
            cost = costs.score(prompts * update.n, length, reward)
            yield Step(f"candidate-rewards/{k}", (candidates, f"reward/{k}"), cost)
            reads = (*reads, f"candidate-rewards/{k}")
        config = "SFTConfig" if update.use == "sft" else "DPOConfig"
        fit = costs.sft(prompts * update.keep, config, update.args)
        yield Step(f"policy-{k + 1}", tuple(reads), fit)

    def _measure(self, k: int, reward: str | None) -> Iterator[Step]:
        """What the loop measures of a policy: vital signs, and evaluation at every temperature."""
        options, counts = self.recipe.evaluation, self.counts
        n = self.recipe.generation.samples_per_prompt
        prompts = min(options.held_out_prompts, counts.prompts["held_out"])
        held = list(self._samples("held_out", prompts, n, 1.0))
        yield from held
        signs = self.costs.measure(counts.rows["held_out"], prompts * n)
        yield Step(f"vitals/{k}", (held[-1].role, *([reward] if reward else [])), signs)
        if k == 0:
            yield Step("evaluation/demonstrations", ("data",), Cost())
        prompts = min(options.prompts or 10**12, counts.prompts["evaluation"])
        answers: list[str] = []
        for temperature in options.temperatures:
            if self.policy != self.base and temperature != options.temperatures[0]:
                continue
            drawn = list(self._samples("evaluation", prompts, 1, temperature))
            yield from drawn
            cost = self.costs.measure(0, prompts) if temperature == 1.0 else Cost(rows=prompts)
            yield Step(f"evaluation/{k}/t{temperature:g}", (drawn[-1].role,), cost)
            answers.append(drawn[-1].role)
        if reward is not None and self.recipe.reward.kind == "explicit":
            costs, loaded = self.costs, {"reward": float(self.costs.reward_bytes())}
            length = costs.prompt.mean + costs.sample_mean
            cost = costs.score(prompts * len(answers), length, loaded)
            yield Step(f"evaluation/{k}/rewards", (*answers, reward), cost)
        if options.match_entropy and k and self.policy == self.base:
            reads = (self._made_by(self.first), f"evaluation/{k}/t1")
            yield Step(f"matched-entropy/{k}", reads, self.costs.sample(MATCHING * prompts, 1))


def parts_of(plan: Plan) -> dict[str, Mapping[str, float]]:
    """Kind of stage -> bytes by part, of the stage to do of that kind that needs most."""
    largest: dict[str, Step] = {}
    for step in plan.to_do:
        part = Role.parse(step.role).part
        kind = "sampling" if step.role.startswith("samples/") else part
        known = largest.get(kind)
        if step.cost.use.parts and (known is None or step.cost.use.peak > known.cost.use.peak):
            largest[kind] = step
    return {
        kind: {**step.cost.use.parts, "peak": step.cost.use.peak} for kind, step in largest.items()
    }
