"""y = x W^T + b and dx = dy W for 4-bit W, against float64, through halfbyte._C.

With u = 2^-24, K the length of the sum and S = sum |w| |x|, float32 results obey |err| <= (P + K/128 + 14) u S:
within a panel at most P = min(K, 256) products are added one after the other, panels of 128 or more one after
the other, and the rest covers the scale, the last few additions and second order terms (kernels_linear4.h).
Rounding x and w to bfloat16 adds 2^-8 S each. The bias adds one rounding, the output dtype another.
"""

import ml_dtypes
import numpy as np
import pytest

from halfbyte import _C

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
DTYPES = [F32, BF16, F16]
UNIT = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}
SMALLEST = {F32: 2.0**-150, BF16: 2.0**-134, F16: 2.0**-25}


@pytest.fixture(autouse=True)
def _threads_restored():
    before = _C.get_num_threads()
    yield
    _C.set_num_threads(before)


class Weight:
    """A random 4-bit matrix in the bitsandbytes layout and its exact values as float64."""

    def __init__(self, rng, rows, depth, blocksize, quant_type="nf4", nested=False):
        n = rows * depth
        n_blocks = -(-n // blocksize)
        self.packed = rng.integers(0, 256, (n + 1) // 2, dtype=np.uint8)
        self.extra = {}
        scales = (0.1 + rng.random(n_blocks)).astype(np.float32)
        self.absmax = scales
        if nested:
            self.absmax, outer, offset = _C.nest_absmax(scales)
            table = _C.map8("dynamic")
            self.extra = {"nested_absmax": outer, "nested_map": table, "nested_offset": offset}
            products = table[self.absmax] * outer[np.arange(n_blocks) // 256]
            scales = products + np.float32(offset)  # two float32 roundings, as the format defines
        codes = np.stack([self.packed >> 4, self.packed & 15], axis=1).reshape(-1)[:n]
        values = _C.codebook(quant_type).astype(np.float64)[codes] * scales[np.arange(n) // blocksize]
        self.values = values.reshape(rows, depth)
        self.arguments = (quant_type, blocksize, (rows, depth))

    def forward(self, x, bias=None, **options):
        return _C.linear_4bit(x, self.packed, self.absmax, *self.arguments, bias, **self.extra, **options)

    def backward(self, dy, **options):
        return _C.linear_4bit_grad_input(
            dy, self.packed, self.absmax, *self.arguments, **self.extra, **options
        )


def random_array(rng, shape, dtype, strided=False):
    if strided:
        wide = rng.standard_normal((shape[0] * 2, shape[1] * 3)).astype(np.float32).astype(dtype)
        return wide[::2, 1::3]
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def check(got, x, weight, bias, compute):
    """weight [outputs, steps] in float64."""
    steps = weight.shape[1]
    x = x.astype(np.float64)
    want, magnitude = x @ weight.T, np.abs(x) @ np.abs(weight).T
    factor = (min(steps, 256) + steps / 128 + 14) * UNIT[F32]
    if compute == "bfloat16":
        factor += 2 * UNIT[BF16] + 2.0**-15
    bound = factor * magnitude
    if bias is not None:
        want = want + bias.astype(np.float64)
        bound += UNIT[F32] * (np.abs(want) + bound)
    bound += UNIT[got.dtype] * (np.abs(want) + bound) + SMALLEST[got.dtype]
    error = np.abs(got.astype(np.float64) - want)
    assert np.all(error <= bound), f"{np.max(error / bound)} times the bound"


def sampled_cases():
    rng = np.random.default_rng(20240229)
    for seed in range(160):
        # Half of the depths are multiples of 32, where blocks may be decoded as vectors.
        depth = int(rng.integers(1, 451)) if seed % 2 else 32 * int(rng.integers(1, 15))
        m = int(rng.integers(1, 131)) if seed % 3 else int(rng.integers(1, 10))
        rows = int(rng.integers(1, 451)) if seed % 5 else 64 * int(rng.integers(1, 7))
        yield seed, m, rows, depth, 32 << int(rng.integers(0, 8))


@pytest.mark.parametrize(("seed", "m", "rows", "depth", "blocksize"), list(sampled_cases()))
def test_against_float64(seed, m, rows, depth, blocksize):
    rng = np.random.default_rng(seed)
    weight = Weight(rng, rows, depth, blocksize, ("nf4", "fp4")[seed % 2], nested=bool(rng.integers(2)))
    dtype, bias_dtype = (DTYPES[i] for i in rng.integers(0, 3, 2))
    compute = ("float32", "bfloat16")[int(rng.integers(2))]
    strided = bool(rng.integers(2))
    x = random_array(rng, (m, depth), dtype, strided)
    dy = random_array(rng, (m, rows), dtype, strided)
    bias = random_array(rng, (1, rows), bias_dtype)[0] if rng.integers(2) else None
    results = []
    for threads in range(1, 5):
        _C.set_num_threads(threads)
        y = random_array(rng, (m, rows), dtype, strided)
        dx = random_array(rng, (m, depth), dtype, strided)
        weight.forward(x, bias, compute=compute, out=y)
        weight.backward(dy, compute=compute, out=dx)
        results.append(y.tobytes() + dx.tobytes())
    assert len(set(results)) == 1, "the result depends on the number of threads"
    check(y, x, weight.values, bias, compute)
    check(dx, dy, weight.values.T, None, compute)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("m", "rows", "depth", "blocksize"),
    [
        (1, 2048, 2048, 64),
        (3, 1024, 4096, 128),
        (9, 520, 4096, 4096),
        (300, 128, 1024, 64),
        (33, 96, 2720, 2048),
    ],
)
def test_large_enough_for_threads(m, rows, depth, blocksize, compute):
    rng = np.random.default_rng(m)
    weight = Weight(rng, rows, depth, blocksize)
    x, dy = random_array(rng, (m, depth), F32), random_array(rng, (m, rows), F32)
    results = []
    for threads in (1, 2, 3, 4):
        _C.set_num_threads(threads)
        results.append((weight.forward(x, compute=compute), weight.backward(dy, compute=compute)))
    for y, dx in results[1:]:
        np.testing.assert_array_equal(y, results[0][0])
        np.testing.assert_array_equal(dx, results[0][1])
    check(results[0][0], x, weight.values, None, compute)
    check(results[0][1], dy, weight.values.T, None, compute)


def test_float32_error_is_that_of_the_prototype():
    # Gaussian data: the worst case of the bound is far away; K/128 + 12 roundings cover what occurs.
    rng = np.random.default_rng(5)
    weight = Weight(rng, 64, 4096, 64)
    for m in (1, 4, 40):
        x = random_array(rng, (m, 4096), F32)
        error = np.abs(weight.forward(x) - x.astype(np.float64) @ weight.values.T)
        magnitude = np.abs(x).astype(np.float64) @ np.abs(weight.values).T
        assert np.max(error / magnitude) < (4096 / 128 + 12) * UNIT[F32] / 10


def test_leading_dimensions_and_broadcast_rows():
    rng = np.random.default_rng(6)
    weight = Weight(rng, 48, 96, 32)
    x = random_array(rng, (4, 3 * 96), F32).reshape(4, 3, 96)
    flat = weight.forward(x.reshape(12, 96))
    np.testing.assert_array_equal(weight.forward(x), flat.reshape(4, 3, 48))
    transposed = weight.forward(x.transpose(1, 0, 2))
    np.testing.assert_array_equal(transposed, flat.reshape(4, 3, 48).transpose(1, 0, 2))
    np.testing.assert_array_equal(weight.forward(x[0, 0]), weight.forward(x[0, :1])[0])
    same = np.broadcast_to(x[0, :1], (5, 96))
    np.testing.assert_array_equal(weight.forward(same), weight.forward(np.ascontiguousarray(same)))
    backwards = np.ascontiguousarray(x[0])[:, ::-1]
    np.testing.assert_array_equal(weight.forward(backwards), weight.forward(backwards.copy()))


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("depth", [128, 130])
def test_nonfinite_values_propagate(m, depth):
    rng = np.random.default_rng(7)
    weight = Weight(rng, 40, depth, 32)
    x = random_array(rng, (m, depth), F32)
    x[0, 5] = np.nan
    y = weight.forward(x)
    assert np.all(np.isnan(y[0])) and np.all(np.isfinite(y[1:]))
    x[0, 5] = np.inf
    y = weight.forward(x)
    column = weight.values[:, 5]
    assert np.all(np.isnan(y[0][column == 0])) and np.all(np.isinf(y[0][column != 0]))
    assert np.all(np.signbit(y[0][column < 0]))
    x[0, 5] = 1
    weight.absmax[1] = np.nan
    y = weight.forward(x)
    assert np.all(np.isnan(y[:, 0])) and np.all(np.isfinite(y[:, -1]))
    dy = random_array(rng, (m, 40), F32)
    dx = weight.backward(dy)
    assert np.all(np.isnan(dx[:, 32:64])) and np.all(np.isfinite(dx[:, :32]))


def test_empty():
    rng = np.random.default_rng(8)
    weight = Weight(rng, 16, 64, 64)
    assert weight.forward(np.zeros((0, 64), np.float32)).shape == (0, 16)
    assert weight.backward(np.zeros((0, 16), np.float32)).shape == (0, 64)


def test_errors_name_argument_expected_and_got():
    rng = np.random.default_rng(9)
    weight = Weight(rng, 16, 64, 64)
    with pytest.raises(ValueError, match=r"linear_4bit: x, expected .*64.*got.*63"):
        weight.forward(np.zeros((2, 63), np.float32))
    with pytest.raises(ValueError, match=r"linear_4bit_grad_input: dy, expected .*16.*got.*17"):
        weight.backward(np.zeros((2, 17), np.float32))
    with pytest.raises(TypeError, match=r"linear_4bit: x.*float64"):
        weight.forward(np.zeros((2, 64)))
    with pytest.raises(ValueError, match=r"linear_4bit: bias, expected .*16.*got.*15"):
        weight.forward(np.zeros((2, 64), np.float32), np.zeros(15, np.float32))
    with pytest.raises(ValueError, match=r"linear_4bit: (out|y), expected .*got.*3"):
        weight.forward(np.zeros((2, 64), np.float32), out=np.zeros((3, 16), np.float32))
    read_only = np.zeros((2, 16), np.float32)
    read_only.flags.writeable = False
    with pytest.raises(BufferError, match=r"linear_4bit"):
        weight.forward(np.zeros((2, 64), np.float32), out=read_only)


def test_bias_is_added_before_the_only_rounding():
    rng = np.random.default_rng(10)
    weight = Weight(rng, 64, 64, 64)
    x = random_array(rng, (1, 64), BF16)
    bias = random_array(rng, (1, 64), F32)[0]
    sums = weight.forward(x.astype(np.float32))
    got = weight.forward(x, bias)
    assert got.dtype == BF16
    np.testing.assert_array_equal(got, (sums + bias).astype(BF16))
