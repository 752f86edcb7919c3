"""PPO with adapters: one backbone for all four models learns the same as separate ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ppo_tools import (
    BOS,
    EOS,
    PAD,
    Stop,
    actors,
    options,
    small_llama,
    train,
    train_until_stopped,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.model import LoraOptions
from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.loading import load_model, save_model, seeded
from irl_align.models.lora import (
    DEFAULT_ADAPTER,
    adapter_weights,
    add_adapter,
    base_of,
    has_adapter,
    train_only,
)
from irl_align.policy.ppo.backbone import share_backbone
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings

LORA = LoraOptions(r=4, lora_alpha=8.0)
PROMPTS = [[BOS, 3 + i, 5] for i in range(8)]


def shaken(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    with torch.no_grad(), seeded(seed):
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return model


class Cast:
    """A base on disk, an adapter of a policy and one of a reward on it."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.base, self.start, self.reward = (
            folder / name / "model" for name in ("start-1", "sft-2", "reward-3")
        )
        save_model(small_llama(len(tokenizer), layers=2), tokenizer, self.base)
        policy = load_model(self.base)
        with seeded(1):
            add_adapter(policy, LORA, base_of(self.base))
        save_model(shaken(policy, 2), tokenizer, self.start)
        settings = RewardSettings(mean=0.3)
        reward = RewardModel.from_policy(self.start, tokenizer, settings, seed=3, lora=LORA)
        shaken(reward.model, 4)
        reward.save_pretrained(self.reward)

    def separate(self, chosen: PPOOptions, start: Path, reference: Path) -> Any:
        reward = RewardModel.from_pretrained(self.reward, merge=False)
        cast = actors(small_llama(4), reward, self.tokenizer, PROMPTS, chosen)
        return self._with(cast, start, load_model(reference, merge=False).requires_grad_(False))

    def shared(self, chosen: PPOOptions, start: Path, reference: Path) -> Any:
        cast = self._with(
            actors(small_llama(4), None, self.tokenizer, PROMPTS, chosen), start, None
        )
        backbone = share_backbone(cast.policy, start, reference, self.reward)
        return replace(cast, reference=cast.policy, reward=backbone.reward, backbone=backbone)

    def _with(self, cast: Any, start: Path, reference: Any) -> Any:
        policy = load_model(start, merge=False)
        if has_adapter(policy):
            train_only(policy, DEFAULT_ADAPTER)
        else:
            with seeded(7):
                add_adapter(policy, LORA, base_of(start))
        generator = TransformersGenerator(policy, [EOS], PAD)
        return replace(cast, policy=policy, reference=reference, generator=generator)


@pytest.fixture
def cast(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Cast:
    return Cast(tmp_path / "store", tiny_tokenizer)


@pytest.mark.parametrize(
    ("chosen_options", "from_base"),
    [
        ({"critic_init": "reward", "credit": "red", "minibatches": 2}, False),
        ({"critic_init": "zero", "credit": "abc", "gradient_checkpointing": True}, True),
        ({"critic": "shared", "credit": "abc_policy"}, True),
    ],
)
def test_train_on_one_backbone_equals_separate_models(
    chosen_options: dict[str, Any], from_base: bool, cast: Cast, tmp_path: Path
) -> None:
    # The reference is the adapter of SFT, or the base itself.
    start = cast.base if from_base else cast.start
    chosen = options(
        **chosen_options, episodes=32, max_batch_tokens=64, keep="reward_gap", learning_rate=3e-2
    )
    histories = []
    for name, make in (("separate", cast.separate), ("shared", cast.shared)):
        made = make(chosen, start, start)
        done = train(tmp_path / name, made, chosen)
        histories.append((done["history"], made.policy))
    (separate, first), (shared, second) = histories
    assert len(separate) == 2
    moved = 0.0
    for one, other in zip(separate, shared, strict=True):
        for key in one:
            if isinstance(one[key], float) and not key.startswith("seconds"):
                assert other[key] == pytest.approx(one[key], abs=1e-5, rel=1e-5), key
        moved = max(moved, abs(one["kl"]))
    assert moved > 1e-3  # it learnt
    for mine, theirs in zip(
        adapter_weights(first, "default").values(),
        adapter_weights(second, "default").values(),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_train_on_one_backbone_resumes_bit_identical(cast: Cast, tmp_path: Path) -> None:
    chosen = options(critic_init="reward", episodes=48, epochs=1, checkpoint_every=1)
    whole = cast.shared(chosen, cast.start, cast.start)
    train(tmp_path / "whole", whole, chosen)

    halves = tmp_path / "halves"
    # One evaluation, and two rollouts in two passes each.
    train_until_stopped(halves, cast.shared(chosen, cast.start, cast.start), chosen, 5)
    checkpoint = halves / "scratch" / "checkpoint-2"
    saved = load_file(checkpoint / "trained-0")
    assert not any("base_layer" in name or "embed" in name for name in saved)
    assert {name.split(".")[-2] for name in saved if "lora_A" in name} == {"default", "critic"}
    assert not list(checkpoint.glob("*.safetensors"))  # of the whole model
    train(halves, cast.shared(chosen, cast.start, cast.start), chosen)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = (folder / "model" / name for folder in (tmp_path / "whole", halves))
        assert one.read_bytes() == other.read_bytes()
    kept = load_model(halves / "model", merge=False)
    for mine, theirs in zip(*(own_weights(model) for model in (kept, whole.policy)), strict=True):
        assert torch.equal(mine, theirs)


def own_weights(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    return list(adapter_weights(model, DEFAULT_ADAPTER).values())


def test_share_backbone_refuses_whole_models_and_other_bases(
    cast: Cast, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    policy = load_model(cast.start, merge=False)
    whole = RewardModel.from_policy(cast.base, tiny_tokenizer, RewardSettings(), seed=3)
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(
        UserError, match=r"found a whole reward model in .* fit it with reward.lora"
    ):
        share_backbone(policy, cast.start, cast.start, tmp_path / "whole")
    other = tmp_path / "other" / "model"
    save_model(small_llama(len(tiny_tokenizer), layers=2, seed=5), tiny_tokenizer, other)
    reward = RewardModel.from_policy(other, tiny_tokenizer, RewardSettings(), seed=3, lora=LORA)
    reward.save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match=r"the reward's base is .*other/model, expected the policy"):
        share_backbone(policy, cast.start, cast.start, tmp_path / "reward")
    with pytest.raises(UserError, match=r"the reference's base is .*other/model"):
        share_backbone(policy, cast.start, other, cast.reward)


def test_switch_keeps_the_trained_weights_trained(cast: Cast) -> None:
    made = cast.shared(options(), cast.start, cast.base)
    switch, ids = made.backbone.switch, torch.tensor([PROMPTS[0]])

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return made.policy(input_ids=ids).logits

    own = logits()
    trained = {name for name, w in made.policy.named_parameters() if w.requires_grad}
    assert trained and all(".default." in name for name in trained)
    with switch.on(None):
        torch.testing.assert_close(logits(), load_model(cast.base)(input_ids=ids).logits)
        with switch.on("reward"):
            assert not torch.allclose(logits(), own)
        with pytest.raises(Stop), switch.on("reward"):
            raise Stop
        torch.testing.assert_close(logits(), load_model(cast.base)(input_ids=ids).logits)
    assert torch.equal(logits(), own)
    assert trained == {name for name, w in made.policy.named_parameters() if w.requires_grad}
    rows = (PROMPTS[:2], [[5, 6, EOS], [7, EOS]])
    scores = made.reward.score_ids(*rows)
    torch.testing.assert_close(scores, RewardModel.from_pretrained(cast.reward).score_ids(*rows))
    assert torch.equal(logits(), own)
