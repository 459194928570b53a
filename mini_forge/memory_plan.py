"""Predicted peak memory of a run, item by item, from shapes and a plan: no weight is read.

The peak is that of the run's worst moment: a training step, a pass without gradients, with rlhf the sampling of
rollouts and the training of its reward model, the saving of a checkpoint. `memory_items.py` has the arithmetic of each.

On a CPU the C library's heap leaves holes between blocks of unequal size (`hole_bytes`, measured with glibc 2.36); on
CUDA the same arithmetic holds for what torch allocates, but neither that nor `CUDA_CONTEXT_BYTES` has been measured.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mini_forge.config import Machine, TrainingConfig
from mini_forge.config_plan import GIB
from mini_forge.data.batches import plan_epoch
from mini_forge.data.pairs import flatten
from mini_forge.data.token_store import inputs_of
from mini_forge.forms import trains_reward
from mini_forge.inputs import adapter_spec, has_reference, ties_to_init_adapter
from mini_forge.io.adapters import PREFIX, read_adapter_tensors
from mini_forge.io.hub import resolve_model
from mini_forge.io.models import is_adapter
from mini_forge.io.records import read_spec
from mini_forge.io.rewards import read_reward_config
from mini_forge.json_faults import read_json
from mini_forge.memory_items import (
    Job,
    Rollouts,
    Sizes,
    adapter_shapes,
    cache_bytes,
    dequantized_bytes,
    experience_bytes,
    forward_bytes,
    head_bytes,
    is_whole,
    kept_bytes,
    largest_layer_bytes,
    needs_checkpoint,
    optimizer_bytes,
    sampling_bytes,
    sizes_of,
    stored_bytes,
    working_bytes,
)
from mini_forge.model.decoder import Decoder
from mini_forge.prepare import Prepared, in_bfloat16
from mini_forge.settings import responses_to_each, reward_windows
from mini_forge.training.windows import Windows
from mini_forge_kernels import frozen_product

MIB = 2**20
GPU_BYTES = 80 * GIB
PROCESS_BYTES = 270 * MIB  # python, torch, this package and what loading leaves; measured, as the next four
CUDA_BUILD_BYTES = 282 * MIB  # libraries of CUDA, which torch's usual build for Linux loads on any machine
COMPILER_BYTES = 38 * MIB  # torch's compiler, which torch.utils.checkpoint and bitsandbytes' optimizers import
BITSANDBYTES_BYTES = 44 * MIB
TRITON_BYTES = 52 * MIB  # beside a GPU, where it is installed
CUDA_CONTEXT_BYTES = GIB // 2  # not measured
# Holes in the heap, fitted to 35 runs of 45 to 135M parameters, 6 to 30 layers, 300 to 2000 tokens, with and without
# each of what follows. They peaked at 0.65 to 2 GiB, up to 7 % apart from run to run, and were predicted to 0.91 to
# 1.12 of that; where plain ops make whole layers again, up to a quarter apart, and to 0.8 to 1.13. What loading leaves
# is at most the weights; then shares of what is kept, by plain ops, between recomputed tiles and beside the float32
# temporaries of 16 bits; of what one layer's backward makes; and of what whole layers make again, all of them together.
HOLES_LOADING = 100 * MIB
HOLES_PLAIN, HOLES_SELECTIVE, HOLES_16BIT, HOLES_WORKING = 0.25, 0.3, 0.3, 1.1
HOLES_WHOLE, HOLES_WHOLE_PLAIN = 0.1, 0.5
EPOCHS_LOOKED_AT = 3


@dataclass(frozen=True)
class MemoryPlan:
    """The prediction. items: bytes by what they are for; they add up to the peak, which comes while `moment`.
    layer_bytes: the largest layer's weights as stored. notes: what is to be said of it."""

    items: dict[str, int]
    moment: str
    layer_bytes: int
    notes: tuple[str, ...] = ()

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


def predict(sizes: Sizes, job: Job) -> MemoryPlan:
    """The peak of training `sizes` by `job`. Pure arithmetic."""
    adapter = [math.prod(shape) for shape in adapter_shapes(sizes, job.rank)]
    trained = [*adapter, *([job.heads] if job.heads else [])]
    always = {
        "weights": sum(stored_bytes(sizes, name, job) for name in sizes.shapes),
        "adapter": 4 * sum(trained),
        "reference's adapter": 4 * sum(adapter) if job.has_adapted_reference else 0,
        "reward model": job.reward_bytes,
        "reward model's own backbone": job.reward_backbone_bytes,
        "gradients": 4 * sum(trained),
        "optimizer": sum(optimizer_bytes(count, job.optimizer) for count in trained),
        "dequantized weight": dequantized_bytes(sizes, job),
        "process": runtime_bytes(sizes, job),
    }
    moments = {"training": training_bytes(sizes, job), "passing forward without gradients": forward_pass(sizes, job)}
    if job.pairs:
        tokens, longest = job.pairs
        moments["training the reward model"] = training_bytes(
            sizes, replace(job, tokens=tokens, longest=longest, is_ragged=True, spared=0, rollouts=None)
        )
    if job.rollouts:
        moments["sampling rollouts"] = {
            "key/value cache": cache_bytes(sizes.spec, job.rollouts, job),
            "reading prompts, or drawing tokens": sampling_bytes(sizes.spec, job.rollouts, job),
        }
    if not job.is_on_cuda:  # elsewhere in the host's memory: the states are copied, and written from a buffer
        moments["saving a checkpoint"] = {"copies of the states": 2 * always["optimizer"]}
        left = min(HOLES_LOADING, always["weights"])
        moments = {name: {"holes in the heap": left, **items} for name, items in moments.items()}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan({**always, **moments[moment]}, moment, largest_layer_bytes(sizes, job))


def runtime_bytes(sizes: Sizes, job: Job) -> int:
    """What is there before a weight is: on a CPU the process, on CUDA the context."""
    if job.is_on_cuda:
        return CUDA_CONTEXT_BYTES
    uses_bitsandbytes = "8bit" in job.optimizer  # 4-bit weights on the CPU do without
    layers = range(len(sizes.spec.layers)) if job.recompute == "selective" else ()
    uses_checkpoint = is_whole(job) or any(needs_checkpoint(sizes, i) for i in layers)
    compiler = COMPILER_BYTES if uses_bitsandbytes or uses_checkpoint else 0
    triton = TRITON_BYTES if job.has_triton else 0
    process = PROCESS_BYTES + (CUDA_BUILD_BYTES if torch.version.cuda else 0)
    return process + compiler + (BITSANDBYTES_BYTES if uses_bitsandbytes else 0) + triton


def training_bytes(sizes: Sizes, job: Job) -> dict[str, int]:
    """Activations of one microbatch at the worst moment of its forward and backward.

    The last layer is counted as the others, though from its attention's output on it runs on trained tokens only."""
    spec, layers = sizes.spec, range(len(sizes.spec.layers))
    stream = job.tokens * spec.hidden_size * job.width
    if is_whole(job):
        kept = stream * (min(2, len(layers)) if job.recompute == "offload" else len(layers))
    else:
        kept = sum(kept_bytes(sizes, i, job) for i in layers)
    working = max(working_bytes(sizes, i, job) for i in layers)
    most = max(head_bytes(spec, job.tokens, job), working)
    # The gradient of the last layer's states and its sum, and these states, which are gone where compiled ops make
    # whole layers again.
    streams = 2 if job.is_compiled and is_whole(job) else 3
    items = {"activations": kept + streams * stream, "loss head, or one layer's backward": most}
    if job.rollouts:
        items["experience"] = experience_bytes(job.rollouts)
    if not job.is_on_cuda:
        items["holes in the heap"] = hole_bytes(sizes, job, kept, working)
    return items


def forward_pass(sizes: Sizes, job: Job) -> dict[str, int]:
    """The largest pass without gradients: an evaluation, what the reference says of a microbatch, a reward."""
    tokens = job.forward_tokens
    head = head_bytes(sizes.spec, tokens, job)
    return {"activations": forward_bytes(sizes.spec, tokens, job), "loss head, or one layer's backward": head}


def hole_bytes(sizes: Sizes, job: Job, kept: int, working: int) -> int:
    """What blocks of unequal size leave unused between them, of a step that keeps and works on so many bytes."""
    weights = sum(stored_bytes(sizes, name, job) for name in sizes.shapes)
    share = HOLES_PLAIN * (not job.is_fused) + HOLES_SELECTIVE * (job.recompute == "selective")
    share += HOLES_16BIT * (job.width == 2)
    holes = share * kept + HOLES_WORKING * working
    if job.recompute == "full":
        again = sum(kept_bytes(sizes, i, replace(job, recompute=None)) for i in range(len(sizes.spec.layers)))
        holes += (HOLES_WHOLE if job.is_fused else HOLES_WHOLE_PLAIN) * again
    return min(HOLES_LOADING, weights) + int(holes)


def largest_microbatch(window: Windows, steps: int) -> tuple[list, object]:
    """The microbatch of the run that is computed on most tokens, as its first epochs are planned: its documents (or
    pairs), and the batch that they make.

    A batch is computed on no more tokens than its documents have, and on fewer where they begin alike. So the longest
    are made first, up to one whose documents have no more tokens than another is computed on."""
    lengths, most, left = window.lengths, 0, steps * window.accumulation
    for epoch in range(EPOCHS_LOOKED_AT):
        options = (window.group_by_length, window.packing, window.capacity, window.seed, epoch)
        planned = plan_epoch(lengths, window.batch_size, window.accumulation, *options)
        tokens = planned.tokens(lengths)[: max(left, 0)]
        for i in np.argsort(-tokens, kind="stable"):
            if tokens[i] <= most:
                break
            documents = [window.documents[j] for j in planned[i]]
            batch = window.collate(documents)
            if batch.computed_tokens > most:
                most, largest = batch.computed_tokens, (documents, batch)
        left -= len(planned)
    return largest


def memory_plan(prepared: Prepared, window: Windows, steps: int) -> MemoryPlan:
    """The prediction for a run as it was prepared. steps: of the optimizer; with rlhf, updates."""
    config, lora = prepared.config, adapter_spec(prepared.config)
    sizes = _sizes_in(prepared.folder, lora.targets)
    is_fused, device = config.provider == "unsloth", torch.device(prepared.plan.device)
    is_compiled = is_fused and prepared.plan.dtype == "float32" and frozen_product.reason_not(device) is None
    job = Job(
        plan=prepared.plan,
        tokens=0,
        longest=0,
        rank=lora.rank,
        optimizer=config.optim,
        recompute=config.recompute if config.gradient_checkpointing else None,
        is_fused=is_fused,
        dropout=lora.dropout,
        is_compiled=is_compiled,
        threads=torch.get_num_threads(),
        has_triton="triton" in sys.modules,  # the kernels import it where it can run
        has_mxfp4=is_stored_as_mxfp4(read_json(prepared.folder / "config.json")),
        in_bfloat16=in_bfloat16(prepared, prepared.folder),
        has_adapted_reference=ties_to_init_adapter(config),
    )
    if config.strategy == "rlhf":
        job = _reinforced(prepared, sizes, job)
    else:
        job = _with_microbatch(job, *largest_microbatch(window, steps))
        reference = job.tokens if has_reference(config) else 0
        job = replace(job, forward_tokens=max(reference, _longest(prepared.eval, config.per_device_eval_batch_size)))
    return replace(predict(sizes, job), notes=tuple(_notes(config, job)))


def _notes(config: TrainingConfig, job: Job) -> list[str]:
    if config.strategy == "dpo":
        return ["one backbone: policy and reference share the weights"]
    if config.strategy != "rlhf":
        return []
    borrows = not (config.reward_function or job.reward_backbone_bytes)
    sharing = ["policy", "reference", *(["value"] if job.heads else []), *(["reward"] if borrows else [])]
    return [
        f"one backbone: {', '.join(sharing[:-1])} and {sharing[-1]} share the weights",
        "rollouts: as if every response were as long as max_new_tokens",
    ]


def _sizes_in(folder: Path, targets: tuple[str, ...] | None) -> Sizes:
    with torch.device("meta"):
        return sizes_of(Decoder(read_spec(folder)), targets)


def _with_microbatch(job: Job, documents: Sequence, batch) -> Job:
    """batch: of the documents; what these begin with alike is in it once."""
    lengths, tokens = [side.inputs for side in flatten(documents)], batch.computed_tokens
    is_ragged = len(set(lengths)) > 1
    return replace(job, tokens=tokens, longest=max(lengths), is_ragged=is_ragged, spared=sum(lengths) - tokens)


def _reinforced(prepared: Prepared, sizes: Sizes, job: Job) -> Job:
    """The job of PPO or GRPO and of its reward model. An upper bound: every response is as long as it may get, those to
    the longest prompts meet, and none shares its prompt's computation."""
    config, new = prepared.config, prepared.config.max_new_tokens
    copies = responses_to_each(config)
    size = min(config.per_device_train_batch_size, math.ceil(config.rollout_batch_size / config.num_mini_batches))
    trained, evaluated = (
        sorted((len(prompt.ids) for prompt in prompts), reverse=True)
        for prompts in (prepared.prompts, prepared.eval_prompts)
    )
    trained = [length + new for length in trained for _ in range(copies)]
    answered = sorted([*trained, *(length + new for length in evaluated)], reverse=True)
    scored = sum(answered[: config.per_device_eval_batch_size])
    sampled = min(config.rollout_batch_size, len(trained)), min(config.per_device_eval_batch_size, len(evaluated))
    adapter, backbone = _reward_bytes(prepared, sizes, job)
    job = replace(
        job,
        tokens=sum(trained[:size]),
        longest=trained[0],
        is_ragged=True,
        forward_tokens=max(scored, _longest(prepared.eval, config.per_device_eval_batch_size)),
        rollouts=Rollouts(max(sampled), max([trained[0] - new, *evaluated[:1]]), new),
        heads=0 if config.advantage == "group" else prepared.spec.hidden_size + 1,
        reward_bytes=adapter,
        reward_backbone_bytes=backbone,
    )
    return replace(job, pairs=_reward_pairs(prepared)) if trains_reward(config) else job


def _reward_pairs(prepared: Prepared) -> tuple[int, int]:
    """(tokens, longest document) of the largest microbatch of the reward model's training: whole documents, each with
    its last token."""
    window = reward_windows(prepared)
    documents, _ = largest_microbatch(window, window.steps_per_epoch * prepared.config.reward_epochs)
    sides = flatten(documents)
    return sum(len(side.ids) for side in sides), max(len(side.ids) for side in sides)


def _reward_bytes(prepared: Prepared, sizes: Sizes, job: Job) -> tuple[int, int]:
    """Of a reward model: its adapter and head, and the backbone of its own that it has where it cannot borrow the
    run's (`load_reward`)."""
    config = prepared.config
    if config.reward_function:
        return 0, 0
    if trains_reward(config):
        return 4 * (sum(math.prod(shape) for shape in adapter_shapes(sizes, job.rank)) + prepared.spec.hidden_size), 0
    if not is_adapter(config.reward_model):
        return 0, _backbone_bytes(prepared, resolve_model(config.reward_model), job)
    folder = Path(config.reward_model).expanduser()
    tensors, base = read_adapter_tensors(folder), resolve_model(read_reward_config(folder)[1])
    names = {name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors if ".lora_" in name}
    live = {name.removesuffix(".weight") for name in sizes.adapted}
    borrows = base.resolve() == prepared.folder.resolve() and all(n in live or ".experts" in n for n in names)
    own = 0 if borrows else _backbone_bytes(prepared, base, job)
    return 4 * sum(tensor.numel() for tensor in tensors.values()), own


def _backbone_bytes(prepared: Prepared, folder: Path, job: Job) -> int:
    other, job = _sizes_in(folder, None), replace(job, in_bfloat16=in_bfloat16(prepared, folder))
    return sum(stored_bytes(other, name, job) for name in other.shapes if not name.startswith("lm_head"))


def is_stored_as_mxfp4(config: dict) -> bool:
    """Whether a checkpoint's config.json says that its experts are MXFP4."""
    return (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"


def _longest(documents: Sequence, batch_size: int) -> int:
    """Tokens of the largest batch of an evaluation, which takes the longest together."""
    return int(np.sort(inputs_of(documents))[::-1][:batch_size].sum())


def memory_report(plan: MemoryPlan, machine: Machine) -> dict:
    """The prediction as `check --json` prints it, beside what the machine has."""
    device, available_bytes = machine.device, machine.memory_bytes if machine.device == "cpu" else machine.vram_bytes
    notes = [
        *plan.notes,
        *(["no prediction for CUDA has been compared with a measurement"] if device == "cuda" else []),
    ]
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
