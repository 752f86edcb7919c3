"""Memory of a causal language model in training and sampling, from its shape alone.

Nothing is loaded. Sizes follow from the shape, and from what PyTorch keeps of a forward pass for
the backward pass (tests count the saved tensors of real models). Sizes are bytes on one device.

Legend of shapes: R rows, L columns of a row, H width, I feed-forward width, Q = heads * head_dim,
K = key-value heads * head_dim, V vocabulary, n layers.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4
HALF = 2
STATE = {"adamw": 8, "adam": 8, "rmsprop": 4, "sgd": 0, "adafactor": 0, "lion": 4, "adagrad": 4}
"""Bytes of optimiser state per trained parameter, by the beginning of the optimiser's name."""
LOGITS_COPIES = 4
"""Arrays as large as a piece of logits that a loss holds at once: logits, two of log-softmax and
its gradient, entropy."""
ROPE, NEOX, GPT2 = ("llama", "mistral", "qwen2", "gemma", "qwen3"), "gpt_neox", "gpt2"
KNOWN = (*ROPE, NEOX, GPT2)
"""Model types whose kept activations are exact. Others are computed as llama's."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model."""

    family: str
    """model_type of its config."""
    layers: int
    width: int
    feed_forward: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    trunk: int
    """Parameters below the output layer, embeddings included."""
    head: int
    """Parameters of a separate output layer; 0 where it is tied to the embeddings."""

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.trunk + self.head

    @property
    def matrices(self) -> int:
        """Parameters of the trunk's matrix products: all but the embeddings."""
        return self.trunk - self.vocabulary * self.width

    @property
    def queries(self) -> int:
        """Q."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """K."""
        return self.key_value_heads * self.head_dim


@dataclass(frozen=True)
class Precision:
    """Bytes of a stored weight, and of the inputs and outputs of matrix products."""

    weights: int = FLOAT
    products: int = FLOAT

    @property
    def autocast(self) -> bool:
        """Whether products have a lower precision than the weights."""
        return self.products < self.weights


def optimiser_state(parameters: int, optimiser: str) -> int:
    """Bytes of state: two moments of Adam, one of RMSProp; a quarter of that in 8 bits."""
    name = optimiser.removeprefix("paged_")
    size = next((size for start, size in STATE.items() if name.startswith(start)), 8)
    return parameters * size // (4 if "8bit" in name else 1)


def weight_copies(shape: Shape, precision: Precision) -> int:
    """Half-precision copies of the matrices that autocast holds in a forward and backward pass."""
    if not precision.autocast:
        return 0
    return precision.products * (shape.matrices + shape.vocabulary * shape.width)


def kept_by_layer(shape: Shape, precision: Precision, columns: int = 0) -> float:
    """Bytes per token that a layer keeps for the backward pass.

    columns: L where the pass has a mask, because of padding or several completions in a row. Then
    a copy of the mask (R, 1, L, L) in the products' precision is kept, and grouped keys and values
    are repeated.
    """
    if shape.family == NEOX:
        kept = _neox(shape, precision)
    elif shape.family == GPT2:
        kept = _gpt2(shape, precision)
    else:
        kept = _rope(shape, precision, masked=bool(columns))
    return kept + precision.products * columns


def _rope(s: Shape, p: Precision, masked: bool) -> int:
    """RMSNorm, rotary attention, gated feed-forward."""
    keys = s.queries if masked else s.keys
    # Two norms: input, normalised input and 1/rms; all in float32 if the weights are.
    if p.weights == FLOAT or s.family == "gemma":
        norms = FLOAT * 2 * (2 * s.width + 1)
    else:
        norms = FLOAT * 2 * (s.width + 1) + p.weights * 2 * s.width
    # The norms' outputs: one for q, k, v and one for gate, up. Autocast makes a copy for each.
    inputs = (5 if p.autocast else 2) * s.width
    attention = 2 * s.queries + 2 * keys  # q, output, k, v; and a log-sum-exp per head
    gated = 4 * s.feed_forward  # gate, its activation, up, their product
    total = norms + p.products * (inputs + attention + gated) + FLOAT * s.heads
    if s.family == "qwen3":  # norms of q and k: input (in float32) and normalised
        normed = s.queries + s.keys
        total += FLOAT * (normed + s.heads + s.key_value_heads) + p.products * normed
    return total


def _neox(s: Shape, p: Precision) -> int:
    """Two LayerNorms of one input (mean and 1/std each), fused q, k, v; parallel residual."""
    norms = p.weights * (s.width + 4) + FLOAT * s.heads
    # norms' outputs, input of the output product; q, k, output; v keeps all of q, k, v
    return norms + p.products * (3 * s.width + 6 * s.width + 2 * s.feed_forward)


def _gpt2(s: Shape, p: Precision) -> int:
    """Two LayerNorms, fused q, k, v, a GELU of five operations, two dropout masks."""
    norms = p.weights * (2 * s.width + 4) + FLOAT * s.heads
    return norms + p.products * (8 * s.width + 5 * s.feed_forward)


def activations(
    shape: Shape,
    rows: int,
    columns: int,
    precision: Precision,
    *,
    masked: bool = False,
    checkpointing: bool = False,
    trunks: int = 1,
) -> float:
    """Bytes that a forward pass of the trunks keeps for the backward pass, and those of the latter.

    While the backward pass is in a layer, the gradients of what that layer kept take at most the
    same space. With checkpointing only each layer's input is kept, and one layer is recomputed.
    """
    tokens = rows * columns
    layer = kept_by_layer(shape, precision, columns if masked else 0)
    # The last norm's input and output. RMSNorm keeps its normalised input, GPT-2 a dropout mask.
    extra = 0 if shape.family == NEOX else FLOAT * shape.width
    last = extra + precision.weights * 2 * shape.width
    if checkpointing:
        inputs = precision.weights * shape.layers * shape.width
        return tokens * (trunks * (inputs + last) + 2 * layer)
    return tokens * ((trunks * shape.layers + 1) * layer + trunks * last)


def key_values(shape: Shape, columns: int, bytes_each: int) -> int:
    """Bytes of the keys and values of cache columns."""
    return columns * shape.layers * 2 * shape.keys * bytes_each


def logits_of(shape: Shape, tokens: int) -> int:
    """Bytes that a loss holds at once for logits (tokens, V) in float32."""
    return LOGITS_COPIES * FLOAT * tokens * shape.vocabulary


@dataclass(frozen=True)
class Use:
    """Bytes on a device by part, and the peak: not all parts exist at the same time."""

    parts: dict[str, float]
    peak: float


def training(
    trained: int,
    weights: int,
    state: float,
    *,
    kept: float,
    loss: float,
    copies: float = 0.0,
    later: float = 0.0,
    resident: dict[str, float] | None = None,
) -> Use:
    """Memory of a training step. trained: number of parameters; all else is in bytes.

    Gradients (float32) appear as the first pass's activations are freed. Later passes (gradient
    accumulation) hold gradients and activations; the largest of them needs the share `later` (0 to
    1) of the first: peak = weights + state + resident + max(forward, gradients + later * forward),
    where forward = kept + copies + loss. resident: models that are only read.
    """
    gradients = float(FLOAT * trained)
    forward = kept + copies + loss
    moving = max(forward, gradients + later * forward)
    others = resident or {}
    parts = {
        "weights": float(weights),
        "gradients": gradients,
        "optimiser": state,
        "activations": kept + copies,
        "logits": loss,
        **others,
    }
    return Use(parts, weights + state + sum(others.values()) + moving)


def forward_flops(shape: Shape, tokens: float, context: float, head: float | None = None) -> float:
    """Floating-point operations of a forward pass: 2 per weight and token, plus attention.

    context: mean number of tokens that a token attends to, half a row. Attention takes 4 Q per such
    token and layer. head: number of tokens that the output layer reads; None means all.
    """
    products = 2.0 * shape.matrices * tokens
    attention = 4.0 * shape.queries * shape.layers * context * tokens
    output = 2.0 * shape.vocabulary * shape.width * (tokens if head is None else head)
    return products + attention + output
