"""What the decoder needs to know of a checkpoint, as data. Options are named for what they do, not for who has them."""

from dataclasses import dataclass

from mini_forge.model.rope import RopeSpec


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer.

    window: keys a query sees, itself included; None is the whole document. chunk: queries see only keys of their own
    chunk of that many positions. rope: which rotation ("global", "local") or None. temperature: queries grow with
    their position (`DecoderSpec.temperature`). experts: whether the MLP is a mixture of experts."""

    window: int | None = None
    chunk: int | None = None
    rope: str | None = "global"
    temperature: bool = False
    experts: bool = False


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture of experts: E SwiGLU MLPs of width `size`, of which a router picks `top_k` for each token.

    router: "softmax" weighs the outputs by the chosen probabilities, divided by their sum if `normalized`; "sigmoid"
    scales each chosen expert's input by sigmoid(logit). `router_name` is its name in the checkpoint. shared_size: width
    of an MLP that every token passes besides. balance_coef: weight of the balance loss in training, 0 for none."""

    count: int
    top_k: int
    size: int
    router: str = "softmax"
    normalized: bool = True
    router_name: str = "gate"
    router_bias: bool = False
    bias: bool = False
    shared_size: int | None = None
    balance_coef: float = 0.0


@dataclass(frozen=True)
class DecoderSpec:
    """Everything the decoder needs to know of a checkpoint."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    heads: int
    kv_heads: int
    head_size: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec
    norm_eps: float
    max_positions: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
    # "weighted": RMSNorm with a weight on every query and key head before RoPE; "weightless": without one, after RoPE,
    # on layers that have RoPE
    qk_norm: str | None = None
    norm_product: str = "input"  # dtype of (x / rms) · weight: the input's, or "float32"
    norm_offset: float = 0.0  # added to every norm's weight
    post_norms: bool = False  # a norm after attention and after the MLP too, before each is added
    local_rope: RopeSpec | None = None  # of layers whose rope is "local"
    rope_interleaved: bool = False  # rotated pairs are neighbours (2i, 2i + 1), not (i, i + C/2)
    sinks: bool = False  # one more logit per head in every softmax, with no value behind it
    attention_scale: float | None = None  # None: 1/√C
    temperature: tuple[float, float] = (0.1, 8192.0)  # a, f: queries times 1 + a·log(1 + ⌊(position + 1)/f⌋)
    activation: str = "silu"  # of gated units: "silu", "gelu_tanh", or "clamped" with `clamp`, its limit and slope
    clamp: tuple[float, float] = (7.0, 1.702)
    experts: ExpertsSpec | None = None
    mlp_name: str = "mlp"  # the MLP's name in the checkpoint
    fused_projections: bool = False  # q, k, v stored as one linear, and so gate and up
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # on what a sublayer adds
    hidden_scale: float = 1.0  # on the final hidden states, which is on the logits
