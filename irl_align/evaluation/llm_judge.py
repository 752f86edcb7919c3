"""Win rates of a run's policy by a chat model, pair by pair, after MT-Bench (arXiv:2306.05685).

The judge is asked about every pair in both orders; an answer that wins in one order only has not
won. Verdicts are saved as they come, so that a rerun asks for the missing ones only.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from irl_align.data.rows import Prompt, as_messages, is_one_turn, prompt_text
from irl_align.data.splits import choose_prompts
from irl_align.errors import UserError
from irl_align.evaluation.chat_client import Endpoint, NoReply
from irl_align.evaluation.win_rates import LastSamples, last_samples, prompt_id
from irl_align.utils.statistics import clustered_share

AT_ONCE = 8  # questions that are asked in parallel
MAX_FAILURES = 8  # questions in a row without a reply, after which no more are asked
SYSTEM = (
    "You compare two answers to one request, and judge fairly. Look at how well each does what was "
    "asked: whether it is right, complete, relevant and well written. Neither the order of the "
    "answers nor their length is a merit. Say in a few sentences why, then end with your verdict "
    "on a line of its own: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they "
    "are equally good."
)
QUESTION = "[{what}]\n{asked}\n\n[Answer A]\n{a}\n\n[Answer B]\n{b}\n\n[Which is better?]"
Question = tuple[Prompt, str, str]
"""A prompt and the answers A and B."""
DECIDED: dict[tuple[str | None, str | None], tuple[str, float]] = {
    ("A", "B"): ("wins", 1.0),
    ("B", "A"): ("losses", 0.0),
}
"""Verdicts on a pair in both orders -> what the own answer does, and its outcome."""
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt: the policy's own and the opponent's."""

    key: str
    prompt: Prompt
    own: str
    other: str

    def questions(self) -> tuple[Question, Question]:
        """(prompt, A, B) in both orders; A is the policy's own answer in the first."""
        return (self.prompt, self.own, self.other), (self.prompt, self.other, self.own)


def chat_win_rates(
    source: Path, endpoint: Endpoint, prompts: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Win rates of a run's last policy by a chat model, at every temperature that it was sampled.

    The opponents are the policy that the run started from and the first demonstration of each
    prompt. prompts: most prompts, chosen by hash. Raises UserError: no finished run, or a judge
    that gives no verdict at all.
    """
    label, samples = last_samples(source)
    comparisons = [
        (one.temperature, opponent, pairs)
        for one in samples
        for opponent, pairs in _pairs(one, prompts, seed).items()
    ]
    verdicts = Verdicts(source / "judgements", endpoint)
    verdicts.ask([pair for _, _, pairs in comparisons for pair in pairs])
    rows = [
        {"temperature": temperature, "against": opponent, **_outcome(pairs, verdicts)}
        for temperature, opponent, pairs in comparisons
    ]
    return {"judge": endpoint.model, "url": endpoint.url, "policy": label, "rows": rows}


def _pairs(samples: LastSamples, prompts: int | None, seed: int) -> dict[str, list[Pair]]:
    """Opponent -> pairs to judge, on the chosen prompts; without opponents that have no answers."""
    chosen = choose_prompts(map(prompt_id, samples.rows), prompts, seed)
    rows = [(key, row) for row in samples.rows if (key := prompt_id(row)) in chosen]
    pairs = {
        opponent: [
            Pair(key, row["prompt"], row["completion"], others[key])
            for key, row in rows
            if key in others
        ]
        for opponent, others in samples.opponents.items()
    }
    return {opponent: own for opponent, own in pairs.items() if own}


def question_text(prompt: Prompt, a: str, b: str) -> str:
    """What the judge is asked about answers A and B; a conversation is shown turn by turn."""
    if is_one_turn(prompt):
        return QUESTION.format(what="Request", asked=prompt_text(prompt), a=a, b=b)
    turns = [f"[{turn['role'].capitalize()}]\n{turn['content']}" for turn in as_messages(prompt)]
    return QUESTION.format(what="Conversation", asked="\n\n".join(turns), a=a, b=b)


class Verdicts:
    """A judge's verdicts on questions, in a file that grows with every reply."""

    def __init__(self, folder: Path, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        name = re.sub(r"[^\w.-]+", "-", endpoint.model)[:60]
        digest = hashlib.sha256(f"{endpoint.url} {endpoint.model}".encode()).hexdigest()[:8]
        self.path = folder / f"{name}-{digest}.jsonl"
        self.known: dict[str, str] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a kill may cut a line off
                    record = json.loads(line)
                    self.known[str(record["key"])] = str(record["verdict"])
        self.unreadable: dict[str, str] = {}
        """Question -> a reply without a verdict."""
        self.unanswered: dict[str, str] = {}
        """Question -> error of the last try."""
        self._lock = threading.Lock()
        self._failures = 0

    def key(self, question: Question) -> str:
        """A hash of everything that the judge reads."""
        content = json.dumps([SYSTEM, QUESTION, self.endpoint.model, *question])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def ask(self, pairs: Iterable[Pair]) -> None:
        """Ask about the pairs that differ, where no verdict is saved.

        Raises UserError: the endpoint does not answer, or none of its replies has a verdict.
        """
        questions = {
            self.key(question): question
            for pair in pairs
            if pair.own != pair.other
            for question in pair.questions()
        }
        missing = {key: q for key, q in questions.items() if key not in self.known}
        if not missing:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")  # a kill cut the last line off
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                work = pool.map(self._ask, missing.items())
                for _ in tqdm(work, total=len(missing), desc="judge", disable=None):
                    pass
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        if not any(key in self.known for key in questions):
            if not self.unreadable:
                raise self._unreachable_error()
            reply = " ".join(next(iter(self.unreadable.values())).split())
            raise UserError(
                f"--judge: {self.endpoint.model}: none of {len(self.unreadable)} replies has a "
                f"verdict [[A]], [[B]] or [[C]]; one of them: {reply[:80]!r}"
            )

    def _ask(self, item: tuple[str, Question]) -> None:
        key, (prompt, a, b) = item
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question_text(prompt, a, b)},
        ]
        if self._failures >= MAX_FAILURES:
            raise self._unreachable_error()
        try:
            reply = self.endpoint.reply(messages)
        except NoReply as error:
            with self._lock:
                self.unanswered[key] = str(error)
                self._failures += 1
            return
        verdicts = _VERDICT.findall(reply)
        with self._lock:
            self._failures = 0
            if not verdicts:
                self.unreadable[key] = reply
                return
            self.known[key] = verdicts[-1].upper()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "verdict": self.known[key]}) + "\n")

    def _unreachable_error(self) -> UserError:
        cause = next(iter(self.unanswered.values()), "")
        return UserError(
            f"--judge: {self.endpoint.url} does not answer: {cause}; {len(self.known)} verdicts "
            "are saved, and the same command resumes"
        )


def _outcome(pairs: Sequence[Pair], verdicts: Verdicts) -> dict[str, Any]:
    """Win rate of the policy's own answers: a win or a loss is one in both orders, all else ties.

    Pairs without both verdicts are counted as unreadable or unanswered, and left out.
    """
    names = ("wins", "ties", "losses", "inconsistent", "equal_texts", "unreadable", "unanswered")
    counts = Counter(dict.fromkeys(names, 0))
    outcomes, keys = [], []
    for pair in pairs:
        questions = [verdicts.key(question) for question in pair.questions()]
        both = verdicts.known.get(questions[0]), verdicts.known.get(questions[1])
        if pair.own == pair.other:
            both = "C", "C"
            counts["equal_texts"] += 1
        elif None in both:
            unreadable = not verdicts.unreadable.keys().isdisjoint(questions)
            counts["unreadable" if unreadable else "unanswered"] += 1
            continue
        result, outcome = DECIDED.get(both, ("ties", 0.5))
        counts[result] += 1
        counts["inconsistent"] += result == "ties" and both != ("C", "C")
        outcomes.append(outcome)
        keys.append(pair.key)
    share = asdict(clustered_share(outcomes, keys)) if outcomes else None
    return {"pairs": len(pairs), "judged": len(outcomes), "win_rate": share, **counts}
