"""The policy level: what a policy is, and the protocol of an update that improves it.

Built in are :mod:`best_of_n`, :mod:`ppo`, :mod:`iqlearn`, :mod:`identity` (SPIN) and :mod:`sft`. A
recipe may name another :class:`PolicyUpdate` by import path (``policy_update.kind``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from irl_align.policy.roles import Role

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from irl_align.models.generation.protocol import Generator, Sampling
    from irl_align.models.generation.samples import Samples
    from irl_align.models.trl import Training
    from irl_align.reward.offset import OffsetShape
    from irl_align.reward.protocol import RewardFunction


@dataclass(frozen=True)
class Reward:
    """A fitted reward as an artefact, with functions that are added to it.

    kind: explicit (folder of a RewardModel or RewardEnsemble), or the folder of a model pi, whose
    reward is beta log(pi / reference): implicit if pi is the improved policy itself, as in SPIN,
    else log_ratio. functions: nothing but functions, without a folder.
    """

    kind: str
    path: Path
    key: str
    beta: float = 1.0
    """Factor of a log-ratio. The logit of an explicit reward is r / beta."""
    references: tuple[tuple[float, Path], ...] = ()
    """Weighted models whose geometric mixture is the reference of a log-ratio; none is 1."""
    endogenous: bool = False
    mean: bool = False
    """See :class:`irl_align.reward.implicit.ImplicitReward`."""
    functions: tuple[tuple[str, float], ...] = ()
    """Import path and weight of each of the user's functions; their hash ends the key, after +."""

    @property
    def learned(self) -> Reward:
        """The reward without the user's functions."""
        if not self.functions:
            return self
        return replace(self, functions=(), key=self.key.rpartition("+")[0])

    @property
    def logit_beta(self) -> float:
        """Divisor of its values in the logits of pairs."""
        return self.beta if self.kind == "explicit" else 1.0


@dataclass(frozen=True)
class Offset:
    """The offset o_k of a cumulative reward as an artefact; see :mod:`irl_align.reward.offset`."""

    of: Reward
    """The log-ratio pi_k / pi_0, as an implicit reward with beta 1, or the reward r_(k-1)."""
    shape: OffsetShape


@dataclass(frozen=True)
class Ranking:
    """How Best-of-N selection picks among n samples: by reward, logprob or both."""

    reward: Reward
    n: int
    score: str
    temperature: float


@dataclass(frozen=True)
class Policy:
    """A policy as an artefact: a causal language model, and the ranking of its samples, if any."""

    path: Path
    key: str
    ranking: Ranking | None = None

    @property
    def identity(self) -> str:
        """Key of everything that decides the policy's distribution."""
        if self.ranking is None:
            return self.key
        r = self.ranking
        return f"{self.key}+{r.reward.key}+{r.n}+{r.score}+{r.temperature}"


class Stage(Protocol):
    """A stage, as a policy update sees it."""

    @property
    def key(self) -> str:
        """Hash of its settings and inputs."""

    @property
    def path(self) -> Path:
        """Folder of its artefacts."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of its build; empty for a stage that was only looked up and is not there."""


class Models(Protocol):
    """Loads models on the run's device."""

    @property
    def adapted(self) -> Mapping[str, Any]:
        """The recipe's adapter, for the settings of stages that train a policy."""

    def load_policy(self, path: Path) -> PreTrainedModel:
        """The language model of a policy."""

    def load_trainable(self, path: Path) -> PreTrainedModel:
        """The language model of a policy for training: all its weights, or its adapter."""

    def load_reward(self, reward: Reward, merge: bool = True) -> RewardFunction:
        """The reward function of an artefact; merge: an adapter is merged into the weights."""


class Sampler(Protocol):
    """Samples policies within the recipe's limits."""

    def sampling(self, n: int, temperature: float) -> Sampling:
        """The recipe's sampling settings with n samples per prompt at a temperature."""

    def sample(
        self, policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, use: str
    ) -> Samples:
        """Samples of a policy, as a stage. The use is part of the seed and of the stage's role."""

    def generator(self, model: PreTrainedModel) -> Generator:
        """A generator that samples this model while it is trained."""


class UpdateContext(Protocol):
    """What a policy update may use. The loop provides it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of all policies of the run."""

    @property
    def device(self) -> torch.device:
        """Device of the run's models."""

    @property
    def models(self) -> Models:
        """Loads models."""

    @property
    def sampler(self) -> Sampler:
        """Samples policies."""

    def stage(
        self,
        role: Role,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        build: Callable[[Path], Mapping[str, Any] | None],
    ) -> Stage:
        """Return a committed stage; it is built if the store does not have it (see Store.stage).

        In a run of several processes all build, and only the main one writes
        (distributed.is_main).
        """

    def log(self, role: Role, record: Mapping[str, Any]) -> None:
        """Set a record of the run's metrics."""

    def training(self, work: Path, label: str) -> Training:
        """Settings of a trainer that works in a stage's folder; the label is part of the seed."""


@dataclass(frozen=True)
class Demonstrations:
    """Demonstrations as token ids: row i is completions[i] after prompts[i]."""

    prompts: list[list[int]]
    completions: list[list[int]]
    checksum: str
    extra_prompts: list[list[int]] = field(default_factory=list)
    """Prompts without demonstrations, for updates that need none."""

    def distinct_prompts(self) -> list[list[int]]:
        """Every prompt once, in the order of its first row; then the extra ones."""
        prompts = [*self.prompts, *self.extra_prompts]
        return [list(p) for p in dict.fromkeys(tuple(p) for p in prompts)]


@dataclass(frozen=True)
class UpdateRequest:
    """What a policy update improves in iteration k, and with what."""

    iteration: int
    policy: Policy
    """pi_k, which is to be improved."""
    initial: Policy
    """pi_0, the policy after SFT."""
    reward: Reward | None
    """r_k; None if the recipe has no reward."""
    demonstrations: Demonstrations
    """The demonstrations, and the prompts on which the policy may be improved."""
    offset: Offset | None = None
    """o_k of a cumulative reward: r_k / beta - o_k is what pi_k lacks."""

    @property
    def role(self) -> Role:
        """Role of the stage that trains pi_{k+1}."""
        return Role.policy(self.iteration + 1)


class PolicyUpdate(Protocol):
    """pi_{k+1} = improve(pi_k, r_k).

    An update does its work in ``build`` functions of the context's stages, and reads models,
    samples and demonstrations only there: then ``irl-align plan`` can show its stages without
    running it. An example::

        class Copy:
            def __call__(self, context: UpdateContext, request: UpdateRequest) -> Policy:
                def build(work: Path) -> dict[str, Any]:
                    shutil.copytree(request.policy.path, work / "model")
                    return {"steps": 0}

                inputs = {"policy": request.policy.key}
                stage = context.stage(request.role, "copy", {}, inputs, build)
                return Policy(stage.path / "model", stage.key)
    """

    def __call__(self, context: UpdateContext, request: UpdateRequest) -> Policy:
        """Return the improved policy."""
