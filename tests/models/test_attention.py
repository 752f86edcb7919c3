"""Replacements of sdpa attention: the fused kernel's numbers, and only where faster."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from irl_align.models import attention
from irl_align.models.attention import LONGEST_SHORT, grouped_attention, short_attention
from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.generation.transformers_backend import TransformersGenerator
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
    """Length and dtype of every query that the fused kernel gets later."""
    seen, fused = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: torch.nn.Module, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        inside = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
        seen.append((query.shape[2], inside))
        return fused(module, query, *rest, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", watched)
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_short_attention_equals_the_fused_kernel(
    tiny_model: TinyModel,
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
    seen: list[tuple[int, torch.dtype]],
) -> None:
    """In float32, where rounding hides nothing: padding, grouped heads, a sliding window."""
    model, (ids, mask) = tiny_model(architecture), rows()
    kept = mask.bool()

    def compute() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits[kept]
        return logits

    expected, wanted = compute().detach(), gradients(model, compute)
    monkeypatch.setattr(attention, "in_bfloat16", lambda tensor: True)
    with short_attention():
        logits, got = compute().detach(), gradients(model, compute)
    assert seen == [(24, torch.float32)] * 8
    assert torch.equal(logits, expected) and all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_short_attention_of_bfloat16_weights_is_in_float32(
    tiny_model: TinyModel, architecture: str, seen: list[tuple[int, torch.dtype]]
) -> None:
    """Also without autocast, where masks have the model's dtype."""
    model, (ids, mask) = tiny_model(architecture).to(torch.bfloat16), rows()
    with short_attention():
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert seen == [(24, torch.float32)] * 2 and logits.dtype == torch.bfloat16
    expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert (logits - expected).abs().mean() < 2e-2 * expected.abs().mean()


def test_short_attention_separates_completions_that_share_a_row(
    tiny_model: TinyModel, seen: list[tuple[int, torch.dtype]]
) -> None:
    """The kernel gets the mask of a shared row, as booleans or in the model's dtype."""
    model = tiny_model("llama").to(torch.bfloat16)
    prompt = [[5, 6, 7]] * 3
    completions = [[8, 9], [10, 11, 12], [13]]
    packed = pack_rows(prompt, completions, [[0, 1, 2]], pad=0)
    apart = pack_rows(prompt, completions, [[0], [1], [2]], pad=0)
    with short_attention():
        shared = hidden_states(model, packed)[packed.row, packed.ends()]
        expected = hidden_states(model, apart)[apart.row, apart.ends()]
    assert {dtype for _, dtype in seen} == {torch.float32}
    torch.testing.assert_close(shared, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("autocast", "gradient", "length", "changed"),
    [
        (True, True, 24, True),
        (False, True, 24, False),
        (True, False, 24, False),
        (True, True, LONGEST_SHORT + 1, False),
    ],
    ids=["short bfloat16 in training", "float32", "no gradients", "long"],
)
def test_short_attention_applies_only_to_training_short_bfloat16_sequences(
    tiny_model: TinyModel,
    seen: list[tuple[int, torch.dtype]],
    autocast: bool,
    gradient: bool,
    length: int,
    changed: bool,
) -> None:
    model, (ids, mask) = tiny_model("llama"), rows(2, length)
    with (
        short_attention(),
        torch.set_grad_enabled(gradient),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(input_ids=ids, attention_mask=mask)
    dtype = torch.bfloat16 if autocast and not changed else torch.float32
    assert seen == [(length, dtype)] * 2


def test_short_attention_under_autocast_gives_the_loss_up_to_rounding(
    tiny_model: TinyModel,
) -> None:
    model, (ids, mask) = tiny_model("qwen3"), rows()

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            mean: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            return mean

    with short_attention():
        one = loss()
    torch.testing.assert_close(one, loss(), rtol=2e-2, atol=0)


# --- grouped attention ----------------------------------------------------------------------------

ROWS, WIDTH = 5, 9
Shapes = list[tuple[tuple[int, ...], tuple[int, ...]]]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """Shapes of queries and keys in every later attention without a copy."""
    seen, kernel = [], attention.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((tuple(query.shape), tuple(key.shape)))
        return kernel(query, key, *rest, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    return seen


def one_step(model: PreTrainedModel, padded: bool) -> torch.Tensor:
    """Logits (B, V) of one new token after a prefix of a few, with ragged padding on the left."""
    ids = torch.randint(3, 300, (ROWS, WIDTH + 1), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(ROWS if padded else 0):
        mask[row, : 2 * row] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    before = model(
        input_ids=ids[:, :WIDTH],
        attention_mask=mask[:, :WIDTH],
        position_ids=positions[:, :WIDTH],
        use_cache=True,
    )
    logits: torch.Tensor = model(
        input_ids=ids[:, WIDTH:],
        attention_mask=mask,
        position_ids=positions[:, WIDTH:],
        past_key_values=before.past_key_values,
    ).logits
    return logits[:, -1]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
@torch.inference_mode()
def test_grouped_attention_gives_the_fused_kernels_logits(
    tiny_model: TinyModel,
    architecture: str,
    padded: bool,
    shapes: Shapes,
) -> None:
    """Grouped heads, a sliding window; the prefix goes to the fused kernel."""
    model = tiny_model(architecture).double()
    heads, kept = model.config.num_attention_heads, model.config.num_key_value_heads
    assert heads > kept
    expected = one_step(model, padded)
    assert not shapes
    with grouped_attention():
        logits = one_step(model, padded)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert [query[:3] for query, _ in shapes] == [(ROWS, kept, heads // kept)] * 2
    assert {key[1] for _, key in shapes} == {kept}


@torch.inference_mode()
def test_grouped_attention_leaves_ungrouped_heads_to_the_fused_function(
    tiny_model: TinyModel, shapes: Shapes
) -> None:
    model = tiny_model("gpt2")
    expected = one_step(model, True)
    with grouped_attention():
        assert torch.equal(one_step(model, True), expected)
    assert not shapes


@pytest.mark.parametrize(
    ("heads_of_mask", "options"),
    [
        (4, {"dropout": 0.0}),
        (1, {"dropout": 0.1}),
        (1, {"position_bias": torch.zeros(1, 4, 1, 6)}),
    ],
    ids=["a mask for each head", "dropout", "a position bias"],
)
def test_grouped_attention_leaves_what_differs_between_heads_to_the_fused_function(
    heads_of_mask: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def fused(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        calls.append((query, key, value, mask, options))
        return query, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", fused)
    query, key = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 6, 8)
    mask = torch.zeros(2, heads_of_mask, 1, 6)
    with grouped_attention():
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        output, _ = attend(torch.nn.Module(), query, key, key, mask, **options)
    assert output is query and calls == [(query, key, key, mask, options)]


def test_sampling_decodes_without_copies(tiny_model: TinyModel, shapes: Shapes) -> None:
    """At every step after the first token."""
    model = tiny_model("llama")
    sampler = TransformersGenerator(model, [1], 0)
    (group,) = generate(sampler, [[5, 6, 7]], Sampling(n=3, max_new_tokens=6))
    steps = max(len(completion.token_ids) for completion in group) - 1
    layers = model.config.num_hidden_layers
    assert steps > 0 and len(shapes) == steps * layers


def test_nested_replacements_are_undone_after_an_error() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with short_attention():
        outer = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with pytest.raises(ValueError, match="inside"), grouped_attention():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] not in (before, outer)
            raise ValueError("inside")
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is outer
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
