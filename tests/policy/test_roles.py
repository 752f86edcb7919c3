"""Roles of stages and of records."""

import pytest

from irl_align.policy.roles import (
    DEMONSTRATIONS,
    PICK,
    Role,
    is_evaluation,
    signs_in,
    signs_key,
    stage_record_key,
    stage_role,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("start", ("data", None)),
        ("sft", ("SFT", None)),
        ("samples/train/policy-1/t1", ("samples and pairs", 1)),
        ("selected/train/policy-2", ("samples and pairs", 2)),
        ("pairs/0", ("samples and pairs", 0)),
        ("reward/3", ("reward", 3)),
        ("policy-2", ("policy", 1)),
        ("candidate-rewards/1", ("policy", 1)),
        ("samples/best-of-n/policy-0/t1", ("policy", 0)),
        ("samples/held_out-candidates/policy-0/t1", ("measuring", None)),
        ("samples/evaluation/policy-0/t0.7", ("measuring", None)),
        ("selected/held_out/policy-1", ("measuring", None)),
        ("reward-report/0", ("measuring", None)),
        ("vitals/1", ("measuring", None)),
        ("matched-entropy/1", ("measuring", None)),
        ("evaluation/demonstrations", ("measuring", None)),
    ],
)
def test_role_gives_its_part_and_iteration(text: str, expected: tuple[str, int | None]) -> None:
    role = Role.parse(text)
    assert (role.part, role.iteration) == expected
    assert str(role) == text


@pytest.mark.parametrize(
    ("role", "text"),
    [
        (PICK, "pick"),
        (DEMONSTRATIONS, "evaluation/demonstrations"),
        (Role.evaluation(2, 0.7), "evaluation/2/t0.7"),
        (Role.evaluation_rewards(1), "evaluation/1/rewards"),
        (Role.samples("train", "policy-1", 1.0), "samples/train/policy-1/t1"),
        (Role.selected("held_out", "policy-2"), "selected/held_out/policy-2"),
        (Role.policy(3), "policy-3"),
        (Role("my-scores", 4), "my-scores/4"),
    ],
)
def test_role_reads_back_from_its_text(role: Role, text: str) -> None:
    assert str(role) == text
    assert Role.parse(text) == role


def test_stage_record_key_reads_back_its_role() -> None:
    assert stage_record_key(Role.pairs(1)) == "stage/pairs/1"
    assert stage_role({"key": "stage/pairs/1"}) == Role.pairs(1)
    assert stage_role({"key": "pairs/1"}) is None


def test_signs_in_names_the_subject() -> None:
    key = signs_key("policy", 2)
    assert key == "signs/policy-2"
    assert signs_in({"key": key, "signs": ["kl: 9 nats"]}) == ["policy-2: kl: 9 nats"]
    assert signs_in({"key": "vitals/2"}) == []


def test_is_evaluation_leaves_out_demonstrations_and_other_records() -> None:
    assert is_evaluation({"key": "evaluation/0/t1", "policy": 0})
    assert not is_evaluation({"key": "evaluation/demonstrations"})
    assert not is_evaluation({"key": "vitals/0", "policy": 0})
