"""The CUDA kernels of LLM.int8() and of 4-bit embeddings on the emulator."""

import numpy as np
import pytest
from host_library import DTYPES, FORMATS, STRUCTURES, Scales4, emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codecs import NUMPY, aligned, data, same

from halfbyte import _C

QuantizeRows8, DequantizeRows8, Gather4 = (
    STRUCTURES[f"hb_cuda_{name}"] for name in ("quantize_rows8", "dequantize_rows8", "gather4")
)


def placed(array, offset=0):
    """A copy at `offset` elements behind a multiple of 256 bytes."""
    copy = aligned(array.size, array.dtype, offset)
    copy[:] = array.ravel()
    return copy.reshape(array.shape)


def with_outliers(x, kind, threshold=6.0):
    """Puts into x what `kind` says; x is changed."""
    rows, depth = x.shape
    rng = np.random.default_rng(rows * 31 + depth)
    if x.size == 0:
        return x
    if kind == "one":
        x[rng.integers(rows), rng.integers(depth)] = -2 * threshold
    if kind == "many":
        x[rng.random(x.shape) < 0.02] = threshold
        x[:, rng.integers(depth)] = threshold * 1.5
    if kind == "all":
        x[rng.integers(rows, size=depth), np.arange(depth)] = threshold * 3
    if kind == "bad":
        x[rng.integers(rows), rng.integers(depth)] = np.inf
        x[rng.integers(rows), rng.integers(depth)] = np.nan
    return x


def quantize_rows(x, threshold, offset, order):
    emulator = emulated()
    emulator.reset(order, seed=x.size)
    rows, depth = x.shape
    source = placed(x, offset)
    codes, scale = aligned(x.size, np.int8, offset), aligned(rows, np.float32)
    marks = aligned(depth, np.uint8, offset)
    args = QuantizeRows8(x=emulator.register(source), x_dtype=DTYPES[x.dtype.name], threshold=threshold,
                         rows=rows, depth=depth, codes=emulator.register(codes, True),
                         scale=emulator.register(scale, True))  # fmt: skip
    if threshold or offset % 2:
        args.outlier_columns = emulator.register(marks, True)
    emulator.run("quantize_rows8", args)
    return codes.reshape(x.shape), scale, marks if args.outlier_columns else None


def check_quantize_rows(x, threshold, offset=0, order=0):
    codes, scale, marks = quantize_rows(x, threshold, offset, order)
    expected = [np.asarray(part) for part in _C.quantize_rows_int8(x, threshold)]
    assert same(scale, expected[1])
    assert np.array_equal(codes, expected[0])
    if marks is not None:
        assert np.array_equal(marks.astype(bool), expected[2] if threshold else np.zeros(x.shape[1], bool))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "one", "many", "all", "bad"])
def test_quantize_rows(kind, dtype, order):
    for rows, depth, offset in [(1, 64, 0), (1, 1000, 0), (3, 8, 0), (17, 264, 0), (2, 1032, 0), (5, 77, 1)]:
        x = with_outliers(data(rows * depth, dtype, rows).reshape(rows, depth), kind)
        for threshold in (0.0, 6.0):
            check_quantize_rows(x, threshold, offset, order)


@pytest.mark.parametrize("depth", [8192, 8200, 9001])
def test_quantize_long_rows(depth):
    """Around what a block keeps in registers, and behind it."""
    x = with_outliers(data(2 * depth, "bfloat16", depth).reshape(2, depth), "many")
    x[0, -1], x[1, -3] = 5.5, 7.0
    check_quantize_rows(x, 6.0)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 20),
    st.one_of(st.integers(0, 300), st.integers(1, 12).map(lambda n: 128 * n)),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([0.0, 0.5, 6.0]),
    st.sampled_from(["none", "one", "many", "all", "bad", "wild"]),
    st.integers(0, 7),
    st.integers(0, 2),
)
def test_quantize_any_rows(rows, depth, dtype, threshold, kind, offset, order):
    x = data(rows * depth, dtype, rows + depth, "wild" if kind == "wild" else "normal").reshape(rows, depth)
    check_quantize_rows(with_outliers(x, kind), threshold, offset, order)


def test_every_int8_code():
    """Values at and beside each border between two codes, tiny and huge rows."""
    middle = (np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)) / 127
    near = (middle.view(np.int32)[:, None] + np.arange(-6, 7, dtype=np.int32)).view(np.float32).ravel()
    row = np.concatenate([near, np.linspace(-1, 1, 700, dtype=np.float32)])
    for factor in (1.0, 3.7, 1e-38, 1e-44, 3e38):
        x = (row[None] * np.float32(factor)).astype(np.float32)
        x[0, 0] = factor
        check_quantize_rows(x, 0.0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 20),
    st.one_of(st.integers(0, 300), st.integers(1, 20).map(lambda n: 16 * n)),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 7),
    st.integers(0, 2),
)
def test_dequantize_rows(rows, depth, dtype, offset, order):
    rng = np.random.default_rng(rows + 100 * depth)
    emulator = emulated()
    emulator.reset(order, seed=depth)
    codes = placed(rng.integers(-128, 128, (rows, depth)).astype(np.int8), offset)
    scale = np.exp(rng.normal(0, 20, rows)).astype(np.float32)
    scale[rng.random(rows) < 0.1] = np.nan
    out = aligned(rows * depth, NUMPY[dtype], offset)
    emulator.run("dequantize_rows8", DequantizeRows8(codes=emulator.register(codes), scale=emulator.register(scale),
                 out_dtype=DTYPES[dtype], rows=rows, depth=depth, out=emulator.register(out, True)))  # fmt: skip
    expected = np.asarray(_C.dequantize_rows_int8(codes, scale, dtype=dtype)).view(NUMPY[dtype])
    assert same(out.reshape(rows, depth), expected)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 12),
    st.integers(1, 30),
    st.one_of(st.integers(1, 200), st.integers(1, 12).map(lambda n: 16 * n)),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([32, 64, 128]),
    st.booleans(),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 3),
    st.integers(0, 2),
)
def test_gather4(n, rows, depth, quant_type, blocksize, nested, dtype, offset, order):
    rng = np.random.default_rng(n + 50 * rows + depth)
    packed, absmax = map(
        np.asarray, _C.quantize_4bit(data(rows * depth, "float32", depth), quant_type, blocksize)
    )
    index = rng.integers(-rows, rows, n)
    index[rng.random(n) < 0.2] = rows
    index[rng.random(n) < 0.1] = -rows - 1
    index[rng.random(n) < 0.1] = 2**62
    emulator = emulated()
    emulator.reset(order, seed=depth)
    scales, extra = Scales4(nested_blocksize=256), {}
    if nested:
        absmax, nested_absmax, mean = _C.nest_absmax(absmax)
        absmax, nested_absmax = np.asarray(absmax), np.asarray(nested_absmax)
        table = np.asarray(_C.map8("dynamic"), np.float32)
        scales.absmax_codes, scales.nested_absmax = (
            emulator.register(absmax),
            emulator.register(nested_absmax),
        )
        scales.nested_map, scales.nested_offset_value = emulator.register(table), mean
        extra = {"nested_absmax": nested_absmax, "nested_map": table, "nested_offset": mean}
    else:
        scales.absmax = emulator.register(absmax)
    codes, out = placed(packed, offset), aligned(n * depth, NUMPY[dtype], offset)
    emulator.run("gather4", Gather4(index=emulator.register(index), packed=emulator.register(codes), scales=scales,
                 out=emulator.register(out, True), format=FORMATS[quant_type], out_dtype=DTYPES[dtype],
                 blocksize=blocksize, n=n, rows=rows, depth=depth))  # fmt: skip
    shape = (rows, depth)
    table = np.asarray(_C.dequantize_4bit(packed, absmax, quant_type, blocksize, shape, dtype, **extra))
    expected = np.full((n, depth), np.nan, NUMPY[dtype])
    inside = (index >= -rows) & (index < rows)
    expected[inside] = table.view(NUMPY[dtype])[index[inside]]
    assert same(out.reshape(n, depth), expected)
