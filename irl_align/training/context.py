"""The services of one run: stages, sampling, models, training settings and the log.

Policy updates see it as :class:`irl_align.policy.UpdateContext`. What a run computes, and in which
order, is in :mod:`irl_align.training.loop`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from irl_align.config.schema import Recipe
from irl_align.models.trl import Training
from irl_align.policy.roles import Role
from irl_align.training.keys import derive_seed
from irl_align.training.model_loader import ModelLoader
from irl_align.training.run_folder import Run
from irl_align.training.sampler import Sampler
from irl_align.training.stages import Build, Stages
from irl_align.training.store import Stage


class RunContext:
    """One run's recipe, stages, models, sampler and log.

    stages: where the stages come from. ``BuiltStages`` trains; with ``LookedUpStages`` the loop
    only shows which stages a run would ask for.
    """

    def __init__(self, recipe: Recipe, stages: Stages, run: Run, device: torch.device) -> None:
        self.recipe, self.stages, self.run, self.device = recipe, stages, run, device
        self.models = ModelLoader(recipe, device)
        self.sampler = Sampler(recipe, stages, self.models, run.folder)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the start model."""
        return self.models.tokenizer

    def stage(
        self,
        role: Role,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        build: Build,
        *,
        main_only: bool = False,
    ) -> Stage:
        """A stage of the run; see :meth:`Stages.stage`."""
        return self.stages.stage(role, name, settings, inputs, build, main_only=main_only)

    def log(self, role: Role, record: Mapping[str, Any]) -> None:
        """Set the record of a role in metrics.jsonl."""
        self.run.log(role, record)

    def training(self, work: Path, label: str) -> Training:
        """Settings of a trainer that works in a stage's folder; its seed depends on the label."""
        name = label.replace(" ", "-")
        return Training(
            work=work,
            seed=derive_seed(self.recipe.seed, label) % 2**31,
            device=self.device,
            report_to=tuple(self.recipe.report_to),
            run_name=f"{self.recipe.name}-seed{self.recipe.seed}-{name}",
            label=label,
            # The default is next to the checkpoints, which are deleted at the end of the stage.
            tensorboard=self.run.folder / "tensorboard" / name,
        )

    def close(self) -> None:
        """Stop what the run started."""
        self.sampler.close()
