"""The machine's limits, measured in this process: `ruler.c` compiled and loaded."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import numpy as np

from .environment import ROOT

FLAGS = (
    "-std=c11",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-D_GNU_SOURCE",
    "-Icsrc",
    "-Ibenchmarks",
)
KINDS = ("float32", "bfloat16", "int8")


def sources() -> list[Path]:
    """ruler.c and what it needs: headers, a header's own C file where there is one, and what they need."""
    found = [ROOT / "benchmarks" / "ruler.c", ROOT / "benchmarks" / "machine_loops.h"]
    for path in found:  # grows while it is walked
        for name in re.findall(r'^#include "(core/\w+)\.h"', path.read_text(), re.MULTILINE):
            own = [ROOT / "csrc" / f"{name}.{kind}" for kind in ("h", "c")]
            found += [p for p in own if p.exists() and p not in found]
    return found


def _library() -> Path:
    target = ROOT / "build" / "benchmarks" / "ruler.so"
    needed = [*sources(), Path(__file__)]
    if target.exists() and all(path.stat().st_mtime <= target.stat().st_mtime for path in needed):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}.so")
    compiler = os.environ.get("CC", "cc").split()
    done = subprocess.run(
        [
            *compiler,
            *FLAGS,
            *(str(path) for path in sources() if path.suffix == ".c"),
            "-pthread",
            "-o",
            str(fresh),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"benchmarks: cannot compile the ruler\n{done.stderr}")
    fresh.replace(target)
    return target


class Ruler:
    """Reads memory and multiplies as fast as `threads` threads can."""

    def __init__(self, threads: int) -> None:
        self._library = ctypes.CDLL(str(_library()))
        self._library.ruler_read.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self._library.ruler_multiply.argtypes = (ctypes.c_int, ctypes.c_int64)
        self._library.ruler_multiply.restype = ctypes.c_int64
        if self._library.ruler_open(threads):
            raise MemoryError("ruler")

    def read(self, data: np.ndarray) -> None:
        """Reads the bytes of a contiguous array once (but for a last partial 256 KiB)."""
        self._library.ruler_read(data.ctypes.data, data.nbytes)

    def multiply(self, kind: str = "float32", calls: int = 512) -> int:
        """Multiply-adds of a kind of KINDS in registers; returns their number times two, 0 where there is no loop."""
        return int(self._library.ruler_multiply(KINDS.index(kind), calls))
