"""Which models PPO trains and leashes to, and in which precision."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ppo_tools import Scripted, options, train
from support.rows import plain_logps, save
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.models.generation.protocol import Sampling
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.loading import load_model
from irl_align.models.trl import Training
from irl_align.policy import Demonstrations, Policy, Reward, UpdateRequest
from irl_align.policy.ppo import update
from irl_align.policy.ppo.actors import Actors
from irl_align.policy.roles import Role

MakeModel = Callable[[str], PreTrainedModel]
DATA = Demonstrations([[3, 4], [5, 6]], [[7, 2], [8, 2]], checksum="data")
REWARD = Scripted(lambda prompt, completion: completion.count(5) - 0.1 * len(completion))


class Shop:
    """A context that stores nothing: it notes what a stage is made of, and what it loads."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype
    ) -> None:
        self.folder, self.tokenizer, self.dtype = folder, tokenizer, dtype
        self.device = torch.device("cpu")
        self.adapted: dict[str, Any] = {}
        self.models = self.sampler = self
        self.inputs: Mapping[str, str] = {}
        self.loaded: dict[str, Path] = {}

    def stage(self, role: Role, name: str, settings: Any, inputs: Any, build: Any) -> Any:
        self.inputs = inputs
        return SimpleNamespace(path=self.folder, key="new", metrics=build(self.folder))

    def log(self, key: str, record: Any) -> None: ...

    def training(self, work: Path, label: str) -> Training:
        return Training(work, 0, self.device, label=label)

    def load_policy(self, path: Path) -> PreTrainedModel:
        self.loaded["reference"] = path
        return load_model(path, dtype=self.dtype)

    def load_reward(self, reward: Reward, merge: bool = True) -> Scripted:
        return REWARD

    def load_trainable(self, path: Path) -> PreTrainedModel:
        self.loaded["policy"] = path
        return load_model(path, dtype=self.dtype)

    def generator(self, model: PreTrainedModel) -> TransformersGenerator:
        return TransformersGenerator(model, [2], 0)

    def sampling(self, n: int, temperature: float) -> Sampling:
        return Sampling(n=n, temperature=temperature, max_new_tokens=6)


def called(
    monkeypatch: pytest.MonkeyPatch, shop: Shop, chosen: PPOOptions, now: Policy, first: Policy
) -> Actors:
    """The models that PPO makes of the policies of an iteration, before it trains."""
    made: list[Actors] = []

    def note(actors: Actors, asked: PPOOptions, training: Training) -> dict[str, Any]:
        made.append(actors)
        return {"history": []}

    monkeypatch.setattr(update, "train_ppo", note)
    ppo = update.PPO(chosen, DATA)
    reward = Reward("explicit", shop.folder / "reward", "r")
    ppo(shop, UpdateRequest(1, now, first, reward, DATA))  # type: ignore[arg-type]
    return made[0]


@pytest.fixture
def policies(
    tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> tuple[Policy, Policy]:
    """pi_1 and pi_0."""
    first = save(tiny_model("llama"), tiny_tokenizer, tmp_path / "pi-0")
    moved = tiny_model("llama")
    with torch.no_grad():
        moved.get_output_embeddings().weight.mul_(1.5)
    return Policy(save(moved, tiny_tokenizer, tmp_path / "pi-1"), "one"), Policy(first, "zero")


@pytest.mark.parametrize(
    ("way", "start", "reference"),
    [
        ({}, "one", "zero"),
        ({"reference": "current"}, "one", "one"),
        ({"start": "initial"}, "zero", "zero"),
        ({"start": "initial", "reference": "current"}, "zero", "one"),
    ],
    ids=str,
)
def test_start_and_reference_are_the_policies_asked_for(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    policies: tuple[Policy, Policy],
    way: dict[str, Any],
    start: str,
    reference: str,
) -> None:
    now, first = policies
    folders = {policy.key: policy.path for policy in policies}
    shop = Shop(tmp_path, tiny_tokenizer, torch.float32)
    made = called(monkeypatch, shop, options(**way), now, first)
    assert (shop.inputs["start"], shop.inputs["reference"]) == (start, reference)
    assert shop.loaded == {"policy": folders[start], "reference": folders[reference]}
    assert made.starts_at_reference is (start == reference)
    for model, key in ((made.policy, start), (made.reference, reference)):
        want = plain_logps(load_model(folders[key]), [3, 4], [9, 5])
        assert torch.allclose(plain_logps(model, [3, 4], [9, 5]), want)
    assert not any(weight.requires_grad for weight in made.reference.parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_stored_in_bfloat16_are_one_function_with_their_reference(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    policies: tuple[Policy, Policy],
    bf16: bool,
) -> None:
    """Policy and reference both compute in float32, from the weights as they are stored."""
    chosen = options(bf16=bf16, reference="current", episodes=32)
    shop = Shop(tmp_path, tiny_tokenizer, torch.bfloat16)
    with monkeypatch.context() as patch:
        made = called(patch, shop, chosen, *policies)
    assert made.policy.dtype == made.reference.dtype == torch.float32
    assert made.dtype == torch.bfloat16
    assert torch.equal(
        plain_logps(made.policy, [3, 4], [9, 5]), plain_logps(made.reference, [3, 4], [9, 5])
    )
    report = train(tmp_path / "work", made, chosen)
    assert report["updates"] == 2 and abs(report["history"][0]["kl"]) < 1e-4
    kept = load_file(tmp_path / "work/model/model.safetensors")
    assert {weight.dtype for weight in kept.values()} == {torch.bfloat16}


class FourBits:
    """A model that says it is quantised, and cannot be cast."""

    is_quantized, dtype = True, torch.float16

    def float(self) -> None:
        raise AssertionError("weights of 4 bits cannot be cast")

    def requires_grad_(self, asked: bool) -> "FourBits":
        return self


def test_a_reference_of_4_bits_stays_as_it_is(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    policies: tuple[Policy, Policy],
) -> None:
    shop = Shop(tmp_path, tiny_tokenizer, torch.float32)
    shop.load_policy = lambda path: FourBits()  # type: ignore[method-assign, assignment, return-value]
    made = called(monkeypatch, shop, options(), *policies)
    assert isinstance(made.reference, FourBits)
