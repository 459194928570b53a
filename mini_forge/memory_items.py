"""What each part of a training step takes in memory, from shapes alone: the arithmetic under `memory_plan.py`.

What stays (weights as stored, adapter, gradients, optimizer states) is exact. Activations are what each layer's
backward keeps, counted off the code in `model/decoder.py`, `model/products.py` and the kernels; a test trains and
compares. N tokens of a microbatch, D H K C F V R E as everywhere, b bytes of the training dtype.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from mini_forge.config import Plan
from mini_forge.model.decoder import TILE_TOKENS, Decoder, DecoderSpec, LayerSpec
from mini_forge.model.lora import target_names
from mini_forge.training import losses
from mini_forge_kernels.attention import BLOCK, COMPILED_ROWS, SHORT, TASKS, WIDTH

# Tensors of the MLP's width that autograd keeps of the plain gated unit: gate and up, and what it makes between.
UNIT_TENSORS = {"silu": 3, "gelu_tanh": 3, "clamped": 6}
FUSED_UNITS = ("silu", "clamped")  # whose fused form keeps gate and up alone
ATTENTION_INPUTS, MLP_INPUTS = {"q_proj", "k_proj", "v_proj", "qkv_proj"}, {"gate_proj", "up_proj", "gate_up_proj"}
BLOCK_4BIT, BLOCK_NESTED, BLOCK_MXFP4, BLOCK_OPTIMIZER = 64, 256, 32, 256
SMALLEST_8BIT_STATE = 4096  # values; bitsandbytes keeps the states of smaller tensors in float32


@dataclass(frozen=True)
class Sizes:
    """What the prediction needs of a model. shapes: of every parameter, by its checkpoint name. stored: names of
    those that quantization turns to few bits, (out, in) or (E, out, in). adapted: of those that LoRA stands beside.
    linears: of those that it could stand beside, stacks aside."""

    spec: DecoderSpec
    shapes: dict[str, tuple[int, ...]]
    stored: frozenset[str]
    adapted: frozenset[str]
    linears: frozenset[str]


@dataclass(frozen=True)
class Rollouts:
    """What is sampled in one go: `count` responses of at most `new` tokens to prompts of at most `prompt`."""

    count: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Job:
    """What the prediction needs of a run. tokens: that the largest microbatch is computed on; spared: how many more
    its documents have, because they begin alike; longest: of the documents; is_ragged: they differ in length.
    recompute: as `Decoder.recompute`. has_mxfp4: experts stay in MXFP4, as stored. in_bfloat16: matrices that stay so
    under float32 activations, where they are not quantized. is_compiled: the CPU's ops are (`kernels/`). threads: of
    the CPU. has_triton: it is imported.
    forward_tokens: of the largest pass without gradients, as in an evaluation. rollouts: what is sampled (rlhf). pairs:
    (tokens, longest) of the largest microbatch of the reward model's training. heads: trained values beside the
    adapter. reward_bytes: of a reward model's adapter and head; reward_backbone_bytes: of a backbone that it does not
    share. has_adapted_reference: the reference is an adapter too."""

    plan: Plan
    tokens: int
    longest: int
    rank: int
    optimizer: str
    recompute: str | None
    is_fused: bool
    dropout: float = 0.0
    forward_tokens: int = 0
    is_ragged: bool = False
    has_mxfp4: bool = False
    in_bfloat16: frozenset[str] = frozenset()
    is_compiled: bool = False
    threads: int = 1
    has_triton: bool = False
    spared: int = 0
    rollouts: Rollouts | None = None
    pairs: tuple[int, int] | None = None
    heads: int = 0
    reward_bytes: int = 0
    reward_backbone_bytes: int = 0
    has_adapted_reference: bool = False

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return dtype_bytes(self.plan.dtype)

    @property
    def is_on_cuda(self) -> bool:
        return self.plan.device == "cuda"


def dtype_bytes(name: str) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}[name]


def sizes_of(model: Decoder, targets: tuple[str, ...] | None) -> Sizes:
    """The sizes of a decoder (on meta) whose layers `targets` (LoraSpec) are adapted."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    stacks = {name for name, shape in shapes.items() if len(shape) == 3}
    adapted = {name if name in shapes else f"{name}.weight" for name in target_names(model, targets)}
    return Sizes(model.spec, shapes, frozenset(linears | stacks), frozenset(adapted), frozenset(linears))


# What stays


def stored_bytes(sizes: Sizes, name: str, job: Job) -> int:
    """Bytes of one parameter as it is kept: see model/fourbit.py, quant.py and mxfp4.py for the forms."""
    shape, is_quantized = sizes.shapes[name], name in sizes.stored and job.plan.quantization is not None
    if name in job.in_bfloat16 and not is_quantized:
        return 2 * math.prod(shape)
    if name not in sizes.stored:
        return math.prod(shape) * job.width
    if len(shape) == 3 and job.has_mxfp4:
        return math.prod(shape) // 2 + math.prod(shape) // BLOCK_MXFP4
    matrices = shape[0] if len(shape) == 3 else 1
    return matrices * _matrix_bytes(shape[-2], shape[-1], job)


def _matrix_bytes(out_features: int, in_features: int, job: Job) -> int:
    count, form = out_features * in_features, job.plan.quantization
    if form is None:
        return count * job.width
    if form == "int8":
        return count + 4 * out_features
    blocks = math.ceil(count / BLOCK_4BIT)
    statistics = blocks + 4 * math.ceil(blocks / BLOCK_NESTED) + 4 if job.plan.nested else 4 * blocks
    return math.ceil(count / 2) + statistics


def largest_layer_bytes(sizes: Sizes, job: Job) -> int:
    totals: dict[str, int] = {}
    for name in sizes.shapes:
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else name
        totals[layer] = totals.get(layer, 0) + stored_bytes(sizes, name, job)
    return max(totals.values())


def adapter_shapes(sizes: Sizes, rank: int) -> list[tuple[int, ...]]:
    """The shapes of A and B of every adapted layer, float32; a stack has a pair for each of its experts."""
    pairs = [(sizes.shapes[name][:-2], *sizes.shapes[name][-2:]) for name in sizes.adapted]
    return [shape for many, out, into in pairs for shape in ((*many, rank, into), (*many, out, rank))]


def optimizer_bytes(count: int, optimizer: str) -> int:
    """States of a tensor of `count` values: two floats a value, or two bytes, a scale for each 256 and the 8-bit code
    of each state; sgd here has no momentum."""
    if optimizer == "sgd":
        return 0
    if "8bit" not in optimizer or count < SMALLEST_8BIT_STATE:
        return 8 * count
    return 2 * (count + 4 * math.ceil(count / BLOCK_OPTIMIZER) + 1024)


def dequantized_bytes(sizes: Sizes, job: Job) -> int:
    """The largest matrix that is made dense for a product: of a stack, one expert's. Compiled products take layers'
    weights as they are stored."""
    shapes = [sizes.shapes[name] for name in sizes.stored]
    is_used_as_stored = job.is_compiled and job.plan.compute_dtype == "float32"
    shapes = [shape for shape in shapes if len(shape) == 3 or not is_used_as_stored]
    kept_small = [shape for shape in shapes if job.plan.quantization or (len(shape) == 3 and job.has_mxfp4)]
    return max((math.prod(shape[-2:]) for shape in kept_small), default=0) * dtype_bytes(job.plan.compute_dtype)


# What a layer keeps


def kept_bytes(sizes: Sizes, index: int, job: Job) -> int:
    """What layer `index` keeps of a microbatch for its backward."""
    spec, layer = sizes.spec, sizes.spec.layers[index]
    total = job.tokens * kept_per_token(sizes, index, job) + score_bytes(spec, layer, job)
    is_gathered = job.spared and not _is_in_place(layer, spec, job)  # each document whole, for plain attention
    return total + (job.spared * _attention_tensors(spec, job) if is_gathered else 0)


def kept_per_token(sizes: Sizes, index: int, job: Job) -> int:
    """Bytes a token that layer `index` keeps for its backward, where it is not recomputed as a whole."""
    mlp = _recomputed_mlp_kept if job.recompute == "selective" else _mlp_kept
    post_norms = 2 * sizes.spec.hidden_size * _norm_bytes(sizes.spec, job) if sizes.spec.post_norms else 0
    return _attention_kept(sizes, index, job) + mlp(sizes, index, job) + post_norms


def is_all_adapted(sizes: Sizes, index: int, only: set[str] | None = None) -> bool:
    """Whether every linear layer (of the names `only`) of layer `index` is adapted; True also where it has none."""
    return _own(sizes.linears, index, only) <= _own(sizes.adapted, index)


def _own(names: frozenset[str], index: int, only: set[str] | None = None) -> set[str]:
    """The last names of layer `index`'s linear layers among `names`: q_proj, up_proj, …"""
    own = {name.split(".")[-2] for name in names if f".layers.{index}." in name and name.endswith(".weight")}
    return own if only is None else own & only


def _norm_bytes(spec: DecoderSpec, job: Job) -> int:
    """Of a value of a norm's input, as the norm keeps it."""
    is_wide = not job.is_fused or spec.norm_product == "float32" or spec.norm_offset != 0
    return 4 if is_wide else job.width


def _input_kept(sizes: Sizes, index: int, group: set[str], job: Job) -> int:
    """Of the input of linear layers behind a norm: the residual stream alone where all are adapted, since the norm is
    made again; else what the norm keeps, and its result where any is adapted (`project`)."""
    D = sizes.spec.hidden_size
    if is_all_adapted(sizes, index, group):
        return job.width * D
    return D * (_norm_bytes(sizes.spec, job) + (job.width if _own(sizes.adapted, index, group) else 0))


def _attention_kept(sizes: Sizes, index: int, job: Job) -> int:
    spec, layer, b = sizes.spec, sizes.spec.layers[index], job.width
    H, K, C = spec.heads, spec.kv_heads, spec.head_size
    own = _own(sizes.adapted, index, ATTENTION_INPUTS | {"o_proj"})
    total = _input_kept(sizes, index, ATTENTION_INPUTS, job) + b * job.rank * len(own)
    if _is_in_blocks(layer, spec, job):  # query, key and value; the output where o_proj keeps its input
        total += b * (H + 2 * K + H * ("o_proj" in own)) * C
    else:
        total += _attention_tensors(spec, job)
    if spec.qk_norm == "weighted" or (spec.qk_norm and layer.rope is not None):  # queries and keys before it
        total += _norm_bytes(spec, job) * (H + K) * C
    if spec.fused_projections:  # the value is a part of a tensor that is kept whole
        total += b * (H + K) * C
    is_copied = (
        spec.sinks or (job.is_ragged or job.spared) and not job.is_on_cuda and not _is_in_place(layer, spec, job)
    )
    return total + (b * H * C if is_copied else 0)


def _attention_tensors(spec: DecoderSpec, job: Job) -> int:
    """Query, key, value and output of the product, and a float32 log-sum a head."""
    return job.width * (2 * spec.heads + 2 * spec.kv_heads) * spec.head_size + 4 * spec.heads


def _is_in_place(layer: LayerSpec, spec: DecoderSpec, job: Job) -> bool:
    """Whether attention writes the documents' outputs where they belong, instead of putting copies together."""
    is_plain = not spec.sinks and (layer.window is None or job.longest <= layer.window)
    return job.is_fused and not job.is_on_cuda and is_plain and not (job.spared and layer.chunk is not None)


def _is_in_blocks(layer: LayerSpec, spec: DecoderSpec, job: Job) -> bool:
    """Whether attention makes its weights again, a block of queries at a time."""
    is_short = job.longest <= SHORT or _is_compiled_attention(spec, job)
    return _is_in_place(layer, spec, job) and job.width == 4 and is_short


def _is_compiled_attention(spec: DecoderSpec, job: Job) -> bool:
    return job.is_compiled and spec.head_size % WIDTH == 0


def _mlp_kept(sizes: Sizes, index: int, job: Job) -> int:
    spec, layer, b, D = sizes.spec, sizes.spec.layers[index], job.width, sizes.spec.hidden_size
    own = _own(sizes.adapted, index, MLP_INPUTS | {"down_proj"})
    dense, routed = widths(spec, layer)
    unit = 2 if job.is_fused and spec.activation in FUSED_UNITS else UNIT_TENSORS[spec.activation]
    total = b * job.rank * len(own) + b * dense * (2 if "down_proj" in own else unit)
    if not routed:
        return total + _input_kept(sizes, index, MLP_INPUTS, job)
    top_k = spec.experts.top_k
    has_stacks = any(f".layers.{index}." in name and "gate_up_proj" in name for name in _stacks(sizes))
    total += D * (_norm_bytes(spec, job) + b * bool(own & MLP_INPUTS))  # the norm is one of its own; of the shared MLP
    total += b * (unit + has_stacks) * routed + b * top_k * D * (1 + has_stacks)
    return total + 4 * spec.experts.count + 2 * 8 * top_k  # router's softmax; two orders


def _stacks(sizes: Sizes) -> set[str]:
    return {name for name in sizes.adapted if len(sizes.shapes[name]) == 3}


def _recomputed_mlp_kept(sizes: Sizes, index: int, job: Job) -> int:
    """The residual stream and, where tiles are recomputed by hand, the last product's x̃Aᵀ."""
    is_by_hand = not needs_checkpoint(sizes, index)
    return job.width * (sizes.spec.hidden_size + (job.rank if is_by_hand else 0))


def needs_checkpoint(sizes: Sizes, index: int) -> bool:
    """Whether layer `index`'s MLP is recomputed by `torch.utils.checkpoint`, which runs all of its autograd again."""
    has_all = is_all_adapted(sizes, index, MLP_INPUTS | {"down_proj"})
    return sizes.spec.layers[index].experts or not has_all


def score_bytes(spec: DecoderSpec, layer: LayerSpec, job: Job) -> int:
    """What attention keeps that grows with the square of the length.

    On a CPU a window's (L, L) mask in the training dtype. On CUDA nothing in 16 bits but for a window with sinks;
    there, and in float32, torch has no kernel for grouped heads (`enable_gqa` is for flash attention, which has none of
    these, and the plain one) and keeps (H, L, L) float32 scores. From torch's documentation, not measured."""
    L, documents = job.longest, math.ceil((job.tokens + job.spared) / job.longest)
    is_masked = layer.window is not None and layer.window < L
    if not job.is_on_cuda:
        return L**2 * job.width if is_masked else 0
    is_plain = job.width == 4 or (is_masked and spec.sinks)
    return 4 * documents * spec.heads * L**2 if is_plain else 0


# What is at work


def is_whole(job: Job) -> bool:
    """Whether whole layers are recomputed, and only their inputs kept (with "offload" on the host but for two)."""
    return job.recompute in ("full", "offload")


def working_bytes(sizes: Sizes, index: int, job: Job) -> int:
    """What the backward of layer `index` makes beside what is kept: with recomputation also that, again."""
    layer, per_token = sizes.spec.layers[index], backward_per_token(sizes.spec, sizes.spec.layers[index], job)
    plain = replace(job, recompute=None)
    attention, mlp_kept = attention_bytes(sizes.spec, layer, job), _mlp_kept(sizes, index, plain)
    if job.recompute == "selective":
        tile = job.tokens if layer.experts else min(job.tokens, TILE_TOKENS)
        return max(tile * (mlp_kept + per_token), attention)
    most = max(job.tokens * per_token, attention - job.tokens * mlp_kept)  # which is gone when attention's turn comes
    return most + (kept_bytes(sizes, index, plain) if is_whole(job) else 0)


def backward_per_token(spec: DecoderSpec, layer: LayerSpec, job: Job) -> int:
    """Bytes a token that the MLP's backward makes: the unit's result and its gradient, those of gate and up, of which
    the compiled unit writes one over its own, and what the plain unit keeps between; then, where dropout is drawn
    again, a mask, that as numbers, and the masked result. Of experts all of that at a time, and the masked result's
    gradient."""
    b, (dense, routed) = job.width, widths(spec, layer)
    between = 0 if job.is_fused and spec.activation in FUSED_UNITS else UNIT_TENSORS[spec.activation] - 2
    is_over = job.is_compiled and spec.activation == "silu"
    dropped = 2 * b + 1 if job.dropout and not job.is_compiled else 0  # compiled: a few rows at a time
    of_dense = max((3 if is_over else 4) * b + between * b, 3 * b + dropped)
    of_experts = 4 * b + max(between * b, 1 + 2 * b if job.dropout else 0)
    permuted = 2 * b * spec.hidden_size * spec.experts.top_k if routed else 0
    return max(dense * of_dense, routed * of_experts) + permuted


def attention_bytes(spec: DecoderSpec, layer: LayerSpec, job: Job) -> int:
    """What the backward of attention in blocks makes. In torch, of one document after another: keys and values for
    every query head and their gradients; a block's logits and weights, and the gradient of either. Compiled: the
    gradients of queries, keys and values, parts of the last two where documents begin alike (for each key head) or are
    few (for each query head), and the threads' room."""
    if not _is_in_blocks(layer, spec, job):
        return 0
    H, C, L = spec.heads, spec.head_size, job.longest
    if not _is_compiled_attention(spec, job):
        return job.width * H * L * (4 * C + 3 * min(BLOCK, L))
    gradients = job.tokens * (H + 2 * spec.kv_heads) * C
    tasks = math.ceil((job.tokens + job.spared) / L) * spec.kv_heads
    heads = spec.kv_heads if tasks >= TASKS * job.threads else H
    parts = 2 * (job.tokens + job.spared) * heads * C if job.spared or heads > spec.kv_heads else 0
    room = 2 * (min(COMPILED_ROWS, H * L) * (C + L) + C * L)
    return job.width * (gradients + parts + job.threads * room)


def forward_bytes(spec: DecoderSpec, tokens: int, job: Job) -> int:
    """One layer's forward without gradients: input, norm, and what the widest part makes."""
    widest = max(max(widths(spec, layer)) for layer in spec.layers)
    return tokens * (4 * spec.hidden_size + 4 * widest) * job.width  # gate, up, unit


def head_bytes(spec: DecoderSpec, tokens: int, job: Job) -> int:
    """Float32 logits of a tile and, where the weight is in 16 bits, their 16-bit form beside them; Σ softmax·W
    of the tile's tokens, float32, and what is added to it."""
    if not tokens:
        return 0
    rows = min(losses.TILE_TOKENS, tokens)
    width = min(spec.vocab_size, losses.tile_width(rows, torch.device(job.plan.device)))
    form = 0 if job.width == 4 else job.width
    return rows * (width * (4 + form) + spec.hidden_size * (4 + job.width))


def cache_bytes(spec: DecoderSpec, rollouts: Rollouts, job: Job) -> int:
    """Keys and values of every layer, for all rollouts at once and as long as they may get."""
    slots = rollouts.count * (rollouts.prompt + rollouts.new)
    return slots * len(spec.layers) * 2 * spec.kv_heads * spec.head_size * job.width


def sampling_bytes(spec: DecoderSpec, rollouts: Rollouts, job: Job) -> int:
    """While prompts are read, padded to the longest: masks, and a layer's MLP, or its attention with a mask of numbers;
    while tokens are drawn: logits, their log-softmax, its exponential and what it is drawn with."""
    tokens, kinds = rollouts.count * rollouts.prompt, {(layer.window, layer.chunk) for layer in spec.layers}
    attention = tokens * (6 * spec.hidden_size + rollouts.prompt) * job.width
    reading = tokens * rollouts.prompt * len(kinds) + max(forward_bytes(spec, tokens, job), attention)
    return max(reading, rollouts.count * spec.vocab_size * 4 * 4)


def experience_bytes(rollouts: Rollouts) -> int:
    """`Experience`: five float32 and a bool for each response token."""
    return rollouts.count * rollouts.new * (5 * 4 + 1)


def widths(spec: DecoderSpec, layer: LayerSpec) -> tuple[int, int]:
    """Values a token that passes a layer's dense MLP (or shared expert), and its chosen experts, are wide."""
    if not layer.experts:
        return spec.mlp_size, 0
    return spec.experts.shared_size or 0, spec.experts.top_k * spec.experts.size
