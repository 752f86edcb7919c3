"""Batches of token ids: budgets of tokens, padding, and rows that share a prompt."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import plain_logps, random_ids
from support.tiny_models import TINY_ARCHITECTURES
from transformers import BertConfig, BertModel, PreTrainedModel

from irl_align.models.lm_head import completion_logprobs, has_plain_logits
from irl_align.models.packing import (
    batches_by_tokens,
    can_pack,
    hidden_states,
    pack_rows,
    pad_right,
    row_lengths,
    share_prompts,
)

MakeModel = Callable[[str], PreTrainedModel]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 200))
def test_batches_by_tokens_hold_every_row_once_within_the_limit(
    lengths: list[int], max_tokens: int
) -> None:
    batches = list(batches_by_tokens(lengths, max_tokens))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[row] for row in batch)
        assert padded <= max_tokens or len(batch) == 1
    longest = [max(lengths[row] for row in batch) for batch in batches]
    shortest = [min(lengths[row] for row in batch) for batch in batches]
    # The longest come first, so that what does not fit fails at once; lengths do not overlap.
    assert all(low >= high for low, high in zip(shortest, longest[1:], strict=False))


def test_batches_by_tokens_are_full() -> None:
    assert list(batches_by_tokens([4, 9, 5, 1, 1], 10)) == [[1], [2, 0], [4, 3]]


def test_pad_right_pads_at_the_end() -> None:
    ids, mask = pad_right([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# --- rows that share a prompt ---------------------------------------------------------------------


def test_pack_rows_places_completions_of_a_shared_prompt() -> None:
    prompts, completions = [[5, 6], [7], [5, 6]], [[8, 9], [8], []]
    packed = pack_rows(prompts, completions, [[0, 2], [1]], pad=1)
    assert packed.input_ids.tolist() == [[5, 6, 8, 9], [7, 8, 1, 1]]
    assert packed.position_ids is not None
    assert packed.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert packed.row.tolist() == [0, 0, 1]  # in the order of the rows: completions 0, 2, 1
    assert packed.before.tolist() == [1, 1, 0]
    assert packed.start.tolist() == [2, 4, 1]
    assert packed.length.tolist() == [2, 0, 1]
    assert packed.places().tolist() == [[1, 2, 3], [1, 0, 0], [0, 1, 0]]
    assert packed.ends().tolist() == [3, 1, 1]


def test_pack_rows_mask_hides_the_other_completions() -> None:
    packed = pack_rows([[5], [5]], [[6, 7], [8]], [[0, 1]], pad=1)  # columns: x, y1, y1, y2
    assert packed.attention_mask.int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]]
    ]


def test_pack_rows_without_sharing_has_a_plain_mask() -> None:
    packed = pack_rows(
        [[5], [5]], [[6, 7], [8]], share_prompts([[5], [5]], [[6, 7], [8]], False), 1
    )
    assert packed.position_ids is None
    assert packed.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 150)), max_size=30),
    st.lists(st.integers(1, 120), min_size=4, max_size=4),
)
def test_share_prompts_puts_every_completion_in_one_row_of_its_prompt(
    wanted: list[tuple[int, int]], prompt_lengths: list[int]
) -> None:
    prompts = [[which] * prompt_lengths[which] for which, _ in wanted]
    completions = [[9] * count for _, count in wanted]
    rows = share_prompts(prompts, completions, True)
    assert sorted(i for row in rows for i in row) == list(range(len(wanted)))
    for row, length in zip(rows, row_lengths(prompts, completions, rows), strict=True):
        assert row == sorted(row)
        assert len({wanted[i][0] for i in row}) == 1
        assert length <= max(256, 4 * len(prompts[row[0]])) or len(row) == 1


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_packed_rows_have_the_hidden_states_and_gradients_of_single_rows(
    arch: str, tiny_model: MakeModel
) -> None:
    model = tiny_model(arch)
    if arch == "mistral":
        model.config.sliding_window = 40
    prompts = [p for p in random_ids(3, 2, 9, seed=1) for _ in range(3)]
    completions = random_ids(9, 1, 12, seed=2)
    assert can_pack(model, 21)
    rows = share_prompts(prompts, completions, True)
    assert [len(row) for row in rows] == [3, 3, 3]
    order = [i for row in rows for i in row]
    packed = pack_rows(prompts, completions, rows, pad=0)
    together = hidden_states(model, packed)[packed.row[:, None], packed.places()]
    direction = torch.randn(together.shape, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(())
    for n, i in enumerate(order):
        alone = model.base_model(input_ids=torch.tensor([prompts[i] + completions[i]]))[0][0]
        alone = alone[len(prompts[i]) - 1 :]
        torch.testing.assert_close(together[n, : len(alone)], alone, atol=2e-5, rtol=0)
        total = total + (alone * direction[n, : len(alone)]).sum()
    steps = torch.arange(together.shape[1])
    real = (steps <= packed.length[:, None])[..., None]
    names = [name for name, weight in model.base_model.named_parameters()]
    weights = list(model.base_model.parameters())
    ours = torch.autograd.grad((together * direction * real).sum(), weights)
    theirs = torch.autograd.grad(total, weights)
    for name, mine, plain in zip(names, ours, theirs, strict=True):
        scale = plain.abs().max().item() + 1e-6
        assert (mine - plain).abs().max().item() < 1e-4 * scale + 1e-5, name


def test_can_pack_refuses_models_without_a_block_mask(tiny_model: MakeModel) -> None:
    llama, mistral = tiny_model("llama"), tiny_model("mistral")
    assert can_pack(llama, 10**6)
    assert can_pack(mistral, 8)
    assert not can_pack(mistral, 9)  # its window is 8, and the block mask has no window
    llama.set_attn_implementation("eager")
    assert not can_pack(llama, 8)
    bert = BertModel(
        BertConfig(
            vocab_size=10,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    assert not can_pack(bert, 8)


def test_completion_logprobs_beyond_a_sliding_window(tiny_model: MakeModel) -> None:
    model = tiny_model("mistral")
    prompts, completions = [[5, 6, 7, 8]] * 3, random_ids(3, 9, 12, seed=5)
    got = completion_logprobs(model, prompts, completions)
    for values, prompt, completion in zip(got, prompts, completions, strict=True):
        with torch.no_grad():
            expected = plain_logps(model, prompt, completion)
        assert values.tolist() == pytest.approx(expected.tolist(), abs=2e-5)


def test_completion_logprobs_process_a_shared_prompt_once(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    prompts, completions = [[5] * 20] * 6, random_ids(6, 3, 3, seed=5)
    assert has_plain_logits(model)  # measured by two passes of its own, once per model
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    completion_logprobs(model, prompts, completions)
    assert seen == [(1, 20 + 6 * 3)]
