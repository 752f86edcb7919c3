"""Decoding on shared key-value heads: the fused attention's numbers, no copies of the cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from irl_align.models.attention import short_attention
from irl_align.models.generation import Sampling, TransformersGenerator, generate
from irl_align.models.generation import grouped_attention as grouped
from irl_align.models.generation.grouped_attention import grouped_attention

TinyModel = Callable[[str], PreTrainedModel]
ROWS, WIDTH = 5, 9


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of the queries and keys that are attended to without a copy from now on."""
    found, kernel = [], grouped.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> Any:
        found.append((tuple(query.shape), tuple(key.shape)))
        return kernel(query, key, *rest, **options)

    monkeypatch.setattr(grouped, "scaled_dot_product_attention", watched)
    return found


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
def test_a_step_has_the_fused_kernels_logits(
    tiny_model: TinyModel,
    architecture: str,
    padded: bool,
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Grouped heads, a sliding window; the prefix itself goes to the fused kernel."""
    model = tiny_model(architecture).double()
    heads, kept = model.config.num_attention_heads, model.config.num_key_value_heads
    assert heads > kept
    expected = one_step(model, padded)
    assert not shapes
    with grouped_attention():
        found = one_step(model, padded)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert [query[:3] for query, _ in shapes] == [(ROWS, kept, heads // kept)] * 2
    assert {key[1] for _, key in shapes} == {kept}


@torch.inference_mode()
def test_a_head_for_each_query_head_is_left_alone(
    tiny_model: TinyModel, shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    model = tiny_model("gpt2")
    expected = one_step(model, True)
    with grouped_attention():
        assert torch.equal(one_step(model, True), expected)
    assert not shapes


@pytest.mark.parametrize("case", ["a mask of each head", "dropout", "a bias of positions"])
def test_what_differs_between_heads_goes_to_the_fused_function(case: str) -> None:
    """None of it can be told of heads that share a query axis."""
    given: list[Any] = []

    def fused(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        given.append((query, key, value, mask, options))
        return query, None

    query, key = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 6, 8)
    mask = torch.zeros(2, 4 if case == "a mask of each head" else 1, 1, 6)
    cases: dict[str, dict[str, Any]] = {
        "a mask of each head": {"dropout": 0.0},
        "dropout": {"dropout": 0.1},
        "a bias of positions": {"position_bias": torch.zeros(1, 4, 1, 6)},
    }
    options = cases[case]
    found, _ = grouped._attend(fused, torch.nn.Module(), query, key, key, mask, **options)
    assert found is query and given == [(query, key, key, mask, options)]


def test_samples_are_drawn_without_copies(
    tiny_model: TinyModel, shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    """By the sampler, at every step after the first token."""
    model = tiny_model("llama")
    sampler = TransformersGenerator(model, [1], 0)
    (group,) = generate(sampler, [[5, 6, 7]], Sampling(n=3, max_new_tokens=6))
    steps = max(len(completion.token_ids) for completion in group) - 1
    layers = model.config.num_hidden_layers
    assert steps > 0 and len(shapes) == steps * layers


def test_one_inside_another_and_an_error_leave_all_as_it_was() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with short_attention():
        outer = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with pytest.raises(ValueError, match="inside"), grouped_attention():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] not in (before, outer)
            raise ValueError("inside")
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is outer
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
