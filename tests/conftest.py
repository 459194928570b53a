"""Shared fixtures: one thread (the same bits on every machine) and a tiny checkpoint to train on."""

import os

import pytest
import torch

from tests.tiny import write_checkpoint

# Without a GPU Triton's kernels are tested under its interpreter. It must be asked for before triton is imported, which
# the kernels do then, and bitsandbytes; nothing but the tests of kernels launches one on a CPU tensor.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random two-layer Llama checkpoint with a byte-level tokenizer and a chat template; read-only."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))
