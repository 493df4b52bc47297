"""cuda/*.cu compiled as C++ against the emulator, and its API through ctypes.

The structures are read from csrc/core/cuda_api.h; `test_api_layout` compares their size with the compiler's.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

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


def structures() -> dict[str, type[ctypes.Structure]]:
    """The structs of cuda_api.h and optim.h by their names there, as ctypes; pointers are void pointers."""
    kinds = {
        "int": ctypes.c_int,
        "int32_t": ctypes.c_int32,
        "uint32_t": ctypes.c_uint32,
        "int64_t": ctypes.c_int64,
        "float": ctypes.c_float,
        "double": ctypes.c_double,
        "char": ctypes.c_char,
        "bool": ctypes.c_bool,
        "hb_dtype": ctypes.c_int,
    }
    found: dict[str, type[ctypes.Structure]] = {}
    header = "".join((ROOT / "csrc" / "core" / name).read_text() for name in ("optim.h", "cuda_api.h"))
    header = re.sub(r"//[^\n]*", "", header)
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", header, re.DOTALL):
        fields: list[tuple[str, Any]] = []
        for line in filter(None, (" ".join(part.split()) for part in body.split(";"))):
            if function := re.fullmatch(r"([\w ]+?[ *]+)\(\*(\w+)\)\((.*)\)", line):
                result, field, parameters = function.groups()
                kind = ctypes.c_char_p if "*" in result else kinds[result.strip()]
                arguments = [
                    ctypes.c_void_p if "*" in a else kinds[a.split()[0]] for a in parameters.split(",")
                ]
                fields.append((field, ctypes.CFUNCTYPE(kind, *arguments)))
                continue
            kind_name, _, declared = line.removeprefix("const ").partition(" ")
            for declarator in declared.split(","):
                field, _, count = declarator.strip().lstrip("*").partition("[")
                kind = ctypes.c_void_p if "*" in declarator else kinds.get(kind_name) or found[kind_name]
                fields.append((field, kind * int(count.rstrip("]")) if count else kind))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


STRUCTURES = structures()
Queue, Device, Scales4 = (STRUCTURES[f"hb_cuda_{name}"] for name in ("queue", "device", "scales4"))
Quantize4, Dequantize4, Linear4 = (
    STRUCTURES[f"hb_cuda_{name}"] for name in ("quantize4", "dequantize4", "linear4")
)
Quantize8, Dequantize8 = STRUCTURES["hb_cuda_quantize8"], STRUCTURES["hb_cuda_dequantize8"]
Api = STRUCTURES["hb_cuda_api"]


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

    def reset(self, order: int = 0, seed: int = 0, completion: int | None = None) -> None:
        """Thread order and completion of asynchronous operations (None: like the order); host/emulator.h."""
        self.library.hb_host_reset(order, seed)
        if completion is not None:
            self.library.hb_host_async(completion)

    def restart(self, order: int = 0, seed: int = 0) -> None:
        """As `reset`, but keeps what is registered."""
        self.library.hb_host_restart(order, seed)

    def register(self, array: np.ndarray, writable: bool = False) -> int:
        """The array's address, which kernels may from now on read (and write)."""
        self.library.hb_host_register(
            ctypes.c_void_p(array.ctypes.data), ctypes.c_int64(array.nbytes), int(writable)
        )
        return array.ctypes.data

    def run(self, name: str, args: ctypes.Structure, device: int = 0) -> None:
        """One call of the API; a fault that the emulator found is an AssertionError.

        The devices are those of host/runtime_host.h: 0 large, 1 small, 2 old.
        """
        status = getattr(self.api, name)(ctypes.byref(Queue(device, None)), ctypes.byref(args))
        assert self.fault == ""
        assert status == 0, self.api.error_text(status)
