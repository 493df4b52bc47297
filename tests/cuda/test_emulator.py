"""The emulator finds the faults that it is there to find."""

import ctypes

import numpy as np
import pytest
from host_library import broken_library

FAULTS = {
    "missing_barrier": "races with",
    "uneven_barrier": "not all threads reach: 40 at block_sync, 24 at an exchange",
    "reads_behind": "read of 4 bytes at offset 256 of a buffer of 256",
    "writes_twice": "written twice",
    "writes_input": "write to an input",
    "misaligned": "read of 8 bytes at a multiple of 4 only",
    "shared_overflow": "shared write of 4 bytes at offset 256 of 256",
    "async_no_wait": "read before the wait for the asynchronous copy",
    "async_wrong_wait": "read before the wait for the asynchronous copy",
    "async_no_barrier": "races with",
    "async_overwrites": "write before the wait for the asynchronous copy",
    "async_overtakes": "races with",
    "async_left_behind": "ends with an asynchronous copy that it has not waited for",
    "async_misaligned": "asynchronous copy of 16 bytes from a multiple of 4 only",
}


def run(name, order, completion=None):
    emulator = broken_library()
    emulator.reset(order, seed=1, completion=completion)
    # 16-byte aligned memory with room around it
    room = np.arange(96, dtype=np.float32)
    source = room[4 + -(room.ctypes.data // 4) % 4 :][:64]
    out = np.zeros(64, np.float32)
    emulator.register(source)
    emulator.register(out, writable=True)
    status = getattr(emulator.library, f"broken_{name}")(
        ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(64)
    )
    return status, emulator.fault, source, out


@pytest.mark.parametrize("completion", [0, 1, 2])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name, order, completion):
    status, fault, _, _ = run(name, order, completion)
    assert FAULTS[name] in fault
    assert status == 719  # cudaErrorLaunchFailure


@pytest.mark.parametrize("order", [0, 1, 2])
def test_correct_kernel_has_no_fault(order):
    status, fault, source, out = run("fine", order)
    assert (status, fault) == (0, "")
    assert np.array_equal(out, source[::-1])


@pytest.mark.parametrize("completion", [0, 1, 2])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_asynchronous_copies(order, completion):
    status, fault, source, out = run("async_fine", order, completion)
    assert (status, fault) == (0, "")
    assert np.array_equal(out, np.where(np.arange(64) < 56, source, 0)[::-1])


def test_shared_memory_is_poisoned():
    _, fault, _, out = run("poisoned", 0)
    assert fault == ""
    assert np.isnan(out).all()
