"""Work on torch's OpenMP threads: when it is borrowed, when not, and that results never depend on it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")
if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
    pytest.skip("needs Linux and a torch with OpenMP", allow_module_level=True)

from halfbyte import _C  # noqa: E402

START = """
import os, sys, threading
import torch
from halfbyte import _C

def borrowed():
    return _C.cpu_info()["loops_on_torch_threads"]

torch.manual_seed(0)
_C.set_num_threads(1)
layer = _C.Linear4bit.from_float(torch.randn(512, 512).numpy(), double_quant=True)
x = torch.randn(64, 512)
want = layer(x)
torch.ones(1 << 20).add_(1)  # starts torch's threads
"""


def run(body: str, **environment: str) -> None:
    """START and body in a fresh process with two threads."""
    variables = {"OMP_NUM_THREADS": "2", "HALFBYTE_NUM_THREADS": "2", **environment}
    done = subprocess.run(
        [sys.executable, "-c", START + body],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_as_many_threads_are_borrowed():
    run("""
_C.set_num_threads(2)
assert torch.equal(layer(x), want)
assert borrowed() > 0  # later calls may avoid a busy machine's torch threads
for _ in range(50):
    assert torch.equal(layer(x), want)
""")


def test_not_when_forbidden():
    run(
        "_C.set_num_threads(2); assert torch.equal(layer(x), want); assert borrowed() == 0",
        HALFBYTE_OPENMP="0",
    )


def test_not_when_torch_has_another_number():
    run("_C.set_num_threads(3); assert torch.equal(layer(x), want); assert borrowed() == 0")
    run("_C.set_num_threads(2); torch.set_num_threads(1); layer(x); assert borrowed() == 0")


def test_a_torch_imported_later_is_found():
    code = """
import numpy as np
from halfbyte import _C
x = np.ones((64, 512), "f4")
layer = _C.Linear4bit.from_float(np.ones((512, 512), "f4"))
layer(x)  # looks for torch, in vain
assert _C.cpu_info()["loops_on_torch_threads"] == 0
import torch
layer(x)
assert _C.cpu_info()["loops_on_torch_threads"] > 0
"""
    variables = {"OMP_NUM_THREADS": "2", "HALFBYTE_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, check=True, timeout=120)


def test_a_forked_child_uses_its_own_threads():
    run("""
_C.set_num_threads(2)
layer(x)
for _ in range(3):
    child = os.fork()
    if child == 0:
        before = borrowed()
        ok = torch.equal(layer(x), want) and borrowed() == before > 0
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(layer(x), want)
""")


def test_a_child_forked_before_the_import_uses_its_own_threads():
    """The fork was before anybody could notice; only the kernel knows of it."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            """
import os
child = os.fork()
if child == 0:
    exec(os.environ["BODY"])
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1] != 0)
""",
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "2",
            "BODY": START + "_C.set_num_threads(2); layer(x); assert borrowed() == 0",
        },
        timeout=120,
    )
    assert done.returncode == 0


def test_callers_in_several_threads():
    run("""
_C.set_num_threads(2)
errors = []
def work():
    for i in range(100):
        if i % 10 == 0: torch.ones(1 << 17).add_(1)
        if not torch.equal(layer(x), want): errors.append(i)
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert not errors
""")


def test_forks_while_another_thread_computes():
    run("""
_C.set_num_threads(2)
stop = False
def work():
    while not stop: assert torch.equal(layer(x), want)
thread = threading.Thread(target=work)
thread.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(layer(x), want) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
thread.join()
""")


def test_an_idle_process_rests():
    """Borrowed threads spin as after torch's own loops, and then sleep."""
    run("""
import time
_C.set_num_threads(2)
for _ in range(3): layer(x)
time.sleep(0.1)
before = time.process_time()
time.sleep(0.5)
assert time.process_time() - before < 0.05
""")


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("depth, blocksize", [(256, 64), (160, 64), (224, 64)])
def test_results_do_not_depend_on_threads_or_lenders(compute, depth, blocksize):
    """With several threads panels of few outputs are decoded once and shared."""
    torch.manual_seed(depth)
    w = torch.randn(208, depth).numpy()
    x, dy = torch.randn(3, 70, depth), torch.randn(3, 70, 208)
    layers = [
        _C.Linear4bit.from_float(w, blocksize=blocksize, double_quant=nested, compute=compute)
        for nested in (False, True)
    ]
    before = _C.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            _C.set_num_threads(threads)
            results.append([f(v) for layer in layers for f, v in ((layer, x), (layer.grad_input, dy))])
    finally:
        _C.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_several_passes_share_the_panels(compute):
    """Rows of x beyond a pass meet the panels that the first pass has decoded."""
    torch.manual_seed(1)
    layer = _C.Linear4bit.from_float(torch.randn(96, 1024).numpy(), double_quant=True, compute=compute)
    x, dy = torch.randn(1100, 1024), torch.randn(1100, 96)
    before = _C.get_num_threads()
    try:
        _C.set_num_threads(2)
        whole = layer(x), layer.grad_input(dy)
        parts = [
            torch.cat([f(piece) for piece in v.split(100)]) for f, v in ((layer, x), (layer.grad_input, dy))
        ]
    finally:
        _C.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_the_number_of_threads_may_rise_during_a_product():
    """A lane has memory of its own, which is made before the threads are called."""
    torch.manual_seed(0)
    layer = _C.Linear4bit.from_float(torch.randn(512, 512).numpy())
    x = torch.randn(64, 512)
    before = _C.get_num_threads()
    _C.set_num_threads(1)
    want = layer(x)
    stop = threading.Event()

    def change() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            _C.set_num_threads(1 + n % 4)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            assert torch.equal(layer(x), want)
    finally:
        stop.set()
        thread.join()
        _C.set_num_threads(before)
