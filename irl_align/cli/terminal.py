"""Terminal output of all commands: the log, quiet libraries, and the console for tables."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.segment import Segment

from irl_align.utils import distributed
from irl_align.utils.sanitize import fit_to_show, printable

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the logs of libraries.")]


class LineFormatter(logging.Formatter):
    """One line per record: the time, the level if above information, and the message."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        line = f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
        if record.exc_info is not None:
            line += f"\n{super().format(record)}"
        return fit_to_show(line)


def set_up(debug: bool) -> None:
    """Log stages and warnings as plain lines on standard error; quiet libraries unless --debug.

    In a run of several processes, all but the first are silent.
    """
    if distributed.launched()[0] > 0:
        _silence()
        return
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, handlers=[handler])
    logging.getLogger("irl_align").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    import warnings

    warnings.filterwarnings("ignore")
    # Defaults of tqdm: no bar for work of under a second, and few lines in a log file.
    os.environ.setdefault("TQDM_DELAY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    for variable in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # This library has its own handler, so that each message would appear twice.
    logging.getLogger("huggingface_hub").propagate = False
    for library in ("transformers", "trl", "datasets", "accelerate", "torch", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _silence() -> None:
    """Switch off log, bars and tables; errors are still reported."""
    import warnings

    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.CRITICAL)
    os.environ["TQDM_DISABLE"] = "1"
    for variable in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ[variable] = "critical"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


class _Console(Console):
    """Prints control characters as escapes, so that a text cannot control the terminal."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            fit = segment.control or segment.text.isprintable()
            yield segment if fit else segment._replace(text=printable(segment.text))


def console() -> Console:
    """A console as wide as the terminal, or 100 columns wide if the output is a file.

    Text is not read as markup, unless ``print`` is called with ``markup=True``.
    """
    return _Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False)
