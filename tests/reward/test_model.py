"""The explicit reward against transformers' own classifier and hand calculations."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.rows import plain_logps, random_ids, save
from support.tiny_models import TINY_ARCHITECTURES
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from irl_align.errors import UserError
from irl_align.reward.forward import score_head
from irl_align.reward.model import RewardModel, train_last_layers
from irl_align.reward.settings import RewardSettings

MakeModel = Callable[[str], PreTrainedModel]
PROMPTS = random_ids(5, 1, 9, seed=1)
COMPLETIONS = random_ids(5, 1, 12, seed=2)


@pytest.fixture
def policy(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[[str], Path]:
    """``policy(arch)``: the folder of a tiny policy."""
    return lambda arch: save(tiny_model(arch), tiny_tokenizer, tmp_path / f"policy-{arch}")


@pytest.fixture
def reward(
    policy: Callable[[str], Path], tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., RewardModel]:
    """``reward(arch, **settings)``: a fresh reward on that policy."""

    def make(arch: str, **options: object) -> RewardModel:
        return RewardModel.from_policy(
            policy(arch), tiny_tokenizer, RewardSettings(**options), seed=3
        )

    return make


def by_hand(model: RewardModel, policy: PreTrainedModel, prompt: list, completion: list) -> float:
    """r(x, y) of one row: head at the last token, the mean log-prob, the bound, less the mean."""
    settings = model.settings
    ids = torch.tensor([[*prompt, *completion]])
    hidden = policy.base_model(input_ids=ids).last_hidden_state[0, -1]
    value = float(score_head(model.model).weight[0].detach() @ hidden)
    if settings.lm_coef and completion:
        value += settings.lm_coef * float(plain_logps(policy, prompt, completion).mean())
    if settings.bound is not None:
        value = settings.bound * math.tanh(value / settings.bound)
    return value - settings.mean


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
@torch.no_grad()
def test_save_pretrained_writes_a_plain_sequence_classifier(
    arch: str, reward: Callable[..., RewardModel], tmp_path: Path
) -> None:
    ours = reward(arch)
    ours.save_pretrained(tmp_path / "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert plain.config.num_labels == 1
    expected = torch.stack(
        [
            plain(input_ids=torch.tensor([p + c])).logits[0, 0]
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
    )
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.score_ids(PROMPTS, COMPLETIONS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [{}, {"lm_coef": 0.7}, {"lm_coef": 0.7, "bound": 1.5, "mean": 0.25}],
    ids=["head", "lm", "all"],
)
@torch.no_grad()
def test_prefix_scores_ids_equal_single_prefixes(
    arch: str, options: dict, reward: Callable[..., RewardModel], tiny_model: MakeModel
) -> None:
    ours, policy = reward(arch, **options), tiny_model(arch)
    scores = ours.prefix_scores_ids(PROMPTS, COMPLETIONS)
    whole = ours.score_ids(PROMPTS, COMPLETIONS)
    for row in range(0, len(PROMPTS), 2):
        prompt, completion = PROMPTS[row], COMPLETIONS[row]
        expected = [
            by_hand(ours, policy, prompt, completion[:t]) for t in range(len(completion) + 1)
        ]
        assert scores[row].shape == (len(completion) + 1,)
        assert scores[row].tolist() == pytest.approx(expected, abs=1e-5)
        assert float(whole[row]) == pytest.approx(expected[-1], abs=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_prefix_scores_ids_do_not_depend_on_the_batch(
    arch: str, reward: Callable[..., RewardModel]
) -> None:
    ours = reward(arch, lm_coef=0.5)
    rows = st.lists(
        st.tuples(
            st.lists(st.integers(3, 319), min_size=1, max_size=10),
            st.lists(st.integers(0, 319), min_size=1, max_size=12),  # pad and EOS ids included
        ),
        min_size=2,
        max_size=6,
    )

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rows, st.sampled_from([1, 24, 4096]))
    def check(pairs: list, max_batch_tokens: int) -> None:
        prompts, completions = [p for p, _ in pairs], [c for _, c in pairs]
        ours.max_batch_tokens = max_batch_tokens
        together = ours.prefix_scores_ids(prompts, completions)
        for row, (prompt, completion) in enumerate(pairs):
            alone = ours.prefix_scores_ids([prompt], [completion])[0]
            torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=1e-5)

    check()


def test_score_ids_of_no_rows_and_empty_completions(reward: Callable[..., RewardModel]) -> None:
    ours = reward("llama", lm_coef=0.5)
    assert ours.score_ids([], []).shape == (0,)
    assert ours.prefix_scores_ids([], []) == []
    prefixes = ours.prefix_scores_ids([[5, 6]], [[7]])[0]
    assert float(ours.score_ids([[5, 6]], [[]])) == pytest.approx(float(prefixes[0]), abs=1e-6)


def test_score_ids_keeps_the_mode_and_no_gradient(
    reward: Callable[..., RewardModel],
) -> None:
    ours = reward("gpt2")
    ours.model.train()
    assert not ours.score_ids(PROMPTS, COMPLETIONS).requires_grad
    assert ours.model.training
    ours.model.eval()
    ours.score_ids(PROMPTS, COMPLETIONS)
    assert not ours.model.training


# --- text -----------------------------------------------------------------------------------------


def test_score_applies_the_template_and_eos(
    reward: Callable[..., RewardModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ours = reward("llama", template="name = {prompt} ;", lowercase=True)

    def ids(text: str) -> list[int]:
        return tiny_tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [ids("name = loch fyne ;"), ids("name = the punter ;")]
    completions = [
        [*ids("french food."), tiny_tokenizer.eos_token_id],
        [*ids("a cheap pub"), tiny_tokenizer.eos_token_id],
    ]
    texts = ["Loch Fyne", "The Punter"], ["French food.", "A cheap pub"]
    assert ours.score(*texts).tolist() == ours.score_ids(prompts, completions).tolist()
    for got, expected in zip(
        ours.prefix_scores(*texts), ours.prefix_scores_ids(prompts, completions), strict=True
    ):
        assert got.tolist() == expected.tolist()


# --- making ---------------------------------------------------------------------------------------


def test_from_policy_draws_the_head_from_the_seed(
    policy: Callable[[str], Path], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = policy("llama")

    def head(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 17)  # the global numbers must not matter
        model = RewardModel.from_policy(folder, tiny_tokenizer, RewardSettings(), seed).model
        assert score_head(model).bias is None
        return score_head(model).weight.detach().clone()

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))
    weights = torch.cat([head(seed).flatten() for seed in range(20)])  # 20 x H=32
    assert weights.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.1)
    assert weights.mean().item() == pytest.approx(0.0, abs=0.025)


def test_from_policy_keeps_the_policys_weights(
    reward: Callable[..., RewardModel], tiny_model: MakeModel
) -> None:
    for arch in ("llama", "qwen3"):
        theirs = tiny_model(arch).base_model.state_dict()
        for name, tensor in reward(arch).model.base_model.state_dict().items():
            assert torch.equal(tensor, theirs[name]), name


def test_from_policy_refuses_lm_coef_with_transformed_logits(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = Gemma2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
    )
    folder = save(AutoModelForCausalLM.from_config(config), tiny_tokenizer, tmp_path / "gemma")
    with pytest.raises(UserError, match="lm_coef: a gemma2 computes its logits with more than"):
        RewardModel.from_policy(folder, tiny_tokenizer, RewardSettings(lm_coef=0.5), 0)
    RewardModel.from_policy(folder, tiny_tokenizer, RewardSettings(), 0)


# --- which weights are trained --------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "trained"), [(0, {"score"}), (1, {"score", "last", "norm"})])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
def test_train_last_layers_freezes_the_rest(
    arch: str, layers: int, trained: set[str], reward: Callable[..., RewardModel]
) -> None:
    model = reward(arch).model
    train_last_layers(model, layers)
    last = len(next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))) - 1
    kinds = set()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            in_last = f".{last}." in name
            kinds.add("score" if "score" in name else "last" if in_last else "norm")
            assert in_last or "score" in name or "norm" in name or "ln_f" in name
    assert kinds == trained


def test_train_last_layers_refuses_more_than_there_are(
    reward: Callable[..., RewardModel],
) -> None:
    with pytest.raises(UserError, match="found 9, expected at most 2, the layers of a llama"):
        train_last_layers(reward("llama").model, 9)


# --- mean of the demonstrations -------------------------------------------------------------------


def test_centre_gives_demonstrations_mean_0(reward: Callable[..., RewardModel]) -> None:
    ours = reward("llama", bound=2.0, mean=5.0)  # an earlier mean is undone first
    raw = ours.score_ids(PROMPTS, COMPLETIONS).double() + 5.0
    mean, std = ours.centre(PROMPTS, COMPLETIONS)
    assert (mean, std) == pytest.approx((raw.mean().item(), raw.std(correction=0).item()), abs=1e-5)
    scores = ours.score_ids(PROMPTS, COMPLETIONS).double()
    torch.testing.assert_close(scores, raw - raw.mean(), atol=1e-5, rtol=0)  # nats stay nats
    assert ours.centre(PROMPTS, COMPLETIONS) == (mean, std)


def test_centre_of_constant_and_broken_rewards(reward: Callable[..., RewardModel]) -> None:
    ours = reward("llama")
    _, std = ours.centre([PROMPTS[0]] * 3, [COMPLETIONS[0]] * 3)
    assert std < 1e-5
    assert ours.score_ids(PROMPTS[:1], COMPLETIONS[:1]).abs().item() < 1e-5
    score_head(ours.model).weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="rewards of completion 0 are not finite"):
        ours.centre(PROMPTS, COMPLETIONS)


# --- saving and loading ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "qwen3"])  # untied, embed_out, tied
def test_save_and_load_round_trip(
    arch: str, reward: Callable[..., RewardModel], tmp_path: Path
) -> None:
    ours = reward(arch, lm_coef=0.5, bound=3.0, template="{prompt} ->", lowercase=True, name="mine")
    if hasattr(ours.model, "lm_head"):  # its own, trained separately from the policy's
        ours.model.lm_head.weight.data.add_(0.01)
    ours.centre(PROMPTS[:4], COMPLETIONS[:4])
    ours.save_pretrained(tmp_path / "reward")
    loaded = RewardModel.from_pretrained(tmp_path / "reward")
    assert loaded.settings == ours.settings
    assert loaded.settings == replace(
        RewardSettings(0.5, 3.0, template="{prompt} ->", lowercase=True, name="mine"),
        mean=ours.settings.mean,
    )
    assert torch.equal(loaded.score_ids(PROMPTS, COMPLETIONS), ours.score_ids(PROMPTS, COMPLETIONS))
    assert loaded.score(["Loch"], ["Fyne"]).tolist() == ours.score(["Loch"], ["Fyne"]).tolist()
    loaded.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("reward", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_from_pretrained_loads_any_one_label_classifier(
    policy: Callable[[str], Path], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(policy("gpt2"), num_labels=1)
    loaded = RewardModel.from_pretrained(save(plain, tiny_tokenizer, tmp_path / "theirs"))
    assert loaded.settings == RewardSettings()
    with torch.no_grad():
        expected = plain.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits.item()
    assert float(loaded.score_ids([[5, 6]], [[7]])) == pytest.approx(expected, abs=1e-6)


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_from_pretrained_refuses_two_labels(
    policy: Callable[[str], Path], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    two = AutoModelForSequenceClassification.from_pretrained(policy("llama"), num_labels=2)
    save(two, tiny_tokenizer, tmp_path / "two")
    with pytest.raises(UserError, match="num_labels is 2"):
        RewardModel.from_pretrained(tmp_path / "two")


def test_from_pretrained_refuses_a_language_model(policy: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"score\.weight"):
        RewardModel.from_pretrained(policy("llama"))
    folder = policy("gpt2")
    edit_config(folder, num_labels=1, id2label={"0": "LABEL_0"})
    with pytest.raises(UserError, match=r"score\.weight"):
        RewardModel.from_pretrained(folder)


def test_from_pretrained_refuses_half_written_folders(
    reward: Callable[..., RewardModel], tmp_path: Path
) -> None:
    folder = tmp_path / "reward"
    reward("qwen3").save_pretrained(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="no usable model in this folder"):
        RewardModel.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(UserError, match="no usable model in this folder"):
        RewardModel.from_pretrained(folder)
    weights.write_bytes(whole)
    RewardModel.from_pretrained(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no usable tokenizer in this folder"):
        RewardModel.from_pretrained(folder)


def test_from_pretrained_refuses_a_missing_lm_head_and_unknown_settings(
    reward: Callable[..., RewardModel], tmp_path: Path
) -> None:
    folder = tmp_path / "reward"
    reward("llama", lm_coef=0.5).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_coef is set, but no \*\.safetensors holds lm_head"):
        RewardModel.from_pretrained(folder)
    edit_config(folder, irl_reward={"lm_coeff": 0.5})
    with pytest.raises(UserError, match=r"irl_reward: .*lm_coeff.*expected the fields lm_coef"):
        RewardModel.from_pretrained(folder)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_score_ids_refuses_texts_beyond_the_context(
    arch: str, reward: Callable[..., RewardModel]
) -> None:
    model = reward(arch)
    limit = model.model.config.max_position_embeddings
    fitting, longer = [[4] * (limit - 3)], [[4] * (limit - 2)]
    assert model.score_ids([[5, 6, 7]], fitting).shape == (1,)
    message = f"completion 1, with its prompt, has {limit + 1} tokens, expected at most the {limit}"
    for score in (model.score_ids, model.prefix_scores_ids):
        with pytest.raises(UserError, match=message):
            score([[5, 6, 7]] * 2, fitting + longer)
