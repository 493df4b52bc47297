"""_C.linear_dense: plain weights against float64 with the derived bound, strides, errors, threads."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import _C

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Unit roundoff, and half the smallest subnormal.
ROUNDING = {
    "float32": (2.0**-24, 2.0**-150),
    "bfloat16": (2.0**-8, 2.0**-134),
    "float16": (2.0**-11, 2.0**-25),
}


def bound(x, w, bias, dtype):
    """(y in float64, largest allowed error): (depth/8 + 16) 2^-24 sum|w x| for the float32 sum (kernels_dense.h),
    one rounding when the bias is added, one to y's dtype."""
    x, w = (np.asarray(a).astype(np.float64) for a in (x, w))
    y, limit = x @ w.T, (x.shape[-1] / 8 + 16) * 2.0**-24 * (np.abs(x) @ np.abs(w).T)
    if bias is not None:
        y = y + np.asarray(bias).astype(np.float64)
        limit = limit * (1 + 2.0**-24) + np.abs(y) * 2.0**-24
    unit, least = ROUNDING[dtype]
    return y, limit + (np.abs(y) + limit) * unit + least


def check(y, x, w, bias, dtype):
    want, limit = bound(x, w, bias, dtype)
    assert y.shape == want.shape and y.dtype == DTYPES[dtype]
    assert (np.abs(np.asarray(y).astype(np.float64) - want) <= limit).all()


def normal(rng, *shape, dtype="float32"):
    return rng.standard_normal(shape).astype(DTYPES[dtype])


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    rows=st.integers(0, 140),
    depth=st.one_of(st.integers(0, 140), st.integers(1000, 1100), st.sampled_from([2048, 4097])),
    bias=st.sampled_from([None, *DTYPES]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(dtype, leading, rows, depth, bias, seed):
    rng = np.random.default_rng(seed)
    x, w = normal(rng, *leading, depth, dtype=dtype), normal(rng, rows, depth, dtype=dtype)
    b = None if bias is None else normal(rng, rows, dtype=bias)
    check(_C.linear_dense(x, w, b), x, w, b, dtype)


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    m=st.integers(1, 20),
    steps=st.tuples(*[st.sampled_from([1, 2, 3, -1, -2])] * 2),
    gap=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_strides(dtype, m, steps, gap, seed):
    rng = np.random.default_rng(seed)
    rows, depth = 70, 75
    big = normal(rng, 3 * m, 3 * depth, dtype=dtype)
    x = big[:: steps[0], :: steps[1]][:m, :depth]
    w = normal(rng, rows, depth + gap, dtype=dtype)[:, :depth]  # rows of a wider matrix
    out = np.full((rows, m), 7, DTYPES[dtype]).T  # columns are contiguous
    b = normal(rng, 2 * rows)[::-2]
    assert _C.linear_dense(x, w, b, out=out) is out
    check(out, x, w, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_weight_may_repeat_and_run_backwards(dtype):
    rng = np.random.default_rng(0)
    x, w = normal(rng, 3, 40, dtype=dtype), normal(rng, 30, 40, dtype=dtype)
    for view in (w[::-1], w[::3], np.broadcast_to(w[:1], (30, 40))):
        check(_C.linear_dense(x, view), x, view, None, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 9])
def test_not_finite(dtype, m):
    rng = np.random.default_rng(m)
    x, w = normal(rng, m, 50, dtype=dtype), normal(rng, 20, 50, dtype=dtype)
    x[0, 49], w[7, 3], w[8, 0] = np.nan, np.inf, np.nan
    y = _C.linear_dense(x, w).astype(np.float32)
    assert np.isnan(y[0]).all() and np.isnan(y[:, 8]).all()
    others = np.delete(y[1:], [7, 8], axis=1)
    assert np.isfinite(others).all()
    assert np.isinf(y[1:, 7]).all() and (np.sign(y[1:, 7]) == np.sign(x[1:, 3].astype(np.float32))).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype):
    rng = np.random.default_rng(1)
    x, w = normal(rng, 5, 1500, dtype=dtype), normal(rng, 900, 1500, dtype=dtype)
    before = _C.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            _C.set_num_threads(n)
            results.append(_C.linear_dense(x, w))
    finally:
        _C.set_num_threads(before)
    assert all(r.tobytes() == results[0].tobytes() for r in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_the_weight_gives_the_same_whatever_is_around_it(dtype):
    rng = np.random.default_rng(2)
    w = normal(rng, 101, 333, dtype=dtype)
    for m in range(1, 12):
        x = normal(rng, m, 333, dtype=dtype)
        whole = _C.linear_dense(x, w)
        parts = [_C.linear_dense(x, w[a:b]) for a, b in ((0, 1), (1, 64), (64, 101))]
        assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes()


def arguments(**changes):
    base = {
        "x": np.ones((2, 8), np.float32),
        "weight": np.ones((3, 8), np.float32),
        "bias": None,
        "out": None,
    }
    return list((base | changes).values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": np.ones((2, 7), np.float32)},
            ValueError,
            r"x, expected a last dimension of 8 \(weight is \[3, 8\]\), got shape \(2, 7\)",
        ),
        (
            {"x": np.ones((2, 8), np.float16)},
            TypeError,
            "x, expected the dtype of the weight, float32, got float16",
        ),
        ({"x": np.ones((2, 8))}, TypeError, "x, expected .*got float64"),
        ({"x": np.float32(1)}, ValueError, "x, expected a last dimension of 8 .*got shape"),
        (
            {"weight": np.ones(8, np.float32)},
            ValueError,
            r"weight, expected shape \[rows, depth\], got 1 dim",
        ),
        (
            {"weight": np.ones((8, 3), np.float32).T},
            ValueError,
            "weight, expected contiguous rows, got a stride of 3",
        ),
        ({"weight": np.ones((3, 8), np.int8)}, TypeError, "weight, expected .*got int8"),
        ({"bias": np.ones(2, np.float32)}, ValueError, r"bias, expected shape .*3"),
        ({"out": np.ones((2, 4), np.float32)}, ValueError, "out"),
        ({"out": np.ones((2, 3), np.float16)}, TypeError, "out"),
        ({"out": np.frombuffer(bytes(24), np.float32).reshape(2, 3)}, BufferError, "out.*read-only"),
    ],
)
def test_errors(changes, error, message):
    x, weight, bias, out = arguments(**changes)
    with pytest.raises(error, match=f"linear_dense: {message}"):
        _C.linear_dense(x, weight, bias, out=out)


def test_out_may_not_overlap():
    room = np.ones(100, np.float32)
    x, w, bias = room[:16].reshape(2, 8), room[16:40].reshape(3, 8), room[40:43]
    for start, name in ((10, "x"), (34, "weight"), (41, "bias")):
        with pytest.raises(ValueError, match=f"out.*{name}"):
            _C.linear_dense(x, w, bias, out=room[start : start + 6].reshape(2, 3))
    assert (room == 1).all()


def test_few_says_when_it_is_not_the_one_to_use():
    for name, dtype in DTYPES.items():
        rows = _C.linear_dense_rows(name)
        assert 0 <= rows <= 64
        x, w = np.ones((rows + 1, 8), dtype), np.ones((3, 8), dtype)
        assert _C.linear_dense_few(x, w, None) is None
        assert rows == 0 or (_C.linear_dense_few(x[1:], w, None) == 8).all()
        assert _C.linear_dense_few(x[1:, :7], w, None) is None  # another depth: the caller's error, not ours
        assert _C.linear_dense_few(x[1:], w, np.ones(2, dtype)) is None
        assert _C.linear_dense_few(x[1:], np.ones((8, 3), dtype).T, None) is None
    with pytest.raises(TypeError, match="linear_dense_few: expected 3 arguments, got 2"):
        _C.linear_dense_few(x, w)
    with pytest.raises((TypeError, ValueError), match="linear_dense_rows: dtype"):
        _C.linear_dense_rows("int8")
