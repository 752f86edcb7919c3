"""Reward functions: an explicit reward model, and the implicit reward of SPIN and DPO.

Legend of shapes: B completions, P prompt tokens, T completion tokens, V vocabulary, H width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

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
from irl_align.data.encoding import Templated, encode_completions, encode_prompts
from irl_align.errors import UserError
from irl_align.models.lm_head import completion_logprobs, has_plain_logits, head_logprobs
from irl_align.models.loading import load_model, load_tokenizer, seeded
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
    PackedRows,
    context_length,
    hidden_states,
    over_packed,
)
from irl_align.reward.losses import bound, implicit_reward, mixture_logp
from irl_align.utils.files import read_json

Ids = Sequence[Sequence[int]]
_CONFIG_KEY = "irl_reward"


class RewardFunction(Protocol):
    """What Best-of-N and PPO need of a reward. Token ids in, float32 tensors on the CPU out."""

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Reward of whole completions: (B,)."""

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Reward of every prefix of each completion, the empty one first: (T + 1,) per row."""


@dataclass(frozen=True)
class RewardSettings:
    """What a reward is beyond its weights; saved in config.json under `irl_reward`."""

    lm_coef: float = 0.0
    """a in r = head + a * mean log-prob of the completion under the backbone."""
    bound: float | None = None
    """Largest |r| before the normaliser."""
    echo: bool = False
    """Whether x comes again after y, and r is read at its end: r(x, y) = head([x; y; x])."""
    mean: float = 0.0
    """Mean of the demonstrations' rewards, which the normaliser takes off."""
    std: float = 1.0
    """Standard deviation of the demonstrations' rewards, which it divides by."""
    template: str = "{prompt}"
    """Prompt template for text input; `chat` is the tokenizer's own."""
    lowercase: bool = False
    """Whether text input is lowercased first."""
    name: str = "reward"
    """Name of the data card that the template is of."""


def score_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The scalar head (1, H) of a sequence classifier."""
    head: torch.nn.Linear = getattr(model, "score")  # noqa: B009  (torch types it as a tensor)
    return head


def train_adapter(model: PreTrainedModel) -> None:
    """Of a reward with an adapter train that and the head."""
    train_only(model, DEFAULT_ADAPTER)
    score_head(model).requires_grad_(True)


def last_layer_head(model: PreTrainedModel) -> torch.nn.Module | Tensor:
    """Output matrix of a reward's backbone: its own `lm_head`, or the tied input embeddings."""
    own: torch.nn.Module | None = getattr(model, "lm_head", None)
    if own is not None:
        return own
    return model.get_input_embeddings().weight  # type: ignore[return-value]


def prefix_rewards(model: PreTrainedModel, settings: RewardSettings, packed: PackedRows) -> Tensor:
    """Reward of every prefix of each completion, the empty one first: (B, T + 1).

    One pass of a causal backbone. Values after a completion's end mean nothing. Differentiable.
    """
    hidden = hidden_states(model, packed)
    reward = score_head(model)(hidden[packed.row[:, None], packed.places()]).squeeze(-1).float()
    if settings.lm_coef:
        reward = reward + settings.lm_coef * _mean_logps(model, hidden, packed, packed.length)
    return settled(reward, settings)


def whole_rewards(model: PreTrainedModel, settings: RewardSettings, packed: PackedRows) -> Tensor:
    """Reward of each whole completion: (B,). Differentiable.

    With echo a completion of `packed` is y, x and EOS; the log-prob is that of y alone.
    """
    hidden = hidden_states(model, packed)
    reward = score_head(model)(hidden[packed.row, packed.ends()]).squeeze(-1).float()
    if settings.lm_coef:
        after = packed.before + 2 if settings.echo else 0  # tokens of x, which starts at 0, and EOS
        length = packed.length - after
        means = _mean_logps(model, hidden, packed, length)
        reward = reward + settings.lm_coef * means.gather(1, length[:, None]).squeeze(1)
    return settled(reward, settings)


def _mean_logps(
    model: PreTrainedModel, hidden: Tensor, packed: PackedRows, length: Tensor
) -> Tensor:
    """Mean log-prob of the tokens of every prefix of a completion: (B, T + 1), 0 of the empty one.

    hidden: last hidden states (R, L, H). length: (B,) tokens that count, T the most of any.
    """
    count = torch.arange(int(length.max()) + 1, device=length.device)
    places, rows = packed.places()[:, : len(count)], packed.row[:, None]
    real = count[1:] <= length[:, None]  # (B, T)
    targets = packed.input_ids[rows, places[:, 1:]][real]
    logps = torch.zeros(real.shape, device=real.device)
    logps[real] = head_logprobs(last_layer_head(model), hidden[rows, places[:, :-1]][real], targets)
    return torch.nn.functional.pad(logps.cumsum(1), (1, 0)) / count.clamp(min=1)


def echoed(prompts: Ids, completions: Ids, eos: int) -> list[list[int]]:
    """Completions with the prompt and an EOS after each."""
    return [[*y, *x, eos] for x, y in zip(prompts, completions, strict=True)]


def settled(reward: Tensor, settings: RewardSettings) -> Tensor:
    """Raw rewards with the settings' bound and normaliser applied, any shape."""
    if settings.bound is not None:
        reward = bound(reward, settings.bound)
    return (reward - settings.mean) / settings.std


class OfTexts(RewardFunction, Protocol):
    """Mixin of reward functions: their rewards of texts, from those of token ids."""

    def text_format(self) -> tuple[PreTrainedTokenizerBase, Templated]:
        """The tokenizer of texts, and the template of prompts."""

    def score(self, prompts: Sequence[Any], completions: Sequence[str]) -> Tensor:
        """Reward of texts: prompts (strings or message lists) and completions; (B,).

        The recipe's template is applied, and EOS appended: a text is taken to be finished.
        """
        return self.score_ids(*self._encode(prompts, completions))

    def prefix_scores(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[Tensor]:
        """Reward after every token of each text, the empty completion first: (T + 1,) per row."""
        return self.prefix_scores_ids(*self._encode(prompts, completions))

    def _encode(
        self, prompts: Sequence[Any], completions: Sequence[str]
    ) -> tuple[list[list[int]], list[list[int]]]:
        tokenizer, template = self.text_format()
        prompt_ids = encode_prompts(prompts, tokenizer, template)
        ids = encode_completions(prompts, completions, prompt_ids, tokenizer, template)
        return prompt_ids, ids


class RewardModel(OfTexts):
    """A backbone with a scalar head: r(x, y) is its score at the last token of y."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: RewardSettings = RewardSettings(),
        max_batch_tokens: int = TOKENS_PER_BATCH,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.max_batch_tokens = max_batch_tokens

    def text_format(self) -> tuple[PreTrainedTokenizerBase, Templated]:
        """The tokenizer of texts, and the template of prompts, saved with the weights."""
        return self.tokenizer, self.settings

    @classmethod
    def from_policy(
        cls,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        settings: RewardSettings,
        seed: int,
        device: torch.device | str = "cpu",
        lora: LoraOptions | None = None,
        **options: Any,
    ) -> RewardModel:
        """A fresh reward on a policy's backbone (cold start).

        The head starts at std 1/sqrt(H + 1) (arXiv:2403.17031), from `seed`. lora: it and an
        adapter are trained, which goes on from the policy's where that has one.
        """
        with suppress_seqcls_warning():
            model = load_model(
                path,
                device,
                AutoModelForSequenceClassification,
                fresh=("score.weight",),
                merge=lora is None,
                num_labels=1,
                **options,
            )
        width = score_head(model).in_features
        with seeded(seed), torch.no_grad():
            score_head(model).weight.copy_(torch.randn(1, width) / (width + 1) ** 0.5)
            if lora is not None and not has_adapter(model):
                add_adapter(model, lora, base_of(path))
        if lora is not None:
            train_adapter(model)
        model.config.pad_token_id = tokenizer.pad_token_id
        if settings.lm_coef and not model.config.tie_word_embeddings:
            policy = load_model(path, device, AutoModelForCausalLM, **options)
            model.lm_head = policy.get_output_embeddings().requires_grad_(lora is None)
        _check_lm_coef(path, model, settings)
        return cls(model, tokenizer, settings)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str = "cpu", **options: Any
    ) -> RewardModel:
        """Load a reward: ours, or any one-label AutoModelForSequenceClassification.

        options: those of ``load_model``, such as merge=False for an adapter apart.
        """
        tokenizer = load_tokenizer(path)
        # Of an adapter the head lies beside it; without it elsewhere a model is no reward.
        quiet = suppress_seqcls_warning() if is_adapter(path) else nullcontext()
        with quiet:
            model = load_model(path, device, AutoModelForSequenceClassification, **options)
        head = getattr(model, "score", None)
        if head is None or model.config.num_labels != 1:
            raise UserError(
                f"{path}: config.json: num_labels is {model.config.num_labels}, head "
                f"{'score is there' if head is not None else 'score is missing'}; expected a "
                "causal sequence classifier with one label"
            )
        settings = _settings(path, getattr(model.config, _CONFIG_KEY, None) or {})
        _check_lm_coef(path, model, settings)
        if settings.lm_coef and not model.config.tie_word_embeddings:
            if is_adapter(path):
                base = options.pop("base", None) or base_of(path)
                policy = load_model(base, device, **options)
                model.lm_head = policy.get_output_embeddings().requires_grad_(False)
            else:
                model.lm_head = _load_lm_head(Path(path), model)
        return cls(model, tokenizer, settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, tokenizer and settings; loads as AutoModelForSequenceClassification."""
        setattr(self.model.config, _CONFIG_KEY, asdict(self.settings))
        if has_adapter(self.model):
            save_adapter(self.model, Path(folder))
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def fit_normaliser(self, prompts: Ids, completions: Ids) -> None:
        """Give these demonstrations' rewards mean 0 and variance 1."""
        self.settings = replace(self.settings, mean=0.0, std=1.0)
        raw = self.score_ids(prompts, completions).double()
        mean, std = float(raw.mean()), float(raw.std(correction=0))
        if not (math.isfinite(mean) and math.isfinite(std)):
            raise UserError(
                f"reward: the demonstrations' rewards have mean {mean} and std {std}; expected "
                "finite ones: lower learning_rate in reward.args"
            )
        self.settings = replace(self.settings, mean=mean, std=max(std, 1e-6))

    def score_ids(self, prompts: Ids, completions: Ids, progress: str | None = "rewards") -> Tensor:
        """Reward of completions as token ids: (B,) float32 on the CPU."""
        scores = torch.empty(len(prompts))

        def one_batch(batch: list[int], packed: PackedRows) -> None:
            scores[batch] = whole_rewards(self.model, self.settings, packed).cpu()

        self._over(one_batch, prompts, self.as_read(prompts, completions), progress)
        require_finite("rewards", scores)
        return scores

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Rewards of all prefixes, one pass: (T + 1,) float32 per row, on the CPU.

        Raises UserError where the prompt is read again: then no token but the last has a reward.
        """
        self.require_no_echo()
        out = [torch.empty(0)] * len(prompts)

        def one_batch(batch: list[int], packed: PackedRows) -> None:
            rewards = prefix_rewards(self.model, self.settings, packed).cpu()
            for values, i in zip(rewards, batch, strict=True):
                out[i] = values[: len(completions[i]) + 1].clone()

        self._over(one_batch, prompts, completions, None)
        return out

    def as_read(self, prompts: Ids, completions: Ids) -> Ids:
        """What the model reads after each prompt: the completion, and with echo the prompt again.

        The second time a causal model can check every part of the prompt against the completion
        before it ("echo", arXiv:2402.15449). Raises UserError where the model's context is short.
        """
        if not self.settings.echo:
            return completions
        read = echoed(prompts, completions, self.tokenizer.eos_token_id)
        longest = max((len(x) + len(y) for x, y in zip(prompts, read, strict=True)), default=0)
        context = context_length(self.model)
        if context is not None and longest > context:
            raise UserError(
                f"reward.echo: prompt, completion and prompt again have {longest} tokens, expected "
                f"at most the model's context of {context}: shorten prompts, or leave echo out"
            )
        return read

    def require_no_echo(self) -> None:
        """Raise UserError where tokens of the completion have no rewards or attention to give."""
        if self.settings.echo:
            raise UserError(
                "reward: it reads the prompt again after the completion (reward.echo), so it has "
                "no rewards of prefixes and no attention by token; expected credit sparse, uniform "
                "or random"
            )

    def _over(
        self,
        one_batch: Callable[[list[int], PackedRows], None],
        prompts: Ids,
        completions: Ids,
        progress: str | None,
    ) -> None:
        was_training = self.model.training
        self.model.eval()
        over_packed(one_batch, self.model, prompts, completions, self.max_batch_tokens, progress)
        self.model.train(was_training)


def read_settings(folder: Path) -> RewardSettings:
    """Settings of a saved reward."""
    config = read_json(folder / "config.json", "a reward's config", "write the reward again")
    return _settings(folder, config.get(_CONFIG_KEY) or {})


def _settings(path: str | Path, values: dict[str, Any]) -> RewardSettings:
    """Settings from a config.json, which people edit."""
    try:
        return RewardSettings(**values)
    except TypeError as error:
        raise UserError(
            f"{path}: config.json: {_CONFIG_KEY}: {error}; expected the fields "
            f"{', '.join(RewardSettings.__dataclass_fields__)}"
        ) from error


def _check_lm_coef(path: str | Path, model: PreTrainedModel, settings: RewardSettings) -> None:
    if settings.lm_coef and not has_plain_logits(model):
        raise UserError(
            f"{path}: reward.lm_coef is {settings.lm_coef:g}, but a {model.config.model_type} "
            "scales or caps its logits; expected 0 for this architecture"
        )


def _load_lm_head(folder: Path, model: PreTrainedModel) -> torch.nn.Module:
    """The untied output layer that a reward with lm_coef keeps beside its classifier."""
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
        f"{folder}: config.json: irl_reward.lm_coef is set, but no *.safetensors holds "
        "lm_head.weight; expected a folder written by RewardModel.save_pretrained"
    )


def require_finite(name: str, values: Tensor) -> None:
    """Raise UserError for scores (B, ...) that are not finite, naming the first row of them."""
    if not values.isfinite().all():
        row = int((~values.reshape(len(values), -1).isfinite()).any(1).nonzero()[0])
        raise UserError(
            f"reward: {name} of completion {row} are not finite; expected finite ones: "
            "lower learning_rate in reward.args, or load the reward in float32"
        )


class ImplicitReward(OfTexts):
    """r(x, y) = beta log(pi(y|x) / pi_ref(y|x)): the reward that SPIN and DPO fit.

    Equals a reward up to beta log Z(x), which cancels in pairs of one prompt. The reference is one
    model, or several with weights that sum to 1: their geometric mixture, up to its own Z(x).
    tokenizer, template: of texts, where those are scored and not token ids alone.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        references: Sequence[tuple[float, PreTrainedModel]],
        beta: float,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: Templated = RewardSettings(),
    ) -> None:
        self.policy = policy
        self.references = references
        self.beta = beta
        self.tokenizer = tokenizer
        self.template = template

    def text_format(self) -> tuple[PreTrainedTokenizerBase, Templated]:
        """The tokenizer of texts, and the template of prompts."""
        if self.tokenizer is None:
            raise UserError("reward: an implicit reward of texts needs a tokenizer, given none")
        return self.tokenizer, self.template

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Rewards of whole completions: (B,)."""
        scores = [float(s[-1]) for s in self.prefix_scores_ids(prompts, completions)]
        require_finite("rewards", torch.tensor(scores))
        return torch.tensor(scores)

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Rewards of all prefixes: (T + 1,) per row, 0 for the empty completion."""
        policy = completion_logprobs(self.policy, prompts, completions, progress="rewards")
        parts = [
            completion_logprobs(model, prompts, completions, progress="rewards of the reference")
            for _, model in self.references
        ]
        weights = [weight for weight, _ in self.references]
        out = []
        for row, own in enumerate(policy):
            reference = mixture_logp([torch.from_numpy(part[row]) for part in parts], weights)
            per_token = implicit_reward(torch.from_numpy(own), reference, self.beta)
            out.append(torch.nn.functional.pad(per_token.cumsum(0), (1, 0)))
        return out
