"""What a recipe would do: its stages in order, their memory, time and disk. Nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.config.schema import Recipe
from irl_align.policy.roles import Role
from irl_align.training.plan.costs import Cost, Costs, disk_of
from irl_align.training.plan.data import Counts, count_data, local_data
from irl_align.training.plan.devices import GIB, Device
from irl_align.training.plan.memory import Shape
from irl_align.training.plan.model_shapes import model_config, shape_of_recipe
from irl_align.training.plan.stage_costs import StageCosts
from irl_align.training.plan.walk import planned_stages, quiet
from irl_align.training.prepare import check_model


@dataclass(frozen=True)
class Step:
    """A stage of the run, with its cost."""

    role: Role
    reads: tuple[Role, ...]
    """Stages that it reads."""
    cost: Cost
    found: bool
    """Whether the store has it."""


def total_hours(hours: Sequence[float | None]) -> float | None:
    """Sum of hours; None if one of them is not known."""
    known = [each for each in hours if each is not None]
    return sum(known) if len(known) == len(hours) else None


@dataclass(frozen=True)
class Assumptions:
    """Device and utilisation, from which hours are computed."""

    device: Device
    mfu: float
    """Share of the device's peak operations that training and scoring reach."""
    mbu: float
    """Share of its memory bandwidth that sampling reaches."""

    def hours(self, cost: Cost) -> float | None:
        """Hours of a stage; None where the device's speed is not known."""
        return total_hours([work.hours(self.device, self.mfu, self.mbu) for work in cost.work])


@dataclass(frozen=True)
class Plan:
    """A recipe's stages and the resources that they need."""

    recipe: Recipe
    shape: Shape
    counts: Counts
    assumptions: Assumptions
    steps: list[Step]
    store: str
    """What was looked at in the store, in words."""

    @property
    def to_do(self) -> list[Step]:
        """Stages that the store does not have."""
        return [step for step in self.steps if not step.found]

    @property
    def peak(self) -> Step | None:
        """The stage to do that needs the most memory."""
        return max(self.to_do, key=lambda step: step.cost.use.peak, default=None)

    @property
    def hours(self) -> float | None:
        """Hours of all stages to do, one after another on one device."""
        return total_hours([self.assumptions.hours(step.cost) for step in self.to_do])

    @property
    def disk(self) -> float:
        """Bytes that the stages to do leave, plus the largest checkpoints of one of them."""
        return disk_of([step.cost for step in self.to_do])

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
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
            "peak_stage": str(peak.role) if peak else None,
            "hours": self.hours,
            "disk_bytes": self.disk,
        }

    def _step_dict(self, step: Step) -> dict[str, Any]:
        cost = step.cost
        return {
            "role": str(step.role),
            "reads": list(map(str, step.reads)),
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
    """The plan of a recipe that runs to its last iteration.

    Raises UserError where the sizes of its data or its model are not known, or the model cannot do
    what the loop asks of it.
    """
    with quiet():  # the run logs warnings about its data
        raw = local_data(recipe)
        counts = count_data(recipe, raw)
    shape = shape_of_recipe(recipe.model, counts.vocabulary)
    path = Path(recipe.model.path) if recipe.model.path is not None else None
    check_model(recipe, model_config(recipe.model), path if path and path.is_dir() else None)
    costs = Costs(recipe, shape, counts, on_cpu=assumptions.device.name == "cpu")
    cost_of = StageCosts(recipe, counts, costs).of
    stages, store = planned_stages(recipe, raw)
    steps = [Step(stage.role, stage.reads, cost_of(stage.role), stage.found) for stage in stages]
    return Plan(recipe, shape, counts, assumptions, steps, store)


def parts_of(plan: Plan) -> dict[str, Mapping[str, float]]:
    """Kind of stage -> bytes by part, of its stage to do that needs the most memory."""
    largest: dict[str, Step] = {}
    for step in plan.to_do:
        kind = "sampling" if step.role.kind == "samples" else step.role.part
        known = largest.get(kind)
        if step.cost.use.parts and (known is None or step.cost.use.peak > known.cost.use.peak):
            largest[kind] = step
    return {
        kind: {**step.cost.use.parts, "peak": step.cost.use.peak} for kind, step in largest.items()
    }
