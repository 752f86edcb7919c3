"""Mistakes of a user end in one line that says where, what was found and what to do."""

import gzip
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.shared_runs import shared_run
from support.tiny_runs import irl_align, the_line, tiny_recipe, write_recipe
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.training.train import Result, train

pytestmark = pytest.mark.timeout(240)
Line = Callable[..., str]


@pytest.fixture
def line(capsys: pytest.CaptureFixture[str]) -> Line:
    """``line(*arguments)``: the one line in which a command refuses its arguments."""
    return lambda *arguments: the_line(irl_align(capsys, *arguments))


@pytest.fixture
def train_line(line: Line, tmp_path: Path) -> Line:
    """``train_line(*overrides)``: the line in which training the tiny recipe is refused."""
    out = f"output_dir={tmp_path / 'runs'}"

    def refused(*overrides: str) -> str:
        path = write_recipe(tmp_path)
        if any(override.startswith("data.card=") for override in overrides):
            path.write_text(path.read_text().replace("task: {size: 200, noise: 0.0}", "task: {}"))
        return line("train", path, out, *overrides)

    return refused


@pytest.fixture
def sft() -> Result:
    """A finished run of SFT without iterations."""
    return shared_run("sft")


def test_train_names_the_line_of_a_misspelt_option(line: Line, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("max_new_tokens", "max_new_token"))
    number = [n for n, text in enumerate(path.read_text().split("\n"), 1) if "new_token" in text]
    expected = f"{path}:{number[0]}: generation.max_new_token: unknown option; did you mean "
    assert line("train", path) == f"{expected}generation.max_new_tokens?"


def test_train_refuses_misspelt_and_mistyped_overrides(train_line: Line) -> None:
    assert "sft.args.learning_rte" in train_line("sft.args.learning_rte=1.0")
    assert "did you mean learning_rate?" in train_line("sft.args.learning_rte=1.0")
    assert "expected integer at least 0" in train_line("loop.iterations=two")
    assert "'many'" in train_line("sft.args.num_train_epochs=many")


def test_train_names_a_recipe_file_that_does_not_exist(line: Line, tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in line("train", tmp_path / "none.yaml")
    assert str(tmp_path) in line("train", tmp_path)


def test_train_refuses_cuda_without_a_gpu(
    train_line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert train_line("device=cuda").startswith("recipe: device: cuda, but torch sees no CUDA")


CARD = """\
---
irl_align:
  kind: demonstrations
  splits: {train: {files: "demos*"}, validation: {from: train, share: 0.2}}
  columns: {prompt: question, completion: answer}
  template: TEMPLATE
---
"""
GOOD = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(50)]


def write_data(folder: Path, content: bytes | list[dict[str, object]], name: str) -> str:
    """A card with one data file; returns the override that names the card."""
    card = folder / "card.md"
    card.write_text(CARD.replace("TEMPLATE", '"{prompt}\\n"'))
    if not isinstance(content, bytes):
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    (folder / name).write_bytes(content)
    return f"data.card={card}"


def changed(row: int, **values: object) -> list[dict[str, object]]:
    return [{**good, **values} if i == row else dict(good) for i, good in enumerate(GOOD)]


ZIPPED = gzip.compress("".join(json.dumps(row) + "\n" for row in GOOD).encode())
BROKEN_FILES: dict[str, tuple[str, bytes | list[dict[str, object]], str]] = {
    "empty": ("demos.jsonl", b"", "demos.jsonl: found no row"),
    "truncated gzip": ("demos.jsonl.gz", ZIPPED[:-20], "demos.jsonl.gz: truncated or damaged gzip"),
    "truncated line": ("demos.jsonl", b'{"question": "a", "ans', "demos.jsonl, line 1: found brok"),
    "not UTF-8": (
        "demos.jsonl",
        b'{"question": "a", "answer": "b"}\n{"question": "caf\xe9", "answer": "b"}\n',
        "demos.jsonl, line 2: byte 18: found 0xe9, expected UTF-8",
    ),
    "no column": (
        "demos.jsonl",
        [{"question": "a", "answer": "b"}, {"question": "a"}],
        "demos.jsonl, line 2: found columns question, expected a column 'answer'",
    ),
    "empty demonstration": (
        "demos.jsonl",
        changed(3, answer="  "),
        "demos.jsonl, line 4: column 'answer': found empty text",
    ),
    "a number": ("demos.jsonl", changed(3, answer=5), "line 4: column 'answer': found a value of"),
    "too long for the context": (
        "demos.jsonl",
        changed(3, question="why " * 400),
        "together 192 (the model's context); raise a limit or set data.overlong: drop",
    ),
    "special token": ("demos.jsonl", changed(3, answer="<|end|> yes"), "a special token"),
    "no such file": ("other.jsonl", b"", "holds card.md, other.jsonl"),
    "another suffix": ("demos.txt", b"a\tb", "found suffix '.txt', expected .json, .jsonl"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_train_names_file_and_line_of_broken_data(
    case: str, train_line: Line, tmp_path: Path
) -> None:
    name, content, expected = BROKEN_FILES[case]
    (tmp_path / "data").mkdir()
    if case == "special token":
        from irl_align.data.tokenizer import train_tokenizer

        eos = str(train_tokenizer(["a"], 300).eos_token)
        content = changed(3, answer=f"{eos} yes")
    overrides = [write_data(tmp_path / "data", content, name), "data.max_prompt_tokens=5000"]
    assert expected in train_line(*overrides)


def test_train_refuses_an_unknown_card_and_task_option(train_line: Line) -> None:
    assert "did you mean restaurant?" in train_line("data.card=restaurnt")
    assert "expected an existing data card" in train_line("data.card=no/such.md")
    assert "sise" in train_line("data.task={sise: 3}")


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


def with_model(path: Path) -> tuple[str, str]:
    return f"model={{path: {path}, from_scratch: null}}", "loop.iterations=0"


def test_train_refuses_a_tokenizer_without_eos(
    model_folder: Path, train_line: Line, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.eos_token = None
    tiny_tokenizer.save_pretrained(model_folder)
    assert "EOS" in train_line(*with_model(model_folder))


def test_train_refuses_a_chat_card_without_a_chat_template(
    model_folder: Path, train_line: Line, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    data = write_data(tmp_path / "data", GOOD, "demos.jsonl")  # type: ignore[arg-type]
    card = tmp_path / "data/card.md"
    card.write_text(CARD.replace("TEMPLATE", "chat"))
    message = train_line(data, *with_model(model_folder))
    assert message.startswith("model.chat_template: ") and message.endswith(
        "expected a Jinja file with one"
    )
    missing = f"model.chat_template={tmp_path / 'none.jinja'}"
    assert "none.jinja: cannot be read" in train_line(data, *with_model(model_folder), missing)


def test_commands_refuse_a_damaged_or_missing_model(
    model_folder: Path, train_line: Line, line: Line, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    file = model_folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    for message in (
        train_line(*with_model(model_folder)),
        line("generate", model_folder, "--input", prompts),
    ):
        assert str(model_folder) in message and "all complete" in message
    file.unlink()
    assert str(model_folder) in train_line(*with_model(model_folder))
    shutil.rmtree(model_folder)
    assert str(model_folder) in line("generate", model_folder, "--input", prompts)
    assert str(model_folder) in train_line(*with_model(model_folder))


def test_train_keeps_finished_stages_after_an_infinite_loss(
    train_line: Line, tmp_path: Path
) -> None:
    # The learning rate and the weight decay let the weights overflow in a few steps.
    args = "sft.args={learning_rate: 2.0e+9, weight_decay: 2.0e+9, max_steps: 4, optim: sgd}"
    message = train_line(args, "loop.iterations=0")
    assert "lower learning_rate" in message and "loss" in message
    store = tmp_path / "runs/store"
    kept = {path.name: path.stat().st_mtime_ns for path in store.glob("[a-z]*-*")}
    assert {name.split("-")[0] for name in kept} == {"start", "data"}
    train(tiny_recipe(tmp_path, "loop.iterations=0", "sft.args.max_steps=2"))
    assert {name: (store / name).stat().st_mtime_ns for name in kept} == kept


def test_train_keeps_finished_stages_on_a_full_disk(
    line: Line, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    # No other tiny run has this temperature, so the pairs are not in the store.
    options = ("name=full-disk", "loop.iterations=1", "generation.temperature=0.9")
    with monkeypatch.context() as patch:
        patch.setattr("irl_align.training.pair_step.save_pairs", full)
        output = f"output_dir={tiny_folder / 'runs'}"
        message = line("train", write_recipe(tiny_folder), output, *options)
    assert message.startswith("stage pairs: no space left for ")
    assert message.endswith("not lost: free space and run the same command again")
    stages = json.loads((tiny_folder / "runs/full-disk-seed0/stages.json").read_text())
    assert "sft" in stages and "pairs/0" not in stages
    assert "pairs/0" in train(tiny_recipe(tiny_folder, *options)).view().stages


def test_train_names_the_limit_of_file_sizes(train_line: Line) -> None:
    """The limit is the system's, 8 KiB: the tokenizer alone is larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, hard))
    try:
        message = train_line()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith("stage start: a file below ") and "ulimit -f" in message


def test_commands_refuse_unfinished_and_unknown_runs(
    line: Line, sft: Result, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    unfinished = tmp_path / "unfinished"
    shutil.copytree(sft.folder, unfinished)
    (unfinished / "summary.json").unlink()
    for command in ("score", "generate"):
        message = line(command, unfinished, "--input", rows)
        assert (
            message == f"{unfinished}: this run is not finished; run its recipe again to resume it"
        )
        assert str(tmp_path / "none") in line(command, tmp_path / "none", "--input", rows)
    assert "expected the folder of a run" in line("show", tmp_path)
    assert "expected the folder of a run" in line("show", tmp_path / "none")


def test_generate_names_the_store_that_a_copied_run_lacks(
    line: Line, sft: Result, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    alone = tmp_path / "alone" / "run"
    shutil.copytree(sft.folder, alone)
    message = line("generate", alone, "--input", rows)
    assert message.startswith(f"{alone}: its policy should be in {alone.parent / 'store'}")
    assert "copy the folder store together with the run" in message


def test_show_says_that_a_run_is_not_finished(
    sft: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(sft.folder, unfinished)
    (unfinished / "summary.json").unlink()
    (unfinished / "metrics.jsonl").unlink()
    ended = irl_align(capsys, "show", unfinished)
    assert ended.status == 0
    assert "not finished: run the recipe again" in " ".join(ended.out.split())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (b"", "found no row"),
        (b'{"text": "a"}\n', "line 1: found the fields text; expected prompt"),
        (b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2: prompt: found int, expected text"),
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2: found broken JSON"),
        (b'{"prompt": "' + b"why " * 300 + b'"}\n', "tokens"),
    ],
)
def test_generate_refuses_bad_prompts(
    rows: bytes, expected: str, line: Line, sft: Result, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(rows)
    assert expected in line("generate", sft.folder, "--input", tmp_path / "rows.jsonl")


def test_generate_refuses_bad_sampling_options(line: Line, sft: Result, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    arguments = ("generate", sft.folder, "--input", tmp_path / "rows.jsonl")
    assert "sampling.temperature" in line(*arguments, "--temperature", "-1")
    assert "sampling.top_p" in line(*arguments, "--top-p", "0")


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_train_refuses_a_tracker_that_is_not_installed(
    tracker: str, train_line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irl_align.training.setup.find_spec", lambda name: None)
    message = train_line(f"report_to=[{tracker}]", "loop.iterations=0")
    assert message.startswith(f"recipe: report_to: {tracker} is not installed; install ")
