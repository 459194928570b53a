"""Some optimizer steps of the very loop that `train` runs, timed; no run is written, evaluated or saved.

After the counted steps the last one's batches run once more under torch's profiler, for the table: in memory that has
been touched, unlike that of a step longer than all before it. Speed is set against the machine's own: a step's floating
point operations, counted by the rule of flops.py, over the rate of square matrix products in the training dtype,
measured first.

On CUDA every step ends in a synchronisation, and memory is what torch allocated; neither has been measured yet.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from mini_forge.bench.flops import counted_as, met_weights, parameter_count, step_flops
from mini_forge.bench.op_table import StepProfile, label
from mini_forge.bench.shapes import prepare_shape, random_base, shape_record
from mini_forge.config import TrainingConfig
from mini_forge.config_plan import GIB
from mini_forge.errors import ConfigError
from mini_forge.forms import LABELLED, PAIRS, form_of
from mini_forge.inputs import adapter_spec
from mini_forge.io.runs import RunFolder
from mini_forge.io.weights import load_base
from mini_forge.memory_plan import memory_plan
from mini_forge.model.decoder import Decoder
from mini_forge.prepare import Prepared, prepare
from mini_forge.run import build_loop, build_model
from mini_forge.settings import windows
from mini_forge.training.loop import peak_memory_bytes
from mini_forge.training.malloc import keep_freed_memory

STEPS, WARM_UP_STEPS = 10, 2  # counted by default, and those of them that are not in the median
PEAK_SECONDS = 0.1  # of products of one size
PEAK_SIZES = {"cuda": (4096, 8192)}  # of square matrices; beside them the model's own widths, up to the last
PEAK_SIZES_ELSEWHERE = (1024, 2048)


@dataclass
class Run:
    """What was seen of the steps. clock: time.perf_counter before the first and after each. batches: of each step."""

    clock: list[float] = field(default_factory=list)
    batches: list[list] = field(default_factory=list)
    peak_bytes: int = 0
    profiled_seconds: float = 0.0
    table: list[dict] = field(default_factory=list)


def bench(
    config: TrainingConfig,
    *,
    steps: int = STEPS,
    shape: str | None = None,
    length: int | None = None,
    called: float | None = None,
    report: Callable[[str], None] = print,
) -> dict:
    """Measure training by `config`. Returns plain values (JSON), which `format_bench` puts in words.

    shape: a name in `SHAPES`; its random weights and rows of `length` random tokens take the place of model_name and
    dataset. called: time.perf_counter when the command began, for systems that do not tell when the process did.
    `report` takes what is known before the steps run. Raises UserError for wrong input, TrainingError when training
    fails."""
    called = time.perf_counter() if called is None else called
    config = config.checked()
    check_options(config, steps, shape, length)
    with TemporaryDirectory() as folder:
        is_random = shape is not None
        prepared = prepare_shape(config, shape, length, steps, Path(folder)) if is_random else prepare(config)
        prepared = replace(_with_reference(prepared), eval=[])
        config, plan, spec = prepared.config, prepared.plan, prepared.spec
        began = time.perf_counter()
        peak = matmul_peak(torch.device(plan.device), plan.dtype, (spec.hidden_size, spec.mlp_size))
        loading = time.perf_counter()
        keep_freed_memory()
        torch.manual_seed(config.seed)
        said: list[str] = []
        model = build_model(prepared, adapter_spec(config), said.append, random_base if is_random else load_base)
        facts = {
            "model": config.model_name,
            "has_random_weights": is_random,
            "parameters": parameter_count(spec),
            "stored_bytes": sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
            "device": plan.device,
            "device_name": device_name(plan.device),
            "dtype": plan.dtype,
            "quantization": plan.quantization,
            "stored_in": prepared.stored_form,
            "ops": said[0],
            "notes": prepared.notes,
            "matmul_peak": peak,
            "load_seconds": time.perf_counter() - loading,
        }
        for line in format_facts(facts):
            report(line)
        run = measure(prepared, model, steps)
        start, since = process_start(called)
        first = {"first_step_seconds": run.clock[1] - start - (loading - began), "first_step_since": since}
        return facts | first | _results(prepared, run, peak["flops_per_second"])


def check_options(config: TrainingConfig, steps: int, shape: str | None, length: int | None):
    """Raises ConfigError with every option that is wrong."""
    problems = []
    if steps <= WARM_UP_STEPS:
        problems.append(
            f"--steps: {steps} must be at least {WARM_UP_STEPS + 1}; the first {WARM_UP_STEPS} are slow and not in the "
            "median"
        )
    if length is not None and shape is None:
        problems.append("--length: only with --shape; a dataset's rows have lengths of their own; set max_seq_length")
    if config.strategy == "rlhf":
        problems.append(
            'strategy: "rlhf" is not measured by bench, which knows no rollouts; use another strategy, or train with '
            "max_steps 3: metrics.jsonl has the rates"
        )
    if shape is not None and (config.init_adapter or form_of(config) is LABELLED):
        key = "init_adapter" if config.init_adapter else "loss_type"
        problems.append(f"{key}: {getattr(config, key)!r} has no meaning with --shape; leave it out, or leave --shape")
    if problems:
        raise ConfigError(*problems)
    if shape is not None:
        shape_record(shape)


def _with_reference(prepared: Prepared) -> Prepared:
    """With precompute_reference the pairs have one, of zeros: it is made before the steps, whatever its values."""
    if not (prepared.config.precompute_reference and prepared.form is PAIRS):
        return prepared
    return replace(prepared, train=[replace(pair, reference=np.zeros(2, np.float32)) for pair in prepared.train])


def measure(prepared: Prepared, model: Decoder, steps: int) -> Run:
    """Run the steps, and the last one's batches once more under the profiler."""
    device, run = model.device, Run()
    lora = adapter_spec(prepared.config)
    loop = build_loop(prepared, model, lora, RunFolder(prepared.config.output_dir))  # a folder that is never made
    loop.settings = replace(loop.settings, total_steps=steps + 1, save_steps=None)
    loop.save = loop.log = lambda record: None
    window, profile = loop.window, StepProfile(device.type)

    def watched(step):
        if step < steps:
            run.batches.append(window(step))
        return run.batches[-1]

    def on_step(done, total):
        synchronize(device)
        now = time.perf_counter()
        if done <= steps:
            run.clock.append(now)
        else:
            run.profiled_seconds = now - run.profiled_seconds
            profile.stop()
        if done == steps:
            run.peak_bytes = peak_memory_bytes(device)  # before the profiler takes some
            label(model, loop.optimizer)
            profile.start()
            run.profiled_seconds = time.perf_counter()

    loop.window, loop.on_step = watched, on_step
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    loop.run()
    run.table = profile.table(run.profiled_seconds, lora.rank, model.spec.vocab_size)
    return run


def _results(prepared: Prepared, run: Run, peak: float) -> dict:
    config, spec = prepared.config, prepared.spec
    weights = met_weights(config, spec)
    seconds = [after - before for before, after in zip(run.clock, run.clock[1:], strict=False)]
    tokens = [sum(batch.tokens for batch in batches) for batches in run.batches]
    flops = [step_flops(config, spec, weights, batches) for batches in run.batches]
    rates = [sum(f.values()) / s for f, s in zip(flops, seconds, strict=True)][WARM_UP_STEPS:]
    speeds = [t / s for t, s in zip(tokens, seconds, strict=True)][WARM_UP_STEPS:]
    parts = {name: sum(f[name] for f in flops) / sum(tokens) for name in flops[0]}
    predicted = memory_plan(prepared, windows(prepared), len(seconds))
    return {
        "steps": len(seconds),
        "step_seconds": seconds,
        "tokens": sum(tokens),
        "trained_tokens": sum(batch.trained_tokens for batches in run.batches for batch in batches),
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_overall": sum(tokens) / sum(seconds),
        "flops_per_token": sum(parts.values()),
        "flops_per_token_by_part": parts,
        "flops_per_second": statistics.median(rates),
        "share_of_matmul_peak": statistics.median(rates) / peak,
        "counted_as": counted_as(config, weights),
        "peak_memory_bytes": run.peak_bytes,
        "predicted_memory_bytes": predicted.peak_bytes,
        "profiled_step_seconds": run.profiled_seconds,
        "table": run.table,
    }


def matmul_peak(device: torch.device, dtype: str, widths: tuple[int, ...]) -> dict:
    """The best rate of square matrix products: {"flops_per_second", "size", "dtype"}; 2·size³ operations each."""
    usual = PEAK_SIZES.get(device.type, PEAK_SIZES_ELSEWHERE)
    best = (0.0, 0)
    for size in sorted({*usual, *(min(width, usual[-1]) for width in widths)}):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.mm(a, b)  # not timed: the first of a size looks for its kernel
        synchronize(device)
        until = time.perf_counter() + PEAK_SECONDS
        while (began := time.perf_counter()) < until:
            torch.mm(a, b, out=out)
            synchronize(device)
            best = max(best, (2 * size**3 / (time.perf_counter() - began), size))
    return {"flops_per_second": best[0], "size": best[1], "dtype": dtype}


def synchronize(device: torch.device):
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def process_start(called: float) -> tuple[float, str]:
    """When this process started, on time.perf_counter's clock, and since what that is: Linux tells it; elsewhere it is
    when the command was called, which leaves Python's own start out."""
    stat = Path("/proc/self/stat")
    if not stat.is_file() or not hasattr(time, "CLOCK_BOOTTIME"):
        return called, "the command was called; this system does not tell when the process started"
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # proc_pid_stat(5): starttime, after boot
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - age, "the process started"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # elsewhere than on Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads" if device == "cpu" else name


def format_facts(facts: dict) -> list[str]:
    """What is known before the steps, for a person."""
    random = ", random weights" if facts["has_random_weights"] else ""
    peak = facts["matmul_peak"]
    return [
        f"device: {facts['device']} ({facts['device_name']})",
        facts["ops"],
        f"model: {facts['model']}, {facts['parameters']:,} parameters{random}, "
        f"{facts['stored_bytes'] / 2**20:,.0f} MiB ({facts['stored_in']}, training in {facts['dtype']})",
        *(f"note: {note}" for note in facts["notes"]),
        f"matmul peak: {_rate(peak['flops_per_second'])} ({peak['dtype']}, {peak['size']} x {peak['size']})",
    ]


def format_results(report: dict) -> list[str]:
    """The measurements, for a person."""
    parts = ", ".join(f"{name} {value / 1e6:,.1f}" for name, value in report["flops_per_token_by_part"].items())
    peak, predicted = report["peak_memory_bytes"], report["predicted_memory_bytes"]
    lines = [
        f"tokens/s: {report['tokens_per_second']:,.1f} (median of steps {WARM_UP_STEPS + 1} to {report['steps']}); "
        f"over all steps {report['tokens_per_second_overall']:,.1f}",
        f"tokens: {report['tokens']:,}, trained on {report['trained_tokens']:,}",
        f"MFLOP a token: {report['flops_per_token'] / 1e6:,.1f} ({parts})",
        f"rate: {_rate(report['flops_per_second'])}, {report['share_of_matmul_peak']:.1%} of the matmul peak",
        f"  counted as {report['counted_as']}",
        f"peak memory: {peak / GIB:.2f} GiB; predicted {predicted / GIB:.2f} GiB ({peak / predicted:.2f} of it)",
        f"first step: ended {report['first_step_seconds']:.2f} s after {report['first_step_since']} (without measuring "
        f"the matmul peak); weights there in {report['load_seconds']:.2f} s",
        "",
        f"one step under the profiler: {report['profiled_step_seconds']:.3f} s",
    ]
    lines += [f"  {row['group']:<18} {row['seconds']:9.4f} s {row['share']:7.1%}" for row in report["table"]]
    longest = next((row["longest"] for row in report["table"] if "longest" in row), {})
    return lines + [f"  other operations: {', '.join(f'{n} {s:.1%}' for n, s in longest.items())}"] * bool(longest)


def _rate(flops_per_second: float) -> str:
    big = flops_per_second >= 1e13
    return f"{flops_per_second / 1e12:,.1f} TFLOP/s" if big else f"{flops_per_second / 1e9:,.1f} GFLOP/s"
