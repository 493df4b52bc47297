"""The CUDA kernels of LLM.int8() and of 4-bit embeddings on the emulator."""

import ctypes

import numpy as np
import pytest
from host_library import DTYPES, FORMATS, STRUCTURES, Scales4, emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codecs import NUMPY, aligned, data, same

from halfbyte import _C

QuantizeRows8, DequantizeRows8, Gather4, Matmul8, Linear8 = (
    STRUCTURES[f"hb_cuda_{name}"]
    for name in ("quantize_rows8", "dequantize_rows8", "gather4", "matmul8", "linear8")
)
U = 2.0**-24  # unit roundoff of float32
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
TINY = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}  # smallest subnormal
INT32, INT64 = 6, 7  # hb_dtype
STEP = np.float32(1 / 127)
AUTO, SIMT, MMA, TILE, TILE_SMALL = 0, 1, 2, 3, 5


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


# ---- products -----------------------------------------------------------------------------------


def matmul(a, b, offset=0, order=0, path=AUTO):
    emulator = emulated()
    emulator.reset(order, seed=a.size)
    a, b = placed(a, offset), placed(b, offset)
    c = np.zeros((a.shape[0], b.shape[0]), np.int32)
    emulator.run("matmul8", Matmul8(a=emulator.register(a), b=emulator.register(b), m=a.shape[0], n=b.shape[0],
                 depth=a.shape[1], c=emulator.register(c, True), path=path))  # fmt: skip
    return c


def check_matmul(m, n, depth, offset=0, order=0, path=AUTO):
    rng = np.random.default_rng(m + 100 * n + depth)
    a = rng.integers(-128, 128, (m, depth)).astype(np.int8)
    b = rng.integers(-128, 128, (n, depth)).astype(np.int8)
    assert np.array_equal(matmul(a, b, offset, order, path), a.astype(np.int32) @ b.astype(np.int32).T)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("m", [1, 8, 16, 17, 33, 64, 70])
def test_matmul(m, order):
    check_matmul(m, 40, 160, 0, order)


@pytest.mark.parametrize("path", [SIMT, MMA, TILE, TILE_SMALL])
def test_matmul_paths(path):
    """More than one tile of each size, and depths that end within a chunk and behind all stages."""
    for m, n, depth in [(130, 133, 80), (65, 34, 64 * 14 + 16), (1, 1, 16), (3, 260, 0)]:
        check_matmul(m, n, depth, 0, path % 3, path)


def test_matmul_refuses():
    for path in (MMA, TILE, TILE_SMALL):
        with pytest.raises(AssertionError, match=r"invalid argument|unknown error"):
            check_matmul(2, 2, 15, path=path)


def test_matmul_largest_sums():
    depth = 131056
    a = np.full((2, depth), -128, np.int8)
    for path in (SIMT, MMA):
        assert (matmul(a, a[:1], path=path) == depth << 14).all()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.one_of(st.integers(0, 300), st.integers(1, 30).map(lambda n: 16 * n)),
    st.integers(0, 5),
    st.integers(0, 2),
)
def test_matmul_any_shape(m, n, depth, offset, order):
    check_matmul(m, n, depth, offset, order)


def case(m, rows, depth, dtype, kind="none", experts=None, transposed=False):
    """x, codes, scale, as a layer has them."""
    rng = np.random.default_rng(m * 1000003 + rows * 1009 + depth)
    steps = rows if transposed else depth
    x = with_outliers(data(m * steps, dtype, m).reshape(m, steps), kind)
    shape = (rows, depth) if experts is None else (experts, rows, depth)
    codes = rng.integers(-128, 128, shape).astype(np.int8)
    return x, codes, np.exp(rng.normal(-3, 1, shape[:-1])).astype(np.float32)


def linear(x, codes, scale, *, bias=None, threshold=0.0, mode="dynamic", transposed=False, offsets=None,
           offset=0, order=0, path=AUTO, device=0):  # fmt: skip
    emulator = emulated()
    emulator.reset(order, seed=x.size)
    rows, depth = codes.shape[-2:]
    m, outputs = x.shape[0], depth if transposed else rows
    x, codes = placed(x, offset), placed(codes, offset)
    y = placed(np.full((m, outputs), 7, x.dtype), offset)
    args = Linear8(x=emulator.register(x), codes=emulator.register(codes), scale=emulator.register(scale),
                   y=emulator.register(y, True), io_dtype=DTYPES[x.dtype.name], mode=int(mode == "exact"),
                   transposed=transposed, path=path, threshold=threshold, m=m, rows=rows, depth=depth)  # fmt: skip
    if bias is not None:
        args.bias, args.bias_dtype = emulator.register(bias), DTYPES[bias.dtype.name]
    if offsets is not None:
        args.offsets, args.experts = emulator.register(offsets), codes.shape[0]
        args.offsets_dtype = INT32 if offsets.dtype == np.int32 else INT64
    queue = STRUCTURES["hb_cuda_queue"](device, None)
    size = emulator.api.linear8_workspace(ctypes.byref(queue), ctypes.byref(args))
    fused = x.shape[0] <= 16 and x.ctypes.data % 16 == codes.ctypes.data % 16 == depth % 16 == 0
    fused = fused and offsets is None and device < 2 and path in (AUTO, MMA) and m * (depth + 64) < 60000
    assert size % 256 == 0
    if mode == "dynamic":
        assert (size > 0) == (y.size > 0 and not fused)
    workspace = aligned(size, np.uint8)
    if size:
        args.workspace = emulator.register(workspace, True)
    emulator.run("linear8", args, device)
    return y


def expert_of(m, offsets):
    """The expert of each row, or -1."""
    ends = np.minimum(np.maximum.accumulate(np.maximum(offsets.astype(np.int64), 0)), m)
    expert = np.searchsorted(ends, np.arange(m), side="right")
    return np.where(expert < offsets.size, expert, -1)


def check_dynamic(x, codes, scale, threshold=0.0, bias=None, offsets=None, **how):
    """Bit for bit the documented float32 operations with no outlier column (16-bit x: one), else their bound."""
    dtype, m = x.dtype.name, x.shape[0]
    y = linear(x, codes, scale, bias=bias, threshold=threshold, offsets=offsets, **how)
    cx, sx, marks = (np.asarray(part) for part in _C.quantize_rows_int8(x, threshold))
    columns = np.flatnonzero(marks) if threshold else np.zeros(0, int)
    expert = np.zeros(m, int) if offsets is None else expert_of(m, offsets)
    stack = codes if offsets is not None else codes[None]
    factor = ((scale if offsets is not None else scale[None]) * STEP).astype(np.float32)
    bias = None if bias is None else (bias if offsets is not None else bias[None]).astype(np.float32)
    exact, size, single = np.zeros(y.shape), np.zeros(y.shape), np.zeros(y.shape, np.float32)
    with np.errstate(all="ignore"):
        for e in np.unique(expert[expert >= 0]):
            here = expert == e
            c = cx[here].astype(np.int64) @ stack[e].astype(np.int64).T
            x_factor = (sx[here] * STEP)[:, None]
            wide, outliers = x[here][:, columns].astype(np.float64), stack[e][:, columns].astype(np.float64)
            value = c.astype(np.float32) * x_factor
            if columns.size:
                value = value + (wide @ outliers.T).astype(np.float32)
            value = value * factor[e]
            single[here] = value if bias is None else value + bias[e]
            exact[here] = (c * x_factor.astype(np.float64) + wide @ outliers.T) * factor[e]
            size[here] = (np.abs(c * x_factor) + np.abs(wide) @ np.abs(outliers).T) * factor[e]
            if bias is not None:
                exact[here] += bias[e]
                size[here] += np.abs(bias[e])
        rounded = single.astype(x.dtype)
    if columns.size == 0 or (columns.size == 1 and dtype != "float32"):
        assert same(y, rounded)
        if offsets is None and np.isfinite(x.astype(np.float32)).all():
            cpu = _C.linear_8bit(x, codes, scale, None if bias is None else bias[0], threshold)
            assert same(y, np.asarray(cpu).view(x.dtype))
    else:  # each term: a sum over the columns (in three parts for float32), and at most 8 operations more
        finite = np.isfinite(exact) & np.isfinite(rounded.astype(np.float64))
        bound = size * (3 * columns.size + 8) * U + np.abs(exact) * UNIT[dtype] * 1.01 + TINY[dtype]
        error = np.abs(y.astype(np.float64)[finite] - exact[finite])
        assert (error <= bound[finite]).all(), (error - bound[finite]).max()
        assert np.array_equal(np.isnan(y), np.isnan(rounded))


@pytest.mark.parametrize("kind", ["none", "one", "many", "all", "bad"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 5, 16, 17, 40])
def test_dynamic(m, dtype, kind):
    x, codes, scale = case(m, 24, 96, dtype, kind)
    bias = data(24, "float32", m)
    for threshold in (0.0, 6.0):
        check_dynamic(x, codes, scale, threshold, bias, order=m % 3)


@pytest.mark.parametrize("path", [SIMT, MMA, TILE, TILE_SMALL])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "one", "many", "all"])
def test_dynamic_paths(kind, dtype, path):
    """More than one tile, more than one portion of outlier columns, with and without whole runs."""
    for m, rows in [(70, 40), (131, 139)] if kind == "all" else [(67, 35)]:
        x, codes, scale = case(m, rows, 80, dtype, kind)
        check_dynamic(x, codes, scale, 6.0, data(rows, "float16", m), order=m % 3, path=path)


@pytest.mark.parametrize("kind", ["none", "one", "many", "all", "bad"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic_fused(dtype, kind):
    """Few rows, which one kernel quantizes and multiplies: each number of rows, depths around its steps."""
    for m, depth in [(1, 4160), (1, 2064), (2, 2048), (3, 64), (7, 144), (8, 16), (9, 144), (16, 80)]:
        x, codes, scale = case(m, 35, depth, dtype, kind)
        check_dynamic(x, codes, scale, 6.0, data(35, "float32", m), order=m % 3)


def test_dynamic_fused_stays():
    """More rows of W than the device holds blocks, so that blocks go on; and a device that cannot."""
    x, codes, scale = case(3, 16 * 9 + 5, 80, "float16", "many")
    for device in (0, 1, 2):
        check_dynamic(x, codes, scale, 6.0, device=device)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.one_of(st.integers(0, 200), st.integers(1, 20).map(lambda n: 16 * n)),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([0.0, 1.0, 6.0]),
    st.sampled_from(["none", "one", "many", "all", "bad"]),
    st.sampled_from([None, *DTYPES]),
    st.integers(0, 3),
    st.integers(0, 2),
)
def test_dynamic_any_shape(m, rows, depth, dtype, threshold, kind, bias, offset, order):
    x, codes, scale = case(m, rows, depth, dtype, kind)
    check_dynamic(x, codes, scale, threshold, None if bias is None else data(rows, bias, m), offset=offset,
                  order=order)  # fmt: skip


def check_float(x, codes, scale, bias=None, transposed=False, offsets=None, **how):
    """Exact mode and transposed products: float32 products and sums, in any order (docs/numerics.md)."""
    dtype, m = x.dtype.name, x.shape[0]
    y = linear(x, codes, scale, bias=bias, mode="exact", transposed=transposed, offsets=offsets, **how)
    expert = np.zeros(m, int) if offsets is None else expert_of(m, offsets)
    weight = codes * (scale[..., None] / 127.0)
    weight = weight if offsets is not None else weight[None]
    wide = x.astype(np.float64)
    exact, size = np.zeros(y.shape), np.zeros(y.shape)
    for e in np.unique(expert[expert >= 0]):
        here, w = expert == e, weight[e] if transposed else weight[e].T
        exact[here], size[here] = wide[here] @ w, np.abs(wide[here]) @ np.abs(w)
        if bias is not None:
            b = (bias if offsets is not None else bias[None])[e].astype(np.float64)
            exact[here] += b
            size[here] += np.abs(b)
    bound = size * (x.shape[1] / 8 + 16) * U + np.abs(exact) * UNIT[dtype] * 1.01 + TINY[dtype]
    error = np.abs(y.astype(np.float64) - exact)
    assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize("path", [SIMT, MMA])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 7, 17])
def test_float(m, dtype, transposed, path):
    """Depths that end within a chunk, and behind what is under way."""
    for rows, depth in [(48, 160), (35, 1104), (600, 36)] if transposed else [(48, 160), (35, 1104)]:
        x, codes, scale = case(m, rows, depth, dtype, transposed=transposed)
        bias = None if transposed else data(rows, "bfloat16", m)
        check_float(x, codes, scale, bias, transposed, order=m % 3, path=path)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("path", [SIMT, MMA])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_exact(dtype, path, transposed):
    """Each code times 1 and scale 127: y is the code itself."""
    codes = np.resize(np.arange(-128, 128), (256, 256)).astype(np.int8)
    codes = codes.T.copy() if transposed else codes
    scale = np.full(256, 127, np.float32)
    x = np.eye(256, dtype=NUMPY[dtype])[:128:7]
    y = linear(x, codes, scale, mode="exact", transposed=transposed, path=path)
    weight = codes if transposed else codes.T
    assert np.array_equal(y.astype(np.float32), weight[:128:7])


@pytest.mark.parametrize("path", [SIMT, MMA])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_propagates(dtype, transposed, path):
    """A row of x with NaN or infinity gives what IEEE products give; largest finite numbers stay finite."""
    x, codes, _ = case(5, 64, 64, dtype, transposed=transposed)
    codes[codes == 0] = 1
    x[1, 3], x[2, 5], x[3, 7] = np.nan, np.inf, -np.inf
    x[4] = 0
    x[4, 9] = np.finfo(np.float32).max if dtype == "float32" else 3e38 if dtype == "bfloat16" else 65504
    y = linear(x, codes, np.full(64, 1.0, np.float32) * STEP, mode="exact", transposed=transposed, path=path)
    y = y.astype(np.float64)
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all() and np.isinf(y[2:4]).all()
    weight = codes if transposed else codes.T
    assert np.array_equal(np.sign(y[2:4]), np.sign([weight[5], -weight[7].astype(int)]))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.one_of(st.integers(0, 200), st.integers(1, 20).map(lambda n: 16 * n)),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([None, *DTYPES]),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 2),
)
def test_float_any_shape(m, rows, depth, dtype, bias, transposed, offset, order):
    x, codes, scale = case(m, rows, depth, dtype, transposed=transposed)
    bias = None if bias is None or transposed else data(rows, bias, m)
    check_float(x, codes, scale, bias, transposed, offset=offset, order=order)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-3, 50), min_size=1, max_size=70),
    st.booleans(),
    st.integers(1, 48),
    st.sampled_from([16, 17, 48, 64]),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(["dynamic", "exact", "transposed"]),
    st.booleans(),
    st.integers(0, 2),
)
def test_experts(offsets, ascending, m, rows, dtype, how, wide, order):
    """Offsets in any disorder, more experts than lanes of a warp, empty ones, rows that meet nobody."""
    offsets = np.asarray(sorted(offsets) if ascending else offsets, np.int64 if wide else np.int32)
    x, codes, scale = case(m, rows, 32, dtype, "one", offsets.size, how == "transposed")
    bias = data(offsets.size * rows, "float32", m).reshape(-1, rows)
    if how == "dynamic":
        check_dynamic(x, codes, scale, 6.0, bias, offsets, order=order)
    else:
        transposed = how == "transposed"
        check_float(x, codes, scale, None if transposed else bias, transposed, offsets, order=order)
