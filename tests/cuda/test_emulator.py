"""The emulator finds the faults that it is there to find."""

import ctypes

import numpy as np
import pytest
from host_library import broken_library

FAULTS = {
    "missing_barrier": "races with",
    "uneven_barrier": "not all threads reach: 40 at block_sync, 0 at warp_sync, 24 at an exchange",
    "reads_behind": "read of 4 bytes at offset 256 of a buffer of 256",
    "writes_twice": "written twice",
    "writes_input": "write to an input",
    "misaligned": "read of 8 bytes at a multiple of 4 only",
    "shared_overflow": "shared write of 4 bytes at offset 256 of 256",
}


def run(name, order):
    emulator = broken_library()
    emulator.reset(order, seed=1)
    # 16-byte aligned memory with room around it
    source = np.arange(72, dtype=np.float32)[4:68]
    out = np.zeros(64, np.float32)
    emulator.register(source)
    emulator.register(out, writable=True)
    status = getattr(emulator.library, f"broken_{name}")(
        ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(64)
    )
    return status, emulator.fault, source, out


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name, order):
    status, fault, _, _ = run(name, order)
    assert FAULTS[name] in fault
    assert status == 719  # cudaErrorLaunchFailure


@pytest.mark.parametrize("order", [0, 1, 2])
def test_correct_kernel_has_no_fault(order):
    status, fault, source, out = run("fine", order)
    assert (status, fault) == (0, "")
    assert np.array_equal(out, source[::-1])


def test_shared_memory_is_poisoned():
    _, fault, _, out = run("poisoned", 0)
    assert fault == ""
    assert np.isnan(out).all()
