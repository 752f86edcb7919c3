"""TRL's options in a recipe: one exact line for every mistake."""

import dataclasses
from pathlib import Path

import pytest
from support.recipe_files import SMALL, load, mistakes

from irl_align.config import trl_args


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (
            "sft:\n  args:\n    lerning_rate: 1",
            "8: sft.args.lerning_rate: no field of trl.SFTConfig; did you mean learning_rate?",
        ),
        (
            "sft:\n  args:\n    learning_rate: '1e-4'",
            "8: sft.args.learning_rate: found '1e-4', expected number",
        ),
        ("sft:\n  args: {max_steps: 1.5}", "7: sft.args.max_steps: found 1.5, expected integer"),
        (
            "sft:\n  args: {gradient_checkpointing: 'no'}",
            "7: sft.args.gradient_checkpointing: found 'no', expected true or false",
        ),
        (
            "sft:\n  args: {num_train_epochs: 0}",
            "7: sft.args.num_train_epochs: found 0, expected number above 0",
        ),
        (
            "sft:\n  args: {learning_rate: -1}",
            "7: sft.args.learning_rate: found -1, expected number at least 0",
        ),
        (
            "sft:\n  args: {logging_strategy: setps}",
            "7: sft.args.logging_strategy: found 'setps', expected one of no, steps, epoch; "
            "did you mean steps?",
        ),
        (
            "sft:\n  args: {max_length: 5}",
            "7: sft.args.max_length: a recipe cannot set it: use data.max_prompt_tokens and "
            "data.max_completion_tokens",
        ),
        (
            "sft:\n  args:\n    seed: 5",
            "8: sft.args.seed: a recipe cannot set it: use the recipe's seed",
        ),
        (
            "reward:\n  args: {beta: 0.1}",
            "7: reward.args.beta: no field of trl.RewardConfig but of trl.DPOConfig",
        ),
        (
            "reward:\n  schedule:\n    learning_rate:\n    - 1e-4\n    - 'x'",
            "10: reward.schedule.learning_rate.1: found 'x', expected number",
        ),
        (
            "reward:\n  schedule:\n    learnin_rate: [1, 2]",
            "8: reward.schedule.learnin_rate: no field of trl.RewardConfig; "
            "did you mean learning_rate?",
        ),
        (
            "reward:\n  schedule:\n    output_dir: [a, b]",
            "8: reward.schedule.output_dir: a recipe cannot set it: the run folder decides it; "
            "use the recipe's output_dir",
        ),
        (
            "policy_update:\n  args: {beta: 0.1}",
            "7: policy_update.args.beta: no field of trl.SFTConfig but of trl.DPOConfig",
        ),
        (
            "policy_update:\n  use: dpo\n  args: {beta: high}",
            "8: policy_update.args.beta: found 'high', expected number",
        ),
        (
            "policy_update:\n  kind: sft\n  args: {warmup_step: 1}",
            "8: policy_update.args.warmup_step: no field of trl.SFTConfig; "
            "did you mean warmup_steps?",
        ),
    ],
)
def test_a_mistake_in_trl_options_is_one_line(added: str, message: str) -> None:
    assert mistakes(SMALL + added + "\n") == [f"r.yaml:{message}"]


def test_trl_options_pass_through_unchanged() -> None:
    recipe = load(
        SMALL + "sft:\n"
        "  args: {learning_rate: 1, save_steps: 50, lr_scheduler_kwargs: {min_lr: 0.1},\n"
        "         bf16: null, lr_scheduler_type: cosine}\n"
        "reward: {kind: implicit, args: {loss_type: [sigmoid]}, schedule: {beta: [0.1, 5]}}\n"
        "policy_update: {kind: identity}\n"
    )
    assert recipe.sft.args == {
        "learning_rate": 1,
        "save_steps": 50,
        "lr_scheduler_kwargs": {"min_lr": 0.1},
        "bf16": None,
        "lr_scheduler_type": "cosine",
    }
    assert recipe.reward.args == {"loss_type": ["sigmoid"]}
    assert recipe.reward.schedule == {"beta": [0.1, 5]}


def test_reserved_names_are_fields_of_trl() -> None:
    import trl

    configs = (trl.SFTConfig, trl.RewardConfig, trl.DPOConfig)
    fields = {field.name for config in configs for field in dataclasses.fields(config)}
    assert set(trl_args.RESERVED) - fields == set()
    # The recipe's args never decide the run's folder, its randomness or an upload.
    dangerous = {"output_dir", "seed", "data_seed", "resume_from_checkpoint", "trust_remote_code"}
    dangerous |= {name for name in fields if name.startswith(("hub_", "push_to_hub", "eval_"))}
    assert dangerous <= set(trl_args.RESERVED)


def test_args_problems_accepts_the_defaults_of_trl() -> None:
    import trl

    for group, name in (("sft", "SFTConfig"), ("reward", "RewardConfig")):
        args = {
            field.name: getattr(field.default, "value", field.default)
            for field in dataclasses.fields(getattr(trl, name))
            if field.name not in trl_args.RESERVED and field.default is not dataclasses.MISSING
        }
        if group == "reward":
            del args["pad_to_multiple_of"]  # pairs are packed
        assert len(args) > 25
        assert list(trl_args.args_problems({group: {"args": args}})) == []
