"""What the built library needs and shows, and that the packages of the extra "build-cuda" suffice to build it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import venv
from pathlib import Path

import gates
import pytest
from host_library import Api, Device

import halfbyte._C

ROOT = gates.ROOT
LIBRARY = Path(halfbyte._C.__file__).with_name("libhalfbyte_cuda.so")
# The C library and its parts; no C++ runtime, no CUDA runtime, no driver.
ALLOWED = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1",
           "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # fmt: skip


def check_library(library: Path) -> None:
    """It needs nothing but the C library, exports one symbol, and answers without a driver."""
    dynamic = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert needed <= ALLOWED
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True
    ).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["hb_cuda_api_get"]
    loaded = ctypes.CDLL(str(library))
    loaded.hb_cuda_api_get.restype = ctypes.POINTER(Api)
    api = loaded.hb_cuda_api_get().contents
    assert api.size == ctypes.sizeof(Api)
    count = ctypes.c_int(-1)
    status = api.device_count(ctypes.cast(ctypes.byref(count), ctypes.c_void_p).value)
    if status != 0:
        assert api.error_text(status)
        assert api.device_get(0, ctypes.addressof(Device())) != 0
    else:
        assert count.value >= 0


needs_binutils = pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed")


@needs_binutils
def test_the_library_of_this_build():
    if not LIBRARY.exists():
        pytest.skip("the CUDA library was not built")
    check_library(LIBRARY)


BUILD = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("halfbyte_setup", "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)
from setuptools.dist import Distribution
command = setup.BuildExt(Distribution())
command.build_lib, command.build_temp = sys.argv[1:]
command.ensure_finalized()
nvcc, why = setup.cuda_plan()
assert nvcc, why
print(nvcc)
print(command.build_cuda(nvcc))
"""


def packages() -> list[str]:
    """The extra's requirements, and what setup.py imports."""
    project = gates.tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = [p for p in project["build-system"]["requires"] if p.startswith("setuptools")]
    return project["project"]["optional-dependencies"]["build-cuda"] + build


@pytest.fixture(scope="module")
def package_python() -> Path:
    """An environment with the toolkit's packages and nothing else, kept in build/toolkit."""
    folder = ROOT / "build" / "toolkit"
    python, record = folder / "bin" / "python", folder / "installed"
    if not record.exists() or record.read_text() != "\n".join(packages()):
        venv.create(folder, with_pip=True, clear=True)
        command = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *packages()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"pip cannot install {packages()}: {done.stderr.strip().splitlines()[-1]}")
        record.write_text("\n".join(packages()))
    return python


@pytest.mark.slow
@needs_binutils
def test_packages_alone_build_the_library(package_python, tmp_path):
    """As on a machine that has gcc and no CUDA Toolkit: whatever folder has an nvcc is not on the path."""
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    path = os.pathsep.join(folders)
    if shutil.which("gcc", path=path) is None:
        pytest.skip("gcc lies beside the machine's nvcc: cannot hide one from the other")
    environment = {"PATH": path, "HOME": str(tmp_path), "HALFBYTE_CUDA": "1", "HALFBYTE_CUDA_ARCHS": "90",
                   "LANG": "C.UTF-8"}  # fmt: skip
    done = subprocess.run([package_python, "-c", BUILD, tmp_path / "lib", tmp_path / "temp"], cwd=ROOT,
                          env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    nvcc, result = done.stdout.splitlines()
    assert Path(nvcc).is_relative_to(ROOT / "build" / "toolkit"), "not the packages' compiler"
    assert "sm_90" in result
    (library,) = (tmp_path / "lib").rglob("libhalfbyte_cuda.so")
    check_library(library)
