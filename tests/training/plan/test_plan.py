"""`irl-align plan`: stages of a run, those that the store has, and their costs."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from support.rows import save
from support.shared_runs import shared_run
from support.tiny_runs import (
    BEST,
    irl_align,
    metrics,
    stage_records,
    the_line,
    tiny_recipe,
    write_recipe,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from irl_align.config.recipe import load_recipe
from irl_align.config.resources import recipe_files, recipes_dir
from irl_align.config.schema import Recipe
from irl_align.errors import UserError
from irl_align.training.plan.data import Counts, count_data, local_data
from irl_align.training.plan.devices import DEVICES, Work, device_named
from irl_align.training.plan.memory import Precision
from irl_align.training.plan.plan import Assumptions, Plan, Step, make_plan
from irl_align.training.plan.stage_costs import MATCHING
from irl_align.training.train import Result, train

pytestmark = pytest.mark.timeout(240)
A100 = Assumptions(device_named("a100-80gb"), 0.35, 0.5)
SHIPPED = sorted(path.relative_to(recipes_dir()).as_posix() for path in recipe_files())


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan_of(run: Result, *overrides: str) -> Plan:
    """The plan of a finished run's recipe."""
    return make_plan(load_recipe(run.folder / "recipe.yaml", overrides), A100)


def roles(plan: Plan) -> list[str]:
    return [str(step.role) for step in plan.steps]


def step_of(plan: Plan, role: str) -> Step:
    return next(step for step in plan.steps if str(step.role) == role)


def rows_of(plan: Plan) -> dict[str, int]:
    return {str(step.role): step.cost.rows for step in plan.steps}


@pytest.mark.parametrize("name", SHIPPED)
def test_make_plan_of_every_recipe(name: str) -> None:
    small = ["data.task={size: 60}"] if name.startswith("restaurant") else []
    plan = make_plan(load_recipe(recipes_dir() / name, small), A100)
    assert plan.to_do == plan.steps and plan.store.startswith("no store at")
    assert plan.hours is not None and plan.hours > 0 and plan.disk > 0
    assert len(roles(plan)) == len(set(roles(plan))) and roles(plan)[:2] == ["start", "data"]
    for number, step in enumerate(plan.steps):  # a stage reads only earlier stages
        assert set(step.reads) <= {earlier.role for earlier in plan.steps[:number]}, step
        assert (
            step.cost.use.peak >= max(step.cost.use.parts.values(), default=0) or not step.cost.work
        )


@pytest.mark.parametrize("name", ["irl", "contrast", "select", "spin", "sft"])
@pytest.mark.parametrize("pick", ["last", "nearest"])
def test_make_plan_of_a_finished_run_finds_its_stages_in_order(name: str, pick: str) -> None:
    run = shared_run(name)
    if pick == "nearest":
        recipe = load_recipe(run.folder / "recipe.yaml", ["loop.pick=nearest", f"name={name}-near"])
        run = train(recipe)
    plan = plan_of(run)
    assert roles(plan) == built(run)
    assert ("pick" in roles(plan)) == (pick == "nearest" and name != "sft")
    assert plan.to_do == [] and plan.hours == 0 and plan.disk == 0


def built(run: Result) -> list[str]:
    """Roles of a run's stages, in order."""
    return [key.removeprefix("stage/") for key in metrics(run.folder) if key.startswith("stage/")]


def test_make_plan_counts_the_rows_and_tokens_of_the_run() -> None:
    run = shared_run("contrast")
    plan, made = plan_of(run), stage_records(run.folder)
    rows = rows_of(plan)
    pairs = made["pairs/0"]["metrics"]["train"]["pairs"]
    assert pairs <= rows["pairs/0"] <= 1.5 * pairs  # samples without EOS make no pairs
    samples = made["samples/train/policy-0/t1"]["metrics"]
    assert rows["samples/train/policy-0/t1"] == samples["samples"]
    counted = made["data"]["metrics"]
    assert plan.counts.rows["sft"] == counted["sft_rows"]
    mean = counted["sft_tokens"] / counted["sft_rows"]
    assert plan.counts.completion.mean == pytest.approx(mean, rel=0.02)
    assert plan.shape.parameters == made["start"]["metrics"]["parameters"]


def test_make_plan_counts_edits_and_extra_prompts(tmp_path: Path) -> None:
    run = shared_run("contrast")
    contrast = (
        "pairs.sources=[demonstration/policy, demonstration/contrast]",
        "pairs.contrast=edit",
    )
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    plain, edited, both = (
        rows_of(plan_of(run, *options))
        for options in (
            (*contrast, "policy_update.prompts=null"),
            (
                *contrast,
                "pairs.contrast_edits=3",
                "pairs.contrast_crossed=true",
                "policy_update.prompts=null",
            ),
            (
                "policy_update.prompts=null",
                "policy_update.edited_prompts=3",
                f"policy_update.prompts_from={file}",
            ),
        )
    )
    demonstrations = plan_of(run).counts.rows["reward"]
    assert edited["pairs/0"] == plain["pairs/0"] + 5 * demonstrations
    candidates, n = "samples/candidates/policy-0/t1", 2
    assert both[candidates] == 2 * plain[candidates] + 2 * n


def test_make_plan_has_to_do_what_a_change_affects() -> None:
    plan = plan_of(shared_run("contrast"), "policy_update.args.learning_rate=0.005")
    to_do = {str(step.role) for step in plan.to_do}
    assert to_do == {
        *("policy-1", "samples/held_out/policy-1/t1", "vitals/1"),
        *("samples/evaluation/policy-1/t1", "evaluation/1/t1"),
        *("samples/evaluation/policy-1/t0", "evaluation/1/t0", "evaluation/1/rewards"),
    }
    assert plan.peak is not None and str(plan.peak.role) == "policy-1"
    # another evaluation trains nothing
    other = plan_of(shared_run("contrast"), "evaluation.prompts=5")
    assert all(str(s.role).startswith(("samples/eval", "eval")) for s in other.to_do)


def test_make_plan_counts_the_samples_of_match_entropy() -> None:
    plan = plan_of(shared_run("contrast"), "evaluation.match_entropy=true")
    *samples, step = plan.to_do
    assert str(step.role) == "matched-entropy/1"
    assert all(drawn.role.use == "evaluation" and not drawn.cost.sampled for drawn in samples)
    at_one = step_of(plan, "samples/evaluation/policy-0/t1")
    assert step.cost.sampled == pytest.approx(MATCHING * at_one.cost.sampled)
    assert plan.hours is not None and plan.hours > 0


def test_make_plan_contacts_no_server() -> None:
    run = shared_run("contrast")
    plan = plan_of(run, "generation.backend=vllm-server", "generation.server.urls=[http://x]")
    assert plan.store.startswith(f"{run.folder.parent}/store was ") and "searched" in plan.store


def counts_of(recipe: Recipe) -> Counts:
    return count_data(recipe, local_data(recipe))


def hub_recipe(*overrides: str) -> Recipe:
    return load_recipe(recipes_dir() / "tldr/sft-pythia-1b.yaml", overrides)


def test_rows_of_the_hub_are_the_cards_and_lengths_the_limits() -> None:
    counts = counts_of(hub_recipe())
    used = 116722 * 0.0902
    assert counts.rows == {
        "sft": round(used * 0.95),
        "reward": round(used * 0.95),
        "held_out": round(used * 0.05),
        "evaluation": 6447,
    }
    assert (counts.prompt.mean, counts.completion.longest) == (512, 53)
    apart = counts_of(hub_recipe("data.reward_data=disjoint", "data.reward_share=0.25"))
    assert apart.rows["reward"] == round(used * 0.95 * 0.25)


def test_a_card_without_counts_is_one_line(tmp_path: Path) -> None:
    card = tmp_path / "c.md"
    card.write_text(
        "---\nirl_align:\n  kind: demonstrations\n  source: {hub: a/b}\n"
        "  splits: {train: {hub: train}, validation: {hub: dev}}\n"
        "  columns: {prompt: p, completion: c}\n---\n"
    )
    with pytest.raises(UserError, match="found no number of rows of split train") as caught:
        counts_of(hub_recipe(f"data.card={card}"))
    assert "expected about: {train: ROWS} in the card, or data.path" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        ("modernbert-decoder", "reward.lm_coef=0", "reward.kind: explicit needs a score"),
        ("gemma2", "reward.lm_coef=0.5", "reward.lm_coef: a gemma2 computes its logits"),
    ],
)
def test_a_model_that_cannot_do_the_job_is_refused_by_plan_and_before_sft(
    kind: str, option: str, message: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
    widths = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    config = AutoConfig.for_model(kind, **sizes, **ids, **widths, sep_token_id=2)
    folder = save(AutoModelForCausalLM.from_config(config), tiny_tokenizer, tmp_path / "model")
    limits = ("data.max_prompt_tokens=200", "data.max_completion_tokens=200")
    overrides = ("model.from_scratch=null", f"model.path={folder}", option, *limits)
    recipe = tiny_recipe(tmp_path, *overrides, "loop.iterations=1")
    with pytest.raises(UserError, match=message):
        make_plan(recipe, A100)
    with pytest.raises(UserError, match=message):
        train(recipe)
    assert not list((tmp_path / "runs/store").glob("sft-*"))


def test_local_data_of_a_model_out_of_reach_is_counted_by_words(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"p": "one two three", "c": "four five"}\n' * 40)
    card = tmp_path / "c.md"
    card.write_text(
        "---\nirl_align:\n  kind: demonstrations\n  columns: {prompt: p, completion: c}\n"
        "  splits: {train: {files: d.jsonl}, validation: {files: d.jsonl}}\n---\n"
    )
    # one prompt: it is held out or trained on as a whole, so that a part is empty
    with pytest.raises(UserError, match="none is left"):
        counts_of(hub_recipe(f"data.card={card}", "data.share=1.0"))
    lines = "".join(f'{{"p": "one two {n}", "c": "four five"}}\n' for n in range(40))
    (tmp_path / "d.jsonl").write_text(lines)
    counts = counts_of(hub_recipe(f"data.card={card}", "data.share=1.0"))
    assert counts.prompt.mean == pytest.approx(3 * 1.4 + 1)
    assert counts.rows["sft"] + counts.rows["held_out"] == counts.rows["evaluation"] == 40
    assert counts.how.endswith("the model's tokenizer is not available")


def test_hours_by_hand() -> None:
    a100 = DEVICES["a100-80gb"]
    half = Precision(4, 2)
    assert Work(flops=312e12 * 0.5 * 3600, precision=half).hours(a100, 0.5, 0.5) == 1.0
    assert Work(flops=19.5e12 * 3600).hours(a100, 1.0, 0.5) == 1.0  # float32 without TF32
    assert Work(moved=2.039e12 * 1800).hours(a100, 1.0, 0.5) == 1.0
    assert Work(flops=1.0).hours(device_named("cpu"), 1.0, 1.0) is None


def test_ppo_of_1b_by_hand() -> None:
    """Policy and critic with float32 gradients and AdamW, plus reward and reference."""
    recipe = load_recipe(recipes_dir() / "tldr/irl-ppo-pythia-1b.yaml")
    plan = make_plan(recipe, A100)
    parts = step_of(plan, "policy-1").cost.use.parts
    policy, head = 1_011_781_632, 50304 * 2048
    both = 2 * policy - head  # the critic has no output layer
    assert parts["weights"] == 4 * both and parts["gradients"] == 4 * both
    assert parts["optimiser"] == 8 * both
    assert parts["reference"] == 4 * policy and parts["reward"] == 4 * (policy - head + 2048)
    shared = make_plan(
        recipe.model_copy(
            update={
                "policy_update": recipe.policy_update.model_copy(
                    update={"critic": "shared", "critic_init": "zero"}
                )
            }
        ),
        A100,
    )
    parts = step_of(shared, "policy-1").cost.use.parts
    assert parts["weights"] == 4 * policy


def test_plan_prints_stages_memory_and_totals(capsys: pytest.CaptureFixture[str]) -> None:
    path = recipes_dir() / "tldr/irl-ppo-pythia-1b.yaml"
    ended = irl_align(capsys, "plan", path, "loop.iterations=1", "--device", "h100")
    assert ended.status == 0, ended.err
    for text in ("1,011.8M parameters", "policy-1", "reward/0", "optimiser", "h100", "disk:"):
        assert text in ended.out
    assert not Path("runs").exists()
    line = the_line(irl_align(capsys, "plan", path, "--device", "h200x"))
    assert "--device: found 'h200x', expected one of a100-40gb" in line
    line = the_line(irl_align(capsys, "plan", path, "lop.iterations=1"))
    assert "did you mean loop" in line


def test_plan_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    path = recipes_dir() / "imdb/abc-ppo-gpt2.yaml"
    ended = irl_align(capsys, "plan", path, "--json", "--device", "cpu", "--mfu", "0.5")
    printed = json.loads(ended.out)
    assert printed["parameters"] == 124_439_808
    assert printed["mfu"] == 0.5 and printed["hours"] is None
    stages = {stage["role"]: stage for stage in printed["stages"]}
    assert set(stages["policy-1"]["reads"]) == {"sft", "reward/0", "data"}
    assert stages["policy-1"]["sampled"] == 2400 * 256
    assert printed["peak_bytes"] == max(stage["peak_bytes"] for stage in stages.values())
    assert printed["disk_bytes"] > sum(stage["disk_bytes"] for stage in stages.values())


def test_plan_of_a_finished_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    ended = irl_align(capsys, "plan", shared_run("spin").folder / "recipe.yaml")
    assert ended.status == 0 and "nothing to do: the store has every stage" in ended.out
    changed = irl_align(
        capsys, "plan", shared_run("spin").folder / "recipe.yaml", "reward.args.beta=0.2"
    )
    assert "in part" in changed.out or "to do" in changed.out


def test_memory_fits_or_does_not(tmp_path: Path) -> None:
    plan = make_plan(tiny_recipe(tmp_path, *BEST), A100)
    assert plan.peak is not None and plan.peak.cost.use.peak < 2**30


def test_a_damaged_stage_stops_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk need is told from what the store has, before the run mends what is damaged."""
    command = ("train", write_recipe(tmp_path), f"output_dir={tmp_path / 'runs'}")
    command += ("loop.iterations=0",)
    assert irl_align(capsys, *command).status == 0
    [file] = (tmp_path / "runs/store").glob("data-*/reward.parquet")
    whole = file.read_bytes()
    at = len(whole) // 4
    file.write_bytes(whole[:at] + bytes(64) + whole[at + 64 :])
    with pytest.raises(DatasetGenerationError):
        Dataset.from_parquet(str(file), keep_in_memory=True)
    ended = irl_align(capsys, *command)
    assert ended.status == 0, ended.err
    assert len(list((tmp_path / "runs/store/.work").glob("data-*.damaged"))) == 1
    assert file.read_bytes() == whole
