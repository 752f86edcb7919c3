"""LoRA adapters: added, saved, loaded, merged, trained; errors of one line."""

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from support.ppo_tools import small_llama
from support.rows import random_pairs
from support.tiny_runs import tiny_recipe
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.model import LoraOptions, QuantizationOptions
from irl_align.errors import UserError
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import check_adapter, load_model, save_model, seeded
from irl_align.models.lora import (
    adapter_weights,
    add_adapter,
    base_of,
    has_adapter,
    quantization_config,
    require_bitsandbytes,
)
from irl_align.models.sft import fit_sft, sft_columns
from irl_align.models.trl import Guarded, Training
from irl_align.policy.ppo.backbone import share_backbone
from irl_align.reward.fit import fit_reward, pair_columns
from irl_align.reward.implicit import fit_implicit, reference_logps
from irl_align.reward.losses import PairLoss
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings

PROMPTS = [[1, 20, 21], [1, 30], [1, 20, 21]]
COMPLETIONS = [[5, 6, 2], [7, 2], [9, 9, 9, 2]]
MakeModel = Callable[[str], PreTrainedModel]


def shaken(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """The model with an adapter that changes its distribution: B is 0 at the start."""
    with torch.no_grad(), seeded(seed):
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return model


def adapted(model: PreTrainedModel, base: Path, **options: Any) -> PreTrainedModel:
    with seeded(0):
        add_adapter(model, LoraOptions(**{"r": 4, **options}), str(base))
    return shaken(model)


@pytest.fixture
def base(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[[str], Path]:
    def saved(arch: str) -> Path:
        folder = tmp_path / f"start-{arch}" / "model"
        save_model(tiny_model(arch), tiny_tokenizer, folder)
        return folder

    return saved


def logprobs(model: PreTrainedModel) -> torch.Tensor:
    rows = completion_logprobs(model, PROMPTS, COMPLETIONS)
    return torch.cat([torch.from_numpy(row) for row in rows])


def trained_names(model: PreTrainedModel) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_load_model_loads_a_saved_adapter_separate_or_merged(
    arch: str, base: Callable[[str], Path], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    start = base(arch)
    model = load_model(start)
    before = logprobs(model)
    with seeded(0):
        add_adapter(model, LoraOptions(r=4), str(start))
    torch.testing.assert_close(logprobs(model), before)  # B is 0
    assert all("lora_" in name for name in trained_names(model))
    shaken(model)
    assert (logprobs(model) - before).abs().max() > 0.05
    folder = tmp_path / "policy-1" / "model"
    save_model(model, tiny_tokenizer, folder)
    apart, merged = load_model(folder, merge=False), load_model(folder)
    torch.testing.assert_close(logprobs(apart), logprobs(model), rtol=0, atol=0)
    torch.testing.assert_close(logprobs(merged), logprobs(model), rtol=1e-4, atol=1e-5)
    assert has_adapter(apart)
    assert not has_adapter(merged)
    assert all(weight.requires_grad for weight in merged.parameters())
    small = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert small < sum(f.stat().st_size for f in start.glob("*.safetensors"))
    # peft itself, which takes the base from the config, gives the same log-probs.
    theirs = AutoPeftModelForCausalLM.from_pretrained
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"start-{arch}/model"', json.dumps(str(start))))
    torch.testing.assert_close(logprobs(theirs(folder).eval().get_base_model()), logprobs(apart))


def test_a_reward_starts_from_the_policys_adapter(
    base: Callable[[str], Path], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    start = base("llama")
    policy = tmp_path / "sft-1" / "model"
    save_model(adapted(load_model(start), start), tiny_tokenizer, policy)
    settings = RewardSettings(mean=0.3, bound=4.0, lm_coef=0.5)
    merged = RewardModel.from_policy(policy, tiny_tokenizer, settings, seed=3)
    reward = RewardModel.from_policy(policy, tiny_tokenizer, settings, 3, lora=LoraOptions(r=4))
    assert not has_adapter(merged.model)
    ours = merged.score_ids(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(reward.score_ids(PROMPTS, COMPLETIONS), ours, rtol=1e-5, atol=1e-5)
    names = trained_names(reward.model)
    assert {name for name in names if "lora_" not in name} == {"score.weight"}

    folder = tmp_path / "reward-2" / "model"
    reward.save_pretrained(folder)
    assert base_of(folder) == str(start)
    for merge in (True, False):
        again = RewardModel.from_pretrained(folder, merge=merge)
        assert again.settings == settings
        assert has_adapter(again.model) is not merge
        scores = again.score_ids(PROMPTS, COMPLETIONS)
        torch.testing.assert_close(scores, ours, rtol=1e-5, atol=1e-5)


def test_peft_loads_a_rewards_adapter(
    base: Callable[[str], Path], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    start = base("gpt_neox")
    lora = LoraOptions(r=4)
    reward = RewardModel.from_policy(start, tiny_tokenizer, RewardSettings(), 3, lora=lora)
    shaken(reward.model)
    reward.save_pretrained(tmp_path / "reward")
    ours = reward.score_ids(PROMPTS, COMPLETIONS)
    adapters_file = tmp_path / "reward" / "adapter_config.json"
    values = json.loads(adapters_file.read_text()) | {"base_model_name_or_path": str(start)}
    adapters_file.write_text(json.dumps(values))
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", num_labels=1
    ).eval()
    rows = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    logits = [theirs(input_ids=torch.tensor([row])).logits[0, 0].item() for row in rows]
    assert logits == pytest.approx(ours.tolist(), abs=1e-5)


def test_load_model_does_not_merge_into_half_precision(
    base: Callable[[str], Path], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Rounding to bfloat16 would lose a small change."""
    start = base("llama")
    save_model(adapted(load_model(start), start), tiny_tokenizer, tmp_path / "policy")
    half = load_model(tmp_path / "policy", dtype=torch.bfloat16)
    assert has_adapter(half) and half.dtype == torch.bfloat16
    parts = adapter_weights(half, "default").values()
    assert {part.dtype for part in parts} == {torch.float32}


# --- training -------------------------------------------------------------------------------------

FIT = {
    **{"per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-2},
    **{"save_steps": 2, "logging_steps": 2, "lr_scheduler_type": "constant"},
}


@pytest.mark.parametrize("kind", ["sft", "reward", "implicit"])
def test_training_an_adapter_resumes_bit_identical_after_a_kill(
    kind: str,
    base: Callable[[str], Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = base("llama")
    pairs = random_pairs(6, seed=3)

    def fit(work: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        where = Training(work, seed=11, device=torch.device("cpu"), run_name="run", label="fit")
        lora = LoraOptions(r=4, lora_dropout=0.2)
        if kind == "reward":
            plain = RewardSettings()
            reward = RewardModel.from_policy(start, tiny_tokenizer, plain, seed=1, lora=lora)
            columns = pair_columns(pairs)
            return reward.model, fit_reward(reward, columns, PairLoss(), FIT, where)
        model = adapted(load_model(start), start, lora_dropout=0.2)
        if kind == "implicit":
            logps = reference_logps([(1.0, model)], pairs)
            return model, fit_implicit(
                model, tiny_tokenizer, pairs, logps, FIT, where, at_reference=True
            )
        columns = sft_columns(list(pairs["prompt_ids"]), list(pairs["chosen_ids"]))
        return model, fit_sft(model, tiny_tokenizer, columns, FIT, where)

    whole, metrics = fit(tmp_path / "whole")
    assert metrics["steps"] == 6
    frozen = load_model(start).state_dict()
    for name, weight in whole.state_dict().items():
        if name.replace(".base_layer", "") in frozen:
            assert torch.equal(weight, frozen[name.replace(".base_layer", "")]), name
    assert any(p.grad is None and not p.requires_grad for p in whole.parameters())

    work = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(Guarded, "training_step", stopped_at(3))
        with pytest.raises(KeyboardInterrupt):
            fit(work)
    [saved] = {p.name for p in (work / "scratch" / "checkpoint-2").glob("*.safetensors")}
    assert saved == "trained.safetensors"
    resumed, again = fit(work)
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, resumed.get_parameter(name)), name
    assert again["last_loss"] == metrics["last_loss"]


def stopped_at(step: int) -> Callable[..., torch.Tensor]:
    """A training_step that is interrupted in this step."""
    whole = Guarded.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    return training_step


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        (["q_prj"], "model.lora.target_modules: found no q_prj in a llama; expected all-linear"),
        (["q_proj", "q_prj"], "model.lora.target_modules: found no q_prj in a llama"),
        (["lm_head"], "model.lora.target_modules: lm_head is no linear layer of the backbone"),
        (["embed_tokens"], "model.lora.target_modules: model.embed_tokens is no linear layer"),
    ],
)
def test_check_adapter_refuses_targets_that_are_no_linear_layers_of_the_backbone(
    targets: list[str], line: str, base: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError) as caught:
        check_adapter(base("llama"), LoraOptions(target_modules=targets), "model.lora")
    assert line in str(caught.value) and "\n" not in str(caught.value)
    if "q_prj" in targets:
        assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def test_check_adapter_accepts_all_linear_for_every_architecture(
    base: Callable[[str], Path],
) -> None:
    for arch in ("llama", "gpt2", "gpt_neox", "mistral"):
        check_adapter(base(arch), LoraOptions(target_modules="all-linear"), "model.lora")


def test_load_model_refuses_a_broken_or_foreign_adapter(
    base: Callable[[str], Path], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    start, folder = base("llama"), tmp_path / "policy"
    save_model(adapted(load_model(start), start), tiny_tokenizer, folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    text, data = config.read_text(), weights.read_bytes()
    values = json.loads(text)

    def refused(what: str) -> None:
        with pytest.raises(UserError) as caught:
            load_model(folder)
        assert what in str(caught.value) and "\n" not in str(caught.value)
        config.write_text(text)
        weights.write_bytes(data)

    weights.write_bytes(data[: len(data) // 2])
    refused("adapter_model.safetensors: no complete adapter")
    weights.unlink()
    refused("adapter_model.safetensors: no complete adapter")
    config.write_text(text[: len(text) // 2])
    refused("adapter_config.json: found no JSON")
    config.write_text(json.dumps(values | {"peft_type": "IA3"}))
    refused("peft_type: found IA3, expected LORA")
    config.write_text(json.dumps(values | {"base_model_name_or_path": None}))
    refused("base_model_name_or_path: found none, expected the base model")
    config.write_text(json.dumps(values | {"base_model_name_or_path": "no/such-model"}))
    refused("no/such-model: neither a folder nor a model")
    config.write_text(json.dumps(values | {"base_model_name_or_path": str(base("gpt2"))}))
    refused("the adapter does not fit its base model, found a GPT2LMHeadModel (gpt2)")
    config.write_text(json.dumps(values | {"r": 8}))
    refused("the adapter does not fit its base model")
    load_model(folder)

    reward = tmp_path / "reward"
    lora = LoraOptions(r=4)
    RewardModel.from_policy(start, tiny_tokenizer, RewardSettings(), 3, lora=lora).save_pretrained(
        reward
    )
    with pytest.raises(UserError, match="found the adapter of a reward, expected one of a policy"):
        load_model(reward)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["model.lora.r=0"], "model.lora.r: found 0, expected integer above 0"),
        (["model.lora.lora_alfa=1"], "model.lora.lora_alfa: unknown option; did you mean"),
        (["model.lora.target_modules=[]"], "model.lora.target_modules: found"),
        (["model.lora={}"], "model.lora needs a trained model"),
        (["sft.full=true"], "sft.full is an option of model.lora"),
        (["model.quantization={}"], "model.quantization needs model.lora"),
        (
            ["model.lora={}", "sft.full=true", "model.quantization={}"],
            "sft.full trains all weights, but model.quantization leaves none",
        ),
        (
            ["policy_update={kind: ppo, backbone: shared}", "model.lora={}", "sft.full=true"],
            "backbone shared needs adapters on one model: give reward.lora",
        ),
        (
            ["policy_update={kind: ppo, backbone: shared}", "reward.lora={}"],
            "backbone shared needs adapters on one model: give model.lora",
        ),
        (
            ["reward={kind: implicit, lora: {}}", "policy_update={kind: identity}"],
            "lora is an option of kind explicit, not of implicit",
        ),
        (
            ["model={path: base, lora: {r: 4}, from_scratch: null}", "reward.lora={}"],
            "reward.lora.r is 16, but the reward starts from SFT's adapter, whose r is 4",
        ),
        (
            [
                "model={path: base, lora: {}, quantization: {}, from_scratch: null}",
                "generation.backend=vllm",
            ],
            "generation.backend vllm does not sample the 4-bit model",
        ),
    ],
)
def test_a_recipe_with_contradictory_adapter_options_is_refused(
    options: list[str], line: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        tiny_recipe(tmp_path, *options)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_require_bitsandbytes_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "bitsandbytes" else find_spec(name),
    )
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install 'irl-align\[qlora\]'"):
        require_bitsandbytes("model.quantization")


# --- four bits ------------------------------------------------------------------------------------


def test_policy_and_reward_train_on_a_4_bit_base(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'irl-align[qlora]'")
    start = tmp_path / "start" / "model"  # of a block of 64 weights at least
    save_model(small_llama(len(tiny_tokenizer), width=64), tiny_tokenizer, start)
    bits = {"quantization_config": quantization_config(QuantizationOptions())}
    near = {"rtol": 0.0, "atol": 1e-3}  # on a CPU bitsandbytes has one kernel for each mode
    pairs = random_pairs(6, seed=3)
    where = Training(tmp_path / "work", seed=11, device=torch.device("cpu"), run_name="run")
    model = adapted(load_model(start, **bits), start)
    apart = (logprobs(load_model(start, **bits)) - logprobs(load_model(start))).abs().max()
    assert 1e-4 < apart < 5  # of 4 bits, and no other model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    logps = reference_logps([(1.0, model)], pairs)
    few = {**FIT, "max_steps": 12, "learning_rate": 3e-2}
    metrics = fit_implicit(model, tiny_tokenizer, pairs, logps, few, where, at_reference=True)
    assert metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics["last_loss"] < 0.69
    save_model(model, tiny_tokenizer, tmp_path / "policy")
    again = load_model(tmp_path / "policy")  # in 4 bits, as its config says
    assert again.is_quantized and has_adapter(again)
    torch.testing.assert_close(logprobs(again), logprobs(model), **near)

    settings = RewardSettings()
    lora = LoraOptions(r=4)
    reward = RewardModel.from_policy(start, tiny_tokenizer, settings, 3, lora=lora, **bits)
    columns = pair_columns(pairs)
    fit_reward(reward, columns, PairLoss(), few, replace(where, work=tmp_path / "other"))
    reward.save_pretrained(tmp_path / "reward")
    ours = reward.score_ids(PROMPTS, COMPLETIONS)
    scores = RewardModel.from_pretrained(tmp_path / "reward").score_ids(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(scores, ours, **near)
    backbone = share_backbone(model, start, start, tmp_path / "reward")
    shared = backbone.reward.score_ids(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(shared, ours, **near)
