"""The explicit reward: a causal language model with a scalar head."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer.reward_trainer import suppress_seqcls_warning

from irl_align.config.model import LoraOptions
from irl_align.data.tokenizer import text_end
from irl_align.errors import UserError
from irl_align.models.lm_head import has_plain_logits
from irl_align.models.loading import (
    evaluating,
    load_model,
    load_tokenizer,
    require_embeddings,
    seeded,
)
from irl_align.models.lora import (
    DEFAULT_ADAPTER,
    add_adapter,
    base_of,
    has_adapter,
    is_adapter,
    save_adapter,
    train_only,
)
from irl_align.models.packing import (
    TOKENS_PER_BATCH,
    Ids,
    PackedRows,
    context_length,
    hidden_states,
    over_packed,
)
from irl_align.reward.forward import prefix_rewards, score_head, whole_rewards
from irl_align.reward.protocol import TextFormat, TextScoring, require_finite
from irl_align.reward.settings import CONFIG_KEY, DEFAULT_SETTINGS, RewardSettings, settings_of


class RewardModel(TextScoring):
    """A backbone with a scalar head: r(x, y) is its score at the last token of y."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: RewardSettings = DEFAULT_SETTINGS,
        max_batch_tokens: int = TOKENS_PER_BATCH,
        foreign: bool = False,
    ) -> None:
        """foreign: the reward was not fitted here, so that it reads whole conversations as its chat
        template writes them."""
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.max_batch_tokens = max_batch_tokens
        self.foreign = foreign

    def text_format(self) -> TextFormat:
        """The tokenizer of texts and the template, saved with the weights."""
        pad = self.model.config.pad_token_id if self.foreign else None
        return TextFormat(self.tokenizer, self.settings, self.foreign, pad)

    @property
    def text_end(self) -> int:
        """Id that ends finished texts. Raises UserError: see data.tokenizer.text_end."""
        return text_end(self.tokenizer, self.settings.template).id

    @classmethod
    def from_policy(
        cls,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        settings: RewardSettings,
        seed: int,
        device: torch.device | str = "cpu",
        lora: LoraOptions | None = None,
        *,
        heads: int = 1,
        **options: Any,
    ) -> RewardModel:
        """A fresh reward on a policy's backbone (cold start).

        Heads start at std 1/sqrt(H + 1) (arXiv:2403.17031), drawn from `seed`; several are an
        ensemble, see settings.penalty. With `lora` only heads and an adapter are trained; the
        adapter continues the policy's where it has one.
        """
        with suppress_seqcls_warning():
            model = load_model(
                path,
                device,
                AutoModelForSequenceClassification,
                fresh=("score.weight",),
                merge=lora is None,
                num_labels=heads,
                **options,
            )
        width = score_head(model).in_features
        with seeded(seed), torch.no_grad():
            score_head(model).weight.copy_(torch.randn(heads, width) / (width + 1) ** 0.5)
            if lora is not None and not has_adapter(model):
                add_adapter(model, lora, base_of(path))
        if lora is not None:
            train_adapter(model)
        model.config.pad_token_id = tokenizer.pad_token_id
        if settings.lm_coef:
            policy = load_model(path, device, AutoModelForCausalLM, **options)
            require_plain_logits(policy)
            if not model.config.tie_word_embeddings:
                model.lm_head = policy.get_output_embeddings().requires_grad_(lora is None)
        return cls(model, tokenizer, settings)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        template: str | None = None,
        **options: Any,
    ) -> RewardModel:
        """Load a reward: ours, or any one-label AutoModelForSequenceClassification.

        template: of a reward that was not fitted here, text with {prompt} or chat; the default is
        its tokenizer's chat template where it has one, else {prompt}. options: passed to
        ``load_model``; merge=False keeps an adapter separate. Raises UserError: no such model, more
        than one label, unknown settings, a missing output layer, or a template that is not used.
        """
        tokenizer = load_tokenizer(path)
        # An adapter's head is in its own file, so the base alone lacks one; elsewhere a model
        # without a head is not a reward.
        quiet = suppress_seqcls_warning() if is_adapter(path) else nullcontext()
        with quiet:
            model = load_model(path, device, AutoModelForSequenceClassification, **options)
        head = getattr(model, "score", None)
        saved = getattr(model.config, CONFIG_KEY, None)
        one_head = (saved or {}).get("penalty") is None
        if head is None or (one_head and model.config.num_labels != 1):
            raise UserError(
                f"{path}: config.json: num_labels is {model.config.num_labels}, the head "
                f"{'is present' if head is not None else 'is missing'}; expected a "
                "causal sequence classifier with one label"
            )
        require_embeddings(path, model, tokenizer)
        settings = settings_of(path, saved, tokenizer.chat_template, template)
        if settings.lm_coef and not model.config.tie_word_embeddings:
            if is_adapter(path):
                base = options.pop("base", None) or base_of(path)
                policy = load_model(base, device, **options)
                model.lm_head = policy.get_output_embeddings().requires_grad_(False)
            else:
                model.lm_head = _load_lm_head(Path(path), model)
        return cls(model, tokenizer, settings, foreign=saved is None)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, tokenizer and settings; loads as AutoModelForSequenceClassification."""
        setattr(self.model.config, CONFIG_KEY, asdict(self.settings))
        if has_adapter(self.model):
            save_adapter(self.model, Path(folder))
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def centre(self, prompts: Ids, completions: Ids) -> tuple[float, float]:
        """Give these demonstrations' rewards mean 0. Returns their mean and deviation before that.

        Raises UserError: the rewards are not finite.
        """
        self.settings = replace(self.settings, mean=0.0)
        if self.settings.penalty is not None:
            centres = self.head_scores_ids(prompts, completions).double().mean(0)
            self.settings = replace(self.settings, centres=centres.tolist())
        raw = self.score_ids(prompts, completions).double()
        mean, std = float(raw.mean()), float(raw.std(correction=0))
        if not (math.isfinite(mean) and math.isfinite(std)):
            raise UserError(
                f"reward: the demonstrations' rewards have mean {mean} and std {std}; expected "
                "finite ones: lower learning_rate in reward.args"
            )
        self.settings = replace(self.settings, mean=mean)
        return mean, std

    def score_ids(self, prompts: Ids, completions: Ids, progress: str | None = "rewards") -> Tensor:
        """Reward of completions as token ids: (B,) float32 on the CPU.

        progress: label of a progress bar; None shows none. Raises UserError: a reward is not
        finite, or a text is longer than the model's context.
        """
        return self._scores(self.settings, prompts, completions, progress)

    def head_scores_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Scores of whole completions by each head of an ensemble, less its centre: (B, k)."""
        settings = replace(self.settings, penalty=None, mean=0.0)
        scores = self._scores(settings, prompts, completions, None)
        return scores - scores.new_tensor(settings.centres or 0.0)

    def _scores(
        self, settings: RewardSettings, prompts: Ids, completions: Ids, progress: str | None
    ) -> Tensor:
        heads = score_head(self.model).out_features
        separate = heads > 1 and settings.penalty is None
        scores = torch.empty((len(prompts), heads) if separate else (len(prompts),))

        def one_batch(batch: list[int], packed: PackedRows) -> None:
            scores[batch] = whole_rewards(self.model, settings, packed).cpu()

        read = self.as_read(prompts, completions)
        with evaluating(self.model):
            over_packed(one_batch, self.model, prompts, read, self.max_batch_tokens, progress)
        require_finite("rewards", scores)
        return scores

    def pooled_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Last hidden states that the head reads, at the last token: (B, H) float32 on the CPU."""
        states = torch.empty(len(prompts), score_head(self.model).in_features)

        def one_batch(batch: list[int], packed: PackedRows) -> None:
            hidden = hidden_states(self.model, packed)
            states[batch] = hidden[packed.row, packed.ends()].float().cpu()

        read = self.as_read(prompts, completions)
        with evaluating(self.model):
            over_packed(one_batch, self.model, prompts, read, self.max_batch_tokens)
        return states

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Rewards of all prefixes, one pass: (T + 1,) float32 per row, on the CPU.

        Raises UserError: the reward uses echo, so only the last token has a reward.
        """
        self.require_no_echo()
        out = [torch.empty(0)] * len(prompts)

        def one_batch(batch: list[int], packed: PackedRows) -> None:
            rewards = prefix_rewards(self.model, self.settings, packed).cpu()
            for values, i in zip(rewards, batch, strict=True):
                out[i] = values[: len(completions[i]) + 1].clone()

        with evaluating(self.model):
            over_packed(one_batch, self.model, prompts, completions, self.max_batch_tokens)
        return out

    def as_read(self, prompts: Ids, completions: Ids) -> Ids:
        """What the model reads after each prompt: the completion; with echo also the prompt again.

        In its second copy a causal model can check every part of the prompt against the completion
        ("echo", arXiv:2402.15449). Raises UserError: the model's context is too short for both.
        """
        if not self.settings.echo:
            return completions
        end = self.text_end
        read = [[*y, *x, end] for x, y in zip(prompts, completions, strict=True)]
        longest = max((len(x) + len(y) for x, y in zip(prompts, read, strict=True)), default=0)
        context = context_length(self.model)
        if context is not None and longest > context:
            raise UserError(
                f"reward.echo: prompt, completion and the prompt again have {longest} tokens, "
                f"expected at most the model's context of {context}: shorten prompts, or remove "
                "reward.echo"
            )
        return read

    def require_no_echo(self) -> None:
        """Raise UserError if single tokens of a completion have no reward or attention."""
        if self.settings.echo:
            raise UserError(
                "reward: it reads the prompt again after the completion (reward.echo), so it has "
                "no rewards of prefixes and no attention by token; expected credit sparse, uniform "
                "or random"
            )


def train_adapter(model: PreTrainedModel) -> None:
    """Train only the adapter and the head of a reward."""
    train_only(model, DEFAULT_ADAPTER)
    score_head(model).requires_grad_(True)


def train_last_layers(model: PreTrainedModel, layers: int) -> None:
    """Train only the head, the last layers of the backbone and the norm behind them.

    layers: 0 trains the head alone. Raises UserError: the backbone has fewer layers, or none in a
    list.
    """
    backbone: Any = model.base_model
    stacks = [each for each in backbone.children() if isinstance(each, torch.nn.ModuleList)]
    stack = max(stacks, key=len, default=torch.nn.ModuleList())
    if layers > len(stack):
        raise UserError(
            f"reward.train_layers: found {layers}, expected at most {len(stack)}, the layers of a "
            f"{model.config.model_type}"
        )
    model.requires_grad_(False)
    score_head(model).requires_grad_(True)
    if layers:
        norms = [each for each in backbone.children() if "norm" in type(each).__name__.lower()]
        for part in [*stack[-layers:], *norms]:
            part.requires_grad_(True)


def require_plain_logits(policy: PreTrainedModel) -> None:
    """Raise UserError if reward.lm_coef cannot be used with a policy of this architecture."""
    if not has_plain_logits(policy):
        raise UserError(
            f"reward.lm_coef: a {policy.config.model_type} computes its logits with more than an "
            "output layer on the last hidden state; expected 0 for this architecture"
        )


def _load_lm_head(folder: Path, model: PreTrainedModel) -> torch.nn.Module:
    """The untied output layer that a reward with lm_coef saves next to its classifier."""
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in ("weight", "bias"):
                if f"lm_head.{name}" in tensors.keys():  # noqa: SIM118  (it has no __contains__)
                    state[name] = tensors.get_tensor(f"lm_head.{name}")
    if "weight" in state:
        vocabulary, width = state["weight"].shape
        head = torch.nn.Linear(width, vocabulary, bias="bias" in state)
        head.load_state_dict(state)
        return head.to(model.device, model.dtype)
    raise UserError(
        f"{folder}: config.json: {CONFIG_KEY}.lm_coef is set, but no *.safetensors holds "
        "lm_head.weight; expected a folder written by RewardModel.save_pretrained"
    )
