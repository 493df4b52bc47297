"""The torch layer on CUDA tensors: the files of torch_checks/ in a process with a fake device (torch_device.py)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch_device

HERE = Path(__file__).parent


def test_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("no torch")
    torch_device.library_path()
    checks = HERE / "torch_checks"
    paths = [
        str(path)
        for path in (HERE, checks, HERE.parent / "py", HERE.parent / "compat", HERE.parents[1] / "python")
    ]
    options = ["-q", "-p", "torch_plugin", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, sorted(checks.glob("check_*.py")))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
