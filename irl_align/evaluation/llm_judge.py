"""A run's samples judged pair by pair by a chat model, after MT-Bench (arXiv:2306.05685).

Every pair is asked in both orders; who wins in one only has not won. Verdicts are kept as they
come, so that a rerun asks for those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from irl_align.data.encoding import prompt_text
from irl_align.data.loading import choose_prompts
from irl_align.errors import UserError
from irl_align.evaluation.chat_client import Endpoint, NoReply
from irl_align.evaluation.win_rates import SamplesOf, key_of, last_samples
from irl_align.utils.statistics import clustered_share

AT_ONCE = 8  # questions that are asked side by side
MAX_FAILURES = 8  # questions without a reply, one after another, after which the judge is given up
SYSTEM = (
    "You compare two answers to one request, and judge fairly. Look at how well each does what was "
    "asked: whether it is right, complete, relevant and well written. Neither the order of the "
    "answers nor their length is a merit. Say in a few sentences why, then end with your verdict "
    "on a line of its own: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they "
    "are equally good."
)
QUESTION = "[Request]\n{prompt}\n\n[Answer A]\n{a}\n\n[Answer B]\n{b}\n\n[Which is better?]"
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, the policy's own and another."""

    key: str
    prompt: str
    own: str
    other: str

    def questions(self) -> Iterator[tuple[str, str, str]]:
        """(prompt, A, B) in both orders, the own answer first in the first."""
        yield self.prompt, self.own, self.other
        yield self.prompt, self.other, self.own


def judged_by(
    source: Path, endpoint: Endpoint, prompts: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Win rates of a run's last policy by a chat model, at every temperature that it was sampled.

    Against the policy that the run started from and against each prompt's first demonstration.
    prompts: at most so many, chosen by hash. Raises UserError: no finished run, or a judge that
    gives no verdict at all.
    """
    samples = last_samples(source)
    asked = list(_comparisons(samples, prompts, seed))
    kept = Verdicts(source / "judgements", endpoint)
    kept.ask([pair for _, _, pairs in asked for pair in pairs])
    rows = [
        {"temperature": temperature, "against": against, **_outcome(pairs, kept)}
        for temperature, against, pairs in asked
    ]
    return {
        "judge": endpoint.model,
        "url": endpoint.url,
        "policy": samples.label,
        "rows": rows,
    }


def _comparisons(
    samples: SamplesOf, prompts: int | None, seed: int
) -> Iterator[tuple[float, str, list[Pair]]]:
    """(temperature, opponent, pairs) of everything that is compared."""
    for temperature, own, start in samples.by_temperature:
        chosen = choose_prompts([key_of(row) for row in own], prompts, seed)
        rows = [row for row in own if key_of(row) in chosen]
        at_start = {key_of(row): row["completion"] for row in start}
        first = {key_of(r): r["demonstrations"][0] for r in rows if r.get("demonstrations")}
        for against, others in (("start", at_start), ("demonstrations", first)):
            pairs = [
                Pair(key_of(row), prompt_text(row["prompt"]), row["completion"], others[key])
                for row in rows
                if (key := key_of(row)) in others
            ]
            if pairs:
                yield temperature, against, pairs


class Verdicts:
    """What a judge said of questions, in a file that grows as it answers."""

    def __init__(self, folder: Path, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        name = re.sub(r"[^\w.-]+", "-", endpoint.model)[:60]
        digest = hashlib.sha256(f"{endpoint.url} {endpoint.model}".encode()).hexdigest()[:8]
        self.path = folder / f"{name}-{digest}.jsonl"
        self.known = dict(_read(self.path))
        self.unreadable: dict[str, str] = {}
        """Question -> a reply without a verdict."""
        self.unanswered: dict[str, str] = {}
        """Question -> what went wrong at the last try."""
        self._lock = threading.Lock()
        self._silent = 0

    def of(self, question: tuple[str, str, str]) -> str | None:
        """A, B or C; None where there is no verdict."""
        return self.known.get(self.key(question))

    def key(self, question: tuple[str, str, str]) -> str:
        """Name of a question by all that the judge is told."""
        content = json.dumps([SYSTEM, QUESTION, self.endpoint.model, *question])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def ask(self, pairs: Iterable[Pair]) -> None:
        """Ask what is not known of pairs that differ. Raises UserError where that is in vain."""
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
                file.write("\n")  # after a line that was cut off
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

    def _ask(self, item: tuple[str, tuple[str, str, str]]) -> None:
        key, (prompt, a, b) = item
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTION.format(prompt=prompt, a=a, b=b)},
        ]
        if self._silent >= MAX_FAILURES:
            raise self._unreachable_error()
        try:
            reply = self.endpoint.reply(messages)
        except NoReply as error:
            with self._lock:
                self.unanswered[key] = str(error)
                self._silent += 1
            return
        found = _VERDICT.findall(reply)
        with self._lock:
            self._silent = 0
            if not found:
                self.unreadable[key] = reply
                return
            self.known[key] = found[-1].upper()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "verdict": self.known[key]}) + "\n")

    def _unreachable_error(self) -> UserError:
        said = next(iter(self.unanswered.values()), "")
        return UserError(
            f"--judge: {self.endpoint.url} does not answer: {said}; {len(self.known)} verdicts are "
            "kept, and the same command goes on"
        )


def _read(path: Path) -> Iterator[tuple[str, str]]:
    """Verdicts of a file, whose last line may be cut off."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            yield str(record["key"]), str(record["verdict"])
        except (ValueError, KeyError, TypeError):
            continue


def _outcome(pairs: Sequence[Pair], verdicts: Verdicts) -> dict[str, Any]:
    """Wins of the own answers: a win and a loss are one in both orders, all else is a tie."""
    counts = Counter({"wins": 0, "ties": 0, "losses": 0, "inconsistent": 0, "equal_texts": 0})
    missing = Counter({"unreadable": 0, "unanswered": 0})
    outcomes, keys = [], []
    for pair in pairs:
        result = _of_pair(pair, verdicts, counts, missing)
        if result is not None:
            outcomes.append(result)
            keys.append(pair.key)
    share = asdict(clustered_share(outcomes, keys)) if outcomes else None
    return {"pairs": len(pairs), "judged": len(outcomes), "win_rate": share, **counts, **missing}


def _of_pair(
    pair: Pair, verdicts: Verdicts, counts: Counter[str], missing: Counter[str]
) -> float | None:
    """1 won, 0 lost, 1/2 neither, None without both verdicts; counted by what it was."""
    if pair.own == pair.other:
        counts["equal_texts"] += 1
        counts["ties"] += 1
        return 0.5
    first, second = pair.questions()
    said = verdicts.of(first), verdicts.of(second)
    if None in said:
        unread = any(verdicts.key(question) in verdicts.unreadable for question in (first, second))
        missing["unreadable" if unread else "unanswered"] += 1
        return None
    if said == ("A", "B"):
        counts["wins"] += 1
        return 1.0
    if said == ("B", "A"):
        counts["losses"] += 1
        return 0.0
    counts["ties"] += 1
    counts["inconsistent"] += said != ("C", "C")
    return 0.5
