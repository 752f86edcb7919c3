"""Rewards of other projects: any AutoModelForSequenceClassification with one label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from irl_align.data.decoding import TokenFormat
from irl_align.data.rows import (
    Completion,
    Prompt,
    completion_text,
    exchanges,
    is_one_turn,
    prompt_text,
)
from irl_align.data.tokenizer import tokenizer_name
from irl_align.errors import UserError
from irl_align.models.loading import (
    empty_classifier,
    load_config,
    load_model,
    load_tokenizer,
    require_embeddings,
)
from irl_align.models.lora import is_adapter
from irl_align.models.packing import (
    TOKENS_PER_BATCH,
    Ids,
    batches_by_tokens,
    context_length,
    require_context,
)
from irl_align.reward.alignment import for_policy
from irl_align.reward.attention import no_prefix_scores
from irl_align.reward.composed import RewardEnsemble, load_fitted
from irl_align.reward.conversations import render_conversations
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import RewardFunction
from irl_align.reward.settings import CONFIG_KEY, RewardSettings, settings_of


def load_text_reward(
    path: str | Path,
    device: torch.device | str = "cpu",
    template: str | None = None,
    **options: Any,
) -> TextReward:
    """A reward of texts: one that was fitted here, or any one-label sequence classifier.

    template: of a reward that was not fitted here, text with {prompt} or chat; see
    RewardModel.from_pretrained. Raises UserError: no such model, or a template that is not used.
    """
    if is_adapter(path) or _is_causal(path):
        return load_fitted(path, device, template, **options)
    model = load_model(path, device, AutoModelForSequenceClassification, **options)
    tokenizer = load_tokenizer(path)
    require_embeddings(path, model, tokenizer)
    saved = getattr(model.config, CONFIG_KEY, None)
    return PairClassifier(
        model, tokenizer, settings_of(path, saved, tokenizer.chat_template, template)
    )


def load_reward(
    path: str | Path,
    policy: TokenFormat,
    device: torch.device | str = "cpu",
    template: str | None = None,
    **options: Any,
) -> RewardFunction:
    """The reward in a folder as a function of a policy's token ids.

    It reads the policy's prompts and answers as texts by its own template. A reward without a
    template of its own reads the policy's, unless that is a chat template. Parameters and errors
    are those of load_text_reward.
    """
    reward = load_text_reward(path, device, template, **options)
    if isinstance(reward, PairClassifier):
        reward.policy = policy
        return reward
    if isinstance(reward, RewardEnsemble):
        return replace(reward, members=[for_policy(m, policy) for m in reward.models])
    without = reward.foreign and template is None and reward.settings.template != "chat"
    if without and policy.card.template != "chat":
        card = policy.card
        reward.settings = replace(reward.settings, template=card.template, lowercase=card.lowercase)
    return for_policy(reward, policy)


def _is_causal(path: str | Path) -> bool:
    """Whether a reward is a causal model with a head, which scores every prefix.

    Raises UserError: no such model, or more than one label.
    """
    try:
        empty = empty_classifier(load_config(path))
    except (OSError, ValueError, UserError) as error:
        raise UserError(
            f"{path}: config.json: not a reward model: {' '.join(str(error).split())[:200]}; "
            "expected one of AutoModelForSequenceClassification"
        ) from error
    if empty.config.num_labels != 1 and not hasattr(empty.config, CONFIG_KEY):
        raise UserError(
            f"{path}: config.json: num_labels is {empty.config.num_labels}; expected a reward "
            "model with one label"
        )
    return hasattr(empty, "score")


class PairClassifier:
    """A classifier that reads prompt and answer as two texts (BERT), or as one by a chat template.

    It scores whole answers only, since each of its tokens depends on later ones. As a
    RewardFunction of token ids it needs the format of the policy that wrote them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: RewardSettings,
        policy: TokenFormat | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.policy = policy

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion] | None = None
    ) -> Tensor:
        """The classifier's logit for each completion: (B,) float32 on the CPU.

        Parameters are those of TextScoring.score. Raises UserError: a row has no answer, or it is
        longer than the model's context.
        """
        return self._scores(*exchanges(prompts, completions))

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """The classifier's logit for completions as the policy's token ids: (B,)."""
        assert self.policy is not None
        answers = self.policy.answers(prompts, completions)
        return self._scores(
            [self.policy.prompt(ids) for ids in prompts], [answer.text for answer in answers]
        )

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Raises UserError: a prefix has no score of its own."""
        raise no_prefix_scores(self.model)

    def _scores(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> Tensor:
        rows = self._encode(prompts, answers)
        lengths = [len(ids) for ids in rows["input_ids"]]
        # Some models (RoBERTa) reserve positions; only their tokenizers know the usable length.
        context = min(context_length(self.model) or 10**12, self.tokenizer.model_max_length)
        require_context(lengths, context, self.model.config.model_type)
        scores = torch.empty(len(lengths))
        with torch.inference_mode():
            for batch in batches_by_tokens(lengths, TOKENS_PER_BATCH):
                chosen = {name: [values[i] for i in batch] for name, values in rows.items()}
                inputs = self.tokenizer.pad(chosen, return_tensors="pt").to(self.model.device)
                scores[batch] = self.model(**inputs).logits[:, 0].float().cpu()
        return scores

    def _encode(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> dict[str, Any]:
        """The tokenizer's inputs, by name."""
        template = self.settings.template
        if template == "chat":
            finished = [True] * len(answers)
            rendered = render_conversations(prompts, answers, finished, self.tokenizer)
            texts = [conversation.text for conversation in rendered]
            return dict(self.tokenizer(texts, add_special_tokens=False))
        if not all(is_one_turn(prompt) for prompt in prompts):
            raise UserError(
                f"reward: {tokenizer_name(self.tokenizer)} reads a prompt as one text, and a "
                "prompt of the data is a conversation; expected a reward with a chat template"
            )
        asked = [template.format(prompt=prompt_text(prompt)) for prompt in prompts]
        return dict(self.tokenizer(asked, [completion_text(answer) for answer in answers]))


TextReward = RewardModel | RewardEnsemble | PairClassifier
"""A reward that scores texts."""
