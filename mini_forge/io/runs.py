"""A run's folder: what is written when, and how it survives being killed at any moment.

Files appear whole or not at all (`durable`). A checkpoint is a folder `checkpoints/step-N` that appears by one rename;
a half-written one keeps its temporary name and is swept away by the next run.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mini_forge.data.tokenizer import FILES as TOKENIZER_FILES
from mini_forge.durable import (
    TEMPORARY,
    flush_file,
    flush_folder,
    json_text,
    staged,
    sync_folder,
    write_atomic,
)
from mini_forge.errors import CheckpointError, ConfigError, TrainingError, is_disk_full, reason_of
from mini_forge.io.adapters import WEIGHTS_FILE
from mini_forge.json_faults import read_json

REPLACED = ".old-"  # before the name of a checkpoint, while another takes its place
CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = "training_config.json", "metrics.jsonl", "summary.json"
REFERENCE_ADAPTER = "reference_adapter.safetensors"
REFERENCE_FILE, REWARD_FOLDER, SAMPLES_FILE = "reference_logps.json", "reward", "samples.jsonl"
EVAL_FILE, PREDICTIONS_FILE, REPORT_FILE = "eval.json", "predictions.jsonl", "report.html"
REPORT_MARK = "<!doctype html>\n<!-- mini_forge report -->\n"  # what begins so is our own
RUN_FILES = (  # what a run and its evaluation write, but for the configuration, which the next run replaces
    SUMMARY_FILE, METRICS_FILE, WEIGHTS_FILE, "adapter_config.json", "README.md", EVAL_FILE, PREDICTIONS_FILE,
    REFERENCE_FILE, REFERENCE_ADAPTER, REPORT_FILE, SAMPLES_FILE,
)  # fmt: skip

ROOM = 100  # bytes of a path that the names within a run's folder may need


def _replace_folder(temporary: Path, final: Path):
    """Flush a finished temporary folder to the disk and give it its name, in place of what had that name."""
    flush_folder(temporary)
    old = final.with_name(REPLACED + final.name)
    if final.exists():
        os.rename(final, old)  # if the next rename never comes, `RunFolder.sweep` takes this one back
    os.rename(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path))  # a user that is not there is a name like another
        self.checkpoints = self.path / "checkpoints"
        self._lock: int | None = None  # a file descriptor, in `held`
        self._expects_none = False  # whether no run was here when it was asked whether one may begin

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this lasts no other process trains in this folder, which may still be made. Raises ConfigError where
        one does."""
        try:
            self._take()
            yield
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def check_free(self):
        """Raise ConfigError if another process trains here."""
        with self.held():
            pass

    def _take(self):
        """A lock on the folder itself, which leaves nothing behind and ends with the process, however that ends."""
        if self._lock is not None or not self.path.is_dir():
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"output_dir: another process is training in {str(self.path)!r}; wait for its end or stop it, or name "
                "another folder"
            ) from None
        except OSError as error:  # some network file systems have no locks
            os.close(descriptor)
            raise ConfigError(
                f"output_dir: {str(self.path)!r} cannot be locked ({error.strerror}); name a folder on another disk"
            ) from None
        self._lock = descriptor

    def check_possible(self):
        """Raise ConfigError if no run can be here, with whichever arguments; leaves nothing."""
        nearest = next(folder for folder in (self.path, *self.path.absolute().parents) if os.path.lexists(folder))
        if not nearest.is_dir():
            what = "a link to what is not there" if nearest.is_symlink() and not nearest.exists() else "a file"
            raise ConfigError(f"output_dir: {str(nearest)!r} is {what}; name a folder")
        if not os.access(nearest, os.W_OK | os.X_OK | (os.R_OK if nearest == self.path else 0)):
            raise ConfigError(f"output_dir: {str(nearest)!r} may not be written to; name another folder")
        if nearest != self.path:
            self._check_name(nearest)
        elif not self._is_blank() and not self._has_configuration():
            raise ConfigError(f"output_dir: {str(self.path)!r} holds files that are not a run's; name another folder")

    def _has_configuration(self) -> bool:
        """Whether a run's configuration is here, be it damaged."""
        try:
            record = read_json(self.path / CONFIG_FILE, absent={})
        except CheckpointError:
            return True
        return "model_name" in record

    def _is_blank(self) -> bool:
        """Whether nothing is here, or what a start leaves that is killed."""
        begun = [p for p in self.path.iterdir() if not p.name.startswith(TEMPORARY)]
        return all(p == self.checkpoints and p.is_dir() and not any(p.iterdir()) for p in begun)

    def _check_name(self, nearest: Path):
        """Raise ConfigError if this folder cannot be made in `nearest`, which is there."""
        try:
            name = os.fsencode(self.path.absolute())
            longest, whole = os.pathconf(nearest, "PC_NAME_MAX"), os.pathconf(nearest, "PC_PATH_MAX")
            if b"\0" in name or any(len(part) > longest for part in name.split(b"/")) or len(name) + ROOM > whole:
                raise ConfigError(
                    f"output_dir: {_shortened(str(self.path))} is no name for a folder; a name has at most {longest} "
                    f"bytes, and the path {whole - ROOM}"
                )
            os.rmdir(tempfile.mkdtemp(prefix=TEMPORARY, dir=nearest))  # some, as /proc, let no one make a folder
        except UnicodeEncodeError:
            raise ConfigError(f"output_dir: {str(self.path)!r} is not text; name another folder") from None
        except OSError as error:
            raise ConfigError(
                f"output_dir: {str(self.path)!r} cannot be made ({error.strerror}); name another folder"
            ) from None

    def check_usable(self, *, resume: bool, overwrite: bool):
        """Raise ConfigError if training here would fail or harm what is there; leaves nothing."""
        self.check_possible()
        folders = [f for root in (self.checkpoints, self.path / REWARD_FOLDER) for f, _, _ in os.walk(root)]
        closed = [f for f in folders if not os.access(f, os.W_OK | os.X_OK)]
        if closed:
            raise ConfigError(
                f"output_dir: {closed[0]!r} may not be written to; make it writable, or name another folder"
            )
        self._expects_none = not (self.path / CONFIG_FILE).exists()
        if not (self._expects_none or resume or overwrite):
            raise ConfigError(
                f"output_dir: {str(self.path)!r} holds a run already; add --resume to go on with it, "
                "--overwrite to replace it, or name another folder"
            )

    def is_own(self, path: str | Path) -> bool:
        """Whether a new run here, or the end of one, may replace or remove this file or folder: by its name, or by that
        of what it is a link to."""
        places = [Path(os.path.abspath(os.path.expanduser(path))), Path(os.path.expanduser(path)).resolve()]
        runs = [Path(os.path.abspath(self.path)), self.path.resolve()]
        return any(self._is_own(p.relative_to(run).parts) for p in places for run in runs if p.is_relative_to(run))

    def _is_own(self, inner: tuple[str, ...]) -> bool:
        own = (*RUN_FILES, self.checkpoints.name, REWARD_FOLDER)
        return not inner or inner[0] in own or inner[0].startswith(TEMPORARY)

    def is_own_reward(self, path: str | Path) -> bool:
        """Whether this is the folder of the run's own reward model."""
        return Path(os.path.expanduser(path)).resolve() == (self.path / REWARD_FOLDER).resolve()

    def start(self, config: dict, clear: Callable[[], None] = lambda: None):
        """A fresh run: remove what an earlier run left here (only a run's own files) and record the configuration.

        That is written first, so that a full disk shows before anything is removed; `clear` removes more. Raises
        TrainingError for a full disk, ConfigError where the folder cannot be made or cleared."""
        is_new, place, fresh = not self.path.exists(), self.path / CONFIG_FILE, None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            if self._expects_none and place.exists():
                raise ConfigError(
                    f"output_dir: another run has begun in {str(self.path)!r} meanwhile; name another folder"
                )
            self.sweep()
            fresh = staged(place, json_text(config))
            self._remove_old(config)
            clear()
            self.checkpoints.mkdir()
            os.replace(fresh, place)
            (self.path / METRICS_FILE).touch()
        except OSError as error:
            if fresh is not None:
                fresh.unlink(missing_ok=True)
            if is_new and self.path.exists() and not any(self.path.iterdir()):
                self.path.rmdir()
            if is_disk_full(error):
                raise TrainingError(f"{self.path}: {error.strerror}; no checkpoint was saved yet") from None
            raise ConfigError(
                f"output_dir: {str(self.path)!r} cannot be made or cleared ({reason_of(error)}); name another folder"
            ) from None

    def _remove_old(self, config: dict):
        if self.checkpoints.exists():
            shutil.rmtree(self.checkpoints)
        is_model = (self.path / "config.json").exists()  # then the tokenizer is the model's, and no run's copy
        keeps_reference = config.get("strategy") == "dpo" and config.get("precompute_reference")  # its key is checked
        for name in RUN_FILES if is_model else (*RUN_FILES, *TOKENIZER_FILES):
            file = self.path / name
            is_users = name == REPORT_FILE and file.exists() and not is_report(file)
            if not (is_users or (name == REFERENCE_FILE and keeps_reference)):
                file.unlink(missing_ok=True)

    def is_finished(self) -> bool:
        summary = self.path / SUMMARY_FILE
        return os.path.isfile(summary) and read_json(summary).get("status") == "finished"

    def steps(self) -> list[int]:
        """The optimizer steps that have a checkpoint, ascending."""
        found = self.checkpoints.glob("step-*") if self.checkpoints.exists() else []
        return sorted(int(p.name[5:]) for p in found if p.name[5:].isdecimal())

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def sweep(self):
        """Remove what a killed run left half-written, and take back a checkpoint it was about to replace."""
        for old in self.checkpoints.glob(REPLACED + "*"):
            name = self.checkpoints / old.name.removeprefix(REPLACED)
            shutil.rmtree(old) if name.exists() else os.rename(old, name)
        for leftover in [*self.path.glob(TEMPORARY + "*"), *self.checkpoints.glob(TEMPORARY + "*")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def save_checkpoint(self, step: int, write, keep: int | None, protected: int | None) -> Path:
        """Make checkpoint `step` of what `write(folder)` leaves; drop all but the newest `keep` and `protected`."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoints / f"{TEMPORARY}step-{step}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            _replace_folder(temporary, self.checkpoint(step))
        except OSError as error:  # as a full disk, which what is there of this checkpoint must not keep full
            shutil.rmtree(temporary, ignore_errors=True)
            error.filename = error.filename or str(temporary)
            raise
        old = self.steps()[:-keep] if keep else []
        for other in old:
            if other != protected:  # renamed first: a kill half-way must not leave half a checkpoint under its name
                doomed = self.checkpoints / f"{TEMPORARY}step-{other}"
                os.rename(self.checkpoint(other), doomed)
                shutil.rmtree(doomed)
        return self.checkpoint(step)

    def publish(self, write):
        """Put what `write(folder)` makes into the run's folder: each file whole, none before all are written."""
        temporary = self.path / f"{TEMPORARY}final"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            for file in sorted(temporary.iterdir()):
                flush_file(file)
                os.replace(file, self.path / file.name)
        except OSError as error:  # as a full disk, which what is there must not keep full
            error.filename = error.filename or str(self.path)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(self.path)

    def append_metrics(self, record: dict):
        with (self.path / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def metrics(self) -> list[dict]:
        return read_records(self.path / METRICS_FILE)

    def truncate_metrics(self, step: int):
        """Forget lines written after checkpoint `step`: the resumed run writes them again."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write_atomic(self.path / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in kept))


def is_report(path: Path) -> bool:
    """Whether the file there is a page that `report` has written."""
    with path.open("rb") as file:
        return file.read(len(REPORT_MARK)) == REPORT_MARK.encode()


def read_records(path: Path) -> list[dict]:
    """The records of a run's JSONL file so far, each with its step. Raises CheckpointError for a line that is none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    return [_record(f"{path}:{i}", line) for i, line in enumerate(lines[:-1], start=1)]  # a kill may cut the last


def _record(place: str, line: bytes) -> dict:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        shown = line[:60].decode("utf-8", errors="replace")
        raise CheckpointError(f"{place}: {shown!r}: must be a JSON object with its step; delete this line")
    return record


def _shortened(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:40]}…{name[-39:]}")
