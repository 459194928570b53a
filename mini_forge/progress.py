"""What a person sees while training: a bar with the latest numbers on a terminal, plain lines elsewhere."""

import errno
import os
import sys
from contextlib import contextmanager

from tqdm import tqdm


class ProgressDisplay:
    """Prints lines and metrics; on a terminal they pass above a bar that follows the optimizer steps."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout or open(os.devnull, "w")  # noqa: SIM115
        self.bar = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def step(self, done: int, total: int):
        """Move the bar; the first call makes it."""
        if self.bar is None and self.stream.isatty():
            self.bar = tqdm(total=total, initial=done, unit="step", file=self.stream, dynamic_ncols=True)
        elif self.bar is not None:
            with self._reader_may_leave():
                self.bar.update(done - self.bar.n)

    def close(self):
        if self.bar is not None:
            with self._reader_may_leave():
                self.bar.close()
            self.bar = None

    def line(self, text: str):
        with self._reader_may_leave():
            if self.bar is None:
                print(text, file=self.stream, flush=True)
            else:
                self.bar.write(text, file=self.stream)

    @contextmanager
    def _reader_may_leave(self):
        """A pipe's, as `| head` does, or a terminal that is closed; the training goes on."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.bar, self.stream = None, open(os.devnull, "w")  # noqa: SIM115

    def metrics(self, record: dict):
        """One record of metrics.jsonl, short."""
        if "loss" in record:
            norm = "inf" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
            extra = "".join(f"  {k} {record[k]:.4g}" for k in record if k.startswith(("reward", "kl")))
            text = (
                f"step {record['step']}  epoch {record['epoch']:.2f}  loss {record['loss']:.4f}  "
                f"lr {record['learning_rate']:.2e}  grad norm {norm}  {record['tokens_per_second']:.0f} tokens/s  "
                f"{record['peak_memory_bytes'] / 2**30:.2f} GiB{extra}"
            )
        else:
            numbers = "  ".join(
                f"{k} {v:.4f}" for k, v in record.items() if k.startswith("eval_") and isinstance(v, float)
            )
            text = f"step {record['step']}  {numbers}"
        self.line(text)
