"""Options of LoRA and QLoRA, by peft's and transformers' names, and what goes with what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from irl_align.config.types import Above, Options, Positive

if TYPE_CHECKING:
    from irl_align.config.schema import Recipe

ALL_LINEAR = "all-linear"


class LoraOptions(Options):
    """Low-rank adapters (arXiv:2106.09685): W + scale * B A, of which A and B are trained."""

    r: Positive = 16
    """Rank of B A."""
    lora_alpha: Above = 32.0
    """The scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before A, in SFT and in the reward's fit; fits of log-ratios and PPO have none."""
    target_modules: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: [ALL_LINEAR]
    )
    """Names of the layers that are adapted, as [q_proj, v_proj]; all-linear is all of the
    backbone's."""
    use_rslora: bool = False
    """Rank-stabilised scale (arXiv:2312.03732)."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _a_name_alone(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names


class QuantizationOptions(Options):
    """4-bit weights (arXiv:2305.14314), by transformers' BitsAndBytesConfig."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Kind of the 4-bit numbers."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales of the blocks too."""
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the products."""


def lora_problem(recipe: Recipe) -> str:
    """What does not go together among a recipe's adapters; empty if all does."""
    lora, sft, update = recipe.model.lora, recipe.sft, recipe.policy_update
    if sft.full and (lora is None or not sft.enabled):
        missing = "without model.lora all weights are" if lora is None else "sft.enabled is false"
        return f"sft.full is an option of model.lora and of SFT: {missing}"
    if lora is not None and recipe.model.from_scratch is not None and not sft.full:
        return "model.lora adapts a model that has learnt: with model.from_scratch give sft.full"
    if recipe.model.quantization is not None:
        if lora is None:
            return "model.quantization is for model.lora: weights of 4 bits are not trained"
        if sft.full:
            return "sft.full trains all weights, and model.quantization leaves none to train"
        if recipe.generation.backend.startswith("vllm"):
            return (
                f"generation.backend {recipe.generation.backend} does not sample the 4-bit model "
                "of model.quantization: use transformers"
            )
    if getattr(update, "backbone", "separate") == "shared":
        absent = "model.lora" if lora is None else "reward.lora"
        if lora is None or recipe.reward.lora is None:
            return f"policy_update.backbone shared is of adapters on one model: give {absent}"
    return _start_problem(recipe)


def _start_problem(recipe: Recipe) -> str:
    """A reward's adapter goes on from that of SFT, so it has the same shape."""
    lora, reward = recipe.model.lora, recipe.reward.lora
    trained = lora is not None and recipe.sft.enabled and not recipe.sft.full
    if not trained or lora is None or reward is None:
        return ""
    for name in ("r", "lora_alpha", "target_modules", "use_rslora"):
        if getattr(reward, name) != getattr(lora, name):
            return (
                f"reward.lora.{name} is {getattr(reward, name)}, but the reward starts from SFT's "
                f"adapter, whose {name} is {getattr(lora, name)}: give the same, or sft.full"
            )
    return ""
