"""Float32 attention for short sequences in bfloat16: the fused kernel's numbers, and only there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from irl_align.models import attention as short
from irl_align.models.packing import hidden_states, pack_rows

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


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.dtype]]:
    """Length and dtype of every query that the fused kernel gets from now on."""
    found, fused = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: torch.nn.Module, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        inside = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
        found.append((query.shape[2], inside))
        return fused(module, query, *rest, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", watched)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_fused_kernels_attention(
    tiny_model: TinyModel,
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
    seen: list[tuple[int, torch.dtype]],
) -> None:
    """Forced in float32, where rounding hides nothing: padding, grouped heads, a sliding window."""
    model, (ids, mask) = tiny_model(architecture), rows()
    kept = mask.bool()

    def compute() -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits[kept]
        return found

    expected, wanted = compute().detach(), gradients(model, compute)
    monkeypatch.setattr(short, "_in_bfloat16", lambda tensor: True)
    with short.short_attention():
        found, got = compute().detach(), gradients(model, compute)
    assert seen == [(24, torch.float32)] * 8
    assert torch.equal(found, expected) and all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_in_bfloat16(
    tiny_model: TinyModel, architecture: str, seen: list[tuple[int, torch.dtype]]
) -> None:
    """Without autocast too, masks in the model's dtype included."""
    model, (ids, mask) = tiny_model(architecture).to(torch.bfloat16), rows()
    with short.short_attention():
        found = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert seen == [(24, torch.float32)] * 2 and found.dtype == torch.bfloat16
    expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert (found - expected).abs().mean() < 2e-2 * expected.abs().mean()


def test_completions_that_share_a_row_are_apart(
    tiny_model: TinyModel, seen: list[tuple[int, torch.dtype]]
) -> None:
    """The mask of a shared row goes to the kernel, as booleans or in the model's dtype."""
    model = tiny_model("llama").to(torch.bfloat16)
    prompt = [[5, 6, 7]] * 3
    completions = [[8, 9], [10, 11, 12], [13]]
    packed = pack_rows(prompt, completions, [[0, 1, 2]], pad=0)
    apart = pack_rows(prompt, completions, [[0], [1], [2]], pad=0)
    with short.short_attention():
        found = hidden_states(model, packed)[packed.row, packed.ends()]
        expected = hidden_states(model, apart)[apart.row, apart.ends()]
    assert {dtype for _, dtype in seen} == {torch.float32}
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("autocast", "gradient", "length", "changed"),
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
    seen: list[tuple[int, torch.dtype]],
    autocast: bool,
    gradient: bool,
    length: int,
    changed: bool,
) -> None:
    model, (ids, mask) = tiny_model("llama"), rows(2, length)
    with (
        short.short_attention(),
        torch.set_grad_enabled(gradient),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(input_ids=ids, attention_mask=mask)
    dtype = torch.bfloat16 if autocast and not changed else torch.float32
    assert seen == [(length, dtype)] * 2


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
