"""8-bit block-wise and row-wise int8 formats through the extension module, against NumPy and bitsandbytes."""

import ml_dtypes
import numpy as np
import pytest

from halfbyte import _C

MAPS = ["dynamic", "dynamic_unsigned", "linear", "fp8_e4m3", "fp8_e5m2", "normal"]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def borders(table: np.ndarray) -> np.ndarray:
    """The code of v is the number of borders below it: midpoints, moved down where a tie must pass them."""
    with np.errstate(over="ignore"):
        middle = (table[:-1] + table[1:]) * np.float32(0.5)
    odd = (np.arange(255) % 2 == 1) & (table[:-1] != table[1:])
    return np.maximum.accumulate(np.where(odd, np.nextafter(middle, np.float32(-np.inf)), middle))


def plain_quantize(x: np.ndarray, table: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    step = min(blocksize, x.size)
    absmax = np.array([np.abs(x[i : i + step]).max() for i in range(0, x.size, step)], np.float32)
    with np.errstate(all="ignore"):
        inverse = np.where(absmax == 0, np.float32(0), np.float32(1) / absmax)
        v = x * np.repeat(inverse, step)[: x.size]
        codes = np.searchsorted(borders(table), v, side="left").astype(np.uint8)
    codes[np.isnan(v)] = 0
    return codes, absmax


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("blocksize", [1, 7, 64, 100, 256, 4096, 5000, 2**62])
def test_blockwise_equals_numpy(name, blocksize):
    table = _C.map8(name)
    for n in (1, 2, 255, 256, 257, 9001, 70003):
        for dtype, numpy_type in DTYPES.items():
            x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
            x[n // 3 : n // 3 + 90] = 0
            x = (np.abs(x) if "unsigned" in name else x).astype(numpy_type)
            codes, absmax = _C.quantize_8bit(x, name, blocksize)
            want_codes, want_absmax = plain_quantize(x.astype(np.float32), table, blocksize)
            assert same_bits(absmax, want_absmax) and same_bits(codes, want_codes)
            step = min(blocksize, n)
            back = table[codes] * np.repeat(absmax, step)[:n]
            got = _C.dequantize_8bit(codes, absmax, table, blocksize, dtype)
            assert same_bits(np.asarray(got).view(numpy_type), back.astype(numpy_type))


def test_blockwise_any_map():
    """Nearest entry of a map that the caller made, equal entries and wide ranges included."""
    rng = np.random.default_rng(0)
    for k in range(40):
        table = np.sort(rng.standard_normal(256) * 10.0 ** rng.integers(-30, 30, 256)).astype(np.float32)
        table[10 + k : 20 + k] = table[10 + k]
        x = rng.standard_normal(3000).astype(np.float32)
        codes, _ = _C.quantize_8bit(x, table, 100)
        want, _ = plain_quantize(x, table, 100)
        assert same_bits(codes, want)


def test_table_changed_in_place_counts():
    """Nothing is remembered of an earlier call with the same memory."""
    table = _C.map8("linear").copy()
    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    for _ in range(3):
        assert same_bits(_C.quantize_8bit(x, table, 64)[0], plain_quantize(x, table, 64)[0])
        table[:100] *= np.float32(0.99)
        table.sort()


def test_blockwise_strides_and_trouble():
    base = np.random.default_rng(2).standard_normal((60, 300)).astype(np.float32)
    base[3, 5], base[20, 7] = np.nan, np.inf
    for view in (base.T, base[::-2, ::3], base[:, :1], base[::-1].T):
        for blocksize in (1, 50, 4097, 9000):
            got = _C.quantize_8bit(view, "dynamic", blocksize)
            want = _C.quantize_8bit(np.ascontiguousarray(view), "dynamic", blocksize)
            assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
            out = np.zeros(view.shape[::-1], np.float16).T
            _C.dequantize_8bit(*got, "dynamic", blocksize, out=out)
            dense = _C.dequantize_8bit(*got, "dynamic", blocksize, "float16")
            assert np.array_equal(out, dense, equal_nan=True)
    x = np.zeros(100, np.float32)
    x[70] = -np.inf
    codes, absmax = _C.quantize_8bit(x, "dynamic", 64)
    back = _C.dequantize_8bit(codes, absmax, "dynamic", 64)
    assert absmax[0] == 0 and (back[:64] == 0).all() and not np.signbit(back[:64]).any()
    assert np.isnan(np.delete(back[64:], 6)).all() and back[70] == -np.inf


def test_bad_maps_and_blocksizes():
    x = np.ones(10, np.float32)
    for change in ({0: np.nan}, {255: np.inf}, {3: 5.0}):
        table = _C.map8("linear").copy()
        for i, value in change.items():
            table[i] = value
        with pytest.raises(ValueError, match=r"map\["):
            _C.quantize_8bit(x, table, 64)
    with pytest.raises(ValueError, match="map"):
        _C.quantize_8bit(x, np.zeros(255, np.float32), 64)
    for blocksize in (0, -1):
        with pytest.raises(ValueError, match="blocksize"):
            _C.quantize_8bit(x, "dynamic", blocksize)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("threshold", [0.0, 2.5, 100.0])
def test_rows_equal_numpy(dtype, threshold):
    for shape in ((1, 1), (1, 4500), (5, 33), (2, 3, 64), (7,), (3, 0), (0, 5)):
        x = np.random.default_rng(4).standard_normal(shape).astype(DTYPES[dtype])
        if x.size > 50:
            x.reshape(-1)[:7] = 0
        codes, scale, columns = _C.quantize_rows_int8(x, threshold)
        wide = (
            x.astype(np.float32).reshape(-1, shape[-1]) if shape[-1] else np.zeros((shape[0], 0), np.float32)
        )
        outlier = np.abs(wide) >= threshold if threshold else np.zeros(wide.shape, bool)
        kept = np.where(outlier, 0, np.abs(wide))
        want_scale = kept.max(1, initial=0).astype(np.float32)
        assert same_bits(scale, want_scale)
        with np.errstate(all="ignore"):
            v = np.rint(wide * (np.float32(127) / want_scale)[:, None])
        zero = outlier | np.isnan(v)
        if threshold:
            assert np.array_equal(np.asarray(columns, bool), outlier.any(0))
            if len(wide) > 1:
                zero = zero | outlier.any(0)
        else:
            assert columns is None
        want = np.where(zero, 0, v).astype(np.int8).reshape(shape)
        assert same_bits(codes, want)
        back = want.reshape(wide.shape).astype(np.float32) * want_scale[:, None] * np.float32(1 / 127)
        for out, numpy_type in DTYPES.items():
            got = np.asarray(_C.dequantize_rows_int8(codes, scale, out)).view(numpy_type)
            assert same_bits(got, back.reshape(shape).astype(numpy_type))


def test_rows_with_trouble():
    x = np.random.default_rng(5).standard_normal((5, 100)).astype(np.float32)
    x[0, 3], x[1, 4], x[2], x[3] = np.nan, np.inf, 0, x[3] * np.float32(1e-40)
    codes, scale, _ = _C.quantize_rows_int8(x)
    assert np.isnan(scale[0]) and np.isinf(scale[1]) and scale[2] == 0
    assert not codes[:3].any()
    assert set(np.unique(codes[3])) <= {-127, 0, 127}, "127 / absmax is infinite: saturated, never wrapped"
    strided = np.zeros((10, 200), np.float32)[::2, ::2]
    strided[:] = x
    assert same_bits(_C.quantize_rows_int8(strided)[0], codes)
    with pytest.raises(ValueError, match="threshold"):
        _C.quantize_rows_int8(x, -1.0)


def test_equals_bitsandbytes():
    """The installed package's codes, but where a rounding decides.

    Block-wise: its CPU code looks 16-bit keys up and is not nearest, so only decoding is compared, and encoding against
    its CUDA rule in plain_quantize above. int8: its CPU factor is 127 * (1 / absmax), two roundings where
    CUDA has a division, so v may be off by 2^-23 of itself: only codes at a half may differ, by one.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    if "halfbyte" in (functional.__file__ or ""):
        pytest.skip("halfbyte stands in for bitsandbytes in this process")
    x = np.random.default_rng(6).standard_normal((64, 500)).astype(np.float16)
    for threshold in (0.0, 2.5):
        codes, scale, columns = _C.quantize_rows_int8(x, threshold)
        theirs, their_scale, their_columns = functional.int8_vectorwise_quant(
            torch.from_numpy(x.copy()), threshold
        )
        assert same_bits(scale, their_scale.numpy())
        if threshold:
            assert np.array_equal(np.nonzero(columns)[0], their_columns.numpy())
        v = x.astype(np.float64) * 127 / scale[:, None]
        half = np.abs(np.abs(v - np.trunc(v)) - 0.5) <= np.abs(v) * 2.0**-22
        difference = np.abs(codes.astype(int) - theirs.numpy())
        assert difference.max() <= 1 and not (difference.astype(bool) & ~half).any()
        back = functional.int8_vectorwise_dequant(torch.from_numpy(codes), torch.from_numpy(scale)).numpy()
        assert same_bits(_C.dequantize_rows_int8(codes, scale), back)
    flat = x.astype(np.float32).ravel()
    codes, absmax = _C.quantize_8bit(flat, "dynamic", 256)
    state = functional.QuantState(
        torch.from_numpy(absmax), code=functional.create_dynamic_map(), blocksize=256, dtype=torch.float32
    )
    back = functional.dequantize_blockwise(torch.from_numpy(codes), state).numpy()
    assert same_bits(_C.dequantize_8bit(codes, absmax, "dynamic", 256), back)
    their_absmax = functional.quantize_blockwise(torch.from_numpy(flat), blocksize=256)[1].absmax.numpy()
    assert same_bits(absmax, their_absmax)
