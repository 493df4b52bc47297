"""The 4-bit encoder of the CUDA kernels beside its definition, for float32 numbers: all, or every 997th."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import pytest
from host_library import BUILD, HOST, ROOT


def compare(step: int, contracted: bool) -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / f"exhaustive.{'fma' if contracted else 'plain'}.{os.getpid()}"
    flags = ["-O3", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'cuda'}", f"-I{ROOT / 'csrc'}"]
    flags += ["-mfma", "-ffp-contract=fast"] if contracted else ["-ffp-contract=off"]
    subprocess.run([compiler, *flags, str(HOST / "exhaustive.cpp"), "-o", str(program)], check=True)
    try:
        return subprocess.run([program, str(step)], capture_output=True, text=True).stdout.strip()
    finally:
        program.unlink()


def has_fma() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return platform.machine() == "x86_64" and " fma " in file.read()
    except OSError:
        return False


CONTRACTED = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not has_fma(), reason="this CPU has no FMA")),
]


@pytest.mark.parametrize("contracted", CONTRACTED)
def test_sample_of_floats(contracted):
    assert compare(997, contracted) == str(2 * (2**32 // 997 + 1))


@pytest.mark.slow
@pytest.mark.parametrize("contracted", CONTRACTED)
def test_all_floats(contracted):
    assert compare(1, contracted) == str(2 * 2**32)
