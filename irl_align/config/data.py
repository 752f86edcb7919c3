"""The recipe's group ``data``: the demonstrations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from irl_align.config.types import ImportPath, Options, PathText


class DataOptions(Options):
    """The demonstrations: where they come from and how they are split."""

    used_with = (("reward_data", ("disjoint",), ("reward_share",)),)

    card: PathText
    """Name of a card in data_cards/, or the path of your own card."""
    path: PathText | None = None
    """Local file or folder that replaces the card's source."""
    task: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the card's task (size, noise) if the card names a procedural task."""
    edit: ImportPath | None = None
    """module:callable that edits a prompt. It replaces the card's edit in contrast pairs and in
    edited prompts."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the training prompts that is used, chosen by a hash of the prompt."""
    noise: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """For ablations: share of the training demonstrations, held-out ones included, whose completion
    is replaced by that of another prompt. The seed chooses them."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the training prompts that neither SFT nor the reward is trained on. The loop's
    diagnostics and the selection of checkpoints use them. Prompts that the model reads as the same
    token ids are one prompt."""
    reward_data: Literal["same", "disjoint"] = "same"
    """same: the reward is fitted on the demonstrations of SFT. disjoint: it is fitted on
    demonstrations of other prompts."""
    reward_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """With reward_data=disjoint: share of the prompts that the reward is fitted on."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt, in tokens, template included."""
    max_completion_tokens: PositiveInt = 512
    """Longest demonstration, in tokens, EOS included."""
    overlong: Literal["error", "drop"] = "error"
    """Rows longer than the limits: error stops the run, drop leaves them out and counts them."""
