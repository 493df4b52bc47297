"""The CUDA library is found, or the user reads why not; the interpreter lives on in every case."""

import json
import os
import subprocess
import sys

import pytest
from host_library import Api, emulated, library_path

SCRIPT = "import json; from halfbyte import _C; print(json.dumps(_C.cuda_info()))"


def info(**environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_api_layout():
    """The structures of host_library.py are those of cuda_api.h."""
    import ctypes

    assert emulated().api.size == ctypes.sizeof(Api)
    assert emulated().api.abi == 4


def test_emulated_device():
    found = info(HALFBYTE_CUDA_LIBRARY=str(library_path()))
    devices = [
        {"name": "emulated on the host", "capability": c, "multiprocessors": n, "memory": 1 << 30}
        for c, n in [([9, 0], 132), ([8, 0], 2), ([7, 5], 16)]
    ]
    assert found == {
        "available": True,
        "reason": None,
        "driver": "13.0",
        "runtime": "13.0",
        "devices": devices,
    }


@pytest.mark.parametrize(
    ("fake", "reason", "driver"),
    [
        ("no-driver", "no NVIDIA driver is installed", None),
        ("old-driver", "the NVIDIA driver is for CUDA 12.2, this build needs 13.0 or later: update the driver", "12.2"),
        ("no-device", "no CUDA-capable device is detected", "13.0"),
    ],
)  # fmt: skip
def test_reasons(fake, reason, driver):
    found = info(HALFBYTE_CUDA_LIBRARY=str(library_path()), HALFBYTE_FAKE_CUDA=fake)
    assert found == {"available": False, "reason": reason, "driver": driver, "runtime": "13.0", "devices": []}


def test_library_is_missing(tmp_path):
    found = info(HALFBYTE_CUDA_LIBRARY=str(tmp_path / "none.so"))
    assert not found["available"]
    assert "built without its CUDA library" in found["reason"]
    assert str(tmp_path) in found["reason"]


def test_library_is_broken(tmp_path):
    (tmp_path / "broken.so").write_bytes(b"\x7fELF and then nothing")
    found = info(HALFBYTE_CUDA_LIBRARY=str(tmp_path / "broken.so"))
    assert not found["available"]
    assert "broken.so" in found["reason"]


def test_foreign_library():
    import _ctypes

    found = info(HALFBYTE_CUDA_LIBRARY=_ctypes.__file__)
    assert not found["available"]
    assert "has no symbol hb_cuda_api_get" in found["reason"]


def test_real_library_on_this_machine():
    """Whatever the machine has: an answer, no crash."""
    found = info()
    assert found["available"] == (found["reason"] is None)
