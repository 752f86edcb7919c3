"""The command line. An error that the user can fix is one line; --debug prints tracebacks."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.padding import Padding

from irl_align.cli import compare, data, hub, plan, prune, vllm_serve
from irl_align.cli.terminal import Debug
from irl_align.cli.terminal import console as _console
from irl_align.cli.terminal import set_up as _set_up
from irl_align.errors import UserError
from irl_align.utils import distributed
from irl_align.utils.sanitize import fit_to_show
from irl_align.utils.version import __version__

app = typer.Typer(
    name="irl-align",
    help="Align language models from demonstrations alone, by inverse reinforcement learning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
Replace = Annotated[
    bool,
    typer.Option(
        "--replace", help="Replace a finished run of the same name and seed with other settings."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ModelArgument = Annotated[
    Path, typer.Argument(help="Folder of a model, or of a run, whose last model is used.")
]
Template = Annotated[
    str | None,
    typer.Option(
        help="Template of a model that was not made by irl-align: text with {prompt}, or chat. "
        "Default: its tokenizer's chat template if it has one, else {prompt}.",
        show_default=False,
    ),
]
PromptFile = Annotated[
    Path,
    typer.Option(
        "--input",
        help="JSON lines with prompt, a text or a list of messages; or with messages, which are "
        "read up to the last turn that is not the assistant's.",
    ),
]


@app.command(
    epilog="Example: irl-align train recipes/e2e/spin.yaml data.path=../data/e2e seed=1",
)
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Options to change, as key=value.")
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke", help="Try the recipe in seconds, with a tiny model and made-up data."
        ),
    ] = False,
    any_disk: Annotated[
        bool, typer.Option("--any-disk", help="Run even if the disk seems too small.")
    ] = False,
    replace: Replace = False,
    debug: Debug = False,
) -> None:
    """Run a recipe. After a stop or a kill, the same command resumes."""
    _set_up(debug)
    from irl_align.cli.show import show_policies, show_runs
    from irl_align.config.recipe import load_recipe

    options = load_recipe(recipe, overrides or [])
    if smoke:
        from irl_align.training.smoke import run_smoke
        from irl_align.training.smoke_data import NOTICE

        typer.echo(NOTICE)
        result = run_smoke(options)
    else:
        from irl_align.training.plan.disk import announce_disk
        from irl_align.training.train import train as run_recipe

        if not any_disk:
            announce_disk(options)
        result = run_recipe(options, lambda run: show_policies([run], _console()), replace=replace)
    show_runs([result.view()], _console())
    typer.echo(f"policy: {result.policy}")
    if result.reward is not None:
        typer.echo(f"reward: {result.reward}")
    if smoke:
        typer.echo(NOTICE)


@app.command(
    epilog="Example: irl-align ppo runs/e2e-sft-seed1 --reward runs/e2e-irl-select-seed1 "
    "--data e2e_nlg --set data.path=../data/e2e --set credit=red",
)
def ppo(
    policy: Annotated[str, typer.Argument(help="Model: a folder, a run or a Hub id.")],
    reward: Annotated[
        str, typer.Option(help="Sequence classifier with one label: a folder, a run or a Hub id.")
    ],
    data: Annotated[str, typer.Option(help="Data card, by name or path.")],
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="key=value: an option of PPO (kl_coef=0.1) or of the recipe (data.path=...).",
        ),
    ] = None,
    output: Annotated[str, typer.Option(help="Folder of the run.")] = "runs",
    reward_template: Annotated[
        str | None,
        typer.Option(
            help="Template of a reward that was not fitted by irl-align: text with {prompt}, or "
            "chat. Default: its tokenizer's chat template if it has one, else that of the policy.",
            show_default=False,
        ),
    ] = None,
    replace: Replace = False,
    debug: Debug = False,
) -> None:
    """Improve a policy on a reward model by PPO. After a kill, the same command resumes."""
    _set_up(debug)
    from irl_align.cli.show import show_runs
    from irl_align.training.ppo_only import ppo_recipe, run_ppo, summary_line
    from irl_align.training.run_folder import Run

    recipe = ppo_recipe(policy, data, output, options or [])
    improved = run_ppo(recipe, reward, reward_template, replace=replace)
    show_runs([Run.load(improved.folder)], _console())
    typer.echo(summary_line(improved))
    typer.echo(f"policy: {improved.policy}")


@app.command(epilog="Example: irl-align recipes --options | less")
def recipes(
    options: Annotated[
        bool, typer.Option("--options", help="List every option with its default.")
    ] = False,
    debug: Debug = False,
) -> None:
    """List the recipes that come with irl-align, or every option that a recipe can set."""
    _set_up(debug)
    from irl_align.config.recipe import list_recipes, options_table

    console = _console()
    if options:
        for key, kind, default, doc in options_table():
            line = f"[bold]{key}[/bold]  {_plain(kind)} = {_plain(default)}"
            console.print(line, soft_wrap=True, markup=True)
            console.print(_indented(doc))
        return
    for path, _, description in list_recipes():
        name = _plain(os.path.relpath(path))
        console.print(f"[bold]{name}[/bold]", soft_wrap=True, markup=True)
        console.print(_indented(description))


@app.command(epilog="Example: irl-align show runs/e2e-spin-seed1 runs/e2e-irl-best-of-n-seed1")
def show(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")], debug: Debug = False
) -> None:
    """Show the results, rewards, costs and warning signs of runs side by side."""
    _set_up(debug)
    from irl_align.cli.show import show_runs
    from irl_align.training.run_folder import Run

    show_runs([Run.load(run) for run in runs], _console())


@app.command(
    epilog="Example: irl-align score runs/e2e-irl-best-of-n-seed1 --input pairs.jsonl. A reward of "
    "another project: irl-align score models/reward --input chats.jsonl",
)
def score(
    model: ModelArgument,
    input: Annotated[
        Path,
        typer.Option(
            "--input",
            help="JSON lines: prompt with completion, or with chosen and rejected, each a text or "
            "a list of messages; or messages, whose last is the answer.",
        ),
    ],
    template: Template = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="JSON lines; default: standard output.")
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Score texts with a reward model or with the reward of a run.

    SPIN's reward is the log-ratio of its policy to SFT. A sequence classifier of another project
    reads each conversation as its own chat template writes it. For rows with chosen and rejected,
    the accuracy is printed as well.
    """
    _set_up(debug)
    from irl_align.evaluation.inference import SCORED, read_rows, row_exchanges, score_rows

    _check_output(output)
    rows = read_rows(input, SCORED, row_exchanges)
    scored, accuracy = score_rows(model, rows, device, template)
    _write(scored, output)
    if accuracy is not None:
        from irl_align.utils.statistics import few_clusters
        from irl_align.utils.text_table import share_text

        typer.echo(f"accuracy {share_text(accuracy)} (n=pairs/prompts)", err=True)
        if note := few_clusters([accuracy]):
            typer.echo(f"note: {note}", err=True)


@app.command(
    epilog="Example: irl-align generate runs/e2e-spin-seed1 --input prompts.jsonl --n 4",
)
def generate(
    model: ModelArgument,
    input: PromptFile,
    template: Template = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="JSON lines; default: standard output.")
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Samples per prompt.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 is greedy. Default: 1, or the run's own if its policy selects.",
            show_default=False,
        ),
    ] = None,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest sample in tokens.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    backend: Annotated[
        Literal["transformers", "vllm", "vllm-server", "auto"],
        typer.Option(help="What draws the samples; vllm-server without --server starts a server."),
    ] = "transformers",
    server: Annotated[
        list[str] | None,
        typer.Option(
            help="Address of a vLLM server; can be repeated. The key is read from VLLM_API_KEY."
        ),
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Sample a policy. If a run's policy selects the best of N samples, so does this command."""
    _set_up(debug)
    from irl_align.evaluation.inference import (
        SAMPLED,
        generate_rows,
        read_rows,
        resolve_policy,
        row_prompt,
        sampling_backend,
    )
    from irl_align.models.generation.protocol import Sampling

    _check_output(output)
    rows, policy = read_rows(input, SAMPLED, row_prompt), resolve_policy(model)
    sampling = Sampling(
        n=n,
        temperature=policy.temperature if temperature is None else temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    options = sampling_backend(backend, server or [])
    _write(generate_rows(policy, rows, sampling, device, options, template), output)


compare.register(app)
hub.register(app)
data.register(app)
prune.register(app)
plan.register(app)
vllm_serve.register(app)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: run a command and turn an error into one line and an exit status.

    0: success. 1: a fault of the program or the machine. 2: an error that the user can fix.
    130: Ctrl-C.
    """
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            _fail(traceback.format_exc().rstrip(), 2 if isinstance(error, UserError) else 1)
        if isinstance(error, UserError):
            _fail(str(error), 2)
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        _fail(f"unexpected fault: {cause} (run with --debug for the traceback)", 1)
    except SystemExit as stop:
        if stop.code == 130:  # typer's status for Ctrl-C
            _fail("stopped; the same command resumes from the last checkpoint", 130)
        raise


def _fail(message: str, status: int) -> None:
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()  # so that the message has its own line
    if distributed.reports_errors():
        typer.echo(f"irl-align: {fit_to_show(message)}", err=True)
    raise SystemExit(status)


def _indented(text: str) -> Padding:
    return Padding(" ".join(text.split()), (0, 0, 0, 4))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(str(text))


def _check_output(output: Path | None) -> None:
    from irl_align.utils.files import require_writable

    if output is not None:
        require_writable(output, "--output")


def _write(rows: list[dict[str, Any]], output: Path | None) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is None:
        # JSON itself escapes the control characters below 32.
        sys.stdout.write(re.sub("[\x7f-\x9f]", lambda c: f"\\u{ord(c[0]):04x}", text))
    else:
        from irl_align.utils.files import atomic_write

        atomic_write(output, text)
