"""NUMBA_DISABLE_JIT=1 runs the portable twins, norms, activations and sampling as plain Python: a debugger can step through them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.needs_jit
def test_kernels_run_as_plain_python():
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={here.parents[2]}", str(here.parent)]
    done = subprocess.run(command, env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
