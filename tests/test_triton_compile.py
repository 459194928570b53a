"""Kernels pass Triton's compiler for a GPU: types, shapes and static branches that the interpreter does not look at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mini_forge_kernels.triton_support import IS_INSTALLED

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not IS_INSTALLED, reason="triton is not installed: pip install 'mini-forge[kernels]'")
def test_kernels_compile_for_the_oldest_gpu_supported_without_one(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compile_kernels", "bfloat16", "float32"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = ["rms_norm._forward", "rms_norm._backward", "rope._turn_both", "swiglu._forward", "swiglu._backward"]
    assert set(done.stdout.splitlines()) == {f"{k} torch.{t}" for k in kernels for t in ("bfloat16", "float32")}
