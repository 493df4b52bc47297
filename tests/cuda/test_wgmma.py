"""The sm_90a product on the emulator, against float64: both directions, tails, every completion and thread order."""

import ctypes

import ml_dtypes
import numpy as np
import pytest
from host_library import DTYPES, FORMATS, Linear4, Queue, Scales4, emulated
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import _C

NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # unit roundoff
WGMMA = 4


def placed(array, offset=0):
    """A copy of the array, `offset` bytes behind a multiple of 256, with garbage on both sides."""
    raw = np.full(array.nbytes + 512, 0xA5, np.uint8)
    start = -raw.ctypes.data % 256 + offset
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def product(m, rows, depth, dtype="bfloat16", quant_type="nf4", blocksize=64, nested=False, bias=None,
            transposed=False, order=0, completion=None, split=True, shift=0, y_shift=0, poison=None):  # fmt: skip
    """Runs the kernel; returns y, what float64 makes of the same weights, and the bound of the difference."""
    rng = np.random.default_rng(m * 1000003 + rows * 1009 + depth)
    w = rng.standard_normal(rows * depth).astype(np.float32)
    packed, absmax = map(np.asarray, _C.quantize_4bit(w, quant_type, blocksize))
    columns, k = (depth, rows) if transposed else (rows, depth)
    x = placed(rng.standard_normal((m, k)).astype(NUMPY[dtype]))
    y = placed(np.zeros((m, columns), NUMPY[dtype]), y_shift)
    packed = placed(packed, shift)
    absmax = np.array(absmax)
    if poison:
        absmax[absmax.size * 2 // 3] = poison

    emulator = emulated()
    emulator.reset(order, seed=rows, completion=completion)
    scales = Scales4(nested_blocksize=256)
    if nested:
        codes, nested_absmax, mean = _C.nest_absmax(absmax)
        codes, nested_absmax = np.asarray(codes), np.asarray(nested_absmax)
        table = np.asarray(_C.map8("dynamic"), np.float32)
        absmax = (table[codes] * np.repeat(nested_absmax, 256)[: codes.size] + np.float32(mean)).astype("f4")
        scales.absmax_codes, scales.nested_absmax = emulator.register(codes), emulator.register(nested_absmax)
        scales.nested_map, scales.nested_offset_value = emulator.register(table), mean
    else:
        absmax = placed(absmax)
        scales.absmax = emulator.register(absmax)
    args = Linear4(x=emulator.register(x), packed=emulator.register(packed), scales=scales,
                   y=emulator.register(y, True), io_dtype=DTYPES[dtype], format=FORMATS[quant_type], path=WGMMA,
                   blocksize=blocksize, m=m, rows=rows, depth=depth, transposed=int(transposed))  # fmt: skip
    b = np.zeros(columns)
    if bias is not None and not transposed:
        b = rng.standard_normal(rows).astype({**NUMPY, "float32": np.float32}[bias])
        args.bias, args.bias_dtype = emulator.register(b), DTYPES[bias]
    emulator.api.linear4_workspace.restype = ctypes.c_int64
    size = emulator.api.linear4_workspace(ctypes.byref(Queue(0, None)), ctypes.byref(args))
    if size and split:
        workspace = placed(np.full(size, 0xFF, np.uint8))
        args.workspace = emulator.register(workspace, True)
    emulator.run("linear4", args)

    codes = np.stack([packed >> 4, packed & 15], 1).ravel()[: rows * depth]
    exact = np.asarray(_C.codebook(quant_type))[codes] * np.repeat(absmax, blocksize)[: rows * depth]
    weight = exact.astype(np.float32).astype(NUMPY[dtype]).astype(np.float64).reshape(rows, depth)
    weight = weight if transposed else weight.T
    wide = x.astype(np.float64)
    expected = wide @ weight + b.astype(np.float64)
    size = np.abs(wide) @ np.abs(weight) + np.abs(b.astype(np.float64))
    # Sums: 16 products at once, then float32: k / 16 roundings, up to 16 parts and the bias; then y's own.
    bound = size * (k / 16 + 20) * 2.0**-24 + np.abs(expected) * UNIT[dtype] * 1.01 + 1e-30
    return y, expected, bound


def check(*shape, **options):
    y, expected, bound = product(*shape, **options)
    error = np.abs(y.astype(np.float64) - expected)
    assert (error <= bound).all(), (error / bound).max()
    return y


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", sorted(NUMPY))
@pytest.mark.parametrize("m", [17, 64, 100, 130])
def test_each_shape_of_block(m, dtype, transposed):
    check(m, 136, 192, dtype, transposed=transposed, bias="float32", order=m % 3)


@pytest.mark.parametrize("completion", range(3))
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("transposed", [False, True])
def test_every_completion(order, completion, transposed):
    """The ring goes round several times, and the result is the same to the bit."""
    y = check(33, 520, 640, transposed=transposed, order=order, completion=completion, split=False)
    first = test_every_completion.__dict__.setdefault(transposed, y.view(np.uint16).copy())
    assert np.array_equal(y.view(np.uint16), first)


@pytest.mark.parametrize("transposed", [False, True])
def test_parts(transposed):
    """The summation is split (and its parts added in order), or not when there is no workspace."""
    shape = (0, 776, 72) if transposed else (0, 72, 776)
    for m, split in [(20, True), (20, False), (70, True), (257, True)]:
        check(m, *shape[1:], transposed=transposed, nested=True, bias="float16", split=split)


@pytest.mark.parametrize("depth", [8, 24, 40, 72, 128, 200])
@pytest.mark.parametrize("transposed", [False, True])
def test_tails(depth, transposed):
    """Blocks that straddle rows, parts of units, rows of W that do not fill a tile, odd rows of y."""
    check(19, 16, depth, blocksize=32, transposed=transposed, quant_type="fp4")
    if not transposed:
        check(65, 131, depth, blocksize=128, nested=True, bias="bfloat16", y_shift=2)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("transposed", [False, True])
def test_nonfinite_scales_stay_where_they_are(transposed, poison):
    """One bad block: the outputs that meet it are NaN or infinite, and no others, tails of tiles included."""
    for depth, rows in [(40, 16), (96, 72), (200, 136)]:
        with np.errstate(invalid="ignore"):
            y, expected, bound = product(18, rows, depth, transposed=transposed, blocksize=32, poison=poison)
        y = y.astype(np.float64)
        good = np.isfinite(expected)
        assert 0 < good.sum() < good.size
        assert np.array_equal(np.isfinite(y), good)
        assert (np.abs(y[good] - expected[good]) <= bound[good]).all()


def test_codes_at_any_word():
    for shift in (0, 4, 8):
        check(18, 40, 96, shift=shift)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_block_sizes(blocksize):
    check(17, 72, 136, blocksize=blocksize, nested=blocksize % 3 == 1)
    check(17, 72, 136, blocksize=blocksize, transposed=True)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 140),
    st.integers(1, 34).map(lambda n: 8 * n),
    st.integers(1, 34).map(lambda n: 8 * n),
    st.sampled_from(sorted(NUMPY)),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([32, 64, 4096]),
    st.booleans(),
    st.sampled_from([None, "float32", "bfloat16"]),
    st.booleans(),
    st.integers(0, 2),
)
def test_any_shape(m, rows, depth, dtype, quant_type, blocksize, nested, bias, transposed, order):
    check(m, rows, depth, dtype, quant_type, blocksize, nested, bias, transposed, order)


def test_refuses_what_it_cannot_do():
    for shape, options in [
        ((17, 8, 12), {}),  # rows of x that the copy engine cannot address
        ((17, 12, 8), {"transposed": True}),
        ((17, 8, 64), {"shift": 2}),
    ]:
        with pytest.raises(AssertionError, match="invalid argument"):
            check(*shape, **options)
