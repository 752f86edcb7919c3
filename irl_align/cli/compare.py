"""The commands compare, report and evaluate."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from irl_align.cli.terminal import Debug, console, set_up
from irl_align.errors import UserError

if TYPE_CHECKING:
    from irl_align.evaluation.chat_client import Endpoint

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE... [KEY=VALUE...]",
        help="Recipes, and options to change in all (key=value) or one of them "
        "(NAME:key=value); or folders of runs, which are compared as they are.",
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds; the seeds are 1, 2, ....")]
SeedList = Annotated[
    list[int] | None,
    typer.Option(min=0, help="A seed, in place of --seeds; can be repeated.", show_default=False),
]
ComparisonFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of the tables; default: comparison, next to the runs."),
]
Jobs = Annotated[
    int,
    typer.Option(min=1, help="Runs at a time, as far as memory allows."),
]
SweepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        help="[NAME:]KEY=VALUE,VALUE,...: one run per value. Each is a policy in the tables and a "
        "point on a frontier of gold and reward against KL. Can be repeated: all combinations are "
        "run, with a frontier over the last option for each combination of the others.",
        show_default=False,
    ),
]
GoldLevel = Annotated[
    list[float] | None,
    typer.Option(
        help="Report after how many updates and samples PPO's rollouts reach this gold, in the "
        "units of the headline metric (0.2 is 20%). Can be repeated.",
        show_default=False,
    ),
]
AtKl = Annotated[
    list[float] | None,
    typer.Option(
        help="Report gold and reward of PPO's rollouts at this KL to the reference. Can be "
        "repeated.",
        show_default=False,
    ),
]
OnlyFinished = Annotated[
    bool, typer.Option("--only-finished", help="Run nothing; compare the finished runs.")
]
Iterations = Annotated[
    bool,
    typer.Option("--iterations", help="Show the policy of every iteration, not only the last."),
]
Baseline = Annotated[
    str | None, typer.Option(help="Policy to compare with; default: the first one, SFT.")
]
By = Annotated[
    str | None,
    typer.Option(help="Metric to rank by, such as bleu@0.7; default: the headline at T=1."),
]
Interval = Annotated[
    Literal["t", "bootstrap"], typer.Option(help="Kind of the 95% intervals over seeds.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Compare runs whose data or evaluation differ.")
]
Replace = Annotated[
    bool,
    typer.Option(
        "--replace", help="Replace finished runs of the same names and seeds with other settings."
    ),
]
RunOrComparison = Annotated[
    Path, typer.Argument(help="Folder of a run, or of a comparison made by compare.")
]
HtmlFile = Annotated[
    Path | None, typer.Option(help="The HTML file; default: report.html in the folder.")
]
Figures = Annotated[Path | None, typer.Option(help="Folder for every figure as SVG and PNG.")]
RunOrModel = Annotated[
    Path, typer.Argument(help="Folder of a run, a reward, or a policy (with --sft).")
]
Card = Annotated[
    list[str] | None,
    typer.Option(
        help="Card of a preference set, or CARD=PATH of its files; can be repeated.",
        show_default=False,
    ),
]
Subset = Annotated[
    list[str] | None,
    typer.Option(
        help="Use only this subset of the cards' pairs; can be repeated. If several columns name "
        "the subset (SFRES/quality), the value of one column is enough (quality).",
        show_default=False,
    ),
]
Split = Annotated[
    str | None, typer.Option(help="Split of the cards; default: test.", show_default=False)
]
TrainSet = Annotated[
    str | None,
    typer.Option(
        help="Card of preferences, or CARD=PATH. A reward is trained on them from the run's SFT "
        "model with the run's settings. The gains of other rewards over chance are reported as "
        "shares of its gain.",
        show_default=False,
    ),
]
TrainSplit = Annotated[
    str | None,
    typer.Option(
        help="Split of --train-set, default: train. Without --train-set, a split of the card.",
        show_default=False,
    ),
]
Beside = Annotated[
    list[Path] | None,
    typer.Option(
        help="Another run (IRL, SPIN, DPO) or reward that scores the same pairs; can be repeated."
    ),
]
Sft = Annotated[
    Path | None,
    typer.Option(help="Model of the log-prob baselines; default: the SFT model of the run."),
]
BestOf = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Draw this number of samples per evaluation prompt, and report the gold of the best "
        "of n by the run's reward, for n = 1, 2, 4, ....",
        show_default=False,
    ),
]
Backend = Annotated[
    Literal["transformers", "vllm", "vllm-server", "auto"] | None,
    typer.Option(
        help="With --best-of: what draws the samples; default: the run's generation.backend.",
        show_default=False,
    ),
]
Prompts = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="With --best-of or the address of a judge: number of prompts; default: all.",
        show_default=False,
    ),
]
Judge = Annotated[
    list[str] | None,
    typer.Option(
        help="Another run's reward, a reward's folder, or the address of an OpenAI-compatible "
        "endpoint (https://HOST/v1, with --judge-model). It reports how often the run's samples "
        "beat those of its first policy and the demonstrations. JUDGE_API_KEY holds the key.",
        show_default=False,
    ),
]
JudgeModel = Annotated[
    str | None, typer.Option(help="Chat model at the judge's address.", show_default=False)
]
JudgeTimeout = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        help="Seconds to wait for a reply of the judge at an address; default: 120.",
        show_default=False,
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help="Template of judges and other models that were not made by irl-align: text with "
        "{prompt}, or chat. Default: their tokenizer's chat template if it has one.",
        show_default=False,
    ),
]
LmEval = Annotated[
    str | None,
    typer.Option(
        help="Tasks of lm-eval, TASK[@SHOTS],...; open-llm-leaderboard stands for ARC@25, "
        "HellaSwag@10, MMLU@5, TruthfulQA@0, Winogrande@5 and GSM8K@5.",
        show_default=False,
    ),
]
LmEvalTasks = Annotated[
    Path | None,
    typer.Option(help="Folder with your own lm-eval task files.", show_default=False),
]
LmEvalLimit = Annotated[
    int | None,
    typer.Option(min=1, help="With --lm-eval: rows per task, for a trial.", show_default=False),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        help="JSON file of all numbers; default for a run: evaluation.json in its folder, which "
        "report reads.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog="Example: irl-align compare recipes/e2e/spin.yaml recipes/e2e/irl-best-of-n.yaml "
        "data.path=../data/e2e --seeds 3"
    )(compare)
    app.command(epilog="Example: irl-align report runs/comparison --output report.html")(report)
    app.command(
        epilog="Example: irl-align evaluate runs/sfx-irl-seed1 --card "
        "sfx_human_pairs=../data/sfx --best-of 64"
    )(evaluate)


def compare(
    arguments: Arguments,
    seeds: Seeds = 3,
    seed: SeedList = None,
    output: ComparisonFolder = None,
    jobs: Jobs = 1,
    only_finished: OnlyFinished = False,
    iterations: Iterations = False,
    baseline: Baseline = None,
    by: By = None,
    interval: Interval = "t",
    force: Force = False,
    replace_runs: Replace = False,
    sweep: SweepOption = None,
    gold_level: GoldLevel = None,
    at_kl: AtKl = None,
    debug: Debug = False,
) -> None:
    """Run recipes with several seeds and compare them, with intervals and tests.

    Runs share equal stages. After a stop, the same command resumes.
    """
    set_up(debug)
    from irl_align.cli.show import show_comparison
    from irl_align.evaluation.compare.aggregate import AnalysisOptions
    from irl_align.evaluation.compare.runner import CompareOptions
    from irl_align.evaluation.compare.runner import compare as compare_recipes

    options = CompareOptions(
        seeds=tuple(dict.fromkeys(seed)) if seed else tuple(range(1, seeds + 1)),
        output=output,
        parallel=jobs,
        only_finished=only_finished,
        iterations=iterations,
        force=force,
        replace=replace_runs,
        sweeps=tuple(sweep or ()),
        analysis=AnalysisOptions(
            by=by,
            baseline=baseline,
            interval=interval,
            levels=tuple(dict.fromkeys(gold_level or ())),
            kls=tuple(dict.fromkeys(at_kl or ())),
        ),
    )
    compared = compare_recipes(arguments, options)
    show_comparison(compared.analysis, console())
    typer.echo(f"comparison: {compared.folder}")
    if compared.failed:
        raise UserError("\n".join(compared.failed))


def report(
    source: RunOrComparison,
    output: HtmlFile = None,
    figures: Figures = None,
    debug: Debug = False,
) -> None:
    """Write a run or a comparison as one HTML file, which needs no network."""
    set_up(debug)
    from irl_align.evaluation.report.write import write_report

    typer.echo(f"report: {write_report(source, output, figures)}")


def evaluate(
    source: RunOrModel,
    card: Card = None,
    subset: Subset = None,
    split: Split = None,
    train_set: TrainSet = None,
    train_split: TrainSplit = None,
    beside: Beside = None,
    sft: Sft = None,
    best_of: BestOf = None,
    backend: Backend = None,
    prompts: Prompts = None,
    judge: Judge = None,
    judge_model: JudgeModel = None,
    judge_timeout: JudgeTimeout = None,
    template: Template = None,
    lm_eval: LmEval = None,
    lm_eval_tasks: LmEvalTasks = None,
    lm_eval_limit: LmEvalLimit = None,
    output: JsonFile = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Evaluate rewards on preference sets and best-of-n, and policies by judges and benchmarks."""
    set_up(debug)
    from irl_align.cli.show import show_evaluation
    from irl_align.evaluation.evaluate import EvaluationRequest, evaluate_source

    request = EvaluationRequest(
        cards=card or [],
        subset=subset or [],
        split=split,
        train_set=train_set,
        train_split=train_split,
        beside=beside or [],
        sft=sft,
        best_of=best_of,
        backend=backend,
        prompts=prompts,
        judges=[Path(one) for one in judge or [] if not _is_address(one)],
        endpoints=_endpoints(judge or [], judge_model, judge_timeout),
        template=template,
        benchmarks=lm_eval,
        lm_eval_tasks=lm_eval_tasks,
        lm_eval_limit=lm_eval_limit,
    )
    show_evaluation(evaluate_source(source, request, device, output), console())


def _is_address(judge: str) -> bool:
    return judge.startswith(("http://", "https://"))


def _endpoints(judges: list[str], model: str | None, timeout: float | None) -> list[Endpoint]:
    """The judges that are endpoints; the key comes only from the environment."""
    from irl_align.evaluation.chat_client import Endpoint

    addresses = [judge for judge in judges if _is_address(judge)]
    if bool(addresses) != (model is not None):
        what = "an address without --judge-model" if addresses else "--judge-model alone"
        raise UserError(f"--judge: found {what}, expected both (--judge https://HOST/v1)")
    if timeout is not None and not addresses:
        raise UserError(
            "--judge-timeout: found no address of a judge; expected --judge https://HOST/v1 with it"
        )
    key = os.environ.get("JUDGE_API_KEY", "")
    made = [Endpoint(url, model or "", key) for url in addresses]
    return made if timeout is None else [replace(one, timeout=timeout) for one in made]
