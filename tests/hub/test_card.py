"""Cards: metadata by the Hub's own classes, numbers by the run's records, snippets that run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard, EvalResult, ModelCard
from support.rows import save
from support.shared_runs import shared_run
from support.tiny_runs import BEST, RECIPE, metrics, stage_records
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, pipeline

from irl_align import RewardModel
from irl_align.config.recipe import load_recipe
from irl_align.data.cards import load_card
from irl_align.data.loading import load_preferences
from irl_align.hub.card import reward_card
from irl_align.hub.export import export
from irl_align.hub.facts import Facts, derive
from irl_align.hub.results import Measured, gold_table
from irl_align.reward.settings import RewardSettings
from irl_align.training.train import train
from irl_align.utils.statistics import clustered_ratio

pytestmark = pytest.mark.timeout(240)
PROMPT, ANSWER = "name[the red lion], food[thai]", "The red lion serves thai food."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder(what)``: the export of a run's reward, policy, pairs or of a selecting policy."""
    root = tmp_path_factory.mktemp("cards")
    run = {"selecting": "select", "spin": "spin"}
    for name in ("reward", "policy", "pairs", "selecting", "spin"):
        what = "policy" if name in run else name
        export(shared_run(run.get(name, "contrast")).folder, what, root / name)
    return lambda name: root / name


def section(text: str, title: str) -> str:
    """Text below a heading, up to the next."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def one_line(text: str) -> str:
    """Text without line breaks."""
    return " ".join(text.split())


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


# --- metadata -------------------------------------------------------------------------------------


def test_reward_card_has_the_metadata_of_a_model(folder: Callable[[str], Path]) -> None:
    data = ModelCard.load(folder("reward") / "README.md").data
    assert (data.license, data.library_name) == ("apache-2.0", "transformers")
    assert data.pipeline_tag == "text-classification" and data.language == ["en"]
    assert {"reward-model", "irl-align"} <= set(data.tags)
    assert data.base_model is None and data.datasets is None  # from scratch, on a made-up task
    held = metrics(shared_run("contrast").folder)["reward/0"]["by_source"]
    actual = {result.metric_name: result for result in data.eval_results}
    assert all(isinstance(result, EvalResult) for result in actual.values())
    for source, report in held.items():
        value = actual[f"{source}, held out"].metric_value
        assert value == pytest.approx(report["accuracy"], abs=1e-4)
    # What is written is what the Hub's classes write: nothing was lost in reading.
    front = (folder("reward") / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front) == data.to_dict()


def test_policy_card_has_the_metadata_of_a_model(folder: Callable[[str], Path]) -> None:
    data = ModelCard.load(folder("policy") / "README.md").data
    assert data.pipeline_tag == "text-generation" and data.model_name == "contrast"
    recorded = metrics(shared_run("contrast").folder)
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values == {
        f"slot_error_rate, T={t}": pytest.approx(
            recorded[f"evaluation/1/t{t}"]["metrics"]["slot_error_rate"], abs=1e-4
        )
        for t in (0, 1)
    }


def test_pairs_card_has_the_metadata_of_a_data_set(folder: Callable[[str], Path]) -> None:
    data = DatasetCard.load(folder("pairs") / "README.md").data
    assert data.license == "apache-2.0" and "preferences" in data.tags
    assert [config["config_name"] for config in data.configs] == ["pairs", "samples"]


# --- text -----------------------------------------------------------------------------------------


def test_reward_card_has_the_numbers_of_the_run(folder: Callable[[str], Path]) -> None:
    text = (folder("reward") / "README.md").read_text()
    recorded = metrics(shared_run("contrast").folder)
    report, data = recorded["reward/0"], recorded["data"]
    evaluation = section(text, "Evaluation")
    for name, key in {"length alone": "length", "mean log-prob under SFT": "logprob_mean"}.items():
        audit = report["audit"]
        low, high = audit["intervals"][key]
        share = f"{audit[key]:.1%} ({low:.1%} to {high:.1%})"
        assert f"| {name} | {share} | {audit['pairs']} | {audit['prompts']} |" in evaluation
    assert "Note: accuracies over fewer than 30 prompts" in evaluation
    row = re.search(r"demonstration/policy \| ([\d.]+)% \(([\d.]+)% to ([\d.]+)%\)", evaluation)
    assert row is not None
    value, low, high = map(float, row.groups())
    exact = 100 * report["by_source"]["demonstration/policy"]["accuracy"]
    assert value == pytest.approx(exact, abs=0.051) and low < value < high
    assert f"Pair loss {report['held_out']['loss']:.4f}" in evaluation
    method = section(text, "Method")
    assert f"{data['sft_rows']:,} rows of {data['sft_prompts']:,} prompts for SFT" in method
    assert "arXiv:2503.13538, eq. 11" in method and "| seed | 0 |" in method
    assert "demonstration/policy, demonstration/contrast" in method
    limits = section(text, "Known limits")
    assert "It is synthetic: few sentence patterns" in limits  # the data card's
    for sign in recorded["signs/policy-1"]["signs"]:
        assert sign in limits


def test_reward_card_names_every_stage_that_the_reward_is_made_from(
    folder: Callable[[str], Path],
) -> None:
    origin = section((folder("reward") / "README.md").read_text(), "Where it comes from")
    records = stage_records(shared_run("contrast").folder)
    roles = {"reward/0", "pairs/0", "sft", "start"}
    for role in roles:
        assert f"| {role} | `{records[role]['name']}-{records[role]['key']}` |" in origin
    assert "policy-1" not in origin  # made later
    for value in metrics(shared_run("contrast").folder)["data"]["checksums"].values():
        assert value in origin


def test_cards_have_no_paths_of_this_machine(folder: Callable[[str], Path]) -> None:
    home = str(shared_run("contrast").folder.parent)
    for name in ("reward", "policy", "pairs", "selecting", "spin"):
        for file in folder(name).rglob("*"):
            if file.suffix in (".md", ".yaml", ".json", ".jinja"):
                assert home not in file.read_text(), file
    recipe = yaml.safe_load((folder("reward") / "recipe.yaml").read_text())
    assert recipe["seed"] == 0 and "output_dir" not in recipe


def test_policy_card_has_a_table_with_intervals_and_baselines(
    folder: Callable[[str], Path],
) -> None:
    evaluation = section((folder("policy") / "README.md").read_text(), "Evaluation")
    rows = [line for line in evaluation.splitlines() if line.startswith("| ") and "%" in line]
    assert [row.split(" | ")[0] for row in rows] == [
        "| demonstrations",
        *["| pi_0 (SFT)"] * 2,
        *["| pi_1"] * 2,
    ]
    run = shared_run("contrast")
    (head,) = (line for line in evaluation.splitlines() if "| temperature |" in line)
    assert head.split(" | ")[2:] == ["slot error rate", "BLEU", "chrF", "KL to pi_0", "tokens |"]
    texts = metrics(run.folder)["evaluation/1/t1"]["metrics"]
    assert f"| {texts['bleu']:.1f} | {texts['chrf']:.1f} |" in rows[3]
    samples = (run.folder / "samples" / "policy-1-t1.jsonl").read_text().splitlines()
    errors = [json.loads(line) for line in samples]
    counts = ([row[name] for row in errors] for name in ("slot_errors", "slots"))
    share = clustered_ratio(*counts)
    assert f"{share.mean:.1%} ({share.low:.1%} to {share.high:.1%})" in rows[3]


def test_gold_table_leaves_out_numbers_that_are_not_finite() -> None:
    facts = Facts.of(shared_run("contrast").folder)
    for record in facts.view.metrics:
        if record["key"].startswith("evaluation/"):
            record |= {"kl": None, "metrics": dict.fromkeys(("slot_error_rate", "bleu"))}
    table = gold_table(facts, facts.policy())
    assert table.results == []
    (first, *_, last) = table.rows
    assert first[:3] == ["demonstrations", "", "-"]
    assert last[:3] == ["pi_1", "0", ""] and set(last[3:-1]) == {""}


def test_policy_card_describes_selecting_and_spin_policies(folder: Callable[[str], Path]) -> None:
    text = (folder("selecting") / "README.md").read_text()
    assert "**The run's policy is best-of-3 selection**" in one_line(text)
    # The weights are SFT's, and so are the results in the metadata; the table has both.
    recorded = metrics(shared_run("select").folder)["evaluation/0/t1"]["metrics"]["slot_error_rate"]
    actual = ModelCard.load(folder("selecting") / "README.md").data.eval_results
    values = {result.metric_name: result.metric_value for result in actual}
    assert values["slot_error_rate, T=1"] == pytest.approx(recorded, abs=1e-4)
    assert "| pi_0 (SFT) | 1 |" in text and "| pi_1, selected | 1 |" in text
    assert f"| sft | `sft-{stage_records(shared_run('select').folder)['sft']['key']}` |" in text
    text = (folder("spin") / "README.md").read_text()
    assert "SPIN, arXiv:2401.01335" in section(text, "Method")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (RewardSettings(lm_coef=0.5), "adds 0.5 times the answer's mean log-prob"),
        (RewardSettings(bound=2.0, mean=0.25), "b tanh(u / b) - 0.25 with b = 2 and u the logit"),
        (RewardSettings(mean=0.25), "**The logit that transformers gives is the score plus 0.25**"),
        (RewardSettings(), "The logit that transformers gives is the score: nothing is to be"),
    ],
)
def test_reward_card_says_how_logit_and_score_differ(
    settings: RewardSettings, expected: str
) -> None:
    facts = Facts.of(shared_run("contrast").folder)
    measured = Measured(3, None, {}, 0, "0")
    text = reward_card(facts, facts.reward(), settings, measured, derive(facts))
    assert expected in one_line(section(text, "What a score is"))
    (snippet,) = code(text, "python")  # transformers alone was not measured to give the score
    assert "RewardModel.from_pretrained(REPO)" in snippet and "```sh" not in text


# --- snippets -------------------------------------------------------------------------------------


def test_reward_card_snippets_run_and_agree(folder: Callable[[str], Path]) -> None:
    text = (folder("reward") / "README.md").read_text()
    plain, ours, trl = code(text, "python")
    known: dict[str, Any] = {"REPO": str(folder("reward")), "prompt": PROMPT, "answer": ANSWER}
    exec(plain, known)
    exec(ours, known)
    assert shared_run("contrast").reward is not None
    reward = RewardModel.from_pretrained(shared_run("contrast").reward)
    expected = float(reward.score([PROMPT], [ANSWER]))
    assert known["score"](PROMPT, ANSWER) == pytest.approx(expected, abs=1e-5)
    assert float(known["scores"]) == pytest.approx(expected, abs=1e-5)
    compile(trl, "README.md", "exec")  # the trainer itself is run in test_export.py
    (vllm,) = code(text, "sh")
    pooler = json.loads(re.search(r"--pooler-config '(.*)'", vllm)[1])  # type: ignore[index]
    config = json.loads((folder("reward") / "config.json").read_text())
    assert pooler == {"use_activation": False, "logit_mean": config["irl_reward"]["mean"]}


@pytest.mark.parametrize("name", ["policy", "selecting", "spin"])
def test_policy_card_snippet_runs(name: str, folder: Callable[[str], Path]) -> None:
    (snippet,) = code((folder(name) / "README.md").read_text(), "python")
    known: dict[str, Any] = {"REPO": str(folder(name)), "prompt": PROMPT}
    exec(snippet, known)
    tokenizer = AutoTokenizer.from_pretrained(folder(name))
    start = known["inputs"]["input_ids"][0].tolist()
    assert tokenizer.decode(start, skip_special_tokens=True) == f"{PROMPT}\n"
    assert isinstance(known["answer"], str) and PROMPT not in known["answer"]
    assert known["model"].generation_config.eos_token_id == [tokenizer.eos_token_id]


def test_reward_card_shows_a_pipeline_that_gives_the_score(folder: Callable[[str], Path]) -> None:
    text = (folder("reward") / "README.md").read_text()
    known: dict[str, Any] = {"REPO": str(folder("reward")), "pipeline": pipeline}
    exec(code(text, "python")[0], known)
    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
    known["text"] = known["tokenizer"].apply_chat_template(chat, tokenize=False)
    (call,) = re.findall(r"`(pipeline\(.*)`", text)
    (result,) = eval(call, known)
    mean = known["model"].config.irl_reward["mean"]
    assert result["score"] - mean == pytest.approx(known["score"](PROMPT, ANSWER), abs=1e-5)


# --- a run on a chat model ------------------------------------------------------------------------

CHAT = (
    "{%- for m in messages -%}<{{ m['role'] }}>{{ m['content'] }}"
    "{%- if m['role'] == 'assistant' -%}{{ eos_token + '\\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)


def test_export_of_a_reward_on_a_chat_model_reads_its_template_and_names_both_licences(
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    tiny_tokenizer.chat_template = CHAT
    base = save(tiny_model("gpt_neox"), tiny_tokenizer, tmp_path / "base-chat")
    (base / "README.md").write_text("---\nlicense: llama3.1\n---\n# Base\n")
    turns = [("system", "Be brief."), ("user", "{} plus 1?"), ("assistant", "It is {}.")]
    rows = [
        {"messages": [{"role": role, "content": text.format(i)} for role, text in turns]}
        for i in range(60)
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "demos.jsonl").write_text(data)
    (tmp_path / "own.md").write_text(
        "---\nlicense: cc-by-nc-4.0\nirl_align:\n  kind: demonstrations\n  template: chat\n"
        "  splits: {train: {files: demos.jsonl}, validation: {from: train, share: 0.2}}\n"
        "  columns: {messages: messages}\n---\n# Sums\n\n**Known problems.** Sums are wrong.\n"
    )
    own = RECIPE.replace(
        "card: restaurant\n  task: {size: 200, noise: 0.0}", f"card: {tmp_path}/own.md"
    )
    own = re.sub(r"  from_scratch:\n(    .*\n)+", f"  path: {base}\n", own)
    (tmp_path / "own.yaml").write_text(own)
    overrides = ("evaluation.split=validation", "pairs.truncated=keep")
    runs = f"output_dir={tmp_path / 'runs'}"
    recipe = load_recipe(
        tmp_path / "own.yaml", [*BEST, *overrides, runs, "generation.max_new_tokens=12"]
    )
    run = train(recipe)
    export(run.folder, "reward", tmp_path / "reward")
    export(run.folder, "policy", tmp_path / "policy")
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template == CHAT
    text = (tmp_path / "reward" / "README.md").read_text()
    data_of_card = ModelCard.load(tmp_path / "reward" / "README.md").data
    assert data_of_card.license == "other" and data_of_card.license_name == (
        "llama3.1 + cc-by-nc-4.0"
    )
    assert "| base model | base-chat |" in text and "Sums are wrong." in text
    assert str(tmp_path) not in text + (tmp_path / "reward" / "recipe.yaml").read_text()
    assert "The logit that transformers gives is the score: nothing is to be added." in text
    known: dict[str, Any] = {"REPO": str(tmp_path / "reward")}
    exec(code(text, "python")[0], known)
    assert run.reward is not None
    reward = RewardModel.from_pretrained(run.reward)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 plus 1?"}]
    for prompt in ("1 plus 1?", talk):
        expected = float(reward.score([prompt], ["It is 2."]))
        assert known["score"](prompt, "It is 2.") == pytest.approx(expected, abs=1e-5)

    # Pairs of conversations are conversations, as TRL's trainers read them.
    export(run.folder, "pairs", tmp_path / "pairs")
    pairs = pq.read_table(next((tmp_path / "pairs" / "pairs").glob("train-*"))).to_pylist()
    asked = [[turn["role"] for turn in row["prompt"]] for row in pairs]
    assert asked and all(roles == ["system", "user"] for roles in asked)
    for row in pairs:
        number = row["prompt"][1]["content"].split()[0]
        assert row["chosen"] == [{"role": "assistant", "content": f"It is {number}."}]
        assert row["rejected_prompt"] == row["prompt"] and len(row["rejected"]) == 1
    samples = [row for rows in run.view().samples().values() for row in rows]
    assert all(row["prompt"][0]["content"] == "Be brief." for row in samples)
    card = load_card(tmp_path / "pairs" / "README.md")
    read = load_preferences(card, "validation")
    assert [turn["role"] for turn in read[0]["prompt"]] == ["system", "user"]
    assert read[0]["chosen"].startswith("It is ")
    table = pq.read_table(next((tmp_path / "pairs" / "samples").glob("policy-1-*"))).to_pylist()
    assert table[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
