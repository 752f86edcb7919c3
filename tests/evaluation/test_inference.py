"""Rows to score and to sample, rewards of other projects in `score`, and answers of `generate`."""

import json
import shutil
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_templates import FAMILIES, chat_tokenizer
from support.classifiers import card_score, one_label_classifier, tiny_llama
from support.rows import plain_logps, save
from support.shared_runs import shared_run
from support.tiny_runs import irl_align, stage_folder, the_line
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from irl_align.errors import UserError
from irl_align.evaluation.inference import (
    SAMPLED,
    SCORED,
    generate_rows,
    log_ratio_of,
    prompt_format,
    read_rows,
    resolve_policy,
    row_exchanges,
    row_prompt,
    saved_reward,
)
from irl_align.evaluation.preferences import Implicit, find_scorers
from irl_align.hub.facts import Facts
from irl_align.models.generation.protocol import Sampling
from irl_align.models.loading import load_model
from irl_align.training.run_folder import artefact_folder

ASK = {"role": "user", "content": "Where is the pub?"}
NEAR = {"role": "assistant", "content": "Near the river."}
AGAIN = {"role": "user", "content": "Which river?"}
FAR = {"role": "assistant", "content": "The Punter."}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "completion": "Yes?"}, [("Hi", "Yes?")]),
        ({"prompt": [ASK], "completion": [NEAR]}, [([ASK], NEAR["content"])]),
        ({"messages": [ASK, NEAR]}, [([ASK], NEAR["content"])]),
        (
            {"prompt": "Hi", "chosen": [NEAR], "rejected": "no"},
            [("Hi", NEAR["content"]), ("Hi", "no")],
        ),
        (
            {"chosen": [ASK, NEAR, AGAIN, FAR], "rejected": [ASK, FAR]},
            [([ASK, NEAR, AGAIN], FAR["content"]), ([ASK], FAR["content"])],
        ),
    ],
)
def test_read_rows_reads_texts_and_messages(
    row: dict[str, Any], expected: list[Any], tmp_path: Path
) -> None:
    [read] = read_rows(write(tmp_path / "rows.jsonl", row), SCORED, row_exchanges)
    assert read == row and row_exchanges(read) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": 3, "completion": "x"},
            "prompt: found int, expected text or a list of messages",
        ),
        ({"messages": "x"}, "messages: found str, expected a list of messages"),
        ({"messages": [ASK]}, "found a conversation of the roles user, expected a prompt and at"),
        ({"prompt": "x", "completion": [ASK]}, "found a conversation of the roles user, user, exp"),
        ({"prompt": [{"role": "boss", "content": "x"}], "completion": "x"}, "role 'boss'"),
        ({"text": "x"}, "found the fields text; expected prompt and completion, or prompt and"),
    ],
)
def test_read_rows_names_the_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(UserError) as caught:
        read_rows(path, SCORED, row_exchanges)
    assert str(caught.value).startswith(f"{path}, line 1: ") and message in str(caught.value)


def test_row_prompt_ends_before_the_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"messages": [ASK, NEAR]}, {"messages": [ASK]})
    assert [row_prompt(row) for row in read_rows(path, SAMPLED, row_prompt)] == [[ASK], [ASK]]
    path = write(tmp_path / "rows.jsonl", {"messages": [NEAR]})
    with pytest.raises(UserError, match=r"line 1: found no prompt, expected text or messages"):
        read_rows(path, SAMPLED, row_prompt)


# --- score ----------------------------------------------------------------------------------------


def test_score_of_another_projects_reward_is_that_of_its_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = chat_tokenizer("chatml")
    plain = one_label_classifier(tokenizer)
    reward = save(plain, tokenizer, tmp_path / "reward")
    chats = [[ASK, NEAR], [ASK, NEAR, AGAIN, FAR]]
    path = write(
        tmp_path / "rows.jsonl", *({"messages": chat, "id": i} for i, chat in enumerate(chats))
    )
    ended = irl_align(capsys, "score", reward, "--input", path)
    assert ended.status == 0, ended.err
    scored = [json.loads(line) for line in ended.out.splitlines()]
    assert [row["id"] for row in scored] == [0, 1]
    for chat, row in zip(chats, scored, strict=True):
        expected = card_score(plain, tokenizer, chat[:-1], chat[-1]["content"])
        assert row["score"] == pytest.approx(expected, abs=1e-5)
    glued = irl_align(capsys, "score", reward, "--input", path, "--template", "{prompt} ")
    assert "a conversation needs template: chat" in the_line(glued)
    line = the_line(irl_align(capsys, "score", reward, "--input", path, "--template", "Q"))
    assert line.startswith(f"{reward}: template: found 'Q': give text with {{prompt}} exactly once")


# --- generate -------------------------------------------------------------------------------------

THINK = FAMILIES["chatml"].template.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and loop.last %}<think>{{ '\n\n' }}</think>{{ '\n\n' }}{% endif %}"
    "{{ m.content }}",
)


def parrot(tokenizer: PreTrainedTokenizerFast, text: str) -> PreTrainedModel:
    """A language model that was trained to answer anything with one text."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama(tokenizer))
    chats = [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": text}]
        for ask in ("Hi", "Where is it?", ASK["content"])
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        for chat in chats:
            ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("family", "template"), [("chatml", THINK), ("gemma", FAMILIES["gemma"].template)]
)
def test_generate_of_another_projects_chat_model_gives_the_answer(
    family: str, template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own chat template and its end, which is not Gemma's EOS, and without a think block."""
    tokenizer = chat_tokenizer(family)
    tokenizer.chat_template = template
    model = save(parrot(tokenizer, NEAR["content"]), tokenizer, tmp_path / "model")
    path = write(tmp_path / "rows.jsonl", {"messages": [ASK]}, {"messages": [ASK, FAR]})
    options = ("--input", path, "--temperature", 0, "--max-new-tokens", 48)
    ended = irl_align(capsys, "generate", model, *options)
    assert ended.status == 0, ended.err
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [row["completion"] for row in rows] == [NEAR["content"]] * 2
    assert rows[1]["messages"] == [ASK, FAR] and not any(row["truncated"] for row in rows)
    path.write_text(json.dumps({"prompt": ASK["content"]}))
    plain = irl_align(capsys, "generate", model, *options, "--template", "{prompt}")
    assert json.loads(plain.out)["completion"] != NEAR["content"]


def test_prompt_format_of_a_policy_that_was_made_here_is_kept(
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    folder = save(model, tiny_tokenizer, tmp_path / "theirs")
    assert prompt_format(folder).template == "{prompt}"
    assert prompt_format(folder, "Q {prompt}").template == "Q {prompt}"
    settings = json.loads((folder / "config.json").read_text())
    own = {"name": "x", "template": "{prompt}\n", "lowercase": True}
    (folder / "config.json").write_text(json.dumps({**settings, "irl_prompt": own}))
    assert vars(prompt_format(folder)) == own
    with pytest.raises(UserError, match=r"theirs: template: found 'chat', but this model was made"):
        prompt_format(folder, "chat")


# --- runs whose reward is the log-ratio of two models ---------------------------------------------


def test_a_run_with_a_log_ratio_scores_samples_and_exports_what_it_has(tmp_path: Path) -> None:
    """SPIN's loss fits pi_theta, pi_0's best of two samples is taken, and r is the mean of the
    tokens' beta log(pi_theta / pi_0)."""
    run = shared_run("ratio").folder
    fitted, sft = (stage_folder(run, role) / "model" for role in ("reward/0", "sft"))
    ratio = log_ratio_of(run)
    assert ratio is not None and (ratio.beta, ratio.mean) == (0.1, True)
    ((weight, reference),) = ratio.references
    assert (weight, reference.resolve(), ratio.path.resolve()) == (
        1.0,
        sft.resolve(),
        fitted.resolve(),
    )
    ids = [[5, 6, 7]], [[8, 9, 10]]
    one, other = (plain_logps(load_model(path), *map(itemgetter(0), ids)) for path in (fitted, sft))
    (score,) = saved_reward(run, "cpu").score_ids(*ids).tolist()
    assert score == pytest.approx(0.1 * (one - other).mean().item(), abs=1e-6)
    assert abs(score) > 1e-5

    policy = resolve_policy(run)
    assert (policy.best_of, policy.model.resolve()) == (2, sft.resolve())
    limits = Sampling(n=2, temperature=1.0, max_new_tokens=12)
    assert len(generate_rows(policy, [{"prompt": "a"}], limits, "cpu")) == 2
    (name, found) = next(iter(find_scorers(run).rewards.items()))
    assert (name, found) == ("implicit reward", Implicit(ratio.path, ratio.references, mean=True))
    facts = Facts.of(run)
    assert facts.policy().path.resolve() == sft.resolve()
    for refused in (facts.reward, lambda: artefact_folder(run, "reward")):
        with pytest.raises(UserError, match="log-ratio of two language models, no classifier"):
            refused()
    alone = tmp_path / "alone"
    shutil.copytree(run, alone / run.name)
    with pytest.raises(UserError, match=r"its reward should be in .*copy the folder store"):
        log_ratio_of(alone / run.name)
