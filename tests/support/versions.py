"""What pyproject.toml asks for, and what an installation of it brings.

python tests/support/versions.py lowest      its lower bounds as pins, for `make test-lowest`
python tests/support/versions.py licences    dependencies.md, from what is installed
"""

import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TESTED = ("report", "dev")  # extras that tests need; the others are services and engines
HEAD = """\
# Dependencies of a base installation

This table lists every package that `pip install irl-align` installs on Linux, with the licence that
the package declares. `constraints.txt` has the exact versions. `make licences` writes this page. A
test compares it with the installed packages and refuses copyleft licences. The MPL-2.0 of tqdm
applies only to changes of its own files, and this project changes none.

| package | licence |
| --- | --- |
"""


def requirements(*extras: str) -> list[Requirement]:
    """Of the base installation, and of extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = list(project["dependencies"])
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


def lower_bound(requirement: Requirement) -> str | None:
    """Version of the requirement's >=, if it has one."""
    bounds = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    return bounds[0] if bounds else None


def lowest() -> Iterator[str]:
    """A constraint per requirement, at the lower bound that is claimed."""
    for requirement in requirements(*TESTED):
        yield f"{requirement.name}=={lower_bound(requirement)}"


def closure(wanted: Iterable[Requirement]) -> set[str]:
    """Names of the requirements and of all that they require here, as far as it is installed."""
    actual: dict[str, set[str]] = {}
    left = [(canonicalize_name(r.name), set(r.extras)) for r in wanted]
    while left:
        name, extras = left.pop()
        if name in actual and extras <= actual[name]:
            continue
        actual[name] = actual.get(name, set()) | extras
        for text in metadata.distribution(name).requires or []:
            needed = Requirement(text)
            marks = ({"extra": extra} for extra in {"", *actual[name]})
            if needed.marker is None or any(needed.marker.evaluate(mark) for mark in marks):
                left.append((canonicalize_name(needed.name), set(needed.extras)))
    return set(actual)


UNDECLARED = {"setuptools": "MIT"}
"""Licences that are in a package's own file alone."""


def licence(name: str) -> str:
    """What a package that is installed declares: an SPDX expression, a classifier, or its words."""
    about = metadata.distribution(name).metadata
    if expression := about.get("License-Expression"):
        return expression
    classes = [c for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    if classes:
        return ", ".join(sorted(c.rpartition("::")[2].strip() for c in classes))
    words: str = about.get("License") or UNDECLARED.get(name, "not declared")
    return words.splitlines()[0]


def licences() -> str:
    """dependencies.md."""
    rows = (f"| {name} | {licence(name)} |\n" for name in sorted(closure(requirements())))
    return HEAD + "".join(rows)


if __name__ == "__main__":
    if sys.argv[1:] == ["lowest"]:
        print("\n".join(lowest()))
    elif sys.argv[1:] == ["licences"]:
        (ROOT / "dependencies.md").write_text(licences(), encoding="utf-8")
    else:
        sys.exit(__doc__)
