"""The policy level: what a policy is, and the protocol of an update that improves it.

A policy update is a value behind :class:`PolicyUpdate`. Built in: :mod:`best_of_n`, :mod:`ppo`, the
identity (SPIN) and more SFT. A recipe names one of its own by import path (``policy_update.kind``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from irl_align.models.generation.protocol import Generator, Sampling
    from irl_align.models.generation.samples import Samples
    from irl_align.models.trl import Training
    from irl_align.policy.roles import Role
    from irl_align.reward.protocol import RewardFunction


@dataclass(frozen=True)
class Reward:
    """A fitted reward as an artefact.

    kind: explicit (folder of a RewardModel) or implicit (folder of pi_theta, whose reward is
    beta log(pi_theta / reference)).
    """

    kind: str
    path: Path
    key: str
    beta: float = 1.0
    references: tuple[tuple[float, Path], ...] = ()
    """Weighted models whose geometric mixture an implicit reward is measured against."""
    scale: float = 1.0
    """Margins of the fitted loss are scale * (r_E - r_hat): undoes the normaliser."""


@dataclass(frozen=True)
class Ranking:
    """How Best-of-N selection picks among n samples: by reward, logprob or both."""

    reward: Reward
    n: int
    score: str
    temperature: float


@dataclass(frozen=True)
class Policy:
    """A policy as an artefact: a causal language model, and what ranks its samples, if anything."""

    path: Path
    key: str
    ranking: Ranking | None = None

    @property
    def identity(self) -> str:
        """Key of everything that decides what the policy says."""
        if self.ranking is None:
            return self.key
        r = self.ranking
        return f"{self.key}+{r.reward.key}+{r.n}+{r.score}+{r.temperature}"


class Stage(Protocol):
    """A committed stage, as a policy update sees it."""

    @property
    def key(self) -> str:
        """Hash of its settings and inputs."""

    @property
    def path(self) -> Path:
        """Folder of its artefacts."""

    @property
    def metrics(self) -> dict[str, Any]:
        """What its build measured."""


class UpdateContext(Protocol):
    """What a policy update may use: stages, sampling, models on disk. Given by the loop."""

    tokenizer: PreTrainedTokenizerBase
    device: torch.device

    @property
    def adapted(self) -> Mapping[str, Any]:
        """For the settings of stages that train a policy: its adapter, where that is trained."""

    def stage(
        self,
        role: Role,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        build: Callable[[Path], Mapping[str, Any] | None],
    ) -> Stage:
        """Return a committed stage, building it if it is not in the store (see Store.stage).

        Of a run of several processes all build; what they write, one does (ranks.is_main).
        """

    def log(self, key: str, record: Mapping[str, Any]) -> None:
        """Set a line of the run's metrics."""

    def sample(
        self, policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, role: str
    ) -> Samples:
        """Samples of a policy, as a stage. The role is part of the seed."""

    def training(self, work: Path, label: str) -> Training:
        """Settings of a trainer that works in a stage's folder."""

    def load_policy(self, path: Path) -> PreTrainedModel:
        """The language model of a policy, on the run's device."""

    def load_trainable(self, path: Path) -> PreTrainedModel:
        """The language model of a policy, to be trained: all its weights, or its adapter."""

    def generator(self, model: PreTrainedModel) -> Generator:
        """What samples this model, whatever its weights become."""

    def load_reward(self, reward: Reward, merge: bool = True) -> RewardFunction:
        """The reward function of an artefact, on the run's device; merge: without its adapter."""

    def sampling(self, n: int, temperature: float) -> Sampling:
        """The recipe's sampling settings with another n and temperature."""


@dataclass(frozen=True)
class Demonstrations:
    """Demonstrations as token ids: row i is completions[i] after prompts[i]."""

    prompts: list[list[int]]
    completions: list[list[int]]
    checksum: str
    extra_prompts: list[list[int]] = field(default_factory=list)
    """Prompts that nobody demonstrated, for updates that need no demonstration."""

    def distinct_prompts(self) -> list[list[int]]:
        """Every prompt once, in the order of its first row; then the extra ones."""
        prompts = [*self.prompts, *self.extra_prompts]
        return [list(p) for p in dict.fromkeys(tuple(p) for p in prompts)]


class PolicyUpdate(Protocol):
    """pi_{k+1} = improve(pi_k, r_phi)."""

    def __call__(
        self,
        context: UpdateContext,
        iteration: int,
        policy: Policy,
        initial: Policy,
        reward: Reward | None,
        demonstrations: Demonstrations,
    ) -> Policy:
        """Return the improved policy; its work is done in the context's stages."""
