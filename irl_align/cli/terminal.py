"""What all commands share: the log on the terminal, quiet libraries, the width of tables."""

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

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' logs.")]


class LineFormatter(logging.Formatter):
    """One line per record: the time, the level where it is more than information, the message."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        line = f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
        if record.exc_info is not None:
            line += f"\n{super().format(record)}"
        return fit_to_show(line)


def set_up(debug: bool) -> None:
    """Log stages and warnings as plain lines on standard error; quiet libraries unless --debug.

    Of several processes of one run all but the first are silent.
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
    # tqdm's defaults: no bar for what is done at once, and few lines in a log file.
    os.environ.setdefault("TQDM_DELAY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    for variable in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # It has a handler of its own: what it tells would be told twice.
    logging.getLogger("huggingface_hub").propagate = False
    for library in ("transformers", "trl", "datasets", "accelerate", "torch", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _silence() -> None:
    """No log, no bars and no tables; an error is told still."""
    import warnings

    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.CRITICAL)
    os.environ["TQDM_DISABLE"] = "1"
    for variable in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ[variable] = "critical"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


class _Console(Console):
    """Prints control characters of a text as escapes: they would be the terminal's."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            fit = segment.control or segment.text.isprintable()
            yield segment if fit else segment._replace(text=printable(segment.text))


def console() -> Console:
    """As wide as the terminal; 100 columns when the output is a file. Text is never markup, unless
    print is told so."""
    return _Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False)
