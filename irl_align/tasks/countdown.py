"""The Countdown task: reach a number from given ones, with an exact gold metric.

A prompt is ``24 from 3 8 5 4``. A completion is one operation per step, ``3*8=24``, or
``8-5=3, 3*4=12``. Every given number and every result of a step is used at most once, and the last
result is the target. Arithmetic is that of the game: positive whole numbers, no remainders. The
data are made by a solver that searches, as in Stream of Search (arXiv:2404.03683), whose optimal
paths the demonstrations are.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from irl_align.errors import UserError
from irl_align.tasks.gold import GoldResult

LARGEST_TARGET = 100
LARGEST_NUMBER = 20
_SHARES = {"test": range(10), "validation": range(10, 20), "train": range(20, 100)}
_PROMPT = re.compile(r"(\d+) from (\d+(?: \d+){1,5})")
_STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")

Mistake = Literal["malformed", "arithmetic", "illegal_number", "wrong_target"]
"""First thing wrong with a completion: its form; a step whose result is wrong; a number that is not
given or was used before; or a last result that is not the target."""


class Problem(NamedTuple):
    """A target and the numbers to reach it from."""

    target: int
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.target} from {' '.join(map(str, self.numbers))}"


class Step(NamedTuple):
    """``left operator right = result``."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


def apply(left: int, operator: str, right: int) -> int | None:
    """Result of a step; None where the game forbids it: not positive, or with a remainder."""
    if operator == "+":
        return left + right
    if operator == "*":
        return left * right
    if operator == "-":
        return left - right if left > right else None
    return left // right if right and left % right == 0 else None


def _next_steps(numbers: Sequence[int]) -> Iterator[Step]:
    """Every step from these numbers, without those that change nothing."""
    for i, left in enumerate(numbers):
        for j, right in enumerate(numbers):
            for operator in "+*-/" if i != j else "":
                if (operator in "+*" and i > j) or (operator in "*/" and right == 1):
                    continue
                result = apply(left, operator, right)
                if result is not None and result not in (left, right):
                    yield Step(left, operator, right, result)


def _without(numbers: Sequence[int], step: Step) -> tuple[int, ...]:
    rest = list(numbers)
    rest.remove(step.left)
    rest.remove(step.right)
    return (*rest, step.result)


def search(problem: Problem, rng: random.Random) -> list[Step] | None:
    """Steps of a solution found by a depth-first search in random order; None if there is none."""
    failed: set[tuple[int, ...]] = set()

    def solve(numbers: tuple[int, ...]) -> list[Step] | None:
        state = tuple(sorted(numbers))
        if len(numbers) < 2 or state in failed:
            return None
        steps = list(_next_steps(numbers))
        rng.shuffle(steps)
        for step in steps:
            if step.result == problem.target:
                return [step]
        for step in steps:
            rest = solve(_without(numbers, step))
            if rest is not None:
                return _used([step, *rest], problem)
        failed.add(state)
        return None

    return solve(problem.numbers)


def _used(steps: list[Step], problem: Problem) -> list[Step]:
    """The steps whose results a later one needs, and the last one."""
    needed, used = Counter[int](), list[Step]()
    for step in reversed(steps):
        if (step.result == problem.target and not used) or needed[step.result]:
            needed[step.result] -= 1
            needed.update((step.left, step.right))
            used.append(step)
    return used[::-1]


@lru_cache(maxsize=65536)
def parse(prompt: str) -> Problem:
    """The problem of a prompt. Raises UserError: it is no problem, or has no solution."""
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise UserError(
            f"prompt {prompt!r}: expected a target and 2 to 6 numbers, such as 24 from 3 8 5 4"
        )
    problem = Problem(int(match[1]), tuple(map(int, match[2].split())))
    if search(problem, random.Random(0)) is None:
        raise UserError(f"prompt {prompt!r}: the numbers cannot make the target; drop the row")
    return problem


def mistake(problem: Problem, text: str) -> Mistake | None:
    """The first mistake of a completion; None if it solves the problem."""
    free = Counter(problem.numbers)
    last = None
    for part in text.strip().split(", "):
        match = _STEP.fullmatch(part)
        if match is None:
            return "malformed"
        left, right, result = int(match[1]), int(match[3]), int(match[4])
        if apply(left, match[2], right) != result:
            return "arithmetic"
        free.subtract((left, right))
        if min(free.values()) < 0:
            return "illegal_number"
        free[result] += 1
        last = result
    return None if last == problem.target else "wrong_target"


class CountdownGold:
    """Share of problems that are solved; :class:`irl_align.tasks.gold.GoldMetric`."""

    headline = "solved"
    lower_is_better = False

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> GoldResult:
        """Rows and corpus: solved, and {kind of mistake}_rate; each row has one 1."""
        if not prompts or len(prompts) != len(completions):
            raise UserError(
                f"gold metric: found {len(prompts)} prompts and {len(completions)} completions, "
                "expected equal numbers, at least one"
            )
        rows = [
            self._row(mistake(parse(prompt), text))
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        return GoldResult(
            {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}, rows
        )

    def _row(self, wrong: Mistake | None) -> dict[str, float]:
        row = {"solved": float(wrong is None)}
        return row | {f"{kind}_rate": float(kind == wrong) for kind in get_args(Mistake)}


gold = CountdownGold()
"""Gold metric of the task."""


def edit(prompt: str, rng: random.Random) -> str:
    """A neighbouring problem: another target, or one number replaced; it has a solution."""
    target, numbers = parse(prompt)
    while True:
        place = rng.randrange(len(numbers) + 1)
        other = Problem(rng.randint(1, LARGEST_TARGET), numbers)
        if place < len(numbers):
            changed = list(numbers)
            changed[place] = rng.randint(1, LARGEST_NUMBER)
            other = Problem(target, tuple(changed))
        if _is_open(other) and other != (target, numbers) and search(other, rng) is not None:
            return str(other)


def _is_open(problem: Problem) -> bool:
    """Whether the target is not simply one of the numbers."""
    return problem.target not in problem.numbers


def demonstrations(
    split: str, size: int, seed: int, numbers: int = 4, noise: float = 0.0
) -> list[dict[str, str]]:
    """``size`` rows with prompt and completion, from the split train, validation or test.

    numbers: how many are given, 2 to 6. A problem (its target and its numbers in any order) belongs
    to the same split for every seed, so splits are disjoint. noise: share of the demonstrations
    with a mistake: a wrong result, a number that is not given, or another target.
    """
    if split not in _SHARES:
        raise UserError(f"countdown task: split is {split!r}, expected {', '.join(_SHARES)}")
    if size < 1:
        raise UserError(f"countdown task: size is {size}, expected 1 or more")
    if not 2 <= numbers <= 6:
        raise UserError(f"countdown task: numbers is {numbers}, expected 2 to 6")
    if not 0.0 <= noise <= 1.0:
        raise UserError(f"countdown task: noise is {noise}, expected a share between 0 and 1")
    return [_demonstration(split, f"{split}/{seed}/{row}", numbers, noise) for row in range(size)]


def _demonstration(split: str, key: str, numbers: int, noise: float) -> dict[str, str]:
    problem_rng, solver_rng, noise_rng = (
        random.Random(f"{part}/{key}") for part in ("problem", "solver", "noise")
    )
    problem = _draw(problem_rng, numbers)
    while problem is None or _bucket(problem) not in _SHARES[split]:
        problem = _draw(problem_rng, numbers)
    steps = search(problem, solver_rng) or []  # the drawn problem has a solution
    if noise_rng.random() < noise:
        steps = noise_rng.choice(_MISTAKES)(problem, steps, noise_rng)
    return {"prompt": str(problem), "completion": ", ".join(map(str, steps))}


def _draw(rng: random.Random, numbers: int) -> Problem | None:
    """Numbers, and what random steps make of them as the target; None if that is no problem."""
    given = tuple(rng.randint(1, LARGEST_NUMBER) for _ in range(numbers))
    left, target = given, 0
    for _ in range(numbers - 1):
        steps = list(_next_steps(left))
        if not steps:
            return None
        step = rng.choice(steps)
        left, target = _without(left, step), step.result
    problem = Problem(target, given)
    return problem if 10 <= target <= LARGEST_TARGET and _is_open(problem) else None


def _bucket(problem: Problem) -> int:
    name = str(Problem(problem.target, tuple(sorted(problem.numbers))))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100


def _wrong_result(_: Problem, steps: list[Step], rng: random.Random) -> list[Step]:
    """The last step has another left operand, which does not give its result."""
    *first, last = steps
    return [*first, last._replace(left=last.left + rng.choice((1, 2, 3)))]


def _foreign_number(problem: Problem, steps: list[Step], rng: random.Random) -> list[Step]:
    """One step that makes the target from numbers that are not given."""
    foreign = rng.choice([n for n in range(1, problem.target) if n not in problem.numbers])
    return [Step(problem.target - foreign, "+", foreign, problem.target)]


def _other_target(_: Problem, steps: list[Step], rng: random.Random) -> list[Step]:
    """The last step has another operator, so that it ends elsewhere."""
    *first, last = steps
    others = {op: apply(last.left, op, last.right) for op in "+-*/" if op != last.operator}
    operator = rng.choice([op for op, result in others.items() if result is not None])
    return [*first, Step(last.left, operator, last.right, others[operator] or 0)]


_Noise = Callable[[Problem, list[Step], random.Random], list[Step]]
_MISTAKES: tuple[_Noise, ...] = (_wrong_result, _foreign_number, _other_target)
