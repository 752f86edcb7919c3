"""Fuzz targets: recipes, data rows, cards and run folders, made from valid ones by changes; and
trainings with valid options of TRL."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import trl
from hypothesis import strategies as st
from rich.console import Console
from support.synthetic_runs import synthetic_run
from support.tiny_runs import BEST, RECIPE, SPIN
from support.tiny_trainings import BASE, GROUPS, accepted, problem, result
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from irl_align.cli.show import show_runs
from irl_align.config.recipe import load_recipe, options_table, to_yaml
from irl_align.config.resources import data_cards_dir, recipes_dir
from irl_align.config.trl_args import DPO_LOSSES
from irl_align.data.cards import Card, load_card
from irl_align.data.loading import load_demonstrations, load_preferences
from irl_align.errors import UserError
from irl_align.models.trl import Training
from irl_align.models.trl_options import check_args, training_args
from irl_align.training.prune import find_waste
from irl_align.training.run_folder import Run

ODD = (
    "", " ", "\n", "\t", "\0", "\x1b[2J", "\x9b31m", "\u202e", "\ufeff", "\ud800", "'", '"', "{",
    "}", "[", "]", ":", ": ", "- ", "#", "&a", "*a", "!!python/object:os.system", "<<: *a",
    "---", "...",
    "|", ">", "%", "@", "`", "null", "~", "true", "NaN", "Infinity", "-.inf", "1e999", "0x",
    "9" * 30,
    "9" * 5000, "../", "/etc/passwd", "~root", "file://", "https://u:p@h/?token=x", "\\", "*", "**",
    "[/red]", "[link=x]", "<script>", "{{ 7*7 }}", "{% for x in y %}", "{prompt}",
    "{prompt.__class__}",
    "{0}", "a" * 3000, "[" * 400, "{a: " * 60, "? ", "2001-99-99", "é", "漢", "🙂",
)  # fmt: skip


@st.composite
def bent(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> str:
    """One of the texts with one to four places cut, doubled, replaced or inserted."""
    text = draw(texts)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 40)))
        middle = draw(st.sampled_from(["", text[start:end] * 2, *ODD]) | st.text(max_size=12))
        text = text[:start] + middle + text[end:]
    return text


values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.sampled_from(ODD),
        st.text(max_size=9),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(ODD), inner, max_size=3)
    ),
    max_leaves=6,
)


# --- recipes --------------------------------------------------------------------------------------


@cache
def _recipes() -> list[str]:
    paths = sorted(recipes_dir().rglob("*.yaml"))
    return [RECIPE, *(path.read_text(encoding="utf-8") for path in paths)]


@cache
def _keys() -> list[str]:
    return [key.replace("(ppo)", "").replace("(best_of_n)", "") for key, *_ in options_table()]


def recipe(draw: st.DrawFn) -> Callable[[Path], None]:
    """A recipe's text and overrides."""
    whole = st.sampled_from(_recipes())
    text = draw(bent(whole) | whole)
    known = st.sampled_from([*BEST, *SPIN])
    keyed = st.tuples(st.sampled_from(_keys()), st.sampled_from(ODD) | st.text(max_size=9))
    override = known | bent(known) | keyed.map("=".join)
    overrides = draw(st.lists(override, max_size=3))

    def run(folder: Path) -> None:
        path = folder / "recipe.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        loaded = load_recipe(path, overrides)
        again = folder / "again.yaml"
        again.write_text(to_yaml(loaded), encoding="utf-8")
        assert load_recipe(again) == loaded

    return run


# --- data rows ------------------------------------------------------------------------------------

CARD = """\
---
irl_align:
  kind: {kind}
  splits: {{train: {{files: "rows*"}}}}
  columns: {{{columns}}}
  template: {template}
  faulty: {faulty}
---
"""
SHAPES = (
    ("demonstrations", "prompt: a, completion: b", {"a": "What?", "b": "This."}),
    ("demonstrations", "messages: a", {"a": [{"role": "user", "content": "x"},
                                             {"role": "assistant", "content": "y"}]}),
    ("preferences", "prompt: a, chosen: b, rejected: c, margin: d",
     {"a": "What?", "b": "This.", "c": "That.", "d": 1.5}),
    ("preferences", "chosen_transcript: a, rejected_transcript: b",
     {"a": "\n\nHuman: x\n\nAssistant: y", "b": "\n\nHuman: x\n\nAssistant: z"}),
    ("preferences", "prompt: a.0.b, first: b, second: c, label: d",
     {"a": [{"b": "What?"}], "b": "This.", "c": "That.", "d": 1}),
)  # fmt: skip


def rows(draw: st.DrawFn) -> Callable[[Path], None]:
    """A file of rows and its card."""
    kind, columns, good = draw(st.sampled_from(SHAPES))
    changes = st.dictionaries(st.sampled_from([*good, "e", ""]), values, max_size=2)
    content_rows = [
        {**good, **change} for change in draw(st.lists(changes, min_size=1, max_size=4))
    ]
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".txt", ".jsonl.gz"]))
    content = _file(content_rows, suffix)
    if draw(st.booleans()):
        text = content.decode("latin-1")
        content = draw(bent(st.just(text))).encode("utf-8", "surrogatepass")
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
        content = content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content
    chat = "messages" in columns or "transcript" in columns
    template = "chat" if chat else draw(st.sampled_from(['"{prompt}\\n"', "chat"]))
    faulty = draw(st.sampled_from(["error", "drop"]))
    card = CARD.format(kind=kind, columns=columns, template=template, faulty=faulty)

    def run(folder: Path) -> None:
        (folder / "card.md").write_text(card, encoding="utf-8")
        (folder / f"rows{suffix}").write_bytes(content)
        _load(load_card(folder / "card.md"), "train", None)

    return run


def _load(card: Card, split: str, path: str | None) -> None:
    if card.kind == "demonstrations":
        load_demonstrations(card, split, path)
    else:
        load_preferences(card, split, path)


def _file(rows: list[dict[str, Any]], suffix: str) -> bytes:
    if suffix == ".csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode("utf-8", "surrogatepass")
    if suffix == ".parquet":
        return _parquet(rows)
    if suffix == ".json":
        return json.dumps(rows).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), out)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):  # no such table
        return b"PAR1" + json.dumps(rows).encode()
    return out.getvalue()


# --- cards ----------------------------------------------------------------------------------------


@cache
def _cards() -> list[str]:
    paths = sorted(data_cards_dir().glob("*.md"))
    fronts = [path.read_text(encoding="utf-8").split("\n---")[0] + "\n---\n" for path in paths]
    own = [CARD.format(kind=k, columns=c, template="chat", faulty="drop") for k, c, _ in SHAPES]
    return [*fronts, *own]


def card(draw: st.DrawFn) -> Callable[[Path], None]:
    """A data card whose first split is read from a file next to it."""
    text = draw(bent(st.sampled_from(_cards())))

    def run(folder: Path) -> None:
        path = folder / "card.md"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        (folder / "rows.jsonl").write_text('{"a": "x", "b": "y"}\n', encoding="utf-8")
        loaded = load_card(path)
        if not loaded.is_task:
            _load(loaded, loaded.split_names[0], str(folder))

    return run


# --- run folders ----------------------------------------------------------------------------------


@cache
def whole_run(root: Path) -> Path:
    """A run that is written once and then copied."""
    samples = {"policy-1": [{"prompt": "x", "completion": "y"}]}
    return synthetic_run(clean(root), "toy", 0, [(0.2, 0.1), (0.1, 0.05)], samples=samples)


def run_folder(draw: st.DrawFn) -> Callable[[Path], None]:
    """A run folder with changes to the text or to one value of a file."""
    name = draw(
        st.sampled_from(["metrics.jsonl", "summary.json", "stages.json", "recipe.yaml", "samples"])
    )
    bend = draw(st.booleans())
    change = draw(values)
    at = draw(st.integers(0, 10**6))
    cuts = draw(st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(ODD)), max_size=3))

    def run(folder: Path) -> None:
        home = folder / "toy-seed0"
        shutil.copytree(whole_run(folder.parent / "whole-run"), home)
        path = home / ("samples/policy-1.jsonl" if name == "samples" else name)
        text = path.read_text(encoding="utf-8")
        if bend or path.suffix not in (".json", ".jsonl"):
            for place, odd in cuts:
                text = text[: place % (len(text) + 1)] + odd + text[place % (len(text) + 1) + 3 :]
        else:
            text = _changed(text, path.suffix, at, change)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        view = Run.load(home)
        view.samples()
        show_runs([view], Console(file=io.StringIO(), width=100, markup=False))
        (folder / "store").mkdir(exist_ok=True)
        find_waste(folder)

    return run


def _changed(text: str, suffix: str, at: int, change: Any) -> str:
    """JSON text with one of its inner values replaced."""
    if suffix == ".json":
        value = json.loads(text)
        _replace(value, at, change)
        return json.dumps(value)
    lines = text.splitlines()
    value = json.loads(lines[at % len(lines)])
    _replace(value, at // 7, change)
    lines[at % len(lines)] = json.dumps(value)
    return "\n".join(lines) + "\n"


def _replace(value: Any, at: int, change: Any) -> None:
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                walk(inner[key])

    walk(value)
    if places:
        owner, key = places[at % len(places)]
        owner[key] = change


# --- trainings ------------------------------------------------------------------------------------

CPU = torch.device("cpu")
NUMBERS: dict[type, tuple[Any, ...]] = {
    bool: (False, True),
    int: (-1, 0, 1, 2, 3, 64, 10**6),
    float: (-1.0, 0.0, 1e-8, 0.1, 0.5, 0.99, 1.0, 2.0, 1e4),
}
NAMED: dict[str, tuple[Any, ...]] = {
    "optim": tuple(OptimizerNames),
    "lr_scheduler_type": tuple(SchedulerType),
    "lr_scheduler_kwargs": ({}, {"num_cycles": 0.5}, {"num_decay_steps": 1}, {"min_lr_rate": 0.1}),
    "logging_strategy": tuple(IntervalStrategy),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "gradient_checkpointing_kwargs": ({}, {"use_reentrant": False}, {"use_reentrant": True}),
    "optim_args": (None, "momentum=0.9", "rank=2"),
    "loss_weights": (None, [1.0], [0.5, 0.5], []),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
}
LONG = ("max_steps", "num_train_epochs", "gradient_accumulation_steps", "dataloader_num_workers")
"""Options that only make a training longer or larger."""
LOSSES: dict[str, tuple[Any, ...]] = {
    "SFTConfig": ("nll", "dft", "chunked_nll"),
    "DPOConfig": (*([loss] for loss in DPO_LOSSES), ["sigmoid", "ipo"]),
}


@cache
def _options(group: str) -> dict[str, tuple[Any, ...]]:
    """Option of TRL that a recipe may set -> values of its type."""
    hints = typing.get_type_hints(getattr(trl, group))
    values: dict[str, tuple[Any, ...]] = {}
    for name in sorted(accepted(group)):
        if name == "loss_type":
            values[name] = LOSSES[group]
        elif name in NAMED:
            values[name] = tuple(getattr(value, "value", value) for value in NAMED[name])
        else:
            kinds = {hints[name], *typing.get_args(hints[name])} & NUMBERS.keys()
            assert kinds, f"{group}.{name}: give values of {hints[name]}"
            values[name] = tuple(value for kind in NUMBERS if kind in kinds
                                 for value in NUMBERS[kind])  # fmt: skip
    return values


def training(draw: st.DrawFn) -> Callable[[Path], None]:
    """A short training with one to four options of TRL, each valid by its type."""
    group = draw(st.sampled_from([group for group in GROUPS if group != "iqlearn"]))
    options = _options(group)
    names = draw(st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=4, unique=True))
    args = {name: draw(st.sampled_from(options[name])) for name in names}

    def run(folder: Path) -> None:
        problems = [text for name, value in args.items() if (text := problem(group, name, value))]
        if problems:
            raise UserError(problems[0])
        options = {**args, **{name: 2 for name in LONG if args.get(name, 0) > 3}}
        settings = {**BASE, **options}
        check_args(training_args(getattr(trl, group), settings, Training(folder, 1, CPU)))
        result(group, settings, folder / "work", "llama")

    return run


TARGETS: dict[str, Callable[[st.DrawFn], Callable[[Path], None]]] = {
    "recipes": recipe,
    "rows": rows,
    "cards": card,
    "runs": run_folder,
    "trainings": training,
}


def clean(folder: Path) -> Path:
    """An empty folder for one case."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
