"""Rewards made of others: ensembles of models, and functions of the user's own added to a reward.

r(x, y) = learned(x, y) + sum_j w_j f_j(x, y). Without a learned reward it is the sum alone. A
function scores whole completions only, so its value belongs to the last token: token-level credit
distributes the learned part, whose rewards of prefixes and attention are those of this reward.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irl_align.config.yaml import show
from irl_align.data.cards import import_object
from irl_align.data.decoding import TokenFormat, decode_answers
from irl_align.data.rows import Completion, Prompt, as_answer, prompt_key
from irl_align.errors import UserError
from irl_align.models.packing import Ids
from irl_align.reward.losses import pessimistic
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import (
    RewardFunction,
    ScoreRequest,
    TextFormat,
    TextScoring,
    TokenScores,
)
from irl_align.reward.scoring import score_tokens
from irl_align.reward.settings import CONFIG_KEY, RewardSettings, read_settings
from irl_align.utils.files import file_checksum, text_hash, to_json
from irl_align.utils.sanitize import one_line


class FunctionError(UserError):
    """A reward function of the user's own failed: no fault of the training that called it."""


@dataclass(frozen=True)
class UserFunction:
    """A reward function of the user's own, with its import path and weight."""

    path: str
    weight: float
    call: Callable[..., Any]

    def scores(self, arguments: Mapping[str, list[Any]]) -> Tensor:
        """Its values for B completions, without the weight: (B,); None counts as 0.

        arguments: see `call_arguments`. Raises FunctionError: it raises an exception, or returns
        anything but B finite numbers.
        """
        count, name = len(arguments["completions"]), f"reward.functions: {self.path}"
        try:
            returned = self.call(**arguments)
        except Exception as error:  # a user's own code may raise anything
            cause = f"{type(error).__name__}: {one_line(str(error))}"
            raise FunctionError(
                f"{name} raised {cause}; expected a list of {count} numbers; it gets "
                f"{', '.join(arguments)} by name"
            ) from error
        if isinstance(returned, Tensor | np.ndarray):
            returned = returned.tolist()
        if not isinstance(returned, list | tuple) or len(returned) != count:
            found = type(returned).__name__
            if isinstance(returned, list | tuple):
                found = f"{len(returned)} values"
            raise FunctionError(f"{name} returned {found}, expected a list of {count} numbers")
        values = [value.item() if hasattr(value, "item") else value for value in returned]
        for row, value in enumerate(values):
            if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
                raise FunctionError(
                    f"{name} returned {show(value)} for completion {row}, expected a finite "
                    "number, or None where it does not apply"
                )
        return torch.tensor([0.0 if value is None else float(value) for value in values])


def load_functions(functions: Iterable[tuple[str, float]]) -> tuple[UserFunction, ...]:
    """The functions at import paths, with their weights. Raises UserError: one is none."""
    loaded = []
    for path, weight in functions:
        call = import_object(path, "reward.functions")
        if not callable(call):
            kind = type(call).__name__
            raise UserError(f"reward.functions: found {path}, a {kind}, expected a function")
        loaded.append(UserFunction(path, weight, call))
    return tuple(loaded)


def functions_key(functions: Iterable[tuple[str, float]], columns: str = "") -> str:
    """Hash of the functions' paths, weights and source files, and of their columns' checksum.

    Of each function: the file of the module that the path names, and of the one that defines it.
    """
    parts = []
    for function in load_functions(functions):
        defined = str(getattr(inspect.unwrap(function.call), "__module__", ""))
        files = {
            getattr(sys.modules.get(name), "__file__", None)
            for name in (function.path.partition(":")[0], defined)
        }
        sums = sorted(file_checksum(Path(f)) for f in files if f and Path(f).is_file())
        parts.append([function.path, function.weight, sums])
    return text_hash(to_json([*parts, columns]))


def call_arguments(
    prompts: Sequence[Prompt],
    answers: Sequence[Completion],
    ids: Ids,
    columns: Sequence[Mapping[str, Any]],
) -> dict[str, list[Any]]:
    """Arguments of a reward function for B completions, by name, as TRL's GRPO passes them.

    A prompt that is a conversation has a completion of one message. ids: token ids of completions.
    columns: of each row, the same names.
    """
    rows = zip(prompts, answers, strict=True)
    names = dict.fromkeys(name for row in columns for name in row)
    return {
        "prompts": list(prompts),
        "completions": [a if isinstance(p, str) else as_answer(a) for p, a in rows],
        "completion_ids": [list(row) for row in ids],
        **{name: [row.get(name) for row in columns] for name in names},
    }


@dataclass(frozen=True)
class FunctionInputs:
    """What functions read of a policy's token ids: texts, and columns of the prompt's rows."""

    policy: TokenFormat
    columns: Mapping[str, Mapping[str, Any]]
    """Prompt key -> name -> value."""
    missing: Mapping[str, Any]
    """Name -> its value for a prompt that is not in the data."""

    def arguments(self, prompts: Ids, completions: Ids) -> dict[str, list[Any]]:
        """Arguments of a reward function; see `call_arguments`."""
        asked = [self.policy.prompt(ids) for ids in prompts]
        answers = decode_answers(asked, completions, self.policy.tokenizer, self.policy.card)
        columns = [self.columns.get(prompt_key(prompt), self.missing) for prompt in asked]
        return call_arguments(asked, [answer.text for answer in answers], completions, columns)


@dataclass(frozen=True)
class ComposedReward:
    """A learned reward, if there is one, plus weighted functions. Also a TokenScorer."""

    learned: RewardFunction | None
    functions: tuple[UserFunction, ...]
    inputs: FunctionInputs

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Reward of whole completions: (B,)."""
        added = self._added(prompts, completions)
        if self.learned is None:
            return added
        return self.learned.score_ids(prompts, completions) + added

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """The learned part's reward of every prefix, and this reward last: (T + 1,) per row."""
        if self.learned is None:
            raise _no_prefixes()
        rows = self.learned.prefix_scores_ids(prompts, completions)
        added = self._added(prompts, completions)
        return [torch.cat([r[:-1], r[-1:] + a]) for r, a in zip(rows, added, strict=True)]

    def score_tokens(self, request: ScoreRequest) -> TokenScores:
        """As scoring.score_tokens; prefixes and attention are those of the learned part."""
        if self.learned is None and (request.prefixes or request.attention):
            raise _no_prefixes()
        added = self._added(request.prompts, request.completions)
        if self.learned is None:
            return TokenScores(added, terminal=added)
        scores = score_tokens(self.learned, request)
        return replace(scores, rewards=scores.rewards + added, terminal=added)

    def parts(self, prompts: Ids, completions: Ids) -> dict[str, Tensor]:
        """`reward`, `learned` with its own parts, and each function without its weight: (B,)."""
        values = self._values(prompts, completions)
        if self.learned is None:
            return {"reward": self._sum(values), **values}
        parts = part_scores(self.learned, prompts, completions)
        learned = parts.pop("reward")
        return {"reward": learned + self._sum(values), "learned": learned, **parts, **values}

    def _added(self, prompts: Ids, completions: Ids) -> Tensor:
        return self._sum(self._values(prompts, completions))

    def _values(self, prompts: Ids, completions: Ids) -> dict[str, Tensor]:
        arguments = self.inputs.arguments(prompts, completions)
        return {function.path: function.scores(arguments) for function in self.functions}

    def _sum(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([f.weight * values[f.path] for f in self.functions]).sum(0)


def composed(
    learned: RewardFunction | None,
    functions: Iterable[tuple[str, float]],
    inputs: FunctionInputs,
) -> RewardFunction:
    """The learned reward, with functions added if there are any. Raises UserError: no such one."""
    loaded = load_functions(functions)
    if learned is not None and not loaded:
        return learned
    return ComposedReward(learned, loaded, inputs)


def _no_prefixes() -> UserError:
    return UserError(
        "reward.kind: functions score whole completions only; expected a learned reward, or "
        "policy_update.credit sparse"
    )


@dataclass(frozen=True)
class RewardEnsemble(TextScoring):
    """k reward models: mean minus penalty times standard deviation. Also a TokenScorer."""

    members: Sequence[RewardFunction]
    penalty: float
    mean: float = 0.0
    """Mean reward of the demonstrations, which is subtracted."""

    @property
    def models(self) -> list[RewardModel]:
        """The members as models; none if they are aligned with the tokens of another tokenizer."""
        return [member for member in self.members if isinstance(member, RewardModel)]

    def text_format(self) -> TextFormat:
        """How texts are read: as each member reads them."""
        return self.models[0].text_format()

    def member_scores_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Scores of whole completions by each member: (B, k)."""
        return torch.stack([m.score_ids(prompts, completions) for m in self.members], -1)

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Reward of whole completions: (B,)."""
        return self._combined(self.member_scores_ids(prompts, completions))

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Reward of every prefix, combined over the members: (T + 1,) per row."""
        scores = self.score_tokens(ScoreRequest(prompts, completions, prefixes=True)).prefixes
        assert scores is not None
        return [row[: len(ids) + 1] for row, ids in zip(scores, completions, strict=True)]

    def score_tokens(self, request: ScoreRequest) -> TokenScores:
        """As scoring.score_tokens; the attention is the members' mean."""
        scores = [score_tokens(member, request) for member in self.members]
        prefixes = [s.prefixes for s in scores if s.prefixes is not None]
        attention = [s.attention for s in scores if s.attention is not None]
        return TokenScores(
            self._combined(torch.stack([s.rewards for s in scores], -1)),
            self._combined(torch.stack(prefixes, -1)) if prefixes else None,
            torch.stack(attention).mean(0) if attention else None,
        )

    def _combined(self, scores: Tensor) -> Tensor:
        return pessimistic(scores, self.penalty) - self.mean


def part_scores(reward: RewardFunction, prompts: Ids, completions: Ids) -> dict[str, Tensor]:
    """`reward` (B,), and the parts that it is made of: see ComposedReward.parts, and `deviation`
    over an ensemble's members."""
    if isinstance(reward, ComposedReward):
        return reward.parts(prompts, completions)
    parts = {"reward": reward.score_ids(prompts, completions)}
    members = None
    if isinstance(reward, RewardEnsemble):
        members = reward.member_scores_ids(prompts, completions)
    elif isinstance(reward, RewardModel) and reward.settings.penalty is not None:
        members = reward.head_scores_ids(prompts, completions)
    if members is not None:
        parts["deviation"] = members.std(-1, correction=0)
    return parts


def member_folder(folder: Path, number: int) -> Path:
    """Folder of a model of an ensemble in the ensemble's folder."""
    return folder / f"member-{number}"


def member_folders(folder: Path) -> list[Path]:
    """Folders of the models of an ensemble; empty for a single model."""
    count = len(list(folder.glob("member-*")))
    return [member_folder(folder, number) for number in range(count)]


def save_ensemble(first: RewardModel, penalty: float, mean: float, folder: Path) -> None:
    """Write what an ensemble's folder has besides its members: settings, config and tokenizer."""
    settings: RewardSettings = replace(first.settings, penalty=penalty, mean=mean)
    setattr(first.model.config, CONFIG_KEY, asdict(settings))
    first.model.config.save_pretrained(folder)
    first.tokenizer.save_pretrained(folder)


def load_fitted(
    path: str | Path, device: torch.device | str = "cpu", *args: Any, **options: Any
) -> RewardModel | RewardEnsemble:
    """A reward as RewardModel.from_pretrained, or an ensemble of them.

    Parameters and errors are those of RewardModel.from_pretrained.
    """
    folders = member_folders(Path(path))
    if not folders:
        return RewardModel.from_pretrained(path, device, *args, **options)
    settings = read_settings(Path(path))
    members = [RewardModel.from_pretrained(own, device, *args, **options) for own in folders]
    return RewardEnsemble(members, settings.penalty or 0.0, settings.mean)
