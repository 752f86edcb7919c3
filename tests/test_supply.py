"""Installed packages match the pins, the claimed ranges and the list of licences."""

import os
import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.versions import ROOT, TESTED, closure, licences, lower_bound, lowest, requirements

COPYLEFT = re.compile(r"\b[AL]?GPL|GNU|MPL|Mozilla|SSPL|EUPL|CDDL|copyleft|not declared", re.I)
PER_FILE = {"certifi", "tqdm"}  # MPL-2.0 concerns only changes to their own files
# `make test-lowest` and `make test-newest` install other versions than the pinned ones.
pinned_here = pytest.mark.skipif(
    "IRL_ALIGN_OTHER_VERSIONS" in os.environ, reason="installed without constraints.txt"
)


def pins() -> dict[str, str]:
    """Package -> version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in exact)
    return {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in exact}


@pinned_here
def test_every_installed_dependency_has_the_pinned_version() -> None:
    pinned = pins()
    names = closure(requirements(*TESTED))
    assert names - set(pinned) == set()
    installed = {name: Version(metadata.version(name)).public for name in names}
    assert {name: installed[name] for name in names if installed[name] != pinned[name]} == {}


@pinned_here
def test_pins_are_within_the_claimed_ranges() -> None:
    pinned = pins()
    for requirement in requirements(*TESTED):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_every_range_has_a_lower_bound() -> None:
    assert [str(r) for r in requirements(*TESTED) if lower_bound(r) is None] == []
    versions = dict(line.split("==") for line in lowest())
    assert versions["torch"] == "2.13" and versions["pytest"] == "8"


@pinned_here
def test_licences_are_listed() -> None:
    assert (ROOT / "dependencies.md").read_text(encoding="utf-8") == licences(), "make licences"


def test_the_base_installation_has_no_copyleft() -> None:
    rows = [line.split(" | ") for line in licences().splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 40
    copyleft = {name[2:] for name, text in rows if COPYLEFT.search(text)}
    # torch for GPUs brings NVIDIA's libraries, which are not pinned here and declare no licence.
    assert {name for name in copyleft if not name.startswith(("cuda-", "nvidia-"))} <= PER_FILE
