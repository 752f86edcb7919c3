"""The recipe's groups ``model`` and ``sft``: the start model, its adapters, and its fine-tuning.

Options of LoRA and QLoRA have the names that peft and transformers give them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from irl_align.config.types import Options, PathText

ALL_LINEAR = "all-linear"


class LoraOptions(Options):
    """Low-rank adapters (arXiv:2106.09685): W + scale * B A, where only A and B are trained."""

    r: PositiveInt = 16
    """Rank of B A."""
    lora_alpha: PositiveFloat = 32.0
    """The scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before A in SFT and in the fit of an explicit reward. Fits of log-ratios and PPO use
    no dropout."""
    target_modules: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: [ALL_LINEAR]
    )
    """Names of the layers that get an adapter, e.g. [q_proj, v_proj]. all-linear means every linear
    layer of the backbone."""
    use_rslora: bool = False
    """Rank-stabilised scale (arXiv:2312.03732)."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _as_list(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names


class QuantizationOptions(Options):
    """4-bit weights (arXiv:2305.14314), through BitsAndBytesConfig of transformers."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Number format of the 4-bit weights."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales of the blocks too."""
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products."""


class ScratchOptions(Options):
    """A small model with random weights. Its tokenizer is trained on the demonstrations."""

    used_with = (("architecture", ("llama",), ("num_key_value_heads",)),)

    architecture: Literal["llama", "gpt_neox"] = "llama"
    """Transformer family."""
    vocab_size: PositiveInt = 1200
    """Size of the byte-level BPE vocabulary, special tokens included."""
    hidden_size: PositiveInt = 192
    """Width H."""
    intermediate_size: PositiveInt = 512
    """Width of the feed-forward layers."""
    num_hidden_layers: PositiveInt = 4
    """Depth."""
    num_attention_heads: PositiveInt = 6
    """Number of attention heads. It divides hidden_size."""
    num_key_value_heads: PositiveInt | None = None
    """Number of key-value heads (llama only). Null means as many as attention heads."""
    max_position_embeddings: PositiveInt = 512
    """Context length in tokens."""
    tie_word_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""

    @model_validator(mode="after")
    def _head_counts_divide(self) -> ScratchOptions:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        return self


class ModelOptions(Options):
    """The model before SFT: an existing model, or a small one from scratch."""

    path: PathText | None = None
    """Hub id or folder of a causal language model with its tokenizer."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    from_scratch: ScratchOptions | None = None
    """Make a small model instead of loading one."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave it off unless you have read that code."""
    chat_template: str | None = None
    """Jinja file with a chat template, for a tokenizer that has none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the stored weights."""
    lora: LoraOptions | None = None
    """Train adapters instead of all weights, wherever a policy is trained."""
    quantization: QuantizationOptions | None = None
    """QLoRA: bitsandbytes holds the weights below the adapters in 4 bits."""

    @model_validator(mode="after")
    def _has_one_source(self) -> ModelOptions:
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of path and from_scratch")
        name = self.first_set("revision", "trust_remote_code", "chat_template")
        if self.path is None and name:
            raise ValueError(f"{name} is an option of path, not of from_scratch")
        return self


class SFTOptions(Options):
    """Supervised fine-tuning on the demonstrations. It gives the policy pi_0."""

    enabled: bool = True
    """False: the start model is pi_0, without SFT."""
    full: bool = False
    """With model.lora: SFT trains all weights, and the adapters are added to pi_0."""
    turns: Literal["all", "demonstration"] = "all"
    """Which turns of a conversation SFT learns: all of the assistant's up to the demonstration, or
    the demonstration only. Pairs are made with the demonstration (turn in the data card)."""
    checkpoint: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of SFT's steps after which its model is kept too, for reward.numerator or
    reward.reference checkpoint. Null keeps none."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Fields of trl.SFTConfig."""

    @model_validator(mode="after")
    def _full_needs_sft(self) -> SFTOptions:
        if not self.enabled and (name := self.first_set("full", "checkpoint")):
            raise ValueError(f"{name} is an option of SFT, but enabled is false")
        return self
