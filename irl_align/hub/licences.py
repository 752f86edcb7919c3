"""The licence of an export, derived from those of its demonstrations and of its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download, metadata_load

from irl_align.hub.facts import Facts

# Licences under which a derived work may have another licence if it keeps the notice.
PERMISSIVE = frozenset(
    {
        "afl-3.0",
        "apache-2.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc-by-2.0",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc0-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "isc",
        "mit",
        "odc-by",
        "pddl",
        "unlicense",
        "zlib",
    }
)
UNKNOWN = "unknown"


class Licence(NamedTuple):
    """A licence by the Hub's name, and how it was derived."""

    name: str
    why: str
    other: str | None = None
    """With name `other`: what to call it."""


def derive(facts: Facts, given: str | None = None) -> Licence:
    """Licence of a run's models and pairs; `unknown` where that of the data or base is unknown.

    given: the publisher's choice, which takes precedence.
    """
    data = _joined(facts.front.get("license"))
    base = _base_licence(facts)
    sources = f"the demonstrations: {data or UNKNOWN}; the base model: {base or UNKNOWN}"
    if facts.base_model is None:
        sources = f"the demonstrations: {data or UNKNOWN}; no base model (trained from scratch)"
    if given is not None:
        return Licence(given, f"chosen by the publisher. {sources[0].upper()}{sources[1:]}")
    return combine(data, base, facts.base_model is not None, sources)


def combine(data: str, base: str, has_base: bool, sources: str) -> Licence:
    """The restrictive licence of the two if one is restrictive, else the base's, else the data's.

    Two different restrictive licences give `other`, which names both. One unknown licence makes the
    result unknown. sources: the two licences in words.
    """
    if not data or (has_base and not base):
        return Licence(UNKNOWN, f"unknown: {sources}")
    parts = [part for part in dict.fromkeys((base, data)) if part]
    restrictive = [part for part in parts if part not in PERMISSIVE]
    if len(restrictive) > 1:
        return Licence("other", f"both apply. From {sources}", " + ".join(restrictive))
    name = (restrictive or parts)[0]
    return Licence(name, f"from {sources}", "that-of-the-sources" if name == "other" else None)


def _base_licence(facts: Facts) -> str:
    """The licence in the base model's card; empty if it cannot be read."""
    model = facts.view.recipe["model"]
    if model["path"] is None:
        return ""
    try:
        readme = Path(model["path"]) / "README.md"
        if facts.base_hub_id is not None:
            readme = Path(hf_hub_download(model["path"], "README.md", revision=model["revision"]))
        return _joined((metadata_load(readme) or {}).get("license"))
    except Exception:  # no card or no metadata, offline, or gated
        return ""


def _joined(value: Any) -> str:
    """A card's field license as one text; empty where it has none or says `unknown`."""
    names = value if isinstance(value, list) else [value or UNKNOWN]
    return "" if UNKNOWN in names else " and ".join(map(str, names))
