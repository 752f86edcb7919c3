"""Read recipes from YAML, apply overrides, and check the result as a whole before any work.

The options themselves are in :mod:`irl_align.config.schema`. Each mistake is reported in one line::

    recipes/e2e/spin.yaml:12: reward.lerning_rate: unknown option; did you mean
    reward.args.learning_rate?

A recipe may start with ``extends: other.yaml``, relative to its own file. Mappings merge, and an
empty mapping (``args: {}``, or ``reward.args={}`` on the command line) clears the old one. Anything
else replaces the old value, and so does a ``reward`` or ``policy_update`` of another kind. Paths
inside a recipe are relative to the current directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from irl_align.config.policy_update import CustomUpdateOptions, PolicyUpdateOptions
from irl_align.config.resources import recipe_files
from irl_align.config.schema import Recipe
from irl_align.config.trl_args import args_problems, describe, nearest_arg, trl_config
from irl_align.config.types import Options
from irl_align.config.yaml import (
    Loc,
    Node,
    dump_yaml,
    from_plain,
    merge,
    nearest,
    nest,
    parse_override,
    read_recipe_tree,
    show,
    show_loc,
)
from irl_align.errors import UserError
from irl_align.utils.sanitize import one_line, redact, secrets_in

_UPDATES: dict[str, type[Options]] = {
    (
        "module:callable"
        if update is CustomUpdateOptions
        else get_args(update.model_fields["kind"].annotation)[0]
    ): update
    for update in get_args(PolicyUpdateOptions)
}
_SECRET = (
    "found a password, key or token, which would be written into run folders; expected it in the "
    "environment (HF_TOKEN, or the variable that generation.server.api_key_env names)"
)
_MOST_MISTAKES = 20  # reported at once: a file that is not a recipe at all has thousands
# Mappings whose options depend on their kind, and their default kind.
_KINDS: dict[Loc, str] = {
    (group,): Recipe.model_fields[group].get_default(call_default_factory=True).kind
    for group in ("reward", "policy_update")
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at ``path``, apply ``overrides`` ("loop.iterations=3") and check the result.

    Overrides that clear a mapping apply first, then those of a ``kind``, then the rest, each in
    order. Raises UserError with one line per mistake: file and line (or override), and dotted key.
    """
    return _overridden(read_recipe_tree(Path(path), _KINDS), overrides)


def make_recipe(values: Mapping[str, Any], place: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from plain values. Messages give `place` as their origin; overrides as above."""
    return _overridden(from_plain(dict(values), place), overrides)


def _overridden(tree: Node, overrides: Sequence[str]) -> Recipe:
    def turn(override: tuple[Loc, Node]) -> int:
        loc, node = override
        return 0 if node.value == {} else 1 if loc[-1] == "kind" else 2

    for loc, node in sorted(map(parse_override, overrides), key=turn):
        tree = merge(tree, nest(loc, node), _KINDS)
    return _check(tree)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, as values that JSON can hold."""
    return recipe.model_dump(mode="json")


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML for :func:`load_recipe`."""
    return dump_yaml(to_dict(recipe))


def list_recipes() -> list[tuple[Path, str, str]]:
    """(path, name, description) of each recipe that ships with the package; not checked further."""
    recipes = []
    for path in recipe_files():
        raw = read_recipe_tree(path, _KINDS).plain()
        recipes.append((path, str(raw.get("name", "")), str(raw.get("description", ""))))
    return recipes


def options_table() -> list[tuple[str, str, str, str]]:
    """(dotted key, type, default, doc) of every option, in the order of the schema."""
    return list(_rows(Recipe, ""))


def _rows(group: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in group.model_fields.items():
        key = prefix + name
        if (group, name) == (Recipe, "policy_update"):
            doc = "How the policy is improved on the reward."
            yield f"{key}.kind", f"one of {', '.join(_UPDATES)}", _KINDS[("policy_update",)], doc
            for kind, update in _UPDATES.items():
                rows = _rows(update, f"{key}({kind}).")
                yield from (row for row in rows if not row[0].endswith(").kind"))
            continue
        inner = _group_in(field.annotation)
        if inner is None or field.default is None:
            doc = " ".join((field.description or "").split())
            yield key, describe(field.annotation, tuple(field.metadata)), _default(field), doc
        if inner is not None:
            yield from _rows(inner, f"{key}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return default if isinstance(default, str) and default else json.dumps(default)


def _group_in(annotation: Any) -> type[BaseModel] | None:
    """The options class of a field, which may be optional; None if the field is a plain value."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _check(tree: Node) -> Recipe:
    """Check the whole tree. Raises UserError with all mistakes."""
    raw = tree.plain()
    problems: list[tuple[Loc, str]] = []
    values = dict(raw)
    if "policy_update" in raw:  # separately, so that only mistakes of its own kind are reported
        update, update_problems = _policy_update(values.pop("policy_update"))
        problems += update_problems
        if update is not None:
            values["policy_update"] = update
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        items = error.errors()[: _MOST_MISTAKES + 1]
        mistakes = [(tuple(item["loc"]), _explain(Recipe, item, raw)) for item in items]
        # A wrong policy_update is replaced by the default here, so that a mistake of the whole
        # recipe (an empty loc) may be about that default.
        problems += [(loc, text) for loc, text in mistakes if loc or not problems]
    problems += args_problems(raw)
    problems += [(loc, _SECRET) for loc in secrets_in(raw)]
    if problems or recipe is None:
        lines = [_line(tree, loc, text) for loc, text in problems[:_MOST_MISTAKES]]
        if len(problems) > _MOST_MISTAKES:
            lines.append(f"{tree.place}: and more, after the first {_MOST_MISTAKES} mistakes")
        raise UserError("\n".join(lines))
    return recipe


def _policy_update(raw: Any) -> tuple[Options | None, list[tuple[Loc, str]]]:
    at: Loc = ("policy_update",)
    if not isinstance(raw, dict):
        return None, [(at, f"found {show(raw)}, expected mapping")]
    raw = {"kind": _KINDS[at], **raw}
    kind = raw["kind"]
    update = None
    if isinstance(kind, str):
        update = CustomUpdateOptions if ":" in kind else _UPDATES.get(kind)
    if update is None:
        text = f"found {show(kind)}, expected one of {', '.join(_UPDATES)}"
        return None, [((*at, "kind"), text + _guess(nearest(kind, _UPDATES)))]
    try:
        return update.model_validate(raw), []
    except ValidationError as error:
        items = error.errors()[: _MOST_MISTAKES + 1]
        whole = {"policy_update": raw}
        return None, [((*at, *item["loc"]), _explain(update, item, whole, at)) for item in items]


def _explain(model: type[Options], item: Any, raw: dict[str, Any], at: Loc = ()) -> str:
    """Explain one of pydantic's errors: what was found and what is expected."""
    loc: Loc = tuple(item["loc"])
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "extra_forbidden":
        group, _ = _field_at(model, loc[:-1])
        return "unknown option" + _suggest(group, (*at, *loc), raw)
    annotation, metadata = _field_at(model, loc)
    if item["type"] == "missing":
        return f"missing, expected {describe(annotation, metadata)}"
    guess = None
    if isinstance(item["input"], str) and get_origin(annotation) is Literal:
        guess = nearest(item["input"], map(str, get_args(annotation)))
    return f"found {show(item['input'])}, expected {describe(annotation, metadata)}{_guess(guess)}"


def _field_at(model: type[BaseModel], loc: Loc) -> tuple[Any, tuple[Any, ...]]:
    """Annotation and constraints of the field at ``loc`` under ``model``."""
    annotation: Any = model
    metadata: tuple[Any, ...] = ()
    for step in loc:
        group = _group_in(annotation)
        if group is not None:
            field = group.model_fields[str(step)]
            annotation, metadata = field.annotation, tuple(field.metadata)
        else:  # an item of a list, a value of a mapping
            annotation, metadata = get_args(annotation)[-1], ()
    return annotation, metadata


def _suggest(annotation: Any, loc: Loc, raw: dict[str, Any]) -> str:
    """A hint for the unknown option at ``loc`` of a group: what its author may have meant."""
    group = _group_in(annotation)
    parent, word = loc[:-1], str(loc[-1])
    names = list(group.model_fields) if group else []
    config = trl_config(raw, str(loc[0])) if "args" in names else None
    arg = nearest_arg(config, word) if config else None
    elsewhere = _keys_named(word, parent)
    if elsewhere and arg != word:
        return _guess(" or ".join(elsewhere))
    guess = nearest(word, names) or (f"args.{arg}" if arg else None)
    if guess is not None:
        return _guess(show_loc((*parent, guess)))
    return f"; expected one of {', '.join(names)}"


def _keys_named(word: str, parent: Loc) -> list[str]:
    """Dotted keys of the options with exactly this name elsewhere in the recipe. Within
    policy_update the keys keep their kind, as in policy_update(ppo).n."""
    keys = [key for key, *_ in options_table() if key.rsplit(".", 1)[-1] == word]
    if parent[:1] != ("policy_update",):
        keys = [re.sub(r"\([^)]*\)", "", key) for key in keys]
    return list(dict.fromkeys(keys))


def _guess(choice: str | None) -> str:
    return f"; did you mean {choice}?" if choice else ""


def _line(tree: Node, loc: Loc, text: str) -> str:
    key = f"{show_loc(loc)}: " if loc else ""
    return one_line(redact(f"{tree.place_of(_culprit(tree, loc, text))}: {key}{text}"))


def _culprit(tree: Node, loc: Loc, text: str) -> Loc:
    """The place to blame: for a mistake of a whole group, the first option that ``text`` names."""
    node = tree.at(loc)
    if node is None or not isinstance(node.value, dict):
        return loc
    for word in re.findall(r"[\w.]+", text):
        named = (*loc, *word.split("."))
        if tree.at(named) is not None:
            return named
    return loc
