"""`irl-align ppo` with rewards of all kinds, PPO in a recipe, and what is refused at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.chat_templates import FAMILIES, chat_tokenizer
from support.classifiers import one_label_classifier, tiny_llama
from support.ppo_tools import options
from support.rows import save
from support.tiny_models import SENTENCES
from support.tiny_runs import irl_align, metrics, stage_folder, stage_records, the_line, tiny_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from irl_align.config.recipe import load_recipe
from irl_align.config.resources import recipes_dir
from irl_align.errors import UserError
from irl_align.models.generation.samples import StoredSamples
from irl_align.models.loading import load_model
from irl_align.policy.ppo.critic import make_critic
from irl_align.reward.implicit import ImplicitReward
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from irl_align.training.train import train as run_recipe

MakeModel = Callable[[str], PreTrainedModel]
SMALL = (
    "batch_size=8",
    "episodes=16",
    "missing_eos=ignore",
    "learning_rate=0.01",
    "keep=last",
    "held_out_prompts=4",
    "generation.max_new_tokens=6",
)


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """Thirty demonstrations of ten prompts, and their card."""
    rows = [{"question": f"count {i % 10}", "answer": f"it is {i}."} for i in range(30)]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    front = (
        "---\nirl_align:\n  kind: demonstrations\n"
        "  splits: {train: {files: demos.jsonl}, validation: {from: train, share: 0.2}}\n"
        "  columns: {prompt: question, completion: answer}\n"
        '  template: "{prompt}\\n"\n---\n'
    )
    (folder / "toy.md").write_text(front)
    return folder / "toy.md"


@pytest.fixture
def policy(tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return save(tiny_model("llama"), tiny_tokenizer, tmp_path / "policy")


def classifier(tokenizer: PreTrainedTokenizerFast, labels: int = 1) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_config(config)


def other_tokenizer() -> PreTrainedTokenizerFast:
    """Another byte-level BPE, of 400 tokens and with other special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text.upper() for text in SENTENCES] + SENTENCES[:2], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>"
    )


def command(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    policy: Path,
    reward: Path,
    card: Path,
    *more: str,
    template: str | None = None,
) -> Any:
    sets = [word for option in (*SMALL, *more) for word in ("--set", option)]
    places = ["--reward", reward, "--data", card, "--output", folder / "runs"]
    if template is not None:
        places += ["--reward-template", template]
    return irl_align(capsys, "ppo", policy, *places, *sets)


def test_any_sequence_classifier_is_a_reward(
    tmp_path: Path,
    policy: Path,
    card: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One without our settings; its policy loads, samples, and scores as the record says."""
    reward = save(classifier(tiny_tokenizer), tiny_tokenizer, tmp_path / "reward")
    ended = command(capsys, tmp_path, policy, reward, card, "credit=red", "seed=3")
    assert ended.status == 0, ended.err
    *tables, message, where = ended.out.splitlines()
    assert message.startswith("2 updates done; reward ") and where.startswith("policy: ")
    model = Path(where.removeprefix("policy: "))
    assert load_model(model).config.vocab_size == 320

    run = tmp_path / "runs/ppo-seed3"
    record = stage_records(run)["policy-1"]
    assert record["settings"]["options"]["credit"] == "red"
    assert metrics(run)["ppo/0"]["ended"] == "2 updates done"
    rows = [json.loads(line) for line in (model.parent / "samples.jsonl").open()]
    assert [row["update"] for row in rows] == [1, 1, 1, 1, 2, 2, 2, 2]
    known = RewardModel.from_pretrained(reward)
    for row in rows:
        prompt = tiny_tokenizer(row["prompt"])["input_ids"]
        score = float(known.score_ids([prompt], [row["token_ids"]], None)[0])
        empty = float(known.prefix_scores_ids([prompt], [row["token_ids"]])[0][0])
        assert row["reward"] == pytest.approx(score, abs=1e-5)
        assert sum(row["credit"]) == pytest.approx(score - empty, abs=1e-4)  # 6 digits a token
        assert len(row["tokens"]) == len(row["kl"]) == len(row["advantage"]) == len(row["credit"])

    # So are the answers to the evaluation's prompts scored, those after the training.
    answers = [json.loads(line) for line in (run / "samples/policy-1-t1.jsonl").open()]
    asked = [tiny_tokenizer(answer["prompt"] + "\n")["input_ids"] for answer in answers]
    drawn = StoredSamples(stage_folder(run, "samples/evaluation/policy-1/t1"), asked)
    given = [group[0].token_ids for _, group in drawn.groups()]
    assert [answer["reward"] for answer in answers] == pytest.approx(
        known.score_ids(asked, given).tolist(), abs=1e-5
    )
    assert "reward" not in (run / "samples/policy-0-t1.jsonl").read_text()

    before, after = (metrics(run)[f"evaluation/{number}/t1"]["kl"] for number in (0, 1))
    assert abs(before) < 1e-4 < abs(after)
    assert sum(line.startswith(" ppo 1 ") for line in tables) == 2  # results, vital signs
    again = command(capsys, tmp_path, policy, reward, card, "credit=red", "seed=3")
    assert again.status == 0 and again.out.splitlines()[-2:] == [message, where]
    assert metrics(run)["stage/policy-1"]["reused"]
    assert irl_align(capsys, "report", run).status == 0
    assert "ppo 1" in (run / "report.html").read_text(encoding="utf-8")


def test_a_model_in_bfloat16_is_trained(
    tmp_path: Path,
    policy: Path,
    card: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without policy_update.bf16 policy and reference compute in float32 from these weights."""
    reward = save(classifier(tiny_tokenizer), tiny_tokenizer, tmp_path / "reward")
    ended = command(capsys, tmp_path, policy, reward, card, "model.dtype=bfloat16")
    assert ended.status == 0, ended.err
    [first, _] = stage_records(tmp_path / "runs/ppo-seed0")["policy-1"]["metrics"]["history"]
    assert abs(first["kl"]) < 1e-4 and first["first_log_ratio_max"] < 1e-4


@pytest.mark.parametrize("credit", ["red", "abc"])
def test_a_reward_with_another_tokenizer(
    tmp_path: Path, policy: Path, card: Path, capsys: pytest.CaptureFixture[str], credit: str
) -> None:
    theirs = other_tokenizer()
    reward = save(classifier(theirs), theirs, tmp_path / "reward")
    ended = command(capsys, tmp_path, policy, reward, card, f"credit={credit}", "critic_init=zero")
    assert ended.status == 0, ended.err
    refused = command(capsys, tmp_path, policy, reward, card, "critic_init=reward", "seed=9")
    assert "critic_init: reward: found AlignedReward, expected an explicit reward" in the_line(
        refused
    )


def bert(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    return BertForSequenceClassification(config)


def test_bad_rewards_are_one_line(
    tmp_path: Path,
    policy: Path,
    card: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    two = save(classifier(tiny_tokenizer, labels=2), tiny_tokenizer, tmp_path / "two")
    both_ways = save(bert(tiny_tokenizer), tiny_tokenizer, tmp_path / "bert")
    broken = classifier(tiny_tokenizer)
    with torch.no_grad():
        broken.score.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    nan = save(broken, tiny_tokenizer, tmp_path / "nan")

    def line(reward: Path, *more: str) -> str:
        return the_line(command(capsys, tmp_path, policy, reward, card, *more))

    assert "num_labels is 2; expected a reward model with one label" in line(two)
    assert "nowhere: config.json: not a reward model" in line(tmp_path / "nowhere")
    assert "expected" in line(both_ways, "credit=red")
    assert "not finite" in line(nan)
    assert "policy: config.json: num_labels is 2" in line(policy)  # a language model has no head


def test_bad_options_are_one_line_before_any_work(
    tmp_path: Path, policy: Path, card: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(*more: str) -> str:
        ended = command(capsys, tmp_path, policy, tmp_path / "unread", card, *more)
        assert not (tmp_path / "runs").exists()
        return the_line(ended)

    assert "policy_update.kl_coeff: unknown option; did you mean policy_update.kl_coef?" in line(
        "policy_update.kl_coeff=1.0"
    )
    assert "policy_update.credti: unknown option; did you mean policy_update.credit?" in line(
        "credti=red"
    )
    assert "dat: unknown option; did you mean data?" in line("dat.path=x")
    assert "command line: policy_update.clip=-1" in line("clip=-1")
    assert "credit red cancels under advantage rloo" in line("advantage=rloo", "n=2", "credit=red")
    assert "found best_of_n, expected ppo" in line("policy_update={kind: best_of_n}")


def test_trackers_get_the_numbers_of_both_policies(
    tmp_path: Path,
    policy: Path,
    card: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reward = save(classifier(tiny_tokenizer), tiny_tokenizer, tmp_path / "reward")
    ended = command(capsys, tmp_path, policy, reward, card, "report_to=[tensorboard]")
    assert ended.status == 0, ended.err
    run = tmp_path / "runs/ppo-seed0"
    actual = events.EventAccumulator(str(run / "tensorboard/irl-align"))
    actual.Reload()
    values = {event.step: event.value for event in actual.Scalars("evaluation/t1/kl")}
    known = [metrics(run)[f"evaluation/{number}/t1"]["kl"] for number in (0, 1)]
    assert values == {0: pytest.approx(known[0]), 1: pytest.approx(known[1])}
    # One that is not installed is told before the run.
    monkeypatch.setattr("irl_align.training.setup.find_spec", lambda name: None)
    line = the_line(command(capsys, tmp_path, policy, reward, card, "report_to=[wandb]", "seed=9"))
    assert "report_to: wandb is not installed" in line
    assert not (tmp_path / "runs/ppo-seed9").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"advantage": "rloo", "n": 2, "credit": "red"}, "cancels under advantage rloo"),
    ({"advantage": "grpo", "n": 2, "credit": "abc"}, "cancels under advantage grpo"),
    ({"credit": "red", "whiten_rewards": True}, "whiten_rewards does not go with credit red"),
    ({"credit": "abc", "clip_token_rewards": 1.0}, "clip_token_rewards does not go with credit"),
    ({"advantage": "grpo", "n": 2}, "use kl loss"),
    ({"advantage": "rloo"}, "n is 1, but advantage rloo needs 2 or more"),
    ({"batch_size": 10, "n": 4}, "batch_size 10 is not a multiple of n 4"),
    ({"minibatches": 20, "batch_size": 8}, "minibatches 20 are more than batch_size 8"),
    ({"kl_target": 1.0, "kl_coef": 0.0}, "kl_target multiplies kl_coef"),
    ({"beta": 0.5}, "beta is an option of credit abc"),
    ({"beta_c": 0.5}, "beta_c is an option of credit red"),
    ({"concentration": 2.0}, "concentration is an option of credit random"),
    ({"advantage": "reinforce", "lam": 0.9}, "lam is an option of advantage gae"),
    ({"advantage": "reinforce", "critic_init": "reward"}, "critic_init is an option of advantage"),
    ({"critic": "shared", "critic_init": "reward"}, "critic_init is an option of critic separate"),
    ({"advantage": "rloo", "n": 2, "gamma": 0.9}, "gamma is an option of advantage gae or"),
    (
        {"advantage": "rloo", "n": 2, "center_rewards": True},
        "center_rewards is an option of advantage gae or",
    ),
    ({"missing_eos_value": 2.0}, "missing_eos_value is an option of missing_eos"),
    ({"kl_horizon": 5}, "kl_horizon is an option of kl_target"),
    ({"baseline_decay": 0.5}, "baseline_decay is an option of advantage reinforce"),
]


@pytest.mark.parametrize(("way", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_compose_is_refused(way: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        options(**way)


def test_rewards_that_cannot_be_critics(
    tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen, model = options(critic_init="reward"), tiny_model("llama")
    implicit = ImplicitReward(model, [(1.0, model)], 0.1)
    with pytest.raises(UserError, match="critic_init: reward: found ImplicitReward, expected"):
        make_critic(chosen, model, implicit, tiny_tokenizer)
    theirs = other_tokenizer()
    foreign = RewardModel(classifier(theirs), theirs)
    with pytest.raises(
        UserError, match=r"reward's tokenizer \(400 tokens\) differs from the policy's"
    ):
        make_critic(chosen, model, foreign, tiny_tokenizer)
    with_lm = RewardModel(classifier(tiny_tokenizer), tiny_tokenizer, RewardSettings(lm_coef=0.5))
    with pytest.raises(UserError, match=r"lm_coef 0\.5, which a critic cannot"):
        make_critic(chosen, model, with_lm, tiny_tokenizer)
    assert make_critic(options(), model, foreign, tiny_tokenizer) is not None  # zero goes with all


# --- in the loop ----------------------------------------------------------------------------------


def test_ppo_needs_a_reward(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a reward"):
        tiny_recipe(tmp_path, "reward.kind=none", "policy_update={kind: ppo}", *UNSET)


UNSET = ("reward.args={}", "reward.schedule={}")


@pytest.mark.timeout(300)
def test_ppo_in_the_loop_reports_gold_of_its_rollouts(tmp_path: Path) -> None:
    """Two outer iterations; every rollout judged by the card's gold, which changes nothing. A
    reward of 9 for samples without EOS is a warning sign of the run, and top-p is not PPO's."""
    recipe = (
        "policy_update={kind: ppo, batch_size: 16, episodes: 32, credit: abc, n: 2}",
        "policy_update.advantage=reinforce",
        "policy_update.missing_eos=replace",
        "policy_update.missing_eos_value=9.0",
        "generation.top_p=0.9",
        "loop.iterations=2",
    )
    run_recipe(tiny_recipe(tmp_path, *recipe))
    run = tmp_path / "runs/tiny-seed0"
    records = stage_records(run)
    for k in (1, 2):
        history = records[f"policy-{k}"]["metrics"]["history"]
        assert len(history) == 2
        for record in history:
            assert 0.0 <= record["gold_slot_error_rate"] <= 1.5
            assert 0.0 <= record["gold_fully_right"] <= 1.0
            assert 0.0 < record["attention_mass"] <= 1.0 and 0.0 <= record["padding"] < 0.3
            assert record["eos_rate"] + record["truncated"] == pytest.approx(1.0)
        last = history[-1]
        assert metrics(run)[f"signs/ppo-{k - 1}"]["signs"] == last["alarms"]
        pays = any(alarm.startswith("samples without EOS") for alarm in last["alarms"])
        assert pays == (0.0 < last["truncated"] < 1.0)
        assert records[f"policy-{k}"]["settings"]["sampling"]["top_p"] == 1.0
        kl = records[f"samples/held_out-all-tokens/policy-{k}/t1"]
        assert kl["settings"]["sampling"]["top_p"] == 1.0
        assert f"samples/held_out/policy-{k}/t1" in records  # with top-p, for all else
    first, second = records["policy-1"], records["policy-2"]
    assert second["inputs"]["start"] == first["key"]
    assert second["inputs"]["reference"] == first["inputs"]["reference"]  # pi_0
    plain = tiny_recipe(tmp_path, *recipe, "evaluation.gold=false", "name=plain")
    run_recipe(plain)
    other = stage_records(tmp_path / "runs/plain-seed0")["policy-1"]
    assert other["key"] != first["key"]
    assert "gold_fully_right" not in other["metrics"]["history"][0]
    model = Path("model/model.safetensors")
    paths = [tmp_path / f"runs/store/ppo-{r['key']}" / model for r in (first, other)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "credit"),
    [
        ("e2e/irl-ppo", "sparse"),
        ("e2e/irl-ppo-red", "red"),
        ("e2e/irl-ppo-abc", "abc"),
        ("restaurant/irl-ppo", "red"),
    ],
)
def test_recipes_with_ppo_are_of_ppo(name: str, credit: str) -> None:
    recipe = load_recipe(recipes_dir() / f"{name}.yaml")
    update = recipe.policy_update
    assert update.kind == "ppo" and recipe.reward.kind == "explicit"
    assert update.credit == credit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data", "restaurant"],
            "data.task: found nothing, expected only size, noise, and at",
        ),
        (
            ["--data", "e2e_nlg", "--set", "data.path=nowhere"],
            "data.path: found nothing at nowhere",
        ),
    ],
)
def test_ppo_refuses_wrong_data_before_it_makes_a_run_folder(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, runs = tmp_path / "model", tmp_path / "runs"
    model.mkdir()
    (model / "config.json").write_text("{}")
    line = the_line(irl_align(capsys, "ppo", model, "--reward", model, *options, "--output", runs))
    assert message in line and not runs.exists()


# --- conversations --------------------------------------------------------------------------------

FOUR_TURNS = (
    "{% if messages|length != 4 %}{{ raise_exception('found ' ~ messages|length ~ ' turns') }}"
    "{% endif %}" + FAMILIES["zephyr"].template
)


@pytest.fixture
def chat_card(tmp_path: Path) -> Path:
    """Thirty conversations of four turns, and their card."""
    texts = [
        ("user", "hi {}"),
        ("assistant", "yes?"),
        ("user", "count {}"),
        ("assistant", "it is {}"),
    ]
    rows = [
        {"messages": [{"role": role, "content": text.format(i)} for role, text in texts]}
        for i in range(30)
    ]
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chats.md").write_text(
        "---\nirl_align:\n  kind: demonstrations\n  template: chat\n"
        "  splits: {train: {files: chats.jsonl}, validation: {from: train, share: 0.2}}\n"
        "  columns: {messages: messages}\n---\n"
    )
    return folder / "chats.md"


def test_run_ppo_gives_a_reward_of_another_project_the_conversation(
    tmp_path: Path, chat_card: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reward's own template gets all four turns; its score is the one of its model card."""
    own, theirs = chat_tokenizer("chatml"), chat_tokenizer("zephyr")
    theirs.chat_template = FOUR_TURNS
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_llama(own))
    policy = save(model, own, tmp_path / "chat-policy")
    plain = one_label_classifier(theirs)
    reward = save(plain, theirs, tmp_path / "their-reward")
    ended = command(capsys, tmp_path, policy, reward, chat_card)
    assert ended.status == 0, ended.err
    run = tmp_path / "runs/ppo-seed0"
    answers = [json.loads(line) for line in (run / "samples/policy-1-t1.jsonl").open()]
    for answer in answers:
        assert [turn["role"] for turn in answer["prompt"]] == ["user", "assistant", "user"]
        chat = [*answer["prompt"], {"role": "assistant", "content": answer["completion"]}]
        text = theirs.apply_chat_template(chat, tokenize=False)
        scores = []
        for read in (text, text.removesuffix("</s>\n")):  # finished, and not finished
            ids = theirs(read, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(float(plain(input_ids=ids).logits))
        assert min(abs(answer["reward"] - score) for score in scores) < 1e-4
    # Its template renders no other text, and one that is made here keeps its own.
    refused = command(
        capsys, tmp_path, policy, reward, chat_card, "name=other", template="Q {prompt}"
    )
    assert "a conversation needs template: chat" in the_line(refused)


def test_run_ppo_refuses_a_template_for_a_reward_that_was_fitted_here(
    tmp_path: Path,
    policy: Path,
    card: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = RewardModel(
        classifier(tiny_tokenizer), tiny_tokenizer, RewardSettings(template="{prompt}")
    )
    own.save_pretrained(tmp_path / "own")
    refused = command(capsys, tmp_path, policy, tmp_path / "own", card, template="chat")
    assert "made with the template '{prompt}', which it keeps" in the_line(refused)
