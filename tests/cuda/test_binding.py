"""The extension module on CUDA arrays, without a GPU.

The CUDA library is opened once in a process, and the one of the test suite is not to have any: so the tests of
inside_binding.py and inside_arrays.py run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import host_library
import pytest
from fake_device import run_inside


def test_functions_and_types():
    run_inside("inside_binding.py")


def test_arrays():
    run_inside("inside_arrays.py")


SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:]
import numpy as np
from dlpack_producer import Producer
from halfbyte import _C

x = Producer(np.ones((2, 64), np.float32), device=(2, 0))
for call in (lambda: _C.quantize_4bit(x), lambda: _C.quantize_4bit(x.capsule()), lambda: _C.Params4bit.quantize(x),
             lambda: _C.Linear4bit.from_float(np.ones((2, 64), np.float32))(x)):
    try:
        call()
    except _C.CudaError as error:
        print(error)
assert x.produced == x.deleted == 1
_C.quantize_4bit(x.array)  # lives on
"""


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ("no-driver", "no NVIDIA driver is installed"),
        (
            "old-driver",
            "the NVIDIA driver is for CUDA 12.2, this build needs 13.0 or later: update the driver",
        ),
        ("no-device", "no CUDA-capable device is detected"),
        ("no-library", "this halfbyte was built without its CUDA library"),
    ],
)
def test_no_device(fake, reason):
    """A CUDA array on a machine that cannot use it: the reason, and which argument it is."""
    library = host_library.library_path() if fake != "no-library" else "/nowhere.so"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(host_library.ROOT / "tests" / "py")],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"HALFBYTE_CUDA_LIBRARY": str(library), "HALFBYTE_FAKE_CUDA": fake},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = ["quantize_4bit", "quantize_4bit", "Params4bit.quantize", "Linear4bit"]
    assert len(lines) == len(names)
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"{name}: x is on cuda:0, which cannot be used: {reason}")
