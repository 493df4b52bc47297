"""cuda/*.cu compiled as C++ against the emulator, and its API through ctypes.

The same structures as csrc/core/cuda_api.h; `test_api_layout` compares their sizes.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).parent / "host"
BUILD = ROOT / "build" / "tests-cuda"
FLAGS = ["-x", "c++", "-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
         "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DHB_CUDA_HOST",
         f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'cuda'}", f"-I{HOST}"]  # fmt: skip
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
FORMATS = {"nf4": 0, "fp4": 1}

p, i32, i64, f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Queue(ctypes.Structure):
    _fields_ = (("device", i32), ("stream", p))


class Device(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * 64), ("major", i32), ("minor", i32), ("multiprocessors", i32),
                ("memory", i64))  # fmt: skip


class Scales4(ctypes.Structure):
    _fields_ = (("absmax", p), ("absmax_codes", p), ("nested_absmax", p), ("nested_map", p),
                ("nested_offset", p), ("nested_offset_value", f32), ("nested_blocksize", i64))  # fmt: skip


class Quantize4(ctypes.Structure):
    _fields_ = (("x", p), ("x_dtype", i32), ("format", i32), ("blocksize", i64), ("n", i64), ("packed", p),
                ("absmax", p))  # fmt: skip


class Dequantize4(ctypes.Structure):
    _fields_ = (("packed", p), ("scales", Scales4), ("format", i32), ("out_dtype", i32), ("blocksize", i64),
                ("start", i64), ("n", i64), ("out", p))  # fmt: skip


class Linear4(ctypes.Structure):
    _fields_ = (("x", p), ("packed", p), ("scales", Scales4), ("bias", p), ("y", p), ("io_dtype", i32),
                ("bias_dtype", i32), ("format", i32), ("path", i32), ("blocksize", i64), ("m", i64),
                ("rows", i64), ("depth", i64))  # fmt: skip


class Quantize8(ctypes.Structure):
    _fields_ = (("x", p), ("tree", p), ("x_dtype", i32), ("blocksize", i64), ("n", i64), ("codes", p),
                ("absmax", p))  # fmt: skip


class Dequantize8(ctypes.Structure):
    _fields_ = (("codes", p), ("absmax", p), ("map", p), ("out_dtype", i32), ("blocksize", i64), ("n", i64),
                ("out", p))  # fmt: skip


def call(args: type[ctypes.Structure]) -> type:
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Queue), ctypes.POINTER(args))


class Api(ctypes.Structure):
    _fields_ = (
        ("abi", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("runtime_version", i32),
        ("error_text", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)),
        ("driver_version", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))),
        ("device_count", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))),
        ("device_get", ctypes.CFUNCTYPE(ctypes.c_int, i32, ctypes.POINTER(Device))),
        ("quantize4", call(Quantize4)),
        ("dequantize4", call(Dequantize4)),
        ("linear4", call(Linear4)),
        ("quantize8", call(Quantize8)),
        ("dequantize8", call(Dequantize8)),
    )


def compile_library(name: str, sources: list[Path]) -> Path:
    """Compiles what changed; returns the shared library."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler (the CUDA kernels' emulator needs one)")
    BUILD.mkdir(parents=True, exist_ok=True)
    headers = [*ROOT.glob("csrc/core/*"), *ROOT.glob("cuda/*.cuh"), *HOST.glob("*.h"), Path(__file__)]
    newest = max(path.stat().st_mtime_ns for path in headers)

    def compile_one(source: Path) -> tuple[Path, bool]:
        target = BUILD / (source.stem + ".o")
        stale = not target.exists() or target.stat().st_mtime_ns < max(newest, source.stat().st_mtime_ns)
        if stale:
            part = target.with_suffix(f".{os.getpid()}.o")
            command = [compiler, *FLAGS, "-c", str(source), "-o", str(part)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            part.replace(target)
        return target, stale

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = BUILD / f"lib{name}.so"
    if any(stale for _, stale in objects) or not library.exists():
        part = library.with_suffix(f".{os.getpid()}.so")
        done = subprocess.run([compiler, "-shared", *(str(o) for o, _ in objects), "-o", str(part)],
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        part.replace(library)
    return library


@cache
def library_path() -> Path:
    """All kernels and api.cu on the emulator: a libhalfbyte_cuda.so that works on host memory."""
    return compile_library(
        "halfbyte_cuda_host", [*sorted((ROOT / "cuda").glob("*.cu")), HOST / "emulator.cpp"]
    )


@cache
def broken_library() -> Emulator:
    return Emulator(compile_library("broken", [HOST / "broken.cu", HOST / "emulator.cpp"]))


@cache
def emulated() -> Emulator:
    return Emulator(library_path())


class Emulator:
    """A library on the emulator; see host/emulator.h."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.hb_host_fault.restype = ctypes.c_char_p

    @property
    def api(self) -> Api:
        self.library.hb_cuda_api_get.restype = ctypes.POINTER(Api)
        return self.library.hb_cuda_api_get().contents

    @property
    def fault(self) -> str:
        return self.library.hb_host_fault().decode()

    def reset(self, order: int = 0, seed: int = 0) -> None:
        self.library.hb_host_reset(order, seed)

    def register(self, array: np.ndarray, writable: bool = False) -> int:
        """The array's address, which kernels may from now on read (and write)."""
        self.library.hb_host_register(p(array.ctypes.data), i64(array.nbytes), int(writable))
        return array.ctypes.data

    def run(self, name: str, args: ctypes.Structure) -> None:
        """One call of the API; a fault that the emulator found is an AssertionError."""
        status = getattr(self.api, name)(Queue(0, None), args)
        assert self.fault == ""
        assert status == 0, self.api.error_text(status)
