"""Models, tokenizers and chat templates of others, through every step of the product.

Each cell of the matrix is one model: a template with the architecture that is published with it,
and a value of every other axis. Every pair of values of two axes is in at least one cell. For each
cell the steps of the loop run on a tiny random model, each by the function that `train` calls:
SFT, pairs, reward, Best-of-N, PPO, SPIN, export. The snippets of the exported cards are run.
"""

import gc
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.chat_templates import FAMILIES, ChatFamily
from support.rows import save
from support.snippets import run_snippet
from support.tiny_runs import irl_align, stage_folder, stage_records, the_line
from support.tiny_tokenizers import TEXT, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.recipe import to_yaml
from irl_align.config.schema import Recipe
from irl_align.data.encoding import encode_prompts
from irl_align.errors import UserError
from irl_align.evaluation.inference import prompt_format
from irl_align.hub.export import export
from irl_align.models.loading import load_tokenizer, seeded
from irl_align.reward.model import RewardModel
from irl_align.training.iteration import Iteration
from irl_align.training.pair_step import make_pairs
from irl_align.training.policy_step import improve_policy
from irl_align.training.prepare import load_data, prepare, supervise
from irl_align.training.reward_step import fit_reward_level
from irl_align.training.setup import finish_run, open_run

AXES: dict[str, tuple[str, ...]] = {
    "template": ("llama-3", "chatml", "gemma", "mistral", "phi", "zephyr", "none"),
    "pad": ("own", "eos", "missing"),
    "family": ("byte-level", "sentencepiece"),
    "stops": ("one", "several"),  # ids that end a text, in the generation config
    "vocabulary": ("plain", "added"),  # added tokens, and more embeddings than tokens
    "embeddings": ("tied", "untied"),
}
CELLS = (
    "llama-3 own byte-level one plain tied",
    "llama-3 eos sentencepiece several added untied",
    "llama-3 missing sentencepiece one added tied",
    "chatml own sentencepiece one added tied",
    "chatml eos byte-level one added untied",
    "chatml missing byte-level several plain untied",
    "gemma own sentencepiece one plain untied",
    "gemma eos byte-level one added untied",
    "gemma missing sentencepiece several plain tied",
    "mistral own byte-level several added tied",
    "mistral eos sentencepiece one plain untied",
    "mistral missing byte-level one plain tied",
    "phi own byte-level several plain untied",
    "phi eos byte-level one plain tied",
    "phi missing sentencepiece one added tied",
    "zephyr own sentencepiece several added untied",
    "zephyr eos sentencepiece one plain untied",
    "zephyr missing byte-level several added tied",
    "none own sentencepiece several plain tied",
    "none eos byte-level one added untied",
    "none missing byte-level several added tied",
)
HEADS = {"num_key_value_heads": 1, "head_dim": 16}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3": ("llama", HEADS),
    "chatml": ("qwen3", HEADS),
    "gemma": ("gemma2", {**HEADS, "sliding_window": 16}),
    "mistral": ("mistral", {**HEADS, "sliding_window": 16}),
    "phi": ("phi3", {"num_key_value_heads": 2}),
    "zephyr": ("stablelm", {"num_key_value_heads": 2}),
    "none": ("gpt2", {}),
}
SECOND_STOP, TOOL = "<|stop|>", "<tool>"
LN2 = math.log(2.0)
pytestmark = pytest.mark.timeout(240)


def test_cells_have_every_pair_of_values() -> None:
    rows = [cell.split() for cell in CELLS]
    for (i, first), (j, second) in combinations(enumerate(AXES.values()), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(first, second))


@pytest.fixture(scope="module", autouse=True)
def collect_little_garbage() -> Iterator[None]:
    """Leave what the imports made out of the collections, of which each trainer makes several."""
    gc.freeze()
    yield
    gc.unfreeze()


# --- a cell: a model with its tokenizer, and demonstrations ---------------------------------------


@dataclass(frozen=True)
class Cell:
    """A model of the matrix in a folder, with demonstrations."""

    folder: Path
    joined: bool
    """Whether its tokenizer divides a prompt with its answer as it divides the two alone."""
    end: int
    """Id at the end of a text: the template's, or the tokenizer's EOS."""

    def recipe(self, name: str, **groups: Any) -> Recipe:
        """A recipe on this model; all recipes of a cell share a store."""
        steps = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
        settings = {
            "name": name,
            "output_dir": str(self.folder / "runs"),
            "device": "cpu",
            "data": {"card": str(self.folder / "card.md"), "held_out": 0.2},
            "model": {"path": str(self.folder / "model")},
            "sft": {"args": steps},
            "generation": {"max_new_tokens": 12},
            "reward": {"args": steps},
            "loop": {"iterations": 1},
            "policy_update": {"kind": "best_of_n", "n": 2, "prompts": 8, "args": steps},
        }
        return Recipe.model_validate({**settings, **groups})


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: cell.replace(" ", "-"))
def cell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cell:
    """The model and the data of a cell."""
    values = dict(zip(AXES, request.param.split(), strict=True))
    folder = tmp_path_factory.mktemp("cell")
    chat = FAMILIES.get(values["template"])
    tokenizer = cell_tokenizer(values, chat)
    end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token if chat is None else chat.end)
    stops = {tokenizer.eos_token_id}
    if values["stops"] == "several":
        stops |= {end, tokenizer.convert_tokens_to_ids(SECOND_STOP)}
        stops |= set(() if chat is None else chat.stop_ids(tokenizer))
    model = cell_model(values, tokenizer)
    teach_ends(model, sorted({end, *stops}))
    model.generation_config.eos_token_id = sorted(stops)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_data(
        folder, "chat" if chat else "{prompt}\n", TOOL if TOOL in tokenizer.get_vocab() else "big"
    )
    # SentencePiece writes a space before a text. In chats the answer follows a special token.
    joined = chat is not None or values["family"] != "sentencepiece"
    return Cell(folder, joined, end)


def cell_tokenizer(values: dict[str, str], chat: ChatFamily | None) -> PreTrainedTokenizerFast:
    eos = "</s>" if chat is None else chat.eos
    special = [*(() if chat is None else chat.special), SECOND_STOP]
    tokenizer = tiny_tokenizer(
        values["family"],
        special,
        eos=eos,
        pad={"own": "<pad>", "eos": eos, "missing": None}[values["pad"]],
        bos="<s>" if chat is None else chat.bos,
        template=None if chat is None else chat.template,
        prefix=values["template"] != "gemma",
    )
    if values["vocabulary"] == "added":
        tokenizer.add_tokens([TOOL, "<image>"])
    return tokenizer


def cell_model(values: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    kind, more = ARCHITECTURES[values["template"]]
    spare = 13 if values["vocabulary"] == "added" else 0
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer) + spare,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,  # so that a score depends on the whole text
        max_position_embeddings=128,
        tie_word_embeddings=values["embeddings"] == "tied",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )
    with seeded(0):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def teach_ends(model: PreTrainedModel, ends: list[int]) -> None:
    """Train the model until each next token is an end of text with a probability of 0.2.

    The ends are equally likely. It is as little training as possible: texts stay different.
    """
    vocabulary = model.config.vocab_size
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with seeded(0):
        for _ in range(100):
            ids = torch.randint(vocabulary, (4, 24))
            logps = model(input_ids=ids).logits.log_softmax(-1)[..., ends]
            if float(logps.exp().sum(-1).mean()) > 0.2:
                return
            optimizer.zero_grad()
            (-logps).mean().backward()
            optimizer.step()
    raise AssertionError("the model has not learned to end texts")


def write_data(folder: Path, template: str, word: str) -> None:
    """Demonstrations of a few words, some of letters that no tokenizer has learned."""
    draw, words = random.Random(0), TEXT.split()
    rows = [
        {
            "prompt": f"{draw.choice(words)} {word} {number}",
            "completion": f"{draw.choice(words)} {draw.choice(words)} {word}{'é' * (number % 3)}",
        }
        for number in range(36)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "demos.jsonl").write_text(lines, encoding="utf-8")
    options = {
        "kind": "demonstrations",
        "splits": {
            "train": {"files": "demos.jsonl"},
            "validation": {"from": "train", "share": 0.2},
        },
        "columns": {"prompt": "prompt", "completion": "completion"},
        "template": template,
    }
    front = json.dumps({"license": "mit", "irl_align": options})
    (folder / "card.md").write_text(f"---\n{front}\n---\n\n# Own\n", encoding="utf-8")


# --- the steps ------------------------------------------------------------------------------------


def one_iteration(recipe: Recipe) -> Path:
    """SFT, pairs, reward and policy update of a recipe; returns the folder of the finished run."""
    with open_run(recipe) as (context, _):
        data, start = prepare(context, load_data(recipe))
        initial = supervise(context, start, data)
        now = Iteration(0, initial, initial, None, data)
        pairs = make_pairs(context, now, start)
        reward = fit_reward_level(context, now, [pairs])
        policy = improve_policy(context, replace(now, reward=reward))
        finish_run(context, policy=policy, number=1, reward=reward, ended="1 done", began=0.0)
        return context.run.folder


@pytest.fixture(scope="module")
def best_of_n(cell: Cell) -> Path:
    """The finished run of Best-of-N on a fitted reward."""
    return one_iteration(cell.recipe("best"))


def test_demonstrations_samples_and_pairs_end_alike(cell: Cell, best_of_n: Path) -> None:
    data = stage_folder(best_of_n, "data")
    for use in ("sft", "reward", "held_out", "evaluation"):
        ids = pq.read_table(data / f"{use}.parquet").column("completion_ids").to_pylist()
        assert {row[-1] for row in ids} == {cell.end}
        assert all(row.count(cell.end) == 1 for row in ids)
    samples = [role for role in stage_records(best_of_n) if role.startswith("samples/")]
    assert len(samples) == 3  # for the pairs of both parts, and the candidates of Best-of-N
    for role in samples:
        rows = pq.read_table(stage_folder(best_of_n, role) / "samples.parquet").to_pylist()
        finished = [row["token_ids"] for row in rows if not row["truncated"]]
        assert finished and {ids[-1] for ids in finished} == {cell.end}
        assert all(cell.end not in row["token_ids"] for row in rows if row["truncated"])
    pairs = pq.read_table(stage_folder(best_of_n, "pairs/0") / "train.parquet").to_pylist()
    for pair in pairs:
        assert pair["chosen_ids"][-1] == cell.end
        assert (pair["rejected_ids"][-1] == cell.end) != pair["rejected_truncated"]


def test_exported_reward_scores_by_its_snippet(cell: Cell, best_of_n: Path, tmp_path: Path) -> None:
    rows = pq.read_table(stage_folder(best_of_n, "data") / "reward.parquet").to_pylist()[:8]
    reward = RewardModel.from_pretrained(stage_folder(best_of_n, "reward/0") / "model")
    ids = reward.score_ids(
        [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows], None
    )
    texts = [(row["prompt"], row["completion"]) for row in rows]
    by_text = reward.score(*map(list, zip(*texts, strict=True)))
    torch.testing.assert_close(by_text, ids, atol=1e-5, rtol=0)

    if not cell.joined:
        with pytest.raises(UserError, match="the tokenizer divides prompt and answer"):
            export(best_of_n, "reward", tmp_path / "reward", licence="mit")
        return
    export(best_of_n, "reward", tmp_path / "reward", licence="mit")
    score = run_snippet(tmp_path / "reward")["score"]
    by_snippet = torch.tensor([score(prompt, answer) for prompt, answer in texts])
    torch.testing.assert_close(by_snippet, ids, atol=1e-5, rtol=0)
    assert float(ids.std()) > 1e-3


def test_exported_policy_answers_by_its_snippet(
    cell: Cell, best_of_n: Path, tmp_path: Path
) -> None:
    export(best_of_n, "policy", tmp_path / "policy", licence="mit")
    prompt = "cat big 3"
    with seeded(0):
        answered = run_snippet(tmp_path / "policy", prompt=prompt)
    policy = stage_folder(best_of_n, "policy-1") / "model"
    (ids,) = encode_prompts([prompt], load_tokenizer(policy), prompt_format(policy))
    assert answered["inputs"]["input_ids"][0].tolist() == ids
    new = answered["new_tokens"].tolist()
    assert len(new) == 12 or new[-1] in answered["model"].generation_config.eos_token_id
    assert cell.end not in new[:-1]


def test_first_ratio_of_ppo_is_1(cell: Cell, best_of_n: Path) -> None:
    update = {
        **{"kind": "ppo", "episodes": 16, "batch_size": 16, "epochs": 1, "keep": "last"},
        **{"held_out_prompts": 4, "samples_kept": 16},
    }
    folder = one_iteration(cell.recipe("ppo", policy_update=update))
    (first,) = stage_records(folder)["policy-1"]["metrics"]["history"]
    assert first["first_log_ratio_max"] < 1e-5 and abs(first["kl"]) < 1e-4
    lines = (stage_folder(folder, "policy-1") / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["token_ids"][-1] == cell.end for row in rows if not row["truncated"]} == {True}


def test_first_loss_of_spin_is_ln2(cell: Cell, best_of_n: Path) -> None:
    steps = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    spin = {"reward": {"kind": "implicit", "args": steps}, "policy_update": {"kind": "identity"}}
    folder = one_iteration(cell.recipe("spin", **spin))
    metrics = stage_records(folder)["reward/0"]["metrics"]
    assert metrics["first_loss"] == pytest.approx(LN2, abs=1e-5)


THINKING = """\
{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'].split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


def test_train_refuses_a_template_that_changes_the_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt ends with <think>, which is not there when the answer follows."""
    values = dict(zip(AXES, CELLS[3].split(), strict=True))
    tokenizer = cell_tokenizer(values, replace(FAMILIES["chatml"], template=THINKING))
    save(cell_model(values, tokenizer), tokenizer, tmp_path / "model")
    write_data(tmp_path, "chat", "big")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(Cell(tmp_path, True, 0).recipe("thinking")), encoding="utf-8")
    line = the_line(irl_align(capsys, "train", recipe))
    assert line.startswith(str(tmp_path / "demos.jsonl")) and "model.chat_template: " in line
    assert "renders the prompt" in line
