"""The last attention row against eager attention's own weights."""

from collections.abc import Callable

import pytest
import torch
from support.rows import random_ids
from support.tiny_models import SIZES, TINY_ARCHITECTURES, gemma2, qwen2
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    PreTrainedModel,
    T5Config,
)

from irl_align.errors import UserError
from irl_align.reward import attention
from irl_align.reward.attention import attention_rows, require_causal, weights_of

MakeModel = Callable[[str], PreTrainedModel]
ROWS = random_ids(4, 3, 14, seed=5)


def batch(side: str) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs padded on one side, and the place of each row's last token."""
    width = max(map(len, ROWS))
    ids, mask = torch.zeros(2, len(ROWS), width, dtype=torch.long)
    for number, row in enumerate(ROWS):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, where], mask[number, where] = torch.tensor(row), 1
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    last = mask.sum(1) - 1 if side == "right" else torch.full((len(ROWS),), width - 1)
    return inputs, last


@torch.no_grad()
def eager_rows(model: PreTrainedModel, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
    """Rows of the last layer's weights as transformers gives them: (B, Q, L)."""
    model.set_attn_implementation("eager")
    weights = model.base_model(**inputs, output_attentions=True).attentions[-1]
    return torch.stack([w.mean(0)[p] for w, p in zip(weights, places, strict=True)])


@torch.no_grad()
def read_rows(model: PreTrainedModel, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
    with attention_rows(model) as reader:
        reader.queries = places
        model.base_model(**inputs, use_cache=False)
        return reader.take()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("arch", [*TINY_ARCHITECTURES, "qwen2", "gemma2"])
def test_attention_rows_equal_eager_attention(arch: str, side: str, tiny_model: MakeModel) -> None:
    own = {"qwen2": qwen2, "gemma2": gemma2}
    model = own[arch]() if arch in own else tiny_model(arch)
    inputs, last = batch(side)
    places = torch.stack([last, last - 1], 1)
    before = model.config._attn_implementation
    assert before == "sdpa" or arch == "gemma2"  # which transformers loads as eager since 5.24
    rows = read_rows(model, inputs, places)
    assert model.config._attn_implementation == before
    assert rows.dtype == torch.float32
    expected = eager_rows(model, inputs, places)
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=0)
    assert not rows[:, 0][inputs["attention_mask"] == 0].any()
    spread = rows[:, 0].amax(1) - 1 / torch.tensor([len(row) for row in ROWS])
    assert spread.max() > 0.05  # far from uniform, so that a wrong row would show


def test_attention_rows_keep_a_model_on_eager_attention(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    inputs, last = batch("right")
    expected = eager_rows(model, inputs, last[:, None])
    rows = read_rows(model, inputs, last[:, None])
    assert model.config._attn_implementation == "eager"
    assert torch.equal(rows, expected)


@torch.no_grad()
@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_attention_rows_leave_the_forward_unchanged(arch: str, tiny_model: MakeModel) -> None:
    model = tiny_model(arch)
    inputs, last = batch("right")
    plain = model.base_model(**inputs)[0]
    with attention_rows(model) as reader:
        reader.queries = last[:, None]
        read = model.base_model(**inputs)[0]
    assert torch.equal(plain, read)


def test_attention_rows_are_causal_without_a_mask(tiny_model: MakeModel) -> None:
    """One unpadded row: sdpa gets no mask."""
    model = tiny_model("llama")
    inputs = {"input_ids": torch.tensor([ROWS[0]])}
    places = torch.arange(len(ROWS[0]))[None]
    rows = read_rows(model, inputs, places)
    torch.testing.assert_close(rows, eager_rows(model, inputs, places), atol=1e-6, rtol=0)


def test_attention_rows_restore_the_model_after_an_exception(tiny_model: MakeModel) -> None:
    for model in (tiny_model("llama"), gemma2()):
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        before = model.config._attn_implementation
        with pytest.raises(RuntimeError, match="stop"), attention_rows(model) as reader:
            reader.queries = torch.tensor([[2]])
            raise RuntimeError("stop")
        assert model.config._attn_implementation == before
        assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
        model.base_model(input_ids=torch.tensor([[5, 6, 7]]))
        assert reader.rows is None


def test_take_returns_the_rows_once(tiny_model: MakeModel) -> None:
    """A forward that did not run must not give the weights of the one before it."""
    model = tiny_model("gpt2")
    with attention_rows(model) as reader:
        reader.queries = torch.tensor([[2]])
        model.base_model(input_ids=torch.tensor([[5, 6, 7]]))
        assert reader.take().shape == (1, 1, 3)
        with pytest.raises(UserError, match=r"GPT2Attention gave no attention weights"):
            reader.take()


def test_weights_of_by_hand() -> None:
    """Two heads share one key head; scores are q k / 2 under a window of 2, or an additive mask."""
    key = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 2.0]])[None, None]  # (1, 1, 3, 2)
    query = torch.zeros(1, 2, 3, 2)
    query[0, :, 2] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    places = torch.tensor([[2]])
    heads = torch.tensor([[0.5, 0.0, 2.0], [0.0, 1.0, 1.0]])
    whole = weights_of(query, key, None, places, 0.5)
    expected = (heads.exp() / heads.exp().sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(whole[0, 0], expected)
    window = torch.ones(3, 3).tril().triu(-1)[None, None]
    near = weights_of(query, key, window.bool(), places, 0.5)
    two = heads[:, 1:].exp() / heads[:, 1:].exp().sum(1, keepdim=True)
    torch.testing.assert_close(near[0, 0], torch.cat([torch.zeros(1), two.mean(0)]))
    added = weights_of(query, key, torch.log(window), places, 0.5)
    torch.testing.assert_close(added, near)
    first = weights_of(query, key, None, torch.tensor([[0]]), 0.5)
    torch.testing.assert_close(first[0, 0], torch.tensor([1.0, 0.0, 0.0]))


def test_attention_rows_read_many_queries_in_pieces(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen3")
    inputs, _ = batch("right")
    places = torch.arange(max(map(len, ROWS))).expand(len(ROWS), -1)
    whole = read_rows(model, inputs, places)
    monkeypatch.setattr(attention, "WEIGHTS_AT_ONCE", 1)
    torch.testing.assert_close(read_rows(model, inputs, places), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [BertConfig(**SIZES), T5Config(vocab_size=320, num_layers=1)])
def test_require_causal_refuses_models_that_read_later_tokens(config: object) -> None:
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(UserError, match=r"reads later tokens too, .*expected a causal model"):
        require_causal(model)
    with pytest.raises(UserError, match=r"reads later tokens too"), attention_rows(model):
        pass
    assert model.training


def test_attention_rows_refuse_attention_outside_the_interface() -> None:
    model = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=320, hidden_size=32, n_layer=1, n_head=4)
    )
    require_causal(model)
    refused = pytest.raises(UserError, match=r"bloom.*cannot be read.*use credit red or sparse")
    with refused, attention_rows(model):
        pass
