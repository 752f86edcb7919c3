"""`irl-align plan`: the stages that a run makes, what the store has of them, and what they take."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
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

from irl_align.config.recipe import load_recipe
from irl_align.config.resources import recipe_files, recipes_dir
from irl_align.config.schema import Recipe
from irl_align.errors import UserError
from irl_align.training.plan.data import count_data
from irl_align.training.plan.devices import DEVICES, Work, device_named
from irl_align.training.plan.memory import Precision
from irl_align.training.plan.plan import MATCHING, Assumptions, Plan, make_plan
from irl_align.training.train import Result

pytestmark = pytest.mark.timeout(240)
A100 = Assumptions(device_named("a100-80gb"), 0.35, 0.5)
SHIPPED = sorted(path.relative_to(recipes_dir()).as_posix() for path in recipe_files())


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def again(run: Result, *overrides: str) -> Plan:
    """The plan of a finished run's recipe."""
    return make_plan(load_recipe(run.folder / "recipe.yaml", overrides), A100)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_has_a_plan(name: str) -> None:
    small = ["data.task={size: 60}"] if name.startswith("restaurant") else []
    plan = make_plan(load_recipe(recipes_dir() / name, small), A100)
    assert plan.to_do == plan.steps and plan.store.startswith("no store at")
    assert plan.hours is not None and plan.hours > 0 and plan.disk > 0
    roles = [step.role for step in plan.steps]
    assert len(roles) == len(set(roles)) and roles[:2] == ["start", "data"]
    for number, step in enumerate(plan.steps):  # whatever is read has been made before
        assert set(step.reads) <= set(roles[:number]), step
        assert (
            step.cost.use.peak >= max(step.cost.use.parts.values(), default=0) or not step.cost.work
        )


@pytest.mark.parametrize("name", ["contrast", "select", "spin"])
def test_the_stages_are_those_of_the_run(name: str) -> None:
    run = shared_run(name)
    plan = again(run)
    made = stage_records(run.folder)
    assert {step.role for step in plan.steps} == set(made)
    assert plan.to_do == [] and plan.hours == 0 and plan.disk == 0
    order = [key.removeprefix("stage/") for key in metrics(run.folder) if key.startswith("stage/")]
    trained = [role for role in order if not role.startswith(("samples", "selected", "eval"))]
    assert [s.role for s in plan.steps if s.role in trained] == trained


def test_rows_and_tokens_are_those_of_the_run() -> None:
    run = shared_run("contrast")
    plan, made = again(run), stage_records(run.folder)
    rows = {step.role: step.cost.rows for step in plan.steps}
    pairs = made["pairs/0"]["metrics"]["train"]["pairs"]
    assert pairs <= rows["pairs/0"] <= 1.5 * pairs  # of samples without EOS there are none
    samples = made["samples/train/policy-0/t1"]["metrics"]
    assert rows["samples/train/policy-0/t1"] == samples["samples"]
    counted = made["data"]["metrics"]
    assert plan.counts.rows["sft"] == counted["sft_rows"]
    mean = counted["sft_tokens"] / counted["sft_rows"]
    assert plan.counts.completion.mean == pytest.approx(mean, rel=0.02)
    assert plan.shape.parameters == made["start"]["metrics"]["parameters"]


def test_edits_and_extra_prompts_are_counted(tmp_path: Path) -> None:
    run = shared_run("contrast")
    contrast = (
        "pairs.sources=[demonstration/policy, demonstration/contrast]",
        "pairs.contrast=edit",
    )
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    plain, edited, both = (
        {step.role: step.cost.rows for step in again(run, *options).steps}
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
    demonstrations = again(run).counts.rows["reward"]
    assert edited["pairs/0"] == plain["pairs/0"] + 5 * demonstrations
    candidates, n = "samples/candidates/policy-0/t1", 2
    assert both[candidates] == 2 * plain[candidates] + 2 * n


def test_only_what_the_change_touches_is_to_do() -> None:
    plan = again(shared_run("contrast"), "policy_update.args.learning_rate=0.005")
    to_do = {step.role for step in plan.to_do}
    assert to_do == {
        *("policy-1", "samples/held_out/policy-1/t1", "vitals/1"),
        *("samples/evaluation/policy-1/t1", "evaluation/1/t1"),
        *("samples/evaluation/policy-1/t0", "evaluation/1/t0", "evaluation/1/rewards"),
    }
    assert plan.peak is not None and plan.peak.role == "policy-1"
    # another evaluation trains nothing again
    other = again(shared_run("contrast"), "evaluation.prompts=5")
    assert {s.role for s in other.to_do if not s.role.startswith(("samples/eval", "eval"))} == set()


def test_matching_entropy_samples_the_first_policy_a_few_times() -> None:
    plan = again(shared_run("contrast"), "evaluation.match_entropy=true")
    (step,) = plan.to_do
    assert step.role == "matched-entropy/1" and step.reads == ("sft", "evaluation/1/t1")
    at_one = next(s for s in plan.steps if s.role == "samples/evaluation/policy-0/t1")
    assert step.cost.sampled == pytest.approx(MATCHING * at_one.cost.sampled)
    assert plan.hours is not None and plan.hours > 0


def test_a_store_out_of_reach_is_said_and_searched_as_far_as_it_goes() -> None:
    run = shared_run("contrast")
    plan = again(run, "generation.backend=vllm-server", "generation.server.urls=[http://x]")
    assert plan.store.startswith(str(run.folder.parent)) and "searched" in plan.store


def hub_recipe(*overrides: str) -> Recipe:
    return load_recipe(recipes_dir() / "tldr/sft-pythia-1b.yaml", overrides)


def test_rows_of_the_hub_are_the_cards_and_lengths_the_limits() -> None:
    counts = count_data(hub_recipe())
    used = 116722 * 0.0902
    assert counts.rows == {
        "sft": round(used * 0.95),
        "reward": round(used * 0.95),
        "held_out": round(used * 0.05),
        "evaluation": 6447,
    }
    assert (counts.prompt.mean, counts.completion.longest, counts.local) == (512, 53, False)
    apart = count_data(hub_recipe("data.reward_data=disjoint", "data.reward_share=0.25"))
    assert apart.rows["reward"] == round(used * 0.95 * 0.25)


def test_a_card_without_counts_is_one_line(tmp_path: Path) -> None:
    card = tmp_path / "c.md"
    card.write_text(
        "---\nirl_align:\n  kind: demonstrations\n  source: {hub: a/b}\n"
        "  splits: {train: {hub: train}, validation: {hub: dev}}\n"
        "  columns: {prompt: p, completion: c}\n---\n"
    )
    with pytest.raises(UserError, match="found no number of rows of split train") as caught:
        count_data(hub_recipe(f"data.card={card}"))
    assert "expected about: {train: ROWS} in the card, or data.path" in str(caught.value)


def test_local_data_of_a_model_out_of_reach_is_counted_by_words(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"p": "one two three", "c": "four five"}\n' * 40)
    card = tmp_path / "c.md"
    card.write_text(
        "---\nirl_align:\n  kind: demonstrations\n  columns: {prompt: p, completion: c}\n"
        "  splits: {train: {files: d.jsonl}, validation: {files: d.jsonl}}\n---\n"
    )
    # one prompt: it is held out or trained on as a whole, so that a part is empty
    with pytest.raises(UserError, match="none is left"):
        count_data(hub_recipe(f"data.card={card}", "data.share=1.0"))
    lines = "".join(f'{{"p": "one two {n}", "c": "four five"}}\n' for n in range(40))
    (tmp_path / "d.jsonl").write_text(lines)
    counts = count_data(hub_recipe(f"data.card={card}", "data.share=1.0"))
    assert counts.prompt.mean == pytest.approx(3 * 1.4 + 1)
    assert counts.rows["sft"] + counts.rows["held_out"] == counts.rows["evaluation"] == 40
    assert counts.how.endswith("the model's tokenizer is not in reach")


def test_hours_by_hand() -> None:
    a100 = DEVICES["a100-80gb"]
    half = Precision(4, 2)
    assert Work(flops=312e12 * 0.5 * 3600, precision=half).hours(a100, 0.5, 0.5) == 1.0
    assert Work(flops=19.5e12 * 3600).hours(a100, 1.0, 0.5) == 1.0  # float32 without TF32
    assert Work(moved=2.039e12 * 1800).hours(a100, 1.0, 0.5) == 1.0
    assert Work(flops=1.0).hours(device_named("cpu"), 1.0, 1.0) is None


def test_ppo_of_1b_by_hand() -> None:
    """Policy and critic with float32 gradients and AdamW, reward and reference beside them."""
    recipe = load_recipe(recipes_dir() / "tldr/irl-ppo-pythia-1b.yaml")
    plan = make_plan(recipe, A100)
    parts = next(step for step in plan.steps if step.role == "policy-1").cost.use.parts
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
    parts = next(step for step in shared.steps if step.role == "policy-1").cost.use.parts
    assert parts["weights"] == 4 * policy


def test_the_command_prints_stages_memory_and_totals(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    path = recipes_dir() / "imdb/abc-ppo-gpt2.yaml"
    ended = irl_align(capsys, "plan", path, "--json", "--device", "cpu", "--mfu", "0.5")
    found = json.loads(ended.out)
    assert found["parameters"] == 124_439_808 and found["mfu"] == 0.5 and found["hours"] is None
    stages = {stage["role"]: stage for stage in found["stages"]}
    assert stages["policy-1"]["reads"] == ["sft", "reward/0", "data"]
    assert stages["policy-1"]["sampled"] == 2400 * 256
    assert found["peak_bytes"] == max(stage["peak_bytes"] for stage in stages.values())
    assert found["disk_bytes"] > sum(stage["disk_bytes"] for stage in stages.values())


def test_a_finished_run_has_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    ended = irl_align(capsys, "plan", shared_run("spin").folder / "recipe.yaml")
    assert ended.status == 0 and "nothing is to do: the store has every stage" in ended.out
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
