"""Harmful input is refused in one line and has no other effect."""

import gzip
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.synthetic_runs import synthetic_run
from support.tiny_runs import irl_align, the_line, tiny_recipe, write_recipe
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.cli.terminal import LineFormatter, console
from irl_align.config.recipe import load_recipe
from irl_align.data.cards import load_card
from irl_align.data.encoding import encode_prompts
from irl_align.data.loading import load_demonstrations, load_preferences
from irl_align.data.sources import MAX_RATIO, file_rows
from irl_align.errors import UserError
from irl_align.models.loading import load_model, load_tokenizer
from irl_align.models.trl import is_sealed, last_checkpoint, seal
from irl_align.training.run_folder import Run
from irl_align.utils.files import read_json, read_lines
from irl_align.utils.sanitize import fit_to_show, printable, redact, secrets_in


class Payload:
    """What a pickle runs when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def model_folder(
    tmp_path: Path,
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    path = tmp_path / "model"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- code in models -------------------------------------------------------------------------------


def test_load_model_refuses_a_pickled_model(model_folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (model_folder / "model.safetensors").unlink()
    torch.save({"weight": Payload(mark)}, model_folder / "pytorch_model.bin")
    message = refusal(lambda: load_model(model_folder))
    assert "safetensors" in message and not mark.exists()


def test_load_checkpoint_runs_no_code_of_a_pickle(
    tmp_path: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    """Optimiser and random state are pickles of tensors: what is more than that is not loaded."""
    from irl_align.policy.ppo.checkpoint import load_checkpoint
    from irl_align.policy.ppo.distributed import make_accelerator

    accelerator = make_accelerator(torch.device("cpu"), bf16=False)
    model = tiny_model("llama")
    prepared = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    assert prepared
    folder, mark = tmp_path / "checkpoint-1", tmp_path / "ran"
    accelerator.save_state(str(folder), safe_serialization=True)
    (folder / "progress.json").write_text("{}")
    torch.save({"state": Payload(mark)}, folder / "random_states_0.pkl")
    load_checkpoint(folder, accelerator)  # accelerate leaves out random states it cannot load
    torch.save({"state": Payload(mark)}, folder / "optimizer.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_checkpoint(folder, accelerator)
    assert not mark.exists()


def test_last_checkpoint_deletes_a_changed_checkpoint(tmp_path: Path) -> None:
    for number in (2, 4):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"whole")
        seal(folder)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    torch.save(Payload(tmp_path / "ran"), tmp_path / "checkpoint-4/optimizer.pt")
    assert not is_sealed(tmp_path / "checkpoint-4")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists() and not (tmp_path / "ran").exists()


CODE = "import os\nos.mkdir({mark!r})\nclass Own: pass\n"


@pytest.mark.parametrize("loader", [load_model, load_tokenizer])
def test_loaders_run_no_code_of_a_model_without_the_flag(
    loader: Callable[..., Any],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is anybody asked at the terminal, which would wait."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    mark = tmp_path / "ran"
    (model_folder / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((model_folder / "config.json").read_text())
    classes = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    config |= {"model_type": "own", "architectures": ["Own"], "auto_map": classes}
    (model_folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((model_folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert "trust_remote_code" in refusal(lambda: loader(model_folder))
    assert not mark.exists()


TEMPLATES = {
    "builtins": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('ran') }}",
    "range": "{% for i in range(999999999) %}x{% endfor %}",
    "mutation": "{% set _ = messages.clear() %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_encode_prompts_runs_no_code_of_a_chat_template(
    name: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer.chat_template = TEMPLATES[name]
    (tmp_path / "card.md").write_text(CARD.replace("PATTERN", "a"))
    card = load_card(tmp_path / "card.md").model_copy(update={"template": "chat"})
    message = refusal(lambda: encode_prompts(["hello"], tiny_tokenizer, card))
    assert message.startswith("model.chat_template: ") and not (tmp_path / "ran").exists()


# --- data -----------------------------------------------------------------------------------------

CARD = """\
---
irl_align:
  kind: demonstrations
  splits: {train: {files: "PATTERN"}}
  columns: {prompt: a, completion: b}
---
"""


@pytest.mark.parametrize("pattern", ["../secret.jsonl", "/etc/*", "x/../../y", "~/a", ""])
def test_load_card_refuses_files_outside_the_cards_folder(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"a": "x", "b": "y"}\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data/card.md").write_text(CARD.replace("PATTERN", pattern))
    message = refusal(lambda: load_card(tmp_path / "data/card.md"))
    assert "is not a name or glob inside the folder" in message


BOMB = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]"]
    + [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in pairwise("abcdefghi")]
)


@pytest.mark.parametrize(
    "text", [BOMB, "a: " + "[" * 5000, "a: !!python/object/apply:os.getcwd []"]
)
def test_readers_refuse_yaml_that_grows_or_makes_objects(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert str(path) in refusal(lambda: load_recipe(path))
    card = tmp_path / "x.md"
    card.write_text(f"---\n{text}\n---\n")
    assert refusal(lambda: load_card(card)).startswith(f"{card}: front matter: ")
    run = synthetic_run(tmp_path, "toy", 0, [(0.1, 0.1)])
    (run / "recipe.yaml").write_text(text)
    assert refusal(lambda: Run.load(run)).startswith(f"{run / 'recipe.yaml'}: found ")


def test_readers_refuse_json_that_nests_or_counts_too_far(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}"):
        path.write_text(text)
        assert "broken JSON" in refusal(lambda: list(file_rows(path)))
        assert "expected a record" in refusal(lambda: read_json(path, "a record", "fix it"))
        assert "expected a JSON object" in refusal(lambda: read_lines(path, "fix it"))


def test_file_rows_refuses_a_file_that_grows_when_decompressed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (100 << 20), 9))
    message = refusal(lambda: list(file_rows(path)))
    assert message.startswith(f"{path}: found more than {MAX_RATIO} times its size")


def test_load_demonstrations_refuses_a_huge_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irl_align.data.messages.MAX_TEXT", 100)
    (tmp_path / "card.md").write_text(CARD.replace("PATTERN", "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": "x" * 101, "b": "y"}) + "\n")
    message = refusal(lambda: load_demonstrations(load_card(tmp_path / "card.md"), "train"))
    assert message.endswith("column 'a': found a text of 101 characters, expected at most 100")


def test_load_preferences_refuses_a_margin_that_is_no_number(tmp_path: Path) -> None:
    text = CARD.replace("demonstrations", "preferences").replace("PATTERN", "rows.jsonl")
    columns = "columns: {prompt: a, chosen: b, rejected: c, margin: d}"
    (tmp_path / "card.md").write_text(text.replace("columns: {prompt: a, completion: b}", columns))
    (tmp_path / "rows.jsonl").write_text('{"a": "x", "b": "y", "c": "z", "d": NaN}\n')
    message = refusal(lambda: load_preferences(load_card(tmp_path / "card.md"), "train"))
    assert message.endswith("column 'd': found nan, expected a finite number")


# --- run folders ----------------------------------------------------------------------------------


def test_run_open_refuses_links_in_a_run_folder(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = tmp_path / "runs/x-seed0"
    run.mkdir(parents=True)
    (run / "samples").symlink_to(elsewhere)

    def write() -> None:
        with Run.open(run, {"name": "x"}, "name: x") as opened:
            opened.save_answers(0, 1.0, [{"a": 1}])

    assert refusal(write).startswith(f"{run / 'samples'}: found a link")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("path", ["../../other/store/sft-1", "/etc", "../../../etc"])
def test_run_load_refuses_stages_outside_the_store(path: str, tmp_path: Path) -> None:
    run = synthetic_run(tmp_path, "toy", 0, [(0.1, 0.1)])
    stages = {"sft": {"name": "sft", "key": "1", "path": path}}
    (run / "stages.json").write_text(json.dumps(stages))
    assert refusal(lambda: Run.load(run)).endswith("expected a path next to it")


def test_commands_refuse_records_that_are_not_a_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = synthetic_run(tmp_path, "toy", 0, [(0.1, 0.1), (0.1, 0.1)])
    text = (run / "metrics.jsonl").read_text().replace('"policy": 1', '"policy": [[]]')
    (run / "metrics.jsonl").write_text(text)
    for command in ("show", "report"):
        message = the_line(irl_align(capsys, command, run))
        assert message.startswith(f"{run}: found records that no run wrote (TypeError")


# --- terminals and logs ---------------------------------------------------------------------------

ESCAPES = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202e [red]x[/red] [/nothing] [link=http://x]y[/link]"


def test_show_prints_escapes_and_markup_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = synthetic_run(tmp_path, "toy", 0, [(0.1, 0.1)], extra={"signs/x": {"signs": [ESCAPES]}})
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("name: toy", f"name: {json.dumps(ESCAPES)}"))
    ended = irl_align(capsys, "show", run)
    assert ended.status == 0 and not set("\x1b\x9b\x07\u202e") & set(ended.out)
    assert "\\x1b[2J" in ended.out and "[/nothing]" in ended.out


def test_console_and_log_escape_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    console().print(ESCAPES)
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s", (ESCAPES,), None)
    for text in (capsys.readouterr().out, LineFormatter().format(record)):
        assert "\x1b" not in text and "\\x1b]0;title" in text
    assert printable("a\nb\tc é 漢") == "a\nb\tc é 漢"


def test_error_line_escapes_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = the_line(irl_align(capsys, "show", tmp_path / ESCAPES.replace("/", "")))
    assert "\x1b" not in message and "\\x1b[2J" in message


# --- secrets --------------------------------------------------------------------------------------

SECRET = "a-password-of-the-test"
PLACES = (
    "https://me:{}@host/data",
    "https://{}@host/data",
    "https://host/data?token={}&x=1",
    "https://host/?x=1&api_key={}",
    "http://host:8000/v1?X-Amz-Signature={}",
)


@pytest.mark.parametrize("place", PLACES)
def test_redact_hides_secrets_in_addresses(place: str) -> None:
    text = f"cannot load {place.format(SECRET)} from there"
    assert SECRET not in redact(text) and redact(text).startswith("cannot load http")
    assert redact(text).endswith(" from there")


def test_redact_hides_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert redact(f"refused {SECRET}") == "refused ***"
    assert fit_to_show("Authorization: Bearer hf_" + "b" * 30) == "Authorization: Bearer ***"
    plain = "max_new_tokens=64 falsely key=value https://host/a?x=1#token a@b.c"
    assert redact(plain) == plain
    assert list(secrets_in({"a": [{"b": SECRET}], "c": "x"})) == [("a", 0, "b")]


@pytest.mark.parametrize("place", PLACES[:3])
def test_train_refuses_a_secret_in_a_recipe_without_repeating_it(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = place.format(SECRET)
    path = write_recipe(tmp_path)
    ended = irl_align(capsys, "train", path, f"data.path={value}", f"output_dir={tmp_path / 'r'}")
    message = the_line(ended)
    assert SECRET not in ended.out + ended.err
    assert "data.path: found a password, key or token" in message
    assert not (tmp_path / "r").exists()
    path.write_text(
        path.read_text().replace("card: restaurant", f"card: restaurant\n  path: {value}")
    )
    message = the_line(irl_align(capsys, "train", path))
    assert SECRET not in message and message.startswith(f"{path}:6: data.path: found a password")


def test_unexpected_errors_and_tracebacks_hide_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(folder: Path) -> None:
        raise RuntimeError(f"401 for https://me:{SECRET}@host/?token={SECRET}")

    monkeypatch.setattr(Run, "load", fault)
    for debug in ([], ["--debug"]):
        ended = irl_align(capsys, "show", tmp_path, *debug)
        assert ended.status == 1 and SECRET not in ended.out + ended.err
        assert "401 for https://***@host/?token=***" in ended.err
    assert "Traceback" in ended.err


def test_train_writes_no_secret_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    from irl_align.training.train import train

    tiny = ("loop.iterations=0", "sft.args.num_train_epochs=1", "data.task.size=40")
    train(tiny_recipe(tmp_path, *tiny))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    shutil.rmtree(tmp_path / "runs")


def test_user_error_escapes_what_it_quotes() -> None:
    """Also from Python, where nothing stands between the message and the terminal."""
    message = str(UserError("rows.jsonl: found \x1b[2J\u202ea\tb, expected text"))
    assert message == "rows.jsonl: found \\x1b[2J\\u202ea b, expected text"
