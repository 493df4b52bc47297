"""A framework with "CUDA" arrays in host memory, and the emulated library behind `halfbyte._C`, without torch.

`install()` is for a process of its own (see `run_inside`), before `halfbyte._C` meets its first CUDA array.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import host_library
import numpy as np
import pytest

TYPES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "uint8": (1, 8), "int8": (0, 8),
         "int32": (0, 32), "int64": (0, 64), "bool": (6, 8), "uint16": (1, 16), "float64": (2, 64)}  # fmt: skip


def run_inside(name: str) -> None:
    """Runs the tests of a file here whose name pytest does not collect, in a process of its own."""
    path = Path(__file__).parent / name
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def compile_c(name: str, source: Path, flags: list[str]) -> Path:
    """A C source as a shared library."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    host_library.BUILD.mkdir(parents=True, exist_ok=True)
    library = host_library.BUILD / f"{name}.so"
    newest = max(
        p.stat().st_mtime_ns for p in (source, Path(__file__), *host_library.ROOT.glob("csrc/core/*.h"))
    )
    if not library.exists() or library.stat().st_mtime_ns < newest:
        part = library.with_suffix(f".{os.getpid()}.so")
        command = [compiler, "-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall"]
        command += [
            "-Werror",
            f"-I{host_library.ROOT / 'csrc'}",
            *flags,
            str(source),
            "-o",
            str(part),
            "-ldl",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        part.replace(library)
    return library


def build_framework() -> ModuleType:
    """The extension module of host/fake_framework.c."""
    tvm_ffi = pytest.importorskip("tvm_ffi.libinfo", reason="DLPack's header (apache-tvm-ffi)")
    flags = [f"-I{sysconfig.get_path('include')}", f"-I{tvm_ffi.find_dlpack_include_path()}"]
    tag = f"fake_framework.{sysconfig.get_config_var('SOABI')}"
    path = compile_c(tag, host_library.HOST / "fake_framework.c", flags)
    spec = importlib.util.spec_from_file_location("fake_framework", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_framework"] = module
    spec.loader.exec_module(module)
    return module


class Device:
    """The fake framework, the recorder and the emulator together."""

    def __init__(self) -> None:
        kernels = host_library.library_path()
        os.environ["HALFBYTE_TEST_CUDA_LIBRARY"] = str(kernels)
        recorder = compile_c("librecorder", host_library.HOST / "recorder.c", [])
        os.environ["HALFBYTE_CUDA_LIBRARY"] = str(recorder)
        self.framework: Any = build_framework()
        self.emulator = host_library.Emulator(kernels)
        self.recorder = ctypes.CDLL(str(recorder))
        self.recorder.hb_cuda_api_get()
        self.recorder.recorder_launches.restype = ctypes.c_long
        library = self.emulator.library
        self.framework.set_hooks(
            *(
                ctypes.cast(f, ctypes.c_void_p).value
                for f in (library.hb_host_register, library.hb_host_forget)
            )
        )

    # ---- arrays

    def gpu(self, array: Any, device: int = 0, plain: bool = False, kind: int = 2) -> Any:
        """A copy of a NumPy array on the fake device."""
        array = np.asarray(array)
        type_ = self.framework.Plain if plain else self.framework.Tensor
        tensor = type_(array.shape, TYPES[str(array.dtype)], kind, device)
        host(tensor)[...] = array
        return tensor

    # ---- what was launched, and faults

    def reset(self) -> None:
        """No faults, no hidden entries, the default stream."""
        self.framework.knobs()
        for device in range(3):
            self.framework.set_stream(0, device)
        self.recorder.recorder_fail(ctypes.c_long(-1), 0)
        self.recorder.recorder_workspace(ctypes.c_int64(-1))
        self.recorder.recorder_skip(0)
        fault = self.emulator.fault
        assert fault == "", fault

    @property
    def launches(self) -> int:
        return self._last()[0]

    @property
    def last(self) -> tuple[str, int, int]:
        """(entry, device, stream) of the newest launch."""
        return self._last()[1:]

    def _last(self) -> tuple[int, str, int, int]:
        entry, device, stream = ctypes.c_char_p(), ctypes.c_int32(), ctypes.c_void_p()
        arguments = (ctypes.byref(x) for x in (entry, device, stream))
        count = self.recorder.recorder_launches(*arguments)
        return count, (entry.value or b"").decode(), device.value, stream.value or 0

    def fail(self, after: int, status: int = 719) -> None:
        """All launches fail when `after` more have been made."""
        self.recorder.recorder_fail(ctypes.c_long(after), status)

    def skip(self, skip: bool) -> None:
        """Launches succeed and no kernel runs: what is left is the host's part."""
        self.recorder.recorder_skip(int(skip))

    def workspace(self, size: int) -> None:
        """Launches that can take a workspace want one of `size` bytes (-1: what they need)."""
        self.recorder.recorder_workspace(ctypes.c_int64(size))

    @property
    def bad_workspace(self) -> bool:
        return bool(self.recorder.recorder_bad_workspace())

    def hide(self, entry: str, hide: bool = True) -> bool:
        """Takes an entry out of the library's table (or puts it back); False where it has none."""
        return bool(self.recorder.recorder_hide(entry.encode(), int(hide)))

    def has(self, entry: str) -> bool:
        return self.hide(entry, False)


def host(tensor: Any) -> np.ndarray:
    """The memory of a fake tensor as a writable NumPy array; bfloat16 as ml_dtypes."""
    info = tensor.info
    names = {v: k for k, v in TYPES.items()}
    name = names[info["dtype"]]
    if name == "bfloat16":
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = np.dtype(name)
    if 0 in info["shape"]:
        return np.zeros(info["shape"], dtype)
    reach = [(n - 1) * s for n, s in zip(info["shape"], info["strides"], strict=True)]
    low, high = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach)
    span = (ctypes.c_char * ((high - low + 1) * dtype.itemsize)).from_address(
        info["address"] + low * dtype.itemsize
    )
    steps = tuple(s * dtype.itemsize for s in info["strides"])
    array = np.ndarray(info["shape"], dtype, span, -low * dtype.itemsize, steps)
    return _Held(array, tensor)


class _Held(np.ndarray):
    """An array that keeps its tensor."""

    tensor: Any

    def __new__(cls, array: np.ndarray, tensor: Any) -> _Held:
        held = array.view(cls)
        held.tensor = tensor
        return held

    def __array_finalize__(self, source: Any) -> None:
        self.tensor = getattr(source, "tensor", None)
