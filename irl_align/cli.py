"""The command line. Errors that a user can mend are one line; tracebacks are for --debug."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding

from irl_align import __version__
from irl_align.errors import UserError

app = typer.Typer(
    name="irl-align",
    help="Align language models from demonstrations alone, by inverse reinforcement learning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' logs.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ModelArgument = Annotated[
    Path, typer.Argument(help="Folder of a model, or of a run (its last one is taken).")
]


@app.command(
    epilog="Example: irl-align train recipes/e2e/spin.yaml data.path=../data/e2e seed=1",
)
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Options to change, as key=value.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a recipe. After a stop or a kill the same command goes on from where it was."""
    _set_up(debug)
    from irl_align.api import train as run_recipe
    from irl_align.recipe import load_recipe
    from irl_align.tables import show_runs

    result = run_recipe(load_recipe(recipe, overrides or []))
    show_runs([result.view()], _console())
    typer.echo(f"policy: {result.policy}")
    if result.reward is not None:
        typer.echo(f"reward: {result.reward}")


@app.command(epilog="Example: irl-align recipes --options | less")
def recipes(
    options: Annotated[
        bool, typer.Option("--options", help="List every option with its default.")
    ] = False,
    debug: Debug = False,
) -> None:
    """List the recipes that come with irl-align, or every option that a recipe can set."""
    _set_up(debug)
    from irl_align.recipe import list_recipes, options_table

    console = _console()
    if options:
        for key, kind, default, doc in options_table():
            console.print(f"[bold]{key}[/bold]  {_plain(kind)} = {_plain(default)}", soft_wrap=True)
            console.print(_indented(doc))
        return
    for path, _, description in list_recipes():
        console.print(f"[bold]{_plain(os.path.relpath(path))}[/bold]", soft_wrap=True)
        console.print(_indented(description))


@app.command(epilog="Example: irl-align show runs/e2e-spin-seed1 runs/e2e-irl-best-of-n-seed1")
def show(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")], debug: Debug = False
) -> None:
    """Show the results, rewards, costs and warning signs of runs side by side."""
    _set_up(debug)
    from irl_align.stages import Run
    from irl_align.tables import show_runs

    show_runs([Run.load(run) for run in runs], _console())


@app.command(
    epilog="Example: irl-align score runs/e2e-irl-best-of-n-seed1 --input pairs.jsonl",
)
def score(
    model: ModelArgument,
    input: Annotated[
        Path, typer.Option("--input", help="JSON lines: prompt and completion, or chosen/rejected.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", help="JSON lines; standard output if left out.")
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Score texts with a reward model. Of rows with chosen and rejected, accuracy is told too."""
    _set_up(debug)
    from irl_align.serve import read_rows, resolve, score_rows

    rows = read_rows(input, [("prompt", "completion"), ("prompt", "chosen", "rejected")])
    scored, accuracy = score_rows(resolve(model, "reward"), rows, device)
    _write(scored, output)
    if accuracy is not None:
        typer.echo(f"accuracy {accuracy:.1%} of {len(rows)} pairs", err=True)


@app.command(
    epilog="Example: irl-align generate runs/e2e-spin-seed1 --input prompts.jsonl --n 4",
)
def generate(
    model: ModelArgument,
    input: Annotated[Path, typer.Option("--input", help="JSON lines with a field prompt.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="JSON lines; standard output if left out.")
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Samples per prompt.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 is greedy. Left out: 1, or that of a selecting run.", show_default=False
        ),
    ] = None,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest sample in tokens.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Sample a policy. A run whose policy is best-of-N by selection is sampled so."""
    _set_up(debug)
    from irl_align.generate import Sampling
    from irl_align.serve import generate_rows, read_rows, resolve_policy

    rows, policy = read_rows(input, [("prompt",)]), resolve_policy(model)
    sampling = Sampling(
        n=n,
        temperature=policy.temperature if temperature is None else temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    _write(generate_rows(policy, rows, sampling, device), output)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: runs a command and turns what went wrong into one line and an exit status.

    0 done, 1 a fault of ours or of the machine, 2 something that the user can mend, 130 Ctrl-C.
    """
    if "--debug" in sys.argv:
        app()
        return
    try:
        app()
    except UserError as error:
        _fail(str(error), 2)
    except SystemExit as stop:
        if stop.code == 130:  # typer's, for Ctrl-C
            _fail("stopped; the same command goes on from the last checkpoint", 130)
        raise
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        _fail(f"unexpected fault: {cause} (run with --debug for the traceback)", 1)


def _fail(message: str, status: int) -> None:
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()  # so that the message has a line of its own
    typer.echo(f"irl-align: {message}", err=True)
    raise SystemExit(status)


class _Lines(logging.Formatter):
    """One line per record: the time, the level where it is more than information, the message."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        line = f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
        return line if record.exc_info is None else f"{line}\n{super().format(record)}"


def _set_up(debug: bool) -> None:
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


def _console() -> Console:
    """As wide as the terminal; 100 columns when the output is a file."""
    return Console(width=None if sys.stdout.isatty() else 100)


def _indented(text: str) -> Padding:
    return Padding(_plain(" ".join(text.split())), (0, 0, 0, 4))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(str(text))


def _write(rows: list[dict[str, Any]], output: Path | None) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is None:
        sys.stdout.write(text)
    else:
        from irl_align.files import atomic_write

        atomic_write(output, text)
