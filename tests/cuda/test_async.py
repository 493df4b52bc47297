"""Barriers, tensor copies and products of sm_90a on the emulator: right uses, and one test for each fault."""

import ctypes
import re
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from host_library import HOST, Emulator, compile_library

ORDERS = [(order, completion) for order in range(3) for completion in range(3)]
# In the order of `enum fault` in host/hopper_cases.cu, with what the emulator says.
FAULTS = [
    "",
    "a product reads what thread .* wrote without fence_async_proxy",
    "accumulators written before the wait",
    "",
    "write while products that read it are under way",
    "read before the wait for the asynchronous copy of barrier 0|write races with a read",
    "product reads (before the wait for the asynchronous copy|races with the write)",
    "product without warpgroup_fence",
    "write while products that read it are under way",
    "more arrivals at a barrier than its 129",
    "not all threads reach: 128 at an mbarrier, 32 ended",
    "where no barrier is|initialisation may not be done",
    "copy counted by a barrier without fence_mbarrier_init",
    "ends with products that it has not waited for",
    "copy of a box to shared address",
    "write in a barrier",
    "threads of a warpgroup with different products",
    "block 0 ends with a tensor copy under way",
    "a copy replaces what thread 128 wrote without fence_async_proxy",
    "product reads races with the write of thread",
]


@cache
def cases() -> Emulator:
    return Emulator(compile_library("hopper_cases", [HOST / "hopper_cases.cu", HOST / "emulator.cpp"]))


def aligned(array):
    raw = np.zeros(array.nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 256
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def pointers(emulator, *arrays):
    return [ctypes.c_void_p(emulator.register(a, writable)) for a, writable in arrays]


def run_pipeline(fault, order, completion):
    rng = np.random.default_rng(fault)
    a, b = (aligned(rng.integers(-8, 9, shape).astype(ml_dtypes.bfloat16)) for shape in ((64, 64), (128, 64)))
    out = aligned(np.zeros((64, 128), np.float32))
    emulator = cases()
    emulator.reset(order, seed=fault, completion=completion)
    status = emulator.library.hopper_pipeline(fault, *pointers(emulator, (a, False), (b, False), (out, True)))
    return status, emulator.fault, out, a.astype(np.float32) @ b.astype(np.float32).T


@pytest.mark.parametrize(("order", "completion"), ORDERS)
def test_pipeline(order, completion):
    status, fault, out, expected = run_pipeline(0, order, completion)
    assert (status, fault) == (0, "")
    assert np.array_equal(out, expected)


@pytest.mark.parametrize(("order", "completion"), ORDERS)
@pytest.mark.parametrize("number", [n for n, text in enumerate(FAULTS) if text])
def test_fault_is_found(number, order, completion):
    if FAULTS[number].startswith("block 0 ends") and completion != 1:
        pytest.skip("the copy is there before the block ends")
    status, fault, _, _ = run_pipeline(number, order, completion)
    assert status == 719
    pattern = FAULTS[number]
    assert re.search(pattern, fault), fault


@pytest.mark.parametrize(("order", "completion"), ORDERS)
def test_accumulators_hold_nan_until_the_wait(order, completion):
    status, fault, out, _ = run_pipeline(3, order, completion)
    assert (status, fault) == (0, "")
    assert np.isnan(out[out != 0]).all() and np.isnan(out).any()


def lay_out(image, start, matrix, line, mn_major, leading, stride):
    """Writes matrix [rows or columns, 16] as CuTe's canonical layout says (PTX ISA, "Canonical Layouts").

    With T = 8 elements, w = line / 16 the pieces of a line, i = (i0, i1, ...) in mixed radix:
    K-major ((8, m), (T, 2k)): ((w T, stride), (1, T)); MN-major ((T, w, m), (8, k)): ((1, T, leading), (w T, stride));
    then the swizzle <log2 w, 4, 3>: bits 4.. of the byte address ^= bits 7...
    """
    pieces = line // 16
    for i in range(matrix.shape[0]):
        for k in range(16):
            if mn_major:
                i0, i1, i2 = i % 8, i // 8 % pieces, i // 8 // pieces
                at = 2 * (i0 + 8 * i1 + pieces * 8 * (k % 8)) + leading * i2 + stride * (k // 8)
            else:
                at = 2 * (pieces * 8 * (i % 8) + k % 8 + 8 * (k // 8)) + stride * (i // 8)
            address = start + at
            address ^= (address >> 7 & pieces - 1) << 4
            image[address : address + 2] = np.frombuffer(matrix[i, k].tobytes(), np.uint8)


# Start and strides of A and B: first steps of 16 k inside a tile of 64, then other strides.
@pytest.mark.parametrize("b_mn_major", [0, 1])
@pytest.mark.parametrize("place", range(5))
def test_descriptors(place, b_mn_major):
    a, a_stride = [(0, 1024), (32, 1024), (64, 1024), (96, 1024), (0, 2048)][place]
    b, leading, stride = [
        (0, 8192, 1024),
        (2048, 8192, 1024),
        (4096, 8192, 1024),
        (0, 1024, 2048),
        (0, 2048, 1024),
    ][place]
    if not b_mn_major:
        b, leading, stride = a, 0, a_stride
    rng = np.random.default_rng(place)
    left, right = (rng.integers(-8, 9, (n, 16)).astype(np.float16) for n in (64, 128))
    image = aligned(np.full(65536, 0xFF, np.uint8))  # NaN elsewhere
    lay_out(image[:16384], a, left, 128, False, 0, a_stride)
    lay_out(image[16384:], b, right, 128, bool(b_mn_major), leading, stride)
    out = aligned(np.zeros((64, 128), np.float32))
    emulator = cases()
    emulator.reset(place % 3, seed=1, completion=place % 3)
    status = emulator.library.hopper_product(
        *pointers(emulator, (image, False), (out, True)),
        *map(ctypes.c_int64, [image.size]),
        *map(ctypes.c_int32, [a, 16384 + b, a_stride, leading, stride, b_mn_major]),
    )
    assert (status, emulator.fault) == (0, "")
    assert np.array_equal(out, 2 * left.astype(np.float32) @ right.astype(np.float32).T)


@pytest.mark.parametrize(("order", "completion"), ORDERS)
def test_ring_of_boxes(order, completion):
    """Every box arrives whole, zeros outside the matrix, and none is overwritten too early."""
    matrix = aligned(np.random.default_rng(5).integers(1, 2**16, (90, 248)).astype(np.uint16))
    out = aligned(np.zeros((5, 64, 64), np.uint16))
    emulator = cases()
    emulator.reset(order, seed=3, completion=completion)
    status = emulator.library.hopper_ring(
        *pointers(emulator, (matrix, False), (out, True)), *map(ctypes.c_int64, matrix.shape)
    )
    assert (status, emulator.fault) == (0, "")
    wide = np.zeros((90 + 200, 248 + 400), np.uint16)
    wide[100:190, 200:448] = matrix
    for step in range(5):
        top, left = 100 + 8 * step - 8, 200 + 64 * step - 16
        assert np.array_equal(out[step], wide[top : top + 64, left : left + 64])


def test_tensor_map_refuses_what_the_driver_does():
    matrix = aligned(np.zeros((8, 12), np.uint16))
    emulator = cases()
    emulator.reset()
    where = pointers(emulator, (matrix, False))[0]
    for address, columns in [(where.value, 12), (where.value + 2, 8)]:
        assert emulator.library.hopper_ring(
            ctypes.c_void_p(address), None, ctypes.c_int64(8), ctypes.c_int64(columns)
        )


def test_swizzle():
    """A bijection of each atom; eight lanes meet all banks whether they touch a column or a line of pieces."""
    swizzle = cases().library.hopper_swizzle
    atom = [swizzle(offset) for offset in range(2048)]
    assert sorted(atom[:1024]) == list(range(1024)) and sorted(atom[1024:]) == list(range(1024, 2048))
    pieces = np.array([swizzle(16 * i) // 16 for i in range(64)]).reshape(8, 8)
    assert all(atom[i] - atom[i // 16 * 16] == i % 16 for i in range(2048))  # pieces stay whole
    for one in (*pieces, *pieces.T):
        assert len(set(one % 8)) == 8  # 8 pieces of 4 banks
