"""The CUDA codecs on the emulator give the bits of the CPU's kernels (which tests/c proves right)."""

import ctypes

import ml_dtypes
import numpy as np
import pytest
from host_library import (
    DTYPES,
    FORMATS,
    STRUCTURES,
    Dequantize4,
    Dequantize8,
    Quantize4,
    Quantize8,
    Queue,
    Scales4,
    emulated,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import _C

NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def aligned(n, dtype, offset=0):
    """n elements at `offset` elements behind a multiple of 256 bytes."""
    size = np.dtype(dtype).itemsize
    raw = np.full((n + offset) * size + 256, 0xA5, np.uint8)
    start = -raw.ctypes.data % 256 + offset * size
    return raw[start : start + n * size].view(dtype)


def data(n, dtype, seed, kind="normal"):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n).astype(np.float32)
    if kind == "wild":  # every magnitude, zeros, blocks of zeros, NaN and infinity
        x *= np.float32(10) ** rng.integers(-30, 30, n).astype(np.float32)
        x[rng.random(n) < 0.2] = 0
        if n > 200:
            x[64:200] = 0
            x[rng.integers(0, n)] = np.nan
            x[rng.integers(0, n)] = -np.inf
    with np.errstate(over="ignore"):
        return x.astype(NUMPY[dtype])


def same(a, b):
    """Equal bit for bit; any NaN equals any other."""
    a, b = np.asarray(a), np.asarray(b)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    nan = np.isnan(wide_a)
    bits = f"u{a.dtype.itemsize}"
    return a.shape == b.shape and np.array_equal(nan, np.isnan(wide_b)) and np.array_equal(
        a.view(bits)[~nan], b.view(bits)[~nan])  # fmt: skip


def quantize4(x, quant_type, blocksize, offset=0, order=0, search=0):
    emulator = emulated()
    emulator.reset(order, seed=x.size)
    source = aligned(x.size, x.dtype, offset)
    source[:] = x
    packed = aligned((x.size + 1) // 2, np.uint8, offset)
    absmax = aligned(-(-x.size // blocksize), np.float32)
    args = Quantize4(
        x=emulator.register(source),
        x_dtype=DTYPES[x.dtype.name],
        format=FORMATS[quant_type],
        search=search,
        blocksize=blocksize,
        n=x.size,
        packed=emulator.register(packed, True),
        absmax=emulator.register(absmax, True),
    )
    emulator.run("quantize4", args)
    return packed, absmax


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", FORMATS)
def test_quantize4(quant_type, dtype, order):
    for n, blocksize, offset in [(1, 64, 0), (63, 32, 0), (64, 64, 0), (2048, 64, 0), (4097, 64, 0),
                                 (2049, 128, 1), (1000, 256, 0), (5000, 512, 0), (9001, 4096, 3)]:  # fmt: skip
        for kind in ("normal", "wild"):
            x = data(n, dtype, n, kind)
            packed, absmax = quantize4(x, quant_type, blocksize, offset, order)
            expected_packed, expected_absmax = _C.quantize_4bit(x, quant_type, blocksize)
            assert same(absmax, expected_absmax), (n, blocksize, kind)
            assert np.array_equal(packed, expected_packed), (n, blocksize, kind)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 3000),
    st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(sorted(FORMATS)),
    st.integers(0, 7),
    st.integers(0, 2),
)
def test_quantize4_any_shape(n, blocksize, dtype, quant_type, offset, order):
    x = data(n, dtype, n + blocksize, "wild")
    packed, absmax = quantize4(x, quant_type, blocksize, offset, order)
    expected_packed, expected_absmax = _C.quantize_4bit(x, quant_type, blocksize)
    assert same(absmax, expected_absmax)
    assert np.array_equal(packed, expected_packed)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 700),
    st.sampled_from([32, 64, 128, 256, 4096]),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from(["normal", "wild", "huge", "tiny"]),
    st.integers(0, 3),
    st.integers(0, 2),
)
def test_quantize4_with_searched_scales(n, blocksize, dtype, quant_type, kind, offset, order):
    """The same scale of the nineteen, also where some overflow or vanish, and the codes that follow."""
    x = data(n, dtype, n, "wild" if kind == "wild" else "normal").astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        x = (x * np.float32({"huge": 1e38, "tiny": 1e-44}.get(kind, 1))).astype(NUMPY[dtype])
    packed, absmax = quantize4(x, quant_type, blocksize, offset, order, search=1)
    expected_packed, expected_absmax = _C.quantize_4bit(x, quant_type, blocksize, scales="search")
    assert same(absmax, expected_absmax)
    assert np.array_equal(packed, expected_packed)


@pytest.mark.parametrize("quant_type", FORMATS)
def test_quantize4_at_every_border(quant_type):
    """The floats around each threshold, and every magnitude of a grid, in blocks whose absmax is 1."""
    value = np.sort(np.asarray(_C.codebook(quant_type), np.float32))
    near = (value[1:] + value[:-1])[:, None] / 2
    near = near.view(np.int32) + np.arange(-40, 41, dtype=np.int32)
    grid = np.linspace(-1, 1, 4001, dtype=np.float32)
    # Where buckets of any kind may begin: quarters of every octave, and even divisions.
    edges = np.float32(2.0) ** np.arange(-12, 1)[:, None] * np.float32([1, 1.25, 1.5, 1.75])
    edges = (edges.astype(np.float32).reshape(-1, 1).view(np.int32) + np.arange(-1, 2)).astype(np.int32)
    edges = edges.view(np.float32).ravel()
    middle = np.concatenate(
        [grid, np.float32([0.0, -0.0, 1e-45, -1e-45]), near.view(np.float32).ravel(), edges, -edges]
    )
    middle = middle[np.abs(middle) <= 1]  # not the NaNs just below 0
    blocks = -(-middle.size // 63)
    x = np.zeros((blocks, 64), np.float32)
    x[:, 0] = 1
    x[:, 1:] = np.resize(middle, (blocks, 63))
    packed, absmax = quantize4(x.ravel(), quant_type, 64)
    assert np.array_equal(packed, _C.quantize_4bit(x.ravel(), quant_type, 64)[0])
    assert (absmax == 1).all()


def dequantize4(
    packed, absmax, quant_type, blocksize, start, n, dtype, nested=None, offset=0, order=0, columns=0
):
    emulator = emulated()
    emulator.reset(order, seed=n)
    codes = aligned(packed.size, np.uint8, offset)
    codes[:] = packed
    scales = Scales4(nested_blocksize=256)
    if nested is None:
        scales.absmax = emulator.register(absmax)
    else:
        scales.absmax_codes = emulator.register(absmax)
        scales.nested_absmax = emulator.register(nested["absmax"])
        scales.nested_map = emulator.register(nested["map"])
        if nested["by_pointer"]:
            scales.nested_offset = emulator.register(nested["offset"])
        else:
            scales.nested_offset_value = float(nested["offset"][0])
    out = aligned(n, NUMPY[dtype], offset)
    args = Dequantize4(
        packed=emulator.register(codes),
        scales=scales,
        format=FORMATS[quant_type],
        out_dtype=DTYPES[dtype],
        blocksize=blocksize,
        start=start,
        n=n,
        columns=columns,
        out=emulator.register(out, True),
    )
    emulator.run("dequantize4", args)
    return out


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6000),
    st.sampled_from([32, 64, 128, 512, 4096]),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(sorted(FORMATS)),
    st.integers(0, 3),
    st.sampled_from([0, 16, 1, 7, 64]),
    st.sampled_from([None, "pointer", "value"]),
    st.integers(0, 2),
)
def test_dequantize4(n, blocksize, dtype, quant_type, offset, start, nesting, order):
    x = data(n, "float32", n)
    packed, absmax = map(np.asarray, _C.quantize_4bit(x, quant_type, blocksize))
    start = min(start, n)
    nested, extra = None, {}
    if nesting:
        absmax, nested_absmax, mean = _C.nest_absmax(absmax)
        absmax, nested_absmax = np.asarray(absmax), np.asarray(nested_absmax)
        table = np.asarray(_C.map8("dynamic"), np.float32)
        nested = {"absmax": nested_absmax, "map": table, "offset": np.float32([mean]),
                  "by_pointer": nesting == "pointer"}  # fmt: skip
        extra = {"nested_absmax": nested_absmax, "nested_map": table, "nested_offset": mean}
    out = dequantize4(packed, absmax, quant_type, blocksize, start, n - start, dtype, nested, offset, order)
    expected = _C.dequantize_4bit(
        packed, absmax, quant_type, blocksize, (n - start,), dtype, start=start, **extra
    )
    assert same(out, np.asarray(expected).view(NUMPY[dtype]))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 140),
    st.one_of(st.integers(1, 150), st.sampled_from([16, 64, 128, 192])),
    st.sampled_from([32, 64, 4096]),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([0, 0, 1]),
    st.sampled_from([0, 0, 16, 5]),
    st.booleans(),
    st.integers(0, 2),
)
def test_dequantize4_to_the_transpose(
    rows, columns, blocksize, dtype, quant_type, offset, start, nesting, order
):
    n = rows * columns
    packed, absmax = map(np.asarray, _C.quantize_4bit(data(n + start, "float32", n), quant_type, blocksize))
    nested, extra = None, {}
    if nesting:
        absmax, nested_absmax, mean = _C.nest_absmax(absmax)
        absmax, nested_absmax = np.asarray(absmax), np.asarray(nested_absmax)
        table = np.asarray(_C.map8("dynamic"), np.float32)
        nested = {"absmax": nested_absmax, "map": table, "offset": np.float32([mean]), "by_pointer": True}
        extra = {"nested_absmax": nested_absmax, "nested_map": table, "nested_offset": mean}
    out = dequantize4(packed, absmax, quant_type, blocksize, start, n, dtype, nested, offset, order, columns)
    expected = _C.dequantize_4bit(
        packed, absmax, quant_type, blocksize, (rows, columns), dtype, start=start, **extra
    )
    assert same(out.reshape(columns, rows), np.asarray(expected).view(NUMPY[dtype]).T)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5000),
    st.sampled_from([1, 7, 8, 64, 100, 256, 2048, 4096]),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(["dynamic", "dynamic_unsigned", "linear", "fp8_e4m3"]),
    st.integers(0, 5),
    st.integers(0, 2),
)
def test_codec8(n, blocksize, dtype, name, offset, order):
    emulator = emulated()
    x = data(n, dtype, n, "wild")
    table = np.asarray(_C.map8(name), np.float32)
    expected_codes, expected_absmax = map(np.asarray, _C.quantize_8bit(x, table, blocksize))

    emulator.reset(order, seed=n)
    source, codes = aligned(n, x.dtype, offset), aligned(n, np.uint8, offset)
    source[:] = x
    absmax = aligned(-(-n // blocksize), np.float32)
    emulator.run("quantize8", Quantize8(x=emulator.register(source), map=emulator.register(table),
                 x_dtype=DTYPES[dtype], blocksize=blocksize, n=n, codes=emulator.register(codes, True),
                 absmax=emulator.register(absmax, True)))  # fmt: skip
    assert same(absmax, expected_absmax)
    assert np.array_equal(codes, expected_codes)

    emulator.reset(order, seed=n)
    out = aligned(n, NUMPY[dtype], offset)
    emulator.run("dequantize8", Dequantize8(codes=emulator.register(codes), absmax=emulator.register(absmax),
                 map=emulator.register(table), out_dtype=DTYPES[dtype], blocksize=blocksize, n=n,
                 out=emulator.register(out, True)))  # fmt: skip
    expected = _C.dequantize_8bit(codes, absmax, table, blocksize, dtype=dtype)
    assert same(out, np.asarray(expected).view(NUMPY[dtype]))


@settings(deadline=None, max_examples=40)
@given(
    st.one_of(st.integers(0, 3000), st.integers(0, 70000)),
    st.sampled_from([1, 7, 32, 100, 256, 4096]),
    st.sampled_from(["normal", "equal", "wild"]),
    st.integers(0, 2),
)
def test_nest4(n, blocksize, kind, order):
    """The same offset bit for bit, whatever the order of the threads, and the codes that follow from it."""
    if blocksize < 32:
        n = min(n, 3000)
    emulator = emulated()
    emulator.reset(order, seed=n)
    absmax = np.abs(data(n, "float32", n, "wild" if kind == "wild" else "normal"))
    if kind == "equal":
        absmax[:] = np.float32(0.1)
    table = np.asarray(_C.map8("dynamic"), np.float32)
    codes, nested = aligned(n, np.uint8), aligned(-(-n // blocksize), np.float32)
    offset = aligned(1, np.float32)
    args = STRUCTURES["hb_cuda_nest4"](n=n, blocksize=blocksize)
    for name, array in (("absmax", absmax), ("map", table), ("codes", codes), ("nested_absmax", nested),
                        ("offset", offset)):  # fmt: skip
        setattr(args, name, emulator.register(array, name not in ("absmax", "map")))
    room = emulator.api.nest4_workspace(ctypes.byref(Queue(0, None)), ctypes.byref(args))
    workspace = aligned(room, np.uint8)
    args.workspace = emulator.register(workspace, True)
    emulator.run("nest4", args)
    expected_codes, expected_nested, expected_offset = _C.nest_absmax(absmax, blocksize)
    assert same(offset[0], np.float32(expected_offset))
    assert same(nested, expected_nested)
    assert np.array_equal(codes, expected_codes)


@pytest.mark.parametrize("order", [0, 2])
def test_codec8_stays(order):
    """More blocks of elements than a small device holds: threads go on to the next."""
    emulator = emulated()
    n, blocksize = 33000, 64
    x, table = data(n, "bfloat16", 1), np.asarray(_C.map8("dynamic"), np.float32)
    expected_codes, expected_absmax = map(np.asarray, _C.quantize_8bit(x, table, blocksize))
    emulator.reset(order, seed=n)
    source, codes, absmax = aligned(n, x.dtype), aligned(n, np.uint8), aligned(-(-n // blocksize), np.float32)
    source[:] = x
    args = Quantize8(x=emulator.register(source), map=emulator.register(table), x_dtype=DTYPES["bfloat16"],
                     blocksize=blocksize, n=n, codes=emulator.register(codes, True),
                     absmax=emulator.register(absmax, True))  # fmt: skip
    emulator.run("quantize8", args, device=1)
    assert same(absmax, expected_absmax)
    assert np.array_equal(codes, expected_codes)
    out = aligned(n, x.dtype)
    args = Dequantize8(codes=emulator.register(codes), absmax=emulator.register(absmax), map=emulator.register(table),
                       out_dtype=DTYPES["bfloat16"], blocksize=blocksize, n=n,
                       out=emulator.register(out, True))  # fmt: skip
    emulator.run("dequantize8", args, device=1)
    expected = _C.dequantize_8bit(codes, absmax, table, blocksize, dtype="bfloat16")
    assert same(out, np.asarray(expected).view(out.dtype))
