"""What all commands share: the log on the terminal, quiet libraries, the width of tables."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer
from rich.console import Console

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' logs.")]


class _Lines(logging.Formatter):
    """One line per record: the time, the level where it is more than information, the message."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        line = f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
        return line if record.exc_info is None else f"{line}\n{super().format(record)}"


def set_up(debug: bool) -> None:
    """Log stages and warnings as plain lines on standard error; quiet libraries unless --debug."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
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
    for library in ("transformers", "trl", "datasets", "accelerate", "torch"):
        logging.getLogger(library).setLevel(logging.ERROR)


def console() -> Console:
    """As wide as the terminal; 100 columns when the output is a file."""
    return Console(width=None if sys.stdout.isatty() else 100)
