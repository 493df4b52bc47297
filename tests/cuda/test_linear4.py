"""The CUDA products with 4-bit weights on the emulator, against float64."""

import ml_dtypes
import numpy as np
import pytest
from host_library import DTYPES, FORMATS, Linear4, Scales4, emulated
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import _C

NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # unit roundoff
AUTO, SIMT, MMA = 0, 1, 2


def aligned(shape, dtype):
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(n + 256, 0xA5, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + n].view(dtype).reshape(shape)


def check(m, rows, depth, dtype, quant_type, blocksize, path, nested=False, bias=None, order=0):
    """Runs the kernel and holds every element to its bound; returns nothing."""
    rng = np.random.default_rng(m * 1000003 + rows * 1009 + depth)
    w = rng.standard_normal(rows * depth).astype(np.float32)
    packed_, absmax_ = map(np.asarray, _C.quantize_4bit(w, quant_type, blocksize))
    x, y, packed = (
        aligned((m, depth), NUMPY[dtype]),
        aligned((m, rows), NUMPY[dtype]),
        aligned(packed_.shape, "u1"),
    )
    x[:] = rng.standard_normal((m, depth)).astype(NUMPY[dtype])
    packed[:] = packed_

    emulator = emulated()
    emulator.reset(order, seed=rows)
    scales = Scales4(nested_blocksize=256)
    if nested:
        codes, nested_absmax, mean = _C.nest_absmax(absmax_)
        codes, nested_absmax = np.asarray(codes), np.asarray(nested_absmax)
        table = np.asarray(_C.map8("dynamic"), np.float32)
        outer = np.repeat(nested_absmax, 256)[: codes.size]
        absmax = (table[codes] * outer + np.float32(mean)).astype(np.float32)
        scales.absmax_codes, scales.nested_absmax = emulator.register(codes), emulator.register(nested_absmax)
        scales.nested_map, scales.nested_offset_value = emulator.register(table), mean
    else:
        absmax = absmax_
        scales.absmax = emulator.register(absmax)
    args = Linear4(x=emulator.register(x), packed=emulator.register(packed), scales=scales,
                   y=emulator.register(y, True), io_dtype=DTYPES[dtype], format=FORMATS[quant_type], path=path,
                   blocksize=blocksize, m=m, rows=rows, depth=depth)  # fmt: skip
    if bias is not None:
        b = rng.standard_normal(rows).astype(NUMPY[bias])
        args.bias, args.bias_dtype = emulator.register(b), DTYPES[bias]
    emulator.run("linear4", args)

    # Reference: the codebook as the kernel has it (rounded to x's dtype on tensor cores), all else exact.
    mma = path == MMA or (path == AUTO and dtype != "float32" and depth % 64 == 0 and blocksize >= 64)
    book = np.asarray(_C.codebook(quant_type))
    if mma:
        book = book.astype(NUMPY[dtype])
    codes = np.stack([packed >> 4, packed & 15], 1).ravel()[: rows * depth]
    weight = book.astype(np.float64)[codes] * np.repeat(absmax.astype(np.float64), blocksize)[: rows * depth]
    weight = weight.reshape(rows, depth)
    wide = x.astype(np.float64)
    expected = wide @ weight.T
    size = np.abs(wide) @ np.abs(weight).T
    if bias is not None:
        expected += b.astype(np.float64)
        size += np.abs(b.astype(np.float64))
    # Products and sums: at most depth / 32 + 40 roundings of 2^-24 on any path through either kernel
    # (32 lanes or 16 k at once); then one rounding to y's dtype, of y itself.
    bound = size * (depth / 16 + 40) * 2.0**-24 + np.abs(expected) * UNIT[dtype] * 1.01
    error = np.abs(y.astype(np.float64) - expected)
    assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize("path", [SIMT, MMA])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9])
def test_half_precision(m, dtype, path):
    check(m, 33, 192, dtype, "nf4", 64, path, bias="float32", order=m % 3)


@pytest.mark.parametrize("m", [1, 8, 11])
def test_float32(m):
    check(m, 20, 129, "float32", "nf4", 64, AUTO, nested=True, bias="float16", order=m % 3)


def test_deep():
    """Every warp gets several rounds of chunks, with a remainder."""
    check(3, 16, 64 * 83, "bfloat16", "fp4", 128, MMA, nested=True)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 17),
    st.integers(1, 70),
    st.one_of(st.integers(1, 300), st.integers(1, 10).map(lambda n: 64 * n)),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([32, 64, 128, 4096]),
    st.booleans(),
    st.sampled_from([None, *DTYPES]),
    st.integers(0, 2),
)
def test_any_shape(m, rows, depth, dtype, quant_type, blocksize, nested, bias, order):
    check(m, rows, depth, dtype, quant_type, blocksize, AUTO, nested, bias, order)


def test_mma_refuses_what_it_cannot_do():
    for depth, blocksize, dtype in [(96, 64, "bfloat16"), (64, 32, "bfloat16"), (64, 64, "float32")]:
        with pytest.raises(AssertionError, match="invalid argument"):
            check(1, 4, depth, dtype, "nf4", blocksize, MMA)
