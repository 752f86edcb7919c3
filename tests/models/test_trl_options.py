"""Every option of TRL that a recipe may set acts, or is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from support.tiny_trainings import BASE, GROUPS, Args, accepted, fields, problem, result

from irl_align.config.trl_args import DPO_LOSSES
from irl_align.errors import UserError
from irl_align.models.trl import Training
from irl_align.models.trl_options import check_args, training_args

# Options that need another model than the default one.
KINDS = {"router_aux_loss_coef": "mixtral", "disable_dropout": "gpt2"}
EPOCHS = {"max_steps": -1, "num_train_epochs": 1}
SGD = {"optim": "sgd", "learning_rate": 0.1}
FOUR = {"max_steps": 4}
# Field -> options that it needs, and a value that changes a training.
EFFECTS: dict[str, tuple[Args, Any]] = {
    "per_device_train_batch_size": ({}, 3),
    "num_train_epochs": (EPOCHS, 2.0),
    "max_steps": ({}, 3),
    "learning_rate": ({}, 0.1),
    "lr_scheduler_type": ({}, "constant"),
    "lr_scheduler_kwargs": ({"lr_scheduler_type": "cosine"}, {"num_cycles": 0.9}),
    "warmup_steps": ({}, 2),
    "optim": ({}, "sgd"),
    "optim_args": ({**SGD, "max_steps": 3}, "momentum=0.9"),
    "weight_decay": ({}, 0.5),
    "adam_beta1": ({}, 0.1),
    "adam_beta2": ({"max_steps": 3}, 0.1),
    "adam_epsilon": ({}, 1e-1),
    "gradient_accumulation_steps": ({}, 2),
    "max_grad_norm": (SGD, 1e-4),
    "neftune_noise_alpha": ({}, 5.0),
    "logging_strategy": (FOUR, "no"),
    "logging_steps": (FOUR, 10),
    "logging_first_step": ({**FOUR, "logging_steps": 10}, True),
    "save_steps": ({"max_steps": 4}, 2),
    "save_total_limit": ({"save_steps": 1}, 1),
    "gradient_checkpointing": ({}, True),
    "gradient_checkpointing_kwargs": ({"gradient_checkpointing": True}, {"use_reentrant": True}),
    "dataloader_drop_last": (EPOCHS, True),
    "train_sampling_strategy": ({}, "sequential"),
}
OWN: dict[str, dict[str, tuple[Args, Any]]] = {
    "SFTConfig": {"loss_type": ({}, "dft"), "router_aux_loss_coef": ({}, 5.0)},
    "RewardConfig": {
        "disable_dropout": ({}, False),
        "center_rewards_coefficient": ({}, 0.5),
    },
    "DPOConfig": {
        "beta": ({}, 2.0),
        "loss_type": ({}, ["ipo"]),
        "loss_weights": ({"loss_type": ["sigmoid", "ipo"]}, [1.0, 0.1]),
        "label_smoothing": ({**SGD, "loss_type": ["robust"]}, 0.3),
        "f_divergence_type": ({"max_steps": 3}, "js_divergence"),
        "f_alpha_divergence_coef": (
            {"max_steps": 3, "f_divergence_type": "alpha_divergence"},
            2.0,
        ),
        "use_weighting": ({**SGD, "learning_rate": 10.0, "max_grad_norm": 0.0}, True),
        "discopop_tau": ({"loss_type": ["discopop"], "max_steps": 3}, 0.5),
        "disable_dropout": ({}, False),
        "router_aux_loss_coef": ({}, 5.0),
    },
}
# Their effect is on speed, memory or precision of a device, and not on what is learnt.
ON_DEVICES = {
    "bf16", "fp16", "tf32", "torch_empty_cache_steps", "dataloader_num_workers",
    "dataloader_pin_memory", "activation_offloading", "pad_to_multiple_of",
}  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_every_field_of_trl_acts_or_is_refused(group: str) -> None:
    # A field that a new version of TRL adds fails here: add it to EFFECTS, or refuse it.
    own = {} if group == "iqlearn" else OWN[group]
    known = {*EFFECTS, *own, *ON_DEVICES} & fields(group).keys()
    assert accepted(group) - known == set()
    assert known - accepted(group) <= {"loss_type", "router_aux_loss_coef", "pad_to_multiple_of"}


def differ(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two trainings differ by more than rounding."""
    if not torch.allclose(a["weights"], b["weights"], rtol=1e-5, atol=1e-6):
        return True
    return any(a[name] != b[name] for name in a.keys() - {"weights"})


CASES = [
    # transformers reads what the three configs share; the trainers' own parts are quick to test.
    pytest.param(group, name, needs, value, marks=[pytest.mark.slow] * shared)
    for group, own in OWN.items()
    for shared, options in ((group != "SFTConfig", EFFECTS), (False, own))
    for name, (needs, value) in options.items()
]


@pytest.mark.parametrize(("group", "name", "needs", "value"), CASES)
def test_an_accepted_field_changes_the_training(
    group: str, name: str, needs: Args, value: Any, tmp_path: Path
) -> None:
    assert problem(group, name, value) is None
    kind = KINDS.get(name, "llama")
    args = {**BASE, **needs}
    plain = without(group, tuple(sorted(args.items(), key=str)), kind, tmp_path)
    assert differ(plain, result(group, {**args, name: value}, tmp_path / "with", kind))


_PLAIN: dict[str, dict[str, Any]] = {}


def without(group: str, args: Any, kind: str, folder: Path) -> dict[str, Any]:
    """The training without the field; one for all fields that need the same options."""
    key = f"{group} {args} {kind}"
    if key not in _PLAIN:
        _PLAIN[key] = result(group, dict(args), folder / "without", kind)
        if len(_PLAIN) == 1:  # two equal trainings do not differ
            assert not differ(_PLAIN[key], result(group, dict(args), folder / "again", kind))
    return _PLAIN[key]


@pytest.mark.parametrize(
    ("group", "args", "message"),
    [
        ("SFTConfig", {"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ("SFTConfig", {"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ("SFTConfig", {"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
        ("SFTConfig", {"lr_scheduler_kwargs": {"cycles": 1}}, "unexpected keyword .*cycles"),
        ("RewardConfig", {"optim": "galore_adamw"}, "galore_torch"),
        ("RewardConfig", {"optim": "sgd", "optim_args": "momentum"}, "optim sgd, lr_scheduler"),
        ("RewardConfig", {"adam_beta1": 2.0}, "Invalid beta parameter"),
        ("RewardConfig", {"optim": "sgd", "adam_beta1": 0.5}, "optim sgd does not read it"),
        ("SFTConfig", {"optim_args": "momentum=0.5"}, "adamw_torch.* does not read it"),
        ("SFTConfig", {"fp16": True}, "fp16 needs a GPU"),
        ("SFTConfig", {"tf32": True}, "tf32 requires"),
        ("DPOConfig", {"loss_weights": [1.0, 2.0]}, "loss_weights. must have the same"),
        ("DPOConfig", {"label_smoothing": 0.1}, "label_smoothing: found 0.1, but only loss_type"),
        ("DPOConfig", {"discopop_tau": 0.1}, "but only loss_type discopop reads it"),
        (
            "DPOConfig",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
            "the limit at 1 is f_divergence_type reverse_kl",
        ),
    ],
)
def test_check_args_refuses_before_any_training(
    group: str, args: Args, message: str, tmp_path: Path
) -> None:
    assert all(problem(group, name, value) is None for name, value in args.items())
    training = Training(tmp_path, 1, torch.device("cpu"))
    with pytest.raises(UserError, match=message) as error:
        check_args(training_args(getattr(trl, group), args, training))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("group", "args", "message"),
    [
        (
            "SFTConfig",
            {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
            "r: dataloader_drop_last leaves no batch of 5 rows",
        ),
        ("SFTConfig", {"router_aux_loss_coef": 0.1}, "r: args of SFTConfig: .*Mixture-of-Experts"),
    ],
)
def test_a_training_refuses_in_one_line_what_its_rows_or_model_do_not_allow(
    group: str, args: Args, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        result(group, {**BASE, **EPOCHS, **args}, tmp_path / "work", "llama")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_every_accepted_loss_of_dpo_trains(loss: str, tmp_path: Path) -> None:
    smoothing = {"label_smoothing": 0.2} if loss in ("robust", "exo_pair") else {}
    args = {**BASE, "max_steps": 1, "loss_type": [loss], **smoothing}
    result("DPOConfig", args, tmp_path / "work", "llama")
