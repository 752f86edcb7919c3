"""The snippets of exported cards, run as a reader would run them."""

from pathlib import Path
from typing import Any


def run_snippet(folder: Path, **names: Any) -> dict[str, Any]:
    """Run the first Python code of the card in a folder; returns all that it defines.

    names: what the code may use besides REPO, which is the folder.
    """
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = next(part for part in card.split("```") if part.startswith("python\n"))
    scope: dict[str, Any] = {"REPO": str(folder), **names}
    exec(code.removeprefix("python\n"), scope)
    return scope
