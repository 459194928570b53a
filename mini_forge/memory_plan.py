"""Predicted peak memory of a run, item by item, from shapes and a plan: no weight is read.

What stays (weights as stored, adapter, gradients, optimizer states) is exact arithmetic. Activations are what each
layer's backward keeps, counted off the code in `model/decoder.py`, `model/lora.py` and the kernels; a test trains and
compares. B rows, N tokens of a microbatch, D H K C F V R E as everywhere, b bytes of the training dtype.

On a CPU the C library's heap leaves holes between blocks of unequal size (`hole_bytes`, measured with glibc 2.36); on
CUDA the same arithmetic holds for what torch allocates, but neither that nor `CUDA_CONTEXT_BYTES` has been measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mini_forge.config import Machine, Plan
from mini_forge.config_plan import GIB
from mini_forge.data.batches import plan_epoch
from mini_forge.data.pairs import flatten
from mini_forge.io.weights import read_json
from mini_forge.model.decoder import Decoder, DecoderSpec, LayerSpec
from mini_forge.model.lora import target_names
from mini_forge.prepare import Prepared, adapter_spec
from mini_forge.training.losses import CHUNK_TOKENS
from mini_forge.training.windows import Windows

MIB = 2**20
GPU_BYTES = 80 * GIB
PROCESS_BYTES = 285 * MIB  # python, torch, this package and what loading leaves; measured, as the next two
COMPILER_BYTES = 71 * MIB  # torch's compiler, which gradient checkpointing and bitsandbytes import
BITSANDBYTES_BYTES = 44 * MIB
CUDA_CONTEXT_BYTES = GIB // 2  # not measured
# Holes in the heap, measured on 40 to 135M parameters, 6 to 30 layers, 250 to 2000 tokens. As shares of what all layers
# keep, for plain and fused ops; checkpointed, of what √layers keep. In 16 bits float32 temporaries add to that, and
# dropout adds a multiple of the masks and masked inputs that one layer draws.
HOLES_PLAIN, HOLES_FUSED, HOLES_CHECKPOINTED, HOLES_16BIT, HOLES_DROPOUT = 0.45, 0.23, 1.0, 0.5, 4
# Tensors of the MLP's width that the gated unit keeps: gate and up, and what the plain form makes between.
UNIT_TENSORS = {"silu": 3, "gelu_tanh": 3, "clamped": 6}
SHARED_INPUTS = ({"q_proj", "k_proj", "v_proj", "qkv_proj"}, {"gate_proj", "up_proj", "gate_up_proj"})
BLOCK_4BIT, BLOCK_NESTED, BLOCK_MXFP4, BLOCK_OPTIMIZER = 64, 256, 32, 256
SMALLEST_8BIT_STATE = 4096  # values; bitsandbytes keeps the states of smaller tensors in float32
EPOCHS_LOOKED_AT = 3


@dataclass(frozen=True)
class Sizes:
    """What the prediction needs of a model. shapes: of every parameter, by its checkpoint name. stored: names of
    those that quantization turns to few bits, (out, in) or (E, out, in). adapted: of those that LoRA stands beside."""

    spec: DecoderSpec
    shapes: dict[str, tuple[int, ...]]
    stored: frozenset[str]
    adapted: frozenset[str]


@dataclass(frozen=True)
class Job:
    """What the prediction needs of a run. tokens: of the largest microbatch, longest: of its documents; is_ragged: they
    differ in length; eval_tokens: of the largest evaluation batch. has_mxfp4: experts stay in MXFP4, as stored."""

    plan: Plan
    tokens: int
    longest: int
    rank: int
    optimizer: str
    is_checkpointed: bool
    is_fused: bool
    dropout: float = 0.0
    eval_tokens: int = 0
    is_ragged: bool = False
    has_mxfp4: bool = False

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return dtype_bytes(self.plan.dtype)


@dataclass(frozen=True)
class MemoryPlan:
    """The prediction. items: bytes by what they are for; they add up to the peak, which comes while `moment`.
    layer_bytes: the largest layer's weights as stored."""

    items: dict[str, int]
    moment: str
    layer_bytes: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.items.values())

    def gpus(self, capacity: int = GPU_BYTES) -> int | None:
        """How many GPUs hold the run where the weights are sharded and a layer at a time is gathered; the rest is whole
        on each. None where no number does."""
        if self.peak_bytes <= capacity:
            return 1
        room = capacity - (self.peak_bytes - self.items["weights"]) - self.layer_bytes
        return math.ceil(self.items["weights"] / room) if room > 0 else None


def dtype_bytes(name: str) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}[name]


def sizes_of(model: Decoder, targets: tuple[str, ...] | None) -> Sizes:
    """The sizes of a decoder (on meta) whose layers `targets` (LoraSpec) are adapted."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    stacks = {name for name, shape in shapes.items() if len(shape) == 3}
    adapted = {name if name in shapes else f"{name}.weight" for name in target_names(model, targets)}
    return Sizes(model.spec, shapes, frozenset(linears | stacks), frozenset(adapted))


def predict(sizes: Sizes, job: Job) -> MemoryPlan:
    """The peak of training `sizes` by `job`. Pure arithmetic."""
    trained = adapter_shapes(sizes, job.rank)
    parameters = sum(math.prod(shape) for shape in trained)
    always = {
        "weights": sum(stored_bytes(sizes, name, job) for name in sizes.shapes),
        "adapter": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": sum(optimizer_bytes(math.prod(shape), job.optimizer) for shape in trained),
        "dequantized weight": dequantized_bytes(sizes, job),
        "process": runtime_bytes(job),
    }
    moments = {"training": training_bytes(sizes, job), "evaluating": evaluation_bytes(sizes, job)}
    if job.plan.device != "cuda":  # elsewhere in the host's memory: the states are copied, and written from a buffer
        moments["saving a checkpoint"] = {"copies of the states": 2 * always["optimizer"]}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan({**always, **moments[moment]}, moment, largest_layer_bytes(sizes, job))


def stored_bytes(sizes: Sizes, name: str, job: Job) -> int:
    """Bytes of one parameter as it is kept: see model/fourbit.py, quant.py and mxfp4.py for the forms."""
    shape = sizes.shapes[name]
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
    """The largest matrix that is made dense for a product: of a stack, one expert's."""
    shapes = [sizes.shapes[name] for name in sizes.stored]
    kept_small = [shape for shape in shapes if job.plan.quantization or (len(shape) == 3 and job.has_mxfp4)]
    return max((math.prod(shape[-2:]) for shape in kept_small), default=0) * dtype_bytes(job.plan.compute_dtype)


def runtime_bytes(job: Job) -> int:
    """What is there before a weight is: on a CPU the process, on CUDA the context."""
    if job.plan.device == "cuda":
        return CUDA_CONTEXT_BYTES
    uses_bitsandbytes = job.plan.quantization in ("nf4", "fp4") or "8bit" in job.optimizer
    compiler = COMPILER_BYTES if uses_bitsandbytes or job.is_checkpointed else 0
    return PROCESS_BYTES + compiler + (BITSANDBYTES_BYTES if uses_bitsandbytes else 0)


def training_bytes(sizes: Sizes, job: Job) -> dict[str, int]:
    """Activations of one microbatch at the worst moment of its forward and backward."""
    spec, tokens = sizes.spec, job.tokens
    scores = [score_bytes(spec, layer, job) for layer in spec.layers]
    kept = [tokens * kept_per_token(sizes, i, job) + score for i, score in enumerate(scores)]
    gradients = max(scores) * (2 if job.plan.device == "cuda" else 0)  # of the scores, before and after the softmax
    between = max(gradients, *(tokens * backward_per_token(spec, layer, job) for layer in spec.layers))
    hidden = 4 * tokens * spec.hidden_size * job.width  # final states, those trained on, their gradient, and its sum
    stream = len(kept) * tokens * spec.hidden_size * job.width
    activations = stream if job.is_checkpointed else sum(kept)
    working = max(head_bytes(spec, tokens, job), between + (max(kept) if job.is_checkpointed else 0))
    items = {"activations": activations + hidden, "loss head, or one layer's backward": working}
    if job.plan.device != "cuda":
        items["holes in the heap"] = hole_bytes(spec, sum(kept), job) + evaluation_bytes(sizes, job)["activations"]
    return items


def hole_bytes(spec: DecoderSpec, kept_bytes: int, job: Job) -> int:
    """What blocks of unequal size leave unused between them, of a step whose layers keep `kept_bytes` in all."""
    share = HOLES_FUSED if job.is_fused else HOLES_PLAIN
    if job.is_checkpointed:
        share = HOLES_CHECKPOINTED / math.sqrt(len(spec.layers))
    share += HOLES_16BIT * (job.width == 2)
    widest = max(max(_widths(spec, layer)) for layer in spec.layers)
    masks = job.tokens * (3 * spec.hidden_size + widest) * (1 + job.width) if job.dropout else 0
    return int(share * kept_bytes) + HOLES_DROPOUT * masks


def evaluation_bytes(sizes: Sizes, job: Job) -> dict[str, int]:
    """One layer's forward at a time: input, norm, what the widest part makes, and the hidden states for the head."""
    spec, tokens = sizes.spec, job.eval_tokens
    widest = max(max(_widths(spec, layer)) for layer in spec.layers)
    activations = tokens * (4 * spec.hidden_size + 4 * widest) * job.width
    return {"activations": activations, "loss head, or one layer's backward": head_bytes(spec, tokens, job)}


def head_bytes(spec: DecoderSpec, tokens: int, job: Job) -> int:
    """One chunk's logits in float32 and, where the weight is in 16 bits, their 16-bit form beside them."""
    each = 4 if job.width == 4 else 4 + job.width
    return min(CHUNK_TOKENS, tokens) * spec.vocab_size * each


def kept_per_token(sizes: Sizes, index: int, job: Job) -> int:
    """Bytes a token that layer `index` keeps for its backward."""
    spec, layer, b = sizes.spec, sizes.spec.layers[index], job.width
    own = {name for name in sizes.adapted if f".layers.{index}." in name}
    linears = {name.split(".")[-2] for name in own if name.endswith(".weight")}
    is_wide = not job.is_fused or spec.norm_product == "float32"  # the norm's input is kept in float32
    norm = spec.hidden_size * (4 if is_wide else b)
    total = norm * (4 if spec.post_norms else 2) + _attention_kept(spec, layer, job, 4 if is_wide else b)
    total += b * job.rank * len(linears)  # x Aᵀ of every adapted linear
    total += b * spec.hidden_size * sum(not group.isdisjoint(linears) for group in SHARED_INPUTS)
    dense, routed = _widths(spec, layer)
    unit = 2 if job.is_fused and spec.activation == "silu" else UNIT_TENSORS[spec.activation]
    total += b * (unit + ("down_proj" in linears)) * dense
    if routed:
        top_k, has_stacks = spec.experts.top_k, any("experts.gate_up_proj" in name for name in own)
        total += b * (unit + has_stacks) * routed + b * top_k * spec.hidden_size * (1 + has_stacks)
        total += 4 * spec.experts.count + 2 * 8 * top_k  # router's softmax; two orders
    return total


def _attention_kept(spec: DecoderSpec, layer: LayerSpec, job: Job, norm_bytes: int) -> int:
    """Query, key, value and output of the product, and a float32 log-sum a head; queries and keys before a norm."""
    H, K, C, b = spec.heads, spec.kv_heads, spec.head_size, job.width
    total = b * (2 * H + 2 * K) * C + 4 * H
    if spec.qk_norm == "weighted" or (spec.qk_norm and layer.rope is not None):
        total += norm_bytes * (H + K) * C
    if spec.fused_projections:  # the value is a part of a tensor that is kept whole
        total += b * (H + K) * C
    is_copied = spec.sinks or (job.is_ragged and job.plan.device != "cuda")  # documents' outputs put end to end
    return total + (b * H * C if is_copied else 0)


def score_bytes(spec: DecoderSpec, layer: LayerSpec, job: Job) -> int:
    """What attention keeps that grows with the square of the length.

    On a CPU a window's (L, L) mask in the training dtype. On CUDA nothing in 16 bits but for a window with sinks;
    there, and in float32, torch has no kernel for grouped heads (`enable_gqa` is for flash attention, which has none of
    these, and the plain one) and keeps (H, L, L) float32 scores. From torch's documentation, not measured."""
    L, documents = job.longest, math.ceil(job.tokens / job.longest)
    is_masked = layer.window is not None and layer.window < L
    if job.plan.device != "cuda":
        return L**2 * job.width if is_masked else 0
    is_plain = job.width == 4 or (is_masked and spec.sinks)
    return 4 * documents * spec.heads * L**2 if is_plain else 0


def backward_per_token(spec: DecoderSpec, layer: LayerSpec, job: Job) -> int:
    """Bytes a token that the MLP's backward makes beside what is kept: three tensors of its width, and a mask's bytes
    where dropout is drawn again."""
    dense, routed = _widths(spec, layer)
    permuted = 2 * job.width * spec.hidden_size * spec.experts.top_k if routed else 0
    return max(dense, routed) * (3 * job.width + (job.dropout > 0)) + permuted


def _widths(spec: DecoderSpec, layer: LayerSpec) -> tuple[int, int]:
    """Values a token that passes a layer's dense MLP (or shared expert), and its chosen experts, are wide."""
    if not layer.experts:
        return layer.mlp_size or spec.mlp_size, 0
    return spec.experts.shared_size or 0, spec.experts.top_k * spec.experts.size


def largest_layer_bytes(sizes: Sizes, job: Job) -> int:
    totals: dict[str, int] = {}
    for name in sizes.shapes:
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else name
        totals[layer] = totals.get(layer, 0) + stored_bytes(sizes, name, job)
    return max(totals.values())


def largest_microbatch(window: Windows, steps: int) -> list[int]:
    """Lengths of the documents of the run's largest microbatch, as its first epochs are planned."""
    lengths, largest, left = [d.inputs for d in window.documents], [], steps * window.accumulation
    for epoch in range(EPOCHS_LOOKED_AT):
        options = (window.group_by_length, window.packing, window.capacity, window.seed, epoch)
        groups = plan_epoch(lengths, window.batch_size, window.accumulation, *options)
        chosen = max(groups[: max(left, 0)], key=lambda group: sum(lengths[i] for i in group), default=[])
        largest = max(largest, chosen, key=lambda group: sum(lengths[i] for i in group))
        left -= len(groups)
    return [side.inputs for side in flatten([window.documents[i] for i in largest])]


def memory_plan(prepared: Prepared, window: Windows, steps: int) -> MemoryPlan:
    """The prediction for a run as it was prepared."""
    config, lora = prepared.config, adapter_spec(prepared.config)
    with torch.device("meta"):
        sizes = sizes_of(Decoder(prepared.spec), lora.targets)
    lengths = largest_microbatch(window, steps)
    job = Job(
        plan=prepared.plan,
        tokens=sum(lengths),
        longest=max(lengths),
        rank=lora.rank,
        optimizer=config.optim,
        is_checkpointed=config.gradient_checkpointing,
        is_fused=config.provider == "unsloth",
        dropout=lora.dropout,
        eval_tokens=_longest_tokens(prepared.eval, config.per_device_eval_batch_size),
        is_ragged=len(set(lengths)) > 1,
        has_mxfp4=is_stored_as_mxfp4(read_json(prepared.folder / "config.json")),
    )
    return predict(sizes, job)


def is_stored_as_mxfp4(config: dict) -> bool:
    """Whether a checkpoint's config.json says that its experts are MXFP4."""
    return (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"


def _longest_tokens(documents: Sequence, batch_size: int) -> int:
    return sum(sorted((d.inputs for d in documents), reverse=True)[:batch_size])


def memory_report(plan: MemoryPlan, machine: Machine) -> dict:
    """The prediction as `check --json` prints it, beside what the machine has."""
    device, available_bytes = machine.device, machine.memory_bytes if machine.device == "cpu" else machine.vram_bytes
    notes = ["no prediction for CUDA has been compared with a measurement"] if device == "cuda" else []
    if available_bytes is not None and plan.peak_bytes > available_bytes:
        notes.append(f"more than the {available_bytes / GIB:.1f} GiB of this machine's {device}: the run will not fit")
    gpus = plan.gpus()
    needed = f"{gpus} GPU{'s' if gpus != 1 else ''} of 80 GiB" if gpus else "no number of GPUs of 80 GiB"
    if gpus != 1:
        gathered = "weights sharded, one layer at a time gathered; this release trains in one process"
        notes.append(f"would fit on {needed} ({gathered})")
    return {
        "peak_bytes": plan.peak_bytes,
        "while": plan.moment,
        "items_bytes": {name: size for name, size in plan.items.items() if size},
        "gpus_of_80_gib": gpus,
        "notes": notes,
    }


def format_memory(report: dict) -> list[str]:
    """The lines of a memory report for a person."""
    items = [f"  {name}: {size / GIB:.2f} GiB" for name, size in report["items_bytes"].items()]
    gpus = report["gpus_of_80_gib"]
    fits = [f"  GPUs of 80 GiB that it needs: {gpus}"] if gpus != 1 else []
    return [f"peak memory: {report['peak_bytes'] / GIB:.1f} GiB", *items, f"  reached while {report['while']}", *fits,
            *(f"  note: {note}" for note in report["notes"])]  # fmt: skip
