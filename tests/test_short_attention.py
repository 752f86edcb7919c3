"""Plain products for short sequences in bfloat16: the fused kernel's numbers, and only there."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from irl_align import short_attention as short
from irl_align.batches import hidden_states, pack_rows

TinyModel = Callable[[str], PreTrainedModel]
ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "qwen3", "mistral"]


def rows(count: int = 4, length: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and a mask with some padding at the end of every other row."""
    ids = torch.randint(3, 300, (count, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, -5:] = 0
    return ids, mask


def gradients(model: PreTrainedModel, compute: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    compute().float().square().mean().backward()
    return [w.grad.clone() for w in model.parameters() if w.grad is not None]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the sequences that plain products are used for from now on."""
    seen, products = [], short.products
    monkeypatch.setattr(
        short,
        "products",
        lambda query, *rest: seen.append(query.shape[2]) or products(query, *rest),
    )
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_are_the_fused_kernels_attention(
    tiny_model: TinyModel, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced in float32, where rounding hides nothing: padding, grouped heads, a sliding window."""
    model, (ids, mask) = tiny_model(architecture), rows()
    kept = mask.bool()

    def compute() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask).logits[kept]

    expected, wanted = compute().detach(), gradients(model, compute)
    monkeypatch.setattr(short, "_in_bfloat16", lambda tensor: True)
    seen = calls(monkeypatch)
    with short.short_attention():
        found, got = compute().detach(), gradients(model, compute)
    assert seen == [24] * 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_completions_that_share_a_row_are_apart(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    packed = pack_rows([[5, 6, 7]] * 3, [[8, 9], [10, 11, 12], [13]], [[0, 1, 2]], pad=0)
    expected = hidden_states(model, packed).detach()
    monkeypatch.setattr(short, "_in_bfloat16", lambda tensor: True)
    seen = calls(monkeypatch)
    with short.short_attention():
        found = hidden_states(model, packed).detach()
    assert seen
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("autocast", "gradient", "length", "plain"),
    [
        (True, True, 24, True),
        (False, True, 24, False),
        (True, False, 24, False),
        (True, True, short.LONGEST + 1, False),
    ],
    ids=["short bfloat16 in training", "float32", "no gradients", "long"],
)
def test_it_is_for_training_short_sequences_in_bfloat16(
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    autocast: bool,
    gradient: bool,
    length: int,
    plain: bool,
) -> None:
    model, (ids, mask) = tiny_model("llama"), rows(2, length)
    seen = calls(monkeypatch)
    with (
        short.short_attention(),
        torch.set_grad_enabled(gradient),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(input_ids=ids, attention_mask=mask)
    assert seen == ([length] * 2 if plain else [])


def test_autocast_gives_the_fused_kernels_loss_up_to_rounding(tiny_model: TinyModel) -> None:
    model, (ids, mask) = tiny_model("qwen3"), rows()

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            return found

    with short.short_attention():
        one = loss()
    torch.testing.assert_close(one, loss(), rtol=2e-2, atol=0)


def test_afterwards_everything_is_as_before() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(ValueError, match="inside"), short.short_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        raise ValueError("inside")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
