"""`python -m mini_forge COMMAND …`.

Exit codes: 0 done; 2 the user's input is wrong, one line `error: …` on stderr for each problem; 1 training failed;
130 and 143 stopped by SIGINT and SIGTERM after a checkpoint.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

from mini_forge import __version__
from mini_forge.errors import ConfigError, SignalExit, TrainingError, UserError, is_disk_full, is_out_of_memory
from mini_forge.export import TYPES
from mini_forge.quick_imports import quick_imports


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(
            f"arguments: {message}; see `mini-forge {self.prog.partition(' ')[2]} --help`".replace("  ", " ")
        )

    def exit(self, status=0, message=None):
        _flush()  # here, where it is known what to do if the help cannot be written
        super().exit(status, message)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} must be KEY=VALUE")
    return key, value


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mini-forge", description="LoRA and QLoRA fine-tuning in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"mini_forge {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    for name, summary in (("train", "fine-tune as CONFIG says"), ("check", "show what train would do, train nothing")):
        command = commands.add_parser(name, help=summary, description=summary)
        _takes_config(command)
        command.add_argument("--output-dir", metavar="DIR", help="run folder to use instead of CONFIG's")
        command.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
        command.add_argument("--overwrite", action="store_true", help="replace a run that is already there")
        if name == "check":
            command.add_argument("--json", action="store_true", help="print one JSON object")

    command = commands.add_parser("bench", help="measure speed and memory of a few training steps")
    _takes_config(command)
    command.add_argument("--steps", metavar="N", type=_positive, default=10, help="optimizer steps (default 10)")
    command.add_argument("--shape", metavar="NAME", help="a model of that size with random weights, on random tokens")
    command.add_argument("--length", metavar="L", type=_positive, help="tokens of a random row")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(output_dir=None)

    command = commands.add_parser("eval", help="a run's metrics on a dataset")
    command.add_argument("run", metavar="RUN_OR_ADAPTER")
    command.add_argument("--dataset", metavar="FILE", help="default: the run's eval_dataset, else the rows it held out")
    command.add_argument("--limit", metavar="N", type=_positive, help="only the first N rows")
    command.add_argument("--free", action="store_true", help="extractive QA: generate freely, not only context spans")
    command.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N")

    for name, summary in (("generate", "continue a prompt"), ("chat", "talk to a model")):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("model", metavar="RUN_OR_MODEL")
        if name == "generate":
            command.add_argument("--prompt", required=True, metavar="TEXT", action="append", help="may be given again")
            command.add_argument("--raw", action="store_true", help="use TEXT as it is, without the template")
        _takes_sampling(command)
        command.add_argument("--system", metavar="TEXT", help="system prompt; default: the run's")

    command = commands.add_parser("merge", help="write base + adapter as a full model folder")
    command.add_argument("run", metavar="RUN")
    command.add_argument("out", metavar="OUT_DIR")

    command = commands.add_parser("export", help="write base + adapter as one GGUF file, for llama.cpp and Ollama")
    command.add_argument("run", metavar="RUN")
    command.add_argument("out", metavar="OUT.gguf")
    command.add_argument("--type", default="f16", choices=TYPES, help="of the weights; default: f16")

    command = commands.add_parser("report", help="curves and evaluations of runs, as one HTML page")
    command.add_argument(
        "runs", metavar="RUN", nargs="+", help="run folder, finished or not; several of a strategy share charts"
    )
    command.add_argument("--out", metavar="FILE", help="default: report.html in the first RUN")

    commands.add_parser("schema", help="print the JSON Schema of a configuration")
    return parser


def _takes_config(command: argparse.ArgumentParser):
    command.add_argument("config", metavar="CONFIG", help="JSON configuration file")
    command.add_argument("--set", metavar="KEY=VALUE", type=_setting, action="append", default=[], dest="settings",
                         help="set a key, as if written in CONFIG; VALUE is JSON or a bare string")  # fmt: skip
    command.add_argument("--dataset", metavar="FILE", help="dataset to use instead of CONFIG's")


def _takes_sampling(command: argparse.ArgumentParser):
    command.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="default: 256")
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="of so many likeliest tokens; 0: all")
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="of the likeliest, with P together; 1: all"
    )
    command.add_argument("--seed", type=_seed, default=0, metavar="N")


def _positive(text: str) -> int:
    if not (text.isdecimal() and len(text) < 20 and int(text)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} must be a whole number, at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isdecimal() and len(text) < 20 and int(text) < 2**32):  # as a configuration's
        raise argparse.ArgumentTypeError(f"{text[:40]!r} must be a whole number from 0 to {2**32 - 1}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        return _outcome(arguments)
    finally:
        if arguments is None:
            _forget_unwritten()


def _outcome(arguments: list[str] | None) -> int:
    spin_briefly()
    try:
        if arguments is None:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
        options = build_parser().parse_args(arguments)
        options.is_own_process = arguments is None  # else somebody calls us from theirs
        if options.is_own_process and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _leave)  # so that nothing half-written stays
        COMMANDS[options.command](options)
        if options.is_own_process:
            _flush()
        return 0
    except UserError as error:
        for problem in error.problems:
            print(f"error: {' '.join(problem.split())}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise  # our own mistake: its traceback is wanted
        print("error: out of memory; use a smaller batch, shorter sequences or 4-bit weights", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        return 0
    except OSError as error:
        if not is_disk_full(error):
            raise  # our own mistake, as above
        print(f"error: {error.filename or 'standard output'}: {error.strerror}; make room", file=sys.stderr)
        return 1


def _forget_unwritten():
    """What of our output cannot be written is not tried again: Python does at exit, and makes 120 of the exit code."""
    try:
        _flush()
    except OSError:  # which `_outcome` has dealt with
        sys.stdout = None


def _flush():
    if sys.stdout is not None:
        sys.stdout.flush()


def _leave(number: int, frame):
    raise SignalExit(128 + number)


def spin_briefly():
    """Let torch's threads (GNU OpenMP) sleep when they have waited for each other for some 50 µs, unless the user says
    otherwise. Else they turn for as long as the system lets them, and where another program keeps one core of two busy
    a step takes 20 times as long; so 5 times, and alone no longer. They read it when torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def overrides(options) -> dict:
    """The keys that the command line sets. Raises ConfigError for one that it sets twice."""
    from mini_forge.config_json import read_value, unique

    problems = []
    settings = [(key, read_value(key, text)) for key, text in options.settings]
    keys = unique(settings, "--set", problems)
    for key, value in (("dataset", options.dataset), ("output_dir", options.output_dir)):
        if value is not None and keys.get(key, value) != value:
            option = f"--{key.replace('_', '-')}"
            problems.append(f"{key}: {keys[key]!r} of --set contradicts {option} {value!r}; keep one of them")
        if value is not None:
            keys[key] = value
    if problems:
        raise ConfigError(*problems)
    return keys


def load_config(options, **replaced):
    """The configuration file with the command line's settings on top, and in place of all these `replaced`."""
    from mini_forge.config import TrainingConfig

    return TrainingConfig.from_file(options.config, **(overrides(options) | replaced))


def refuse_contradiction(options):
    if options.resume and options.overwrite:
        raise ConfigError("arguments: --resume and --overwrite contradict each other; give one")


def _train(options):
    with quick_imports(options.is_own_process):
        from mini_forge.progress import ProgressDisplay
        from mini_forge.run import train
        from mini_forge.training.loop import Interrupted, stop_signals

    refuse_contradiction(options)
    config = load_config(options)
    with ProgressDisplay() as display:
        try:
            with stop_signals():  # also while the model is loaded: there is nothing to save yet
                result = train(config, resume=options.resume, overwrite=options.overwrite, report=display.line,
                               on_metrics=display.metrics, on_step=display.step)  # fmt: skip
        except Interrupted as stopped:
            if options.is_own_process:  # all is saved: what else comes changes no exit code
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
            display.close()
            raise SystemExit(128 + stopped.signal_number) from None
    print(f"adapter saved in {result.output_dir}")


def _check(options):
    with quick_imports(options.is_own_process):
        from mini_forge.check import check, dataset_problems, format_report

    refuse_contradiction(options)
    keys = overrides(options)
    try:
        config = load_config(options)
    except ConfigError as error:
        raise UserError(*error.problems, *dataset_problems(options.config, keys)) from None
    report = check(config, resume=options.resume, overwrite=options.overwrite)
    print(_json(report) if options.json else format_report(report))


def _bench(options):
    called = time.perf_counter()
    with quick_imports(options.is_own_process):
        from mini_forge.bench.measure import bench, format_results
        from mini_forge.training.loop import Interrupted

    # in place of what the file names, if it names any
    replaced = {"model_name": options.shape, "dataset": "random tokens"} if options.shape else {}
    report = (lambda line: None) if options.json else partial(print, flush=True)
    try:
        config = load_config(options, **replaced)
        result = bench(config, steps=options.steps, shape=options.shape, length=options.length, called=called,
                       report=report)  # fmt: skip
    except Interrupted as stopped:
        raise SystemExit(128 + stopped.signal_number) from None
    print(_json(result) if options.json else "\n".join(format_results(result)))


def _eval(options):
    with quick_imports(options.is_own_process):
        from mini_forge.inference.evaluate import format_table, write_eval
        from mini_forge.use import evaluate_run

    if not os.path.isdir(os.path.expanduser(options.run)):
        raise ConfigError(f"arguments: {options.run!r} is not a folder; eval takes a run, adapter or model folder")
    metrics, predictions = evaluate_run(
        options.run, dataset=options.dataset, limit=options.limit, constrained=not options.free,
        max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
    try:
        write_eval(Path(options.run), metrics, predictions)
    finally:  # what was computed is told, kept or not
        print(format_table(metrics))


def _generate(options):
    with quick_imports(options.is_own_process):
        from mini_forge.use import Session

    session = Session.open(options.model, system_prompt=options.system)
    for prompt in options.prompt:
        session.print_reply(prompt, raw=options.raw, **_sampling(options))


def _chat(options):
    with quick_imports(options.is_own_process):
        from mini_forge.inference.chat import chat_loop
        from mini_forge.use import Session

    if sys.stdin is None:
        raise ConfigError("standard input: is closed, and chat reads from it; use generate for one prompt")
    session = Session.open(options.model, system_prompt=options.system)
    chat_loop(session.model, session.tokenizer, session.template, session.system_prompt, input, **_sampling(options))


def _json(value) -> str:
    """For the standard output, in ASCII where that is not UTF-8."""
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    return json.dumps(value, indent=2, ensure_ascii=not is_utf8)


def _sampling(options) -> dict:
    import torch

    if options.temperature == 0 and (options.top_k or options.top_p < 1):
        print("note: at temperature 0 nothing is drawn: --top-k and --top-p have no effect", file=sys.stderr)
    return {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "generator": torch.Generator().manual_seed(options.seed),
    }


def _merge(options):
    with quick_imports(options.is_own_process):
        from mini_forge.io.merge import largest_difference, merge_adapter

    out = merge_adapter(options.run, options.out)
    print(f"merged model saved in {out}")
    worst, deviations = largest_difference(options.run, out)
    print(
        f"largest logit difference between adapter-on and merged: {worst:.2e} ({deviations:.1e} of their deviation), "
        "by the rounding of merged weights"
    )


def _export(options):
    with quick_imports(options.is_own_process):
        from mini_forge.export.gguf_file import export_gguf

    for note in export_gguf(options.run, options.out, options.type):
        print(f"note: {note}")
    print(f"merged model saved in {options.out}")


def _report(options):
    with quick_imports(options.is_own_process):
        from mini_forge.report import write_report

    print(f"report saved in {write_report(options.runs, options.out)}")


def _schema(options):
    from mini_forge.config import json_schema

    print(_json(json_schema()))


COMMANDS = {"train": _train, "check": _check, "eval": _eval, "generate": _generate, "chat": _chat, "merge": _merge,
            "export": _export, "report": _report, "schema": _schema, "bench": _bench}  # fmt: skip
