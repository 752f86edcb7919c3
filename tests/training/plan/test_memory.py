"""What PyTorch keeps and holds, by hand numbers and counted on real models."""

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from irl_align.config.model import ModelOptions, ScratchOptions
from irl_align.errors import UserError
from irl_align.training.plan import memory
from irl_align.training.plan.memory import Precision, Shape
from irl_align.training.plan.model_shapes import (
    PUBLISHED,
    scratch_config,
    shape_of,
    shape_of_recipe,
)

PRECISIONS = {
    "float32": Precision(),
    "autocast": Precision(4, 2),
    "bfloat16": Precision(2, 2),
}
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
ROWS, COLUMNS = 2, 64


def config(family: str, layers: int) -> AutoConfig:
    given = {**SIZES, "num_hidden_layers": layers}
    if family in memory.ROPE:
        given |= {"num_key_value_heads": 2, "head_dim": 24}
    if family == "gpt2":  # torch's fast attention on a CPU has no dropout
        given = {"n_embd": 96, "n_inner": 224, "n_head": 4, "n_layer": layers, "attn_pdrop": 0.0}
        given |= {"vocab_size": 512, "n_positions": 128}
    return AutoConfig.for_model(family, **given, bos_token_id=1, eos_token_id=1)


def kept(family: str, layers: int, precision: Precision, padded: bool) -> int:
    """Bytes of the distinct storages that autograd keeps of a real forward pass, but weights."""
    dtype = torch.bfloat16 if precision.weights == 2 else torch.float32
    model = AutoModelForCausalLM.from_config(config(family, layers), dtype=dtype).train()
    known = {weight.untyped_storage()._cdata for weight in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # so that no storage's place is used again
        storage = tensor.untyped_storage()
        # Copies of weights by autocast are two-dimensional and have no place for tokens.
        weight = tensor.ndim == 2 and ROWS * COLUMNS not in tensor.shape and tensor.dtype != int
        if storage._cdata not in known and not (weight and tensor.dtype == torch.bfloat16):
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    mask = torch.ones(ROWS, COLUMNS, dtype=torch.long)
    if padded:
        mask[0, -5:] = 0
    half = torch.autocast("cpu", torch.bfloat16)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        half if precision.autocast else contextlib.nullcontext(),
    ):
        model.base_model(input_ids=torch.zeros_like(mask), attention_mask=mask, use_cache=False)
    return sum(sizes.values())


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", memory.KNOWN)
def test_a_layer_keeps_what_autograd_is_seen_to_keep(
    family: str, precision: str, padded: bool
) -> None:
    actual = PRECISIONS[precision]
    both = [kept(family, layers, actual, padded) for layers in (1, 2)]
    shape = shape_of(config(family, 2))
    expected = ROWS * COLUMNS * memory.kept_by_layer(shape, actual, COLUMNS if padded else 0)
    assert both[1] - both[0] == pytest.approx(expected, rel=2e-3)  # gemma keeps 1 + weight too
    whole = memory.activations(shape, ROWS, COLUMNS, actual, masked=padded)
    output = ROWS * COLUMNS * shape.width * actual.weights  # which the head would keep
    whole -= output + expected  # and a layer's gradients in the backward pass
    assert both[1] == pytest.approx(whole, rel=0.03)  # rotary tables and ids are left out


def test_a_llama_layer_by_hand() -> None:
    """H 8, I 16, 2 heads of 4, 1 key-value head."""
    shape = Shape("llama", 3, 8, 16, 2, 1, 4, 100, trunk=1000, head=800)
    # norms 2 (8 + 8 + 1); their outputs 16; q, out 16; k, v 8; gate.. 64; log-sum-exp 2
    assert memory.kept_by_layer(shape, Precision()) == 4 * (34 + 16 + 16 + 8 + 64 + 2)
    # autocast: the norms and log-sum-exps stay float32, five copies of norms' outputs
    assert memory.kept_by_layer(shape, Precision(4, 2)) == 4 * 36 + 2 * (40 + 16 + 8 + 64)
    # a mask of 10 columns in float32, and k, v repeated for both heads
    assert memory.kept_by_layer(shape, Precision(), 10) == 4 * (140 + 8 + 10)
    # 3 layers, one layer's gradients, the last norm and its output, for 2 rows of 5
    assert memory.activations(shape, 2, 5, Precision()) == 10 * (4 * 560 + 96)
    # with checkpointing 3 inputs of layers, and one layer run again with its gradients
    again = memory.activations(shape, 2, 5, Precision(), checkpointing=True)
    assert again == 10 * (3 * 32 + 2 * 560 + 96)
    # two trunks in one pass; the backward one is in a layer of one of them at a time
    assert memory.activations(shape, 2, 5, Precision(), trunks=2) == 10 * (7 * 560 + 2 * 96)
    again = memory.activations(shape, 2, 5, Precision(), checkpointing=True, trunks=2)
    assert again == 10 * (2 * (3 * 32 + 96) + 2 * 560)


def test_cache_state_logits_and_copies_by_hand() -> None:
    shape = Shape("llama", 3, 8, 16, 2, 1, 4, 100, trunk=1000, head=800)
    assert memory.key_values(shape, 7, 2) == 7 * 3 * 2 * 4 * 2
    assert memory.optimiser_state(10, "adamw_torch_fused") == 80
    assert (
        memory.optimiser_state(10, "adamw_8bit")
        == memory.optimiser_state(10, "paged_lion_8bit") * 2
    )
    assert memory.optimiser_state(10, "rmsprop") == 40
    assert memory.optimiser_state(10, "sgd") == 0
    assert memory.logits_of(shape, 5) == 4 * 4 * 5 * 100
    assert memory.weight_copies(shape, Precision()) == 0
    assert memory.weight_copies(shape, Precision(4, 2)) == 2 * (200 + 800)


def test_gradients_come_as_activations_go() -> None:
    use = memory.training(trained=10, weights=40, state=80, kept=25, loss=5, resident={"reward": 7})
    assert use.peak == 40 + 80 + 7 + max(40, 30)
    assert use.parts["gradients"] == 40 and use.parts["reward"] == 7
    many = memory.training(10, 40, 80, kept=25, loss=5, later=1.0)
    assert many.peak == 40 + 80 + 40 + 30
    rest = memory.training(10, 40, 80, kept=45, loss=5, later=0.1)  # gradients and a small pass
    assert rest.peak == 40 + 80 + max(50, 40 + 5)
    large = memory.training(10, 40, 80, kept=25, loss=5, copies=100)
    assert large.peak == 40 + 80 + 130


def test_operations_of_a_forward_pass_by_hand() -> None:
    shape = Shape("llama", 3, 8, 16, 2, 1, 4, 100, trunk=1000, head=800)
    attention = 6 * 3 * 2.5 * 4 * 8  # tokens, layers, tokens seen, two products of 2 Q
    assert memory.forward_flops(shape, 6, 2.5) == 2 * 200 * 6 + attention + 2 * 800 * 6
    assert memory.forward_flops(shape, 6, 2.5, head=0) == 2 * 200 * 6 + attention


PARAMETERS = {
    "EleutherAI/pythia-1b-deduped": 1_011_781_632,
    "EleutherAI/pythia-2.8b-deduped": 2_775_208_960,
    "alignment-handbook/zephyr-7b-sft-full": 7_241_732_096,
    "google/gemma-2b": 2_506_172_416,
    "openai-community/gpt2": 124_439_808,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_parameters(name: str) -> None:
    assert shape_of_recipe(ModelOptions(path=name)).parameters == PARAMETERS[name]


def test_a_shape_from_scratch_is_the_model_that_is_made() -> None:
    options = ScratchOptions(architecture="gpt_neox", tie_word_embeddings=False)
    shape = shape_of_recipe(ModelOptions(from_scratch=options))
    model = AutoModelForCausalLM.from_config(scratch_config(options))
    assert shape.parameters == model.num_parameters()
    assert shape.head == 1200 * 192 and shape.queries == shape.keys == 192
    smaller = shape_of_recipe(ModelOptions(from_scratch=options), vocabulary=1000)
    assert shape.parameters - smaller.parameters == 2 * 200 * 192


def test_a_model_out_of_reach_is_one_line() -> None:
    with pytest.raises(UserError, match="neither a folder nor a model that the Hub gave") as caught:
        shape_of_recipe(ModelOptions(path="nobody/nothing"))
    assert "\n" not in str(caught.value) and "openai-community/gpt2" in str(caught.value)


def test_a_model_that_is_no_causal_one_is_one_line() -> None:
    with pytest.raises(UserError, match="found a config of t5, which gives no shape"):
        shape_of(AutoConfig.for_model("t5"))
