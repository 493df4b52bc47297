"""The torch layer on CUDA tensors: each file of torch_checks/ in a process with a fake device (torch_device.py)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch_device

HERE = Path(__file__).parent
CHECKS = sorted((HERE / "torch_checks").glob("check_*.py"))


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem.removeprefix("check_"))
def test_torch(path: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("no torch")
    torch_device.library_path()
    paths = [str(HERE), str(HERE / "torch_checks"), str(HERE.parents[1] / "python")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "torch_plugin", "-p", "no:cacheprovider", str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
