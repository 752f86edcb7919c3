"""Read and write recipes as YAML: YAML 1.2 scalars, no aliases or tags, the place of every value.

PyYAML reads YAML 1.1, where ``1e-4`` is a string and ``no`` is a boolean, and drops line numbers.
This module therefore converts PyYAML's nodes to values itself.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from irl_align.errors import UserError
from irl_align.utils.sanitize import one_line

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
Loc = tuple[str | int, ...]

_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


@dataclass(frozen=True)
class Node:
    """A value and its place in a file; ``value`` is a scalar, or a dict or list of nodes."""

    value: Any
    place: str
    """``file:line`` of the key, or ``command line: key=value``."""

    def plain(self) -> Any:
        """The value as ordinary Python objects."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def at(self, loc: Loc) -> Node | None:
        """The node at ``loc``; None if there is none."""
        node = self
        for step in loc:
            if isinstance(node.value, dict) and step in node.value:
                node = node.value[step]
            elif isinstance(node.value, list) and step in range(len(node.value)):
                node = node.value[int(step)]
            else:
                return None
        return node

    def place_of(self, loc: Loc) -> str:
        """Place of ``loc``, or of its innermost parent that exists."""
        node = self.at(loc)
        return node.place if node is not None else self.place_of(loc[:-1])


def show(value: Any) -> str:
    """A value in YAML's terms, shortened for a message."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return str({None: "null", True: "true", False: "false"}[value])
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def show_loc(loc: Loc) -> str:
    """Dotted key; a long step, which cannot be an option's name, is cut short."""
    return ".".join(step if len(step) <= 60 else step[:57] + "..." for step in map(str, loc))


def nearest(word: Any, choices: Iterable[str]) -> str | None:
    """The choice that ``word`` may be a misspelling of."""
    matches = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.7)
    return matches[0] if matches else None


def read_recipe_tree(path: Path, kinds: Mapping[Loc, str]) -> Node:
    """Read a recipe file and the files that it ``extends``.

    ``kinds`` is as in :func:`merge`. Raises UserError with ``file:line`` if a file is missing, is
    not a recipe's YAML, or extends itself.
    """
    return _read_chain(path, kinds, place=None, seen=())


def parse_override(override: str) -> tuple[Loc, Node]:
    """Split ``a.b=value`` into key and value, which is YAML. Raises UserError where it cannot."""
    place = one_line(f"command line: {override if len(override) <= 80 else override[:77] + '...'}")
    key, equals, text = override.partition("=")
    loc = tuple(key.strip().split("."))
    if not equals or not all(loc):
        raise UserError(f"{place}: expected key=value, e.g. loop.iterations=3")
    node = _parse(text, lambda line: place) if text.strip() else None
    if node is None:
        key = one_line(key.strip())
        raise UserError(f"{place}: {key}: found no value; write {key}=null if you mean none")
    return loc, node


def nest(loc: Loc, node: Node) -> Node:
    """A tree that holds only ``node``, at ``loc``."""
    for step in reversed(loc):
        node = Node({step: node}, node.place)
    return node


def merge(base: Node, over: Node, kinds: Mapping[Loc, str], at: Loc = ()) -> Node:
    """Merge ``over`` into ``base``: mappings merge, an empty one clears, anything else replaces.

    ``kinds`` maps the places of mappings whose options depend on their ``kind`` to their default
    kind: such a mapping replaces one of another kind as a whole.
    """
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    if at and not over.value:
        return over
    if at in kinds and "kind" in over.value:
        kind = base.value["kind"].value if "kind" in base.value else kinds[at]
        if kind != over.value["kind"].value:
            return over
    merged = dict(base.value)
    for key, node in over.value.items():
        merged[key] = merge(merged[key], node, kinds, (*at, key)) if key in merged else node
    return Node(merged, base.place)


def from_plain(value: Any, place: str) -> Node:
    """A tree of plain mappings, lists and scalars that all have the same place."""
    if isinstance(value, dict):
        return Node({key: from_plain(inner, place) for key, inner in value.items()}, place)
    if isinstance(value, list):
        return Node([from_plain(inner, place) for inner in value], place)
    return Node(value, place)


def dump_yaml(value: Any) -> str:
    """Plain values as YAML whose values are the same for this module and for YAML 1.1 readers."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def load_plain(text: str) -> Any:
    """Read YAML 1.1 from a card or a run folder; aliases, tags and deep nesting are refused.

    Raises:
        ValueError: with a message of one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(one_line(" ".join(str(error).split())[:300])) from error


class _Loader(yaml.SafeLoader):
    """Composes nodes; refuses aliases, tags and deep nesting, which recipes do not need."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = yaml.SafeLoader.peek_event(self)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not supported; use extends to share options",
                problem_mark=event.start_mark,
            )
        if event.tag is not None:
            raise yaml.MarkedYAMLError(
                problem=f"tags are not supported: {event.tag}", problem_mark=event.start_mark
            )
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML loses rare line breaks such as U+0085 unless they are escaped between double quotes.
    odd = not text.replace("\n", "").isprintable()
    style = '"' if odd else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)
# Strings such as "1e-4", plain in YAML 1.1, must be quoted for YAML 1.2.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"(?:{_INT.pattern})$"), None)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), None)


def _read_chain(
    path: Path, kinds: Mapping[Loc, str], place: str | None, seen: tuple[Path, ...]
) -> Node:
    shown = one_line(str(path))
    text = _read_text(path, place)
    if path.resolve() in seen:
        raise UserError(f"{place}: {shown} extends itself")
    tree = _parse(text, lambda line: f"{shown}:{line}")
    if tree is None:
        raise UserError(f"{shown}:1: the file is empty, expected a mapping of options")
    if not isinstance(tree.value, dict):
        raise UserError(f"{tree.place}: found {show(tree.plain())}, expected a mapping of options")
    extends = tree.value.pop("extends", None)
    if extends is None:
        return tree
    if not isinstance(extends.value, str) or not extends.value:
        raise UserError(
            f"{extends.place}: extends: found {show(extends.plain())}, expected the name of a file"
        )
    below = Path(os.path.normpath(path.parent / extends.value))
    base = _read_chain(below, kinds, f"{extends.place}: extends", (*seen, path.resolve()))
    return Node(merge(base, tree, kinds).value, tree.place)


def _read_text(path: Path, place: str | None) -> str:
    shown = one_line(str(path))
    where = f"{place}: {shown}" if place else shown
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        guess = None
        if path.parent.is_dir():
            guess = nearest(path.name, (p.name for p in path.parent.iterdir() if p.is_file()))
        hint = f"; did you mean {one_line(str(path.parent / guess))}?" if guess else ""
        raise UserError(f"{where}: no such file{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{where}: is a folder, expected a YAML file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{where}: cannot be read: {reason}") from error
    if len(raw) > MAX_BYTES:
        raise UserError(f"{where}: larger than {MAX_BYTES} bytes, too large for a recipe")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{shown}:{line}: found byte 0x{raw[error.start]:02x}, expected UTF-8 text"
        ) from None


def _parse(text: str, place: Callable[[int], str]) -> Node | None:
    """Parse one YAML document; None if it is empty. ``place`` maps a line number to a place."""
    line = 1
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{place(line)}: found unprintable character {error.character:#x}"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else line
        problem = one_line(error.problem or error.context or "malformed")
        raise UserError(f"{place(line)}: not a recipe's YAML: {problem}") from None
    except (ValueError, OverflowError) as error:  # PyYAML lets an escape as \UFFFFFFFF through
        line = loader.line + 1 if loader else line
        raise UserError(f"{place(line)}: not a recipe's YAML: {one_line(str(error))}") from None
    return None if root is None else _node(root, place, root.start_mark.line + 1)


def _node(node: yaml.Node, place: Callable[[int], str], line: int) -> Node:
    if isinstance(node, yaml.SequenceNode):
        items = [_node(item, place, item.start_mark.line + 1) for item in node.value]
        return Node(items, place(line))
    if isinstance(node, yaml.ScalarNode):
        return Node(_scalar(node, place(line)), place(line))
    mapping: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        key = _node(key_node, place, key_line)
        if not isinstance(key.value, str):
            raise UserError(f"{key.place}: found key {show(key.plain())}, expected a word")
        if key.value in mapping:
            first = mapping[key.value].place
            shown = one_line(show_loc((key.value,)))
            raise UserError(f"{key.place}: {shown}: given twice, first at {first}")
        mapping[key.value] = _node(value_node, place, key_line)
    return Node(mapping, place(line))


def _scalar(node: yaml.ScalarNode, place: str) -> str | int | float | bool | None:
    text: str = node.value
    if node.style is None:  # plain: neither quoted nor a block
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INT.fullmatch(text):
            # Check the length first: Python refuses to convert very long numbers.
            number = int(text, {"0x": 16, "0o": 8}.get(text[:2], 10)) if len(text) < 100 else None
            if number is None or abs(number) >= 1 << 63:
                raise UserError(f"{place}: found {show(text)}, expected an integer below 2^63")
            return number
        if _FLOAT.fullmatch(text):
            real = math.nan if text[-1].isalpha() else float(text)  # .inf and .nan end in letters
            if not math.isfinite(real):
                raise UserError(f"{place}: found {show(text)}, expected a finite number")
            return real
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{place}: found {show(text)}, expected text without NUL and surrogates")
    return text
