"""Work on the threads of each OpenMP runtime that a torch may be linked with: GCC's, LLVM's, Intel's.

Two ways to have one: a library of the name that is looked for, built here and linked with the runtime (no torch), and
the real torch with the runtime preloaded, so that torch's own loops run on it too. A runtime is looked for where
packages put it (`pip install intel-openmp`, `apt install libomp5-19`), and in LD_LIBRARY_PATH.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("threads are borrowed on Linux only", allow_module_level=True)

RUNTIMES = {
    "libgomp": ["libgomp.so.1"],
    "libomp": ["/usr/lib/llvm-*/lib/libomp.so*", "/usr/lib/*/libomp.so*", f"{sys.prefix}/lib/libomp.so"],
    "libiomp5": [f"{sys.prefix}/lib/libiomp5.so", "/opt/intel/oneapi/compiler/latest/lib/libiomp5.so",
                 "/usr/lib/*/libiomp5.so"],
}  # fmt: skip

STUB = """
#include <stdlib.h>
int omp_get_max_threads(void);
void GOMP_parallel(void (*fn)(void *), void *data, unsigned threads, unsigned flags);
static void nothing(void *data) { (void)data; }
void use(void) { GOMP_parallel(nothing, NULL, (unsigned)omp_get_max_threads(), 0); }
"""

COMMON = """
import os, threading, time
import numpy as np
from halfbyte import _C

def borrowed():
    return _C.cpu_info()["loops_on_torch_threads"]

rng = np.random.default_rng(0)
_C.set_num_threads(1)
layer = _C.Linear4bit.from_float(rng.standard_normal((512, 512)).astype("f4"), double_quant=True)
x = rng.standard_normal((64, 512)).astype("f4")
want = layer(x)
_C.set_num_threads(2)

def check(calls=20):
    for _ in range(calls):
        np.testing.assert_array_equal(layer(x), want)
"""

BODY = """
check(1)
assert borrowed() == 1, borrowed()
check()
threads = [threading.Thread(target=check) for _ in range(3)]  # each has a team of its own in the runtime
for t in threads: t.start()
for t in threads: t.join()

def child_is_well():
    before, child = borrowed(), os.fork()
    if child == 0:
        try:
            check(5)
            os._exit(0 if borrowed() == before else 1)
        except BaseException:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0

assert child_is_well()
results = []
thread = threading.Thread(target=lambda: results.append(child_is_well()))
thread.start(); thread.join()
assert results == [True]
check()
time.sleep(0.5)  # LLVM's and Intel's threads spin for 0.2 s
before = time.process_time()
time.sleep(0.3)
assert time.process_time() - before < 0.03
"""


def library(name: str) -> str:
    elsewhere = [f"{f}/{name}.so*" for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    for pattern in elsewhere + RUNTIMES[name]:
        if "/" not in pattern:
            compiler = shutil.which("gcc") or pytest.skip("no gcc")
            found = subprocess.run([compiler, f"-print-file-name={pattern}"], capture_output=True, text=True)
            candidates = [found.stdout.strip()]
        else:
            candidates = sorted(glob.glob(pattern))
        for candidate in candidates:
            if os.path.isabs(candidate) and os.path.exists(candidate):
                return os.path.realpath(candidate)
    pytest.skip(f"{name} is not installed")


def run(code: str, **environment: str) -> None:
    variables = {"OMP_NUM_THREADS": "2", "HALFBYTE_NUM_THREADS": "2", "KMP_WARNINGS": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request) -> str:
    return library(request.param)


@pytest.mark.no_asan
def test_a_library_linked_with_it(runtime, tmp_path: Path):
    compiler = shutil.which("gcc") or shutil.which("cc") or pytest.skip("no C compiler")
    stub = tmp_path / "stub.c"
    stub.write_text(STUB)
    linked = tmp_path / "libtorch_cpu.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(linked), str(stub), runtime,
               f"-Wl,-rpath,{os.path.dirname(runtime)}"]  # fmt: skip
    subprocess.run(command, check=True)
    run(f"import ctypes; ctypes.CDLL({str(linked)!r}).use()\n" + COMMON + BODY)


@pytest.mark.no_asan
def test_torch_with_it_preloaded(runtime):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    code = "import torch; torch.ones(1 << 20).add_(1)\n" + COMMON + BODY
    run(code, LD_PRELOAD=runtime)


@pytest.mark.no_asan
def test_two_runtimes_of_different_libraries_do_not_mix(tmp_path: Path):
    """Half of the functions from one library, half from another: no thread of either is used."""
    compiler = shutil.which("gcc") or pytest.skip("no gcc")
    gomp = library("libgomp")
    stub, other = tmp_path / "stub.c", tmp_path / "other.c"
    stub.write_text(STUB)
    other.write_text("int omp_get_thread_num(void) { return 0; }\nint omp_in_parallel(void) { return 0; }\n")
    linked, mixed = tmp_path / "libtorch_cpu.so", tmp_path / "libother.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(linked), str(stub), gomp,
         f"-Wl,-rpath,{os.path.dirname(gomp)}"], check=True
    )  # fmt: skip
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(mixed), str(other)], check=True)
    load = f"import ctypes; ctypes.CDLL({str(linked)!r}).use()\n"
    run(load + COMMON + "check(); assert borrowed() == 0", LD_PRELOAD=str(mixed))
