"""Quantize and dequantize of NF4 and FP4 through the extension module, against NumPy and bitsandbytes."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import _C

BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# The constants in bitsandbytes' compiled CUDA code, as bits of float32.
NF4_LIMITS = np.array(
    [0xBF591CD9, 0xBF1C5270, 0xBEEB8480, 0xBEADEA76, 0xBE703CEC, 0xBE0D38BC, 0xBD3A7871, 0x3D22FAFF,
     0x3DF64863, 0x3E5067E0, 0x3E9582D4, 0x3EC753F9, 0x3F006D03, 0x3F248DAF, 0x3F5C89D9], np.uint32
).view(np.float32)  # fmt: skip
FP4_LIMITS = np.array(
    [0x3B2AAAB9, 0x3DB00000, 0x3E555555, 0x3E955555, 0x3ED55556, 0x3F155550, 0x3F555555], np.uint32
).view(np.float32)  # fmt: skip
FP4_CODES = np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8)


def encode(v: np.ndarray, quant_type: str) -> np.ndarray:
    if quant_type == "nf4":
        return (v[:, None] > NF4_LIMITS).sum(1).astype(np.uint8)
    return FP4_CODES[(np.abs(v)[:, None] > FP4_LIMITS).sum(1)] | np.where(v < 0, 8, 0).astype(np.uint8)


def block_maxima(x: np.ndarray, blocksize: int) -> np.ndarray:
    blocks = [x[i : i + blocksize] for i in range(0, len(x), blocksize)]
    return np.array([np.abs(block).max() for block in blocks], np.float32)


def plain_quantize(x: np.ndarray, quant_type: str, blocksize: int, absmax: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        inverse = np.where(absmax == 0, np.float32(0), np.float32(1) / absmax)
        codes = encode(x * np.repeat(inverse, blocksize)[: len(x)], quant_type)
    if len(codes) % 2:
        codes = np.append(codes, np.uint8(7 if quant_type == "nf4" else 0))
    return codes[0::2] << 4 | codes[1::2]


def plain_dequantize(packed, absmax, n, quant_type, blocksize) -> np.ndarray:
    codes = np.stack([packed >> 4, packed & 15], 1).ravel()[:n]
    with np.errstate(all="ignore"):
        return _C.codebook(quant_type)[codes] * np.repeat(absmax, blocksize)[:n]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def sample(n: int, seed: int, dtype: str) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    x[n // 3 : n // 3 + 80] = 0
    return x.astype(DTYPES[dtype])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_equals_numpy(quant_type, blocksize, dtype):
    for n in (0, 1, 2, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize + 17, 70001):
        x = sample(n, n, dtype)
        packed, absmax = _C.quantize_4bit(x, quant_type, blocksize)
        wide = x.astype(np.float32)
        assert same_bits(absmax, block_maxima(wide, blocksize))
        assert same_bits(packed, plain_quantize(wide, quant_type, blocksize, absmax))
        back = plain_dequantize(packed, absmax, n, quant_type, blocksize)
        for out, numpy_type in DTYPES.items():
            got = _C.dequantize_4bit(packed, absmax, quant_type, blocksize, (n,), out)
            assert same_bits(np.asarray(got).view(numpy_type), back.astype(numpy_type))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_views_of_any_strides(data):
    """Rows, steps, transposes and reversals give what their contiguous copies give; so does `out`."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    base = rng.standard_normal([2 * s for s in shape]).astype(np.float32)
    view = base[tuple(slice(None, None, data.draw(st.sampled_from([1, 2, -1, -2]))) for _ in shape)]
    view = view.transpose(data.draw(st.permutations(range(len(shape)))))
    quant_type = data.draw(st.sampled_from(["nf4", "fp4"]))
    packed, absmax = _C.quantize_4bit(view, quant_type, 32)
    for got, want in zip(
        (packed, absmax), _C.quantize_4bit(np.ascontiguousarray(view), quant_type, 32), strict=True
    ):
        assert same_bits(got, want)
    target = np.zeros_like(base)[tuple(slice(None, None, 2) for _ in shape)]
    target = target.transpose(data.draw(st.permutations(range(len(shape)))))
    size = min(target.size, view.size)
    target = target[: max(1, size * target.shape[0] // target.size)] if target.size > size else target
    start = data.draw(st.integers(0, view.size - target.size))
    _C.dequantize_4bit(packed, absmax, quant_type, 32, target.shape, start=start, out=target)
    want = plain_dequantize(packed, absmax, view.size, quant_type, 32)[start : start + target.size]
    assert same_bits(target.ravel(), want)


@pytest.mark.parametrize("scales", ["absmax", "search"])
def test_threads_do_not_matter(scales):
    x = sample(1_000_003, 5, "float32")
    before = _C.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 4):
            _C.set_num_threads(threads)
            packed, absmax = _C.quantize_4bit(x, "nf4", 64, scales)
            back = _C.dequantize_4bit(packed, absmax, "nf4", 64, (x.size - 7,), "bfloat16", start=7)
            results.append(
                (packed.tobytes(), absmax.tobytes(), np.asarray(back).tobytes(), _C.nest_absmax(absmax)[2])
            )
        assert all(result == results[0] for result in results)
    finally:
        _C.set_num_threads(before)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_trouble_stays_in_its_block(quant_type):
    """NaN and infinity spoil their own block only; zeros become +0; subnormals do not divide by zero."""
    x = sample(64 * 8, 1, "float32")
    x[70], x[130], x[192:256] = np.nan, -np.inf, 0
    x[200] = -0.0
    x[256:320] *= np.float32(1e-40)
    packed, absmax = _C.quantize_4bit(x, quant_type, 64)
    back = _C.dequantize_4bit(packed, absmax, quant_type, 64, x.shape)
    assert np.isnan(absmax[1]) and np.isnan(back[64:128]).all()
    assert np.isinf(absmax[2]) and back[130] == -np.inf and np.isnan(np.delete(back[128:192], 2)).all()
    assert absmax[3] == 0 and (back[192:256] == 0).all() and not np.signbit(back[192:256]).any()
    assert np.isfinite(np.delete(back, np.s_[64:192])).all()
    # The widest gap of the codebook, halved, bounds the error; 2e-7 for the roundings of v and of the thresholds.
    gap = np.diff(np.sort(_C.codebook(quant_type))).max() / 2
    healthy = np.r_[0:64, 320:512]
    assert (np.abs(back[healthy] - x[healthy]) <= (gap + 2e-6) * np.repeat(absmax, 64)[healthy]).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_searched_scales(quant_type, dtype, blocksize):
    """Each block stores the best of 19 factors of its absmax, and codes that are nearest under it."""
    n = 6 * blocksize + 37
    x = np.random.default_rng(3).standard_normal(n).astype(np.float32).astype(DTYPES[dtype])
    wide = x.astype(np.float32)
    _, plain = _C.quantize_4bit(x, quant_type, blocksize)
    packed, scale = _C.quantize_4bit(x, quant_type, blocksize, "search")
    assert same_bits(packed, plain_quantize(wide, quant_type, blocksize, scale))
    factors = np.float32([round(0.70 + 0.02 * k, 2) for k in range(19)])

    def errors(scales: np.ndarray) -> np.ndarray:
        back = plain_dequantize(
            plain_quantize(wide, quant_type, blocksize, scales), scales, n, quant_type, blocksize
        )
        square = (back.astype(np.float64) - wide) ** 2
        return np.array([square[i : i + blocksize].sum() for i in range(0, n, blocksize)])

    tried = np.stack([errors(plain * f) for f in factors])
    assert all(s in plain[b] * factors for b, s in enumerate(scale))
    # float32 sums of at most 4096 squares in 16 lanes: 256 + 4 additions, each off by 2^-24 at most, and
    # squares off by the rounding of q * s, 2^-24 |x| against errors of about 0.05 |x|.
    assert (errors(scale) <= tried.min(0) * (1 + 260 * 2.0**-24 + 2**-16)).all()
    if blocksize == 64:
        assert errors(scale).sum() < 0.9 * errors(plain).sum()


def test_search_keeps_what_it_cannot_improve():
    x = np.zeros(64 * 6, np.float32)
    x[64], x[128], x[129] = np.nan, np.inf, 1
    x[192:256] = 1e-42
    x[256:320] = 3e38
    x[320] = -2.5
    packed, absmax = _C.quantize_4bit(x, "nf4", 64, "search")
    want_packed, want = _C.quantize_4bit(x, "nf4", 64)
    assert same_bits(absmax, want) and same_bits(packed, want_packed)


@pytest.mark.parametrize("blocksize", [1, 64, 256, 4096])
def test_nesting(blocksize):
    absmax = np.abs(np.random.default_rng(0).standard_normal(5000)).astype(np.float32)
    codes, nested, offset = _C.nest_absmax(absmax, blocksize)
    assert offset == np.float32(absmax.astype(np.float64).mean())
    want_codes, want_nested = _C.quantize_8bit(absmax - np.float32(offset), "dynamic", blocksize)
    assert same_bits(codes, want_codes) and same_bits(nested, want_nested)
    # Nested scales decode as map[code] * nested + offset, two roundings.
    expanded = _C.map8("dynamic")[codes] * np.repeat(nested, blocksize)[:5000] + np.float32(offset)
    packed = np.random.default_rng(1).integers(0, 256, 5000 * 32, np.uint8)
    got = _C.dequantize_4bit(
        packed, codes, "nf4", 64, (5000 * 64 - 3,), start=3,
        nested_absmax=nested, nested_map=_C.map8("dynamic"), nested_offset=offset, nested_blocksize=blocksize,
    )  # fmt: skip
    assert same_bits(got, _C.dequantize_4bit(packed, expanded, "nf4", 64, got.shape, start=3))


def test_bad_arguments():
    x = np.ones(64, np.float32)
    for blocksize in (0, 1, 16, 48, 8192, -64, 2**62):
        with pytest.raises(ValueError, match="blocksize"):
            _C.quantize_4bit(x, "nf4", blocksize)
    with pytest.raises((ValueError, OverflowError)):
        _C.quantize_4bit(x, "nf4", 2**64)
    with pytest.raises(ValueError, match="nf5"):
        _C.quantize_4bit(x, "nf5")
    with pytest.raises(TypeError, match="int32"):
        _C.quantize_4bit(x.astype(np.int32))
    packed, absmax = _C.quantize_4bit(x)
    with pytest.raises(ValueError, match="elements"):
        _C.dequantize_4bit(packed, absmax, "nf4", 64, (64,), start=1)
    frozen = np.zeros(64, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(BufferError, match="read-only"):
        _C.dequantize_4bit(packed, absmax, "nf4", 64, (64,), out=frozen)


# The thresholds at which bitsandbytes' CPU code, which compares with midpoints rounded twice, stands one float32
# away from its CUDA code. Only v equal to the upper of the two numbers can have another code.
CPU_DIFFERS = NF4_LIMITS[[0, 8, 12, 14]]


@pytest.mark.parametrize("blocksize", [64, 256])
def test_equals_bitsandbytes(blocksize):
    """The package gives the same bytes, but for what its CPU code does otherwise than its CUDA code.

    NF4: v within a unit of the four thresholds above, and a last partial block, where it divides instead of
    multiplying by the reciprocal. FP4: its CPU thresholds differ by up to 2e-6, its codes of |v| < 0.0027 too.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    if "halfbyte" in (functional.__file__ or ""):
        pytest.skip("halfbyte stands in for bitsandbytes in this process")
    x = np.random.default_rng(9).standard_normal(blocksize * 500).astype(np.float32)
    for quant_type in ("nf4", "fp4"):
        theirs, state = functional.quantize_4bit(
            torch.from_numpy(x), quant_type=quant_type, blocksize=blocksize
        )
        packed, absmax = _C.quantize_4bit(x, quant_type, blocksize)
        assert same_bits(absmax, state.absmax.numpy())
        v = x * np.repeat(np.float32(1) / absmax, blocksize)
        ours, other = (np.stack([p >> 4, p & 15], 1).ravel() for p in (packed, theirs.numpy().ravel()))
        differ = ours != other
        if quant_type == "nf4":
            near = np.min(np.abs(v[:, None] - CPU_DIFFERS), 1) <= 2.0**-23
        else:
            near = np.min(np.abs(np.abs(v)[:, None] - FP4_LIMITS), 1) <= 2e-6
            near |= np.abs(v) < 0.0027
        assert not (differ & ~near).any()
        back = functional.dequantize_4bit(torch.from_numpy(packed)[:, None], state).numpy().ravel()
        # Equal as numbers: its CPU code writes +0 for FP4's code 8, which its table says is -0.
        assert np.array_equal(_C.dequantize_4bit(packed, absmax, quant_type, blocksize, x.shape), back)
