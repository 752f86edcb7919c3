"""The Countdown task: its generator, its solver and its exact verifier."""

import itertools
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irl_align.errors import UserError
from irl_align.tasks.countdown import Problem, demonstrations, edit, gold, mistake, parse, search

SPLITS = ("train", "validation", "test")


def reachable(numbers: tuple[int, ...]) -> set[int]:
    """Every number that the game can make, by plain recursion over all pairs: no search order."""
    made: set[int] = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = Fraction(numbers[i]), Fraction(numbers[j])
        for value in (a + b, a * b, a - b, a / b):
            if value > 0 and value.denominator == 1:
                made |= {int(value)} | reachable((*rest, int(value)))
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=4), st.integers(1, 60), st.integers(0, 9))
def test_search_solves_what_can_be_solved(numbers: list[int], target: int, seed: int) -> None:
    problem = Problem(target, tuple(numbers))
    steps = search(problem, random.Random(seed))
    if target in numbers:  # a step may not give one of its operands back; no data has such a target
        return
    assert (steps is not None) == (target in reachable(problem.numbers))
    if steps is not None:
        assert mistake(problem, ", ".join(map(str, steps))) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3*8=24", None),
        ("8-5=3, 3*8=24", "illegal_number"),  # the 8 is used twice
        ("5+3=8, 8-4=4", "wrong_target"),
        ("8-5=3, 3+3=6, 6*4=24", None),  # 3 is given, and made
        ("3*8=25", "arithmetic"),
        ("8/3=2", "arithmetic"),  # a remainder
        ("3-8=5", "arithmetic"),
        ("12*2=24", "illegal_number"),
        ("24", "malformed"),
        ("", "malformed"),
        ("3*8=24,", "malformed"),
        ("3 * 8 = 24", "malformed"),
        ("3*8=24, 24-5=19", "wrong_target"),
    ],
)
def test_mistake_by_hand(text: str, expected: str | None) -> None:
    assert mistake(Problem(24, (3, 8, 5, 4)), text) == expected


def test_gold_counts_solved_problems_and_first_mistakes() -> None:
    prompts = ["24 from 3 8 5 4"] * 4
    result = gold(prompts, ["3*8=24", "3*8=25", "x", "3+8=11"], [[]] * 4)
    assert result.corpus == {
        "solved": 0.25,
        "malformed_rate": 0.25,
        "arithmetic_rate": 0.25,
        "illegal_number_rate": 0.0,
        "wrong_target_rate": 0.25,
    }
    assert all(sum(row.values()) == 1.0 for row in result.rows)
    assert not gold.lower_is_better and gold.headline in result.corpus


@pytest.mark.parametrize("numbers", [2, 3, 4])
def test_demonstrations_solve_their_problems(numbers: int) -> None:
    rows = demonstrations("train", 60, seed=1, numbers=numbers)
    result = gold([row["prompt"] for row in rows], [row["completion"] for row in rows], [])
    assert result.corpus["solved"] == 1.0
    for row in rows:
        problem = parse(row["prompt"])
        assert len(problem.numbers) == numbers and problem.target not in problem.numbers


def test_demonstrations_of_splits_have_no_problem_in_common() -> None:
    problems = [
        {
            (parse(row["prompt"]).target, *sorted(parse(row["prompt"]).numbers))
            for seed in (0, 1)
            for row in demonstrations(split, 150, seed, numbers=2)
        }
        for split in SPLITS
    ]
    assert all(not a & b for a, b in itertools.combinations(problems, 2))


def test_demonstrations_depend_on_the_seed_only() -> None:
    rows = demonstrations("test", 30, seed=3)
    assert demonstrations("test", 30, seed=3) == rows != demonstrations("test", 30, seed=4)
    assert demonstrations("test", 10, seed=3) == rows[:10]


def test_noise_is_the_share_of_mistakes_of_each_kind() -> None:
    clean, noisy = (demonstrations("train", 400, seed=0, numbers=3, noise=n) for n in (0.0, 0.3))
    assert [row["prompt"] for row in clean] == [row["prompt"] for row in noisy]
    result = gold([row["prompt"] for row in noisy], [row["completion"] for row in noisy], [])
    assert result.corpus["solved"] == pytest.approx(0.7, abs=0.07)
    for kind in ("arithmetic", "illegal_number", "wrong_target"):
        assert result.corpus[f"{kind}_rate"] == pytest.approx(0.1, abs=0.05)
    assert result.corpus["malformed_rate"] == 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_edit_gives_another_problem_with_a_solution(seed: int) -> None:
    prompt = "76 from 6 5 14 2"
    other = edit(prompt, random.Random(seed))
    assert other != prompt
    old, new = parse(prompt), parse(other)
    changed = sum(a != b for a, b in zip(old.numbers, new.numbers, strict=True))
    assert changed + (old.target != new.target) == 1
    assert edit(prompt, random.Random(seed)) == other


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("99 from 1 1", "the numbers cannot make the target; drop the row"),
        ("make 24 of 3 8", "expected a target and 2 to 6 numbers, such as"),
        ("24 from 24", "expected a target and 2 to 6 numbers"),
    ],
)
def test_gold_refuses_a_prompt_that_is_no_problem(prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        gold([prompt], ["1+1=2"], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split is 'dev', expected test, validation, train"),
        ({"size": 0}, "size is 0, expected 1 or more"),
        ({"numbers": 7}, "numbers is 7, expected 2 to 6"),
        ({"noise": 1.5}, "noise is 1.5, expected a share"),
    ],
)
def test_demonstrations_refuse_bad_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        demonstrations(**{"split": "train", "size": 5, "seed": 0, **options})
