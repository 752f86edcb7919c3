"""Data cards: a Hub dataset card (Markdown) whose front matter also says how to load the data.

A card of your own needs only this, in the folder of ``demos.jsonl``::

    ---
    irl_align:
      kind: demonstrations
      splits: {train: {files: demos.jsonl}, validation: {from: train, share: 0.1}}
      columns: {prompt: question, completion: answer}
      template: "{prompt}\\n"
    ---
"""

from __future__ import annotations

import importlib
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from irl_align.config.resources import data_cards_dir
from irl_align.config.types import ImportPath, Options
from irl_align.config.yaml import load_plain, nearest, show
from irl_align.errors import UserError
from irl_align.utils.sanitize import one_line

Columns = dict[str, str]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

PLAIN, MESSAGES = frozenset({"prompt", "completion"}), frozenset({"messages"})
TEXT = frozenset({"text"})
PAIRS = frozenset({"prompt", "chosen", "rejected"})
TRANSCRIPTS = frozenset({"chosen_transcript", "rejected_transcript"})
LABELLED = frozenset({"prompt", "first", "second", "label"})
FORMATS = {"demonstrations": (PLAIN, MESSAGES, TEXT), "preferences": (PAIRS, TRANSCRIPTS, LABELLED)}
"""Kind of rows -> the sets of fields that its columns may be mapped to."""
OPTIONAL = {
    "demonstrations": frozenset({"input", "tools"}),
    "preferences": frozenset({"input", "tools", "subset", "margin"}),
}
"""Kind of rows -> fields that may be added to its FORMATS."""
GIVEN = frozenset({"prompts", "completions", "completion_ids", "demonstrations"})
"""What every reward function of the user's own gets by name."""
_MAX_BYTES = 1 << 24
TASK_SPLITS = ("train", "validation", "test")


class Source(Options):
    """Where rows come from if the recipe gives no local path."""

    hub: str | None = None
    """Hub dataset, org/name."""
    config: str | None = None
    """Configuration of the Hub dataset."""
    data_dir: str | None = None
    """Folder of the Hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of the Hub dataset."""
    columns: Columns = Field(default_factory=dict)
    """Column names on the Hub, if they differ from those of the local files."""
    task: ImportPath | None = None
    """module:callable that makes demonstrations. It is called with split, seed and the recipe's
    data.task."""
    url: str | None = None
    """Page where people find the files. The recipe must then give a local path."""

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        if sum(value is not None for value in (self.hub, self.task, self.url)) != 1:
            raise ValueError("give exactly one of hub, task and url")
        extras = [name for name in ("config", "data_dir", "revision") if getattr(self, name)]
        if self.hub is None and (extras or self.columns):
            raise ValueError(f"{(extras or ['columns'])[0]} goes with hub only")
        return self


class Split(Options):
    """One split: its own files or Hub split, or a part carved out of another split."""

    hub: str | None = None
    """Name of the split on the Hub."""
    files: str | list[str] | None = None
    """File name(s) or glob(s) inside the local folder."""
    carved_from: Annotated[str | None, Field(alias="from")] = None
    """Another split, which loses a share of its prompts to this one."""
    share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """With from: the share of the prompts, chosen by a hash of the prompt."""

    @model_validator(mode="after")
    def _one_kind(self) -> Split:
        if (self.carved_from is None) != (self.share is None):
            raise ValueError("from and share go together")
        for pattern in self.patterns:
            if not pattern or pattern[0] in "/\\~" or ".." in pattern or "\0" in pattern:
                raise ValueError(f"files: {pattern!r} is not a name or glob inside the folder")
        if (self.carved_from is None) == (self.hub is None and self.files is None):
            raise ValueError("give hub and/or files, or else from and share")
        return self

    @property
    def patterns(self) -> list[str]:
        """Globs of the local files."""
        return [self.files] if isinstance(self.files, str) else list(self.files or [])


class CardOptions(Options):
    """The key ``irl_align`` of a card's front matter."""

    kind: Literal["demonstrations", "preferences"]
    """What a row is."""
    source: Source | None = None
    """Where the data is. Without it, the files lie in the card's folder."""
    splits: dict[str, Split] = Field(default_factory=dict)
    """Splits by name: train, validation, test or others. A task has exactly these three."""
    columns: Columns = Field(default_factory=dict)
    """Field -> column; a.0.b is key b of item 0 of column a. Demonstrations have prompt and
    completion; or messages; or text, which starts with its prompt. Preferences have prompt, chosen
    and rejected; or chosen_transcript and rejected_transcript; or prompt, first, second and label
    (1 or 2, the better text). Preferences may also have margin and subset. A subset may join
    several columns by +; without one, the files of a split are its subsets.

    A prompt may also have input, a text that follows it after an empty line (as in Alpaca). With
    template chat, prompts and completions may be texts or lists of messages, with the keys role and
    content or (as in ShareGPT) from and value; content may be a list of text parts. The chat
    template also gets tool_calls, the model's reasoning, and the row's tools (column tools, or the
    one that the field tools names). Columns that are not used are logged."""
    template: str = "{prompt}\n"
    """Text with one {prompt}, or chat: the tokenizer's chat template."""
    lowercase: bool = False
    """Whether prompts and completions are lowercased when they are encoded."""
    prompt_words: Annotated[int, Field(gt=0)] | None = None
    """With text: how many words the prompt has. The completion is the rest of the text."""
    labels: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(default=[1, 2])
    """Values of label: the first means that the first text is better, the second the second."""
    extra: list[str] = Field(default_factory=list)
    """Of demonstrations: other columns that reward functions get by name (reward.functions). All
    rows of a prompt need the same value."""
    turn: Literal["first", "last", "each"] = "last"
    """With messages: which turn of the assistant is the demonstration that makes pairs, or each of
    them. Turns after it are left out. With last, SFT also learns the earlier turns, unless the
    recipe says sft.turns: demonstration. A turn of weight 0 or train false is only read."""
    where: dict[str, bool | int | str] = Field(default_factory=dict)
    """Column -> value. Rows with another value are left out."""
    faulty: Literal["error", "drop"] = "error"
    """Faulty rows: stop, or drop them and log how many. A row is faulty if it cannot be parsed,
    lacks a column or a text, has chosen equal to rejected, has something that the chat template
    does not render, or has the text of a special token of the tokenizer: special tokens come from
    the template, never from the text of a row."""
    rows: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """Split -> expected number of rows. A mismatch logs a warning."""
    about: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """Split -> approximate number of rows, for plans that cannot count them. It is not checked."""
    sha256: dict[str, Sha256] = Field(default_factory=dict)
    """Split -> SHA-256 of its local files, decompressed. A mismatch logs a warning."""
    gold: ImportPath | None = None
    """module:object, the gold metric of the task."""
    edit: ImportPath | None = None
    """module:callable that edits a prompt so that it asks for something else."""

    @field_validator("template")
    @classmethod
    def _one_prompt(cls, template: str) -> str:
        return check_template(template)

    @model_validator(mode="after")
    def _task_or_splits(self) -> CardOptions:
        if self.source is not None and self.source.task is not None:
            if self.kind != "demonstrations" or self.splits or self.columns or self.where:
                raise ValueError("a task gives demonstrations: leave splits, columns, where out")
            return self
        if not self.splits:
            raise ValueError("splits: give at least one")
        hub = self.source is not None and self.source.hub is not None
        with_files = {name for name, split in self.splits.items() if split.carved_from is None}
        for name, split in self.splits.items():
            if split.carved_from is not None and split.carved_from not in with_files:
                raise ValueError(f"splits.{name}.from: {split.carved_from} has no files of its own")
            if split.hub is not None and not hub:
                raise ValueError(f"splits.{name}.hub: the source is not on the Hub")
            if hub and split.hub is None and split.carved_from is None:
                raise ValueError(f"splits.{name}: the source is on the Hub, so give hub")
            if sum(part.share or 0.0 for part in self.carved(name).values()) >= 1.0:
                raise ValueError(f"splits.{name}: the shares carved out of it leave nothing")
        return self

    @model_validator(mode="after")
    def _columns_fit(self) -> CardOptions:
        if self.is_task:
            return self
        form = self.format(self.columns)
        on_hub = self.source.columns if self.source is not None else {}
        if on_hub and self.format(on_hub) != form:
            raise ValueError("source.columns: not the same fields as columns")
        if form in (MESSAGES, TRANSCRIPTS) and self.template != "chat":
            raise ValueError("template: conversations need template chat")
        if self.turn != "last" and self.template != "chat":
            raise ValueError("turn: goes with conversations, which need template chat")
        if "input" in self.columns and "prompt" not in form:
            raise ValueError("columns.input: goes with columns.prompt only")
        if "tools" in self.columns and self.template != "chat":
            raise ValueError("columns.tools: needs template chat")
        if (self.prompt_words is None) == (form == TEXT):
            raise ValueError("prompt_words: goes with columns.text, which needs it")
        if self.labels != [1, 2] and form != LABELLED:
            raise ValueError("labels: goes with columns.label only")
        return self

    @model_validator(mode="after")
    def _extra_has_names_of_its_own(self) -> CardOptions:
        if self.extra and self.kind != "demonstrations":
            raise ValueError("extra: goes with demonstrations only")
        if taken := sorted(GIVEN & set(self.extra)):
            raise ValueError(f"extra: reward functions get other values named {taken[0]}")
        return self

    @model_validator(mode="after")
    def _known_splits(self) -> CardOptions:
        for field, names in (("rows", self.rows), ("about", self.about), ("sha256", self.sha256)):
            unknown = sorted(set(names) - set(self.split_names))
            if unknown:
                raise ValueError(f"{field}: {unknown[0]} is not a split of this card")
        return self

    @property
    def is_task(self) -> bool:
        """Whether a procedural task makes the demonstrations."""
        return self.source is not None and self.source.task is not None

    @property
    def split_names(self) -> list[str]:
        """Names of the splits that can be loaded."""
        return list(TASK_SPLITS) if self.is_task else list(self.splits)

    def carved(self, base: str) -> dict[str, Split]:
        """Splits that take their prompts out of `base`, in the card's order."""
        return {name: split for name, split in self.splits.items() if split.carved_from == base}

    def format(self, columns: Mapping[str, str]) -> frozenset[str]:
        """The one of FORMATS that the columns give. Raises ValueError where none fits."""
        fields = set(columns)
        for form in FORMATS[self.kind]:
            if form <= fields <= form | OPTIONAL[self.kind]:
                return form
        choices = "; or ".join(", ".join(sorted(form)) for form in FORMATS[self.kind])
        given = ", ".join(sorted(fields)) or "nothing"
        raise ValueError(f"columns: found {given}, expected for {self.kind}: {choices}")


class Card(CardOptions):
    """A data card that was read from a file."""

    name: str
    """Stem of the card's file."""
    folder: Path
    """Folder of the card's file."""
    license: str
    """The Hub's field license; empty if the card has none."""


def check_template(template: str) -> str:
    """The template, if it is chat or text with one {prompt}. Raises ValueError."""
    if template == "chat":
        return template
    try:
        fields = [
            name + (f":{spec}" if spec else "") + (f"!{how}" if how else "")
            for _, name, spec, how in string.Formatter().parse(template)
            if name is not None
        ]
    except ValueError as error:
        raise ValueError(f"{error}; write a literal brace twice") from error
    if fields != ["prompt"]:
        raise ValueError("give text with {prompt} exactly once and no other field, or chat")
    return template


def load_card(name_or_path: str | Path) -> Card:
    """Read a card by its name in data_cards/ or by its path.

    Raises UserError: there is no such card, or a key in it, which the message names, is wrong.
    """
    path = _card_path(name_or_path)
    front = _front_matter(path)
    options = front.get("irl_align")
    if not isinstance(options, dict):
        raise UserError(f"{path}: irl_align: found {show(options)}, expected the loader's options")
    own = {"name": path.stem, "folder": path.parent, "license": _license(front.get("license"))}
    reserved = sorted(set(options) & set(own))
    if reserved:
        raise UserError(f"{path}: irl_align.{reserved[0]}: no such key")
    try:
        return Card.model_validate({**options, **own})
    except ValidationError as error:
        raise UserError(f"{path}: {_first_error(error)}") from error


def import_object(import_path: str, field: str) -> Any:
    """The object at ``module:attribute``.

    Raises UserError, which begins with `field`: the object cannot be imported.
    """
    module_name, _, attributes = import_path.partition(":")
    if not module_name or not attributes:
        raise UserError(f"{field}: found {import_path!r}, expected module:attribute")
    try:
        value: Any = importlib.import_module(module_name)
        for attribute in attributes.split("."):
            value = getattr(value, attribute)
    except Exception as error:  # a module of the user's own may raise anything
        cause = one_line(f"{type(error).__name__}: {error}")
        if isinstance(error, ImportError | AttributeError):
            cause = str(error)
        raise UserError(f"{field}: cannot import {import_path}: {cause}") from error
    return value


def _card_path(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".md") or "/" in text:
        if not Path(text).is_file():
            raise UserError(f"data.card: found {text}, expected an existing data card (.md)")
        return Path(text)
    path = data_cards_dir() / f"{text}.md"
    if not path.is_file():
        names = sorted(card.stem for card in data_cards_dir().glob("*.md"))
        close = nearest(text, names)
        hint = f"; did you mean {close}?" if close else ""
        raise UserError(
            f"data.card: found {text!r}, expected one of {', '.join(names)}, or a path{hint}"
        )
    return path


def _front_matter(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
        if len(raw) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes, which no card is")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---" or "---" not in (x.rstrip() for x in lines[1:]):
        raise UserError(f"{path}: line 1: expected YAML front matter between two lines ---")
    end = next(i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---")
    try:
        # The blank line in place of --- keeps YAML's line numbers those of the file.
        front = load_plain("\n".join(["", *lines[1:end]]))
    except ValueError as error:
        raise UserError(f"{path}: front matter: {error}") from error
    if not isinstance(front, dict):
        raise UserError(f"{path}: front matter: found {show(front)}, expected keys and values")
    return front


def _license(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(["irl_align", *map(str, first["loc"])])
    if first["type"] == "extra_forbidden":
        return f"{key}: no such key"
    if first["type"] == "missing":
        return f"{key}: missing"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    value = "" if isinstance(given, dict) else f", found {show(given)}"
    return one_line(f"{key}: {message}{value}")
