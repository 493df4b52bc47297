"""_C.rms_norm, _C.gate, _C.rotate, _C.attend: against float64 with the derived bounds, strides, threads, errors."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import _C

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
U = 2.0**-24
# Unit roundoff, and half the smallest subnormal.
ROUNDING = {"float32": (U, 2.0**-150), "bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25)}


def rounded(value, dtype):
    """float64 -> the dtype by way of float32, as the kernels do."""
    return value.astype(np.float32).astype(DTYPES[dtype]).astype(np.float64)


def norm(x, w, eps, dtype):
    """(y in float64, largest error). The factor has at most 3 U: 1/2 each of the mean and of adding eps, halved
    by the root; root, division; second order. Then the product with x, and roundings to the dtype."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    unit, least = ROUNDING[dtype]
    h = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float64(np.float32(eps)))
    limit = np.abs(h) * 4 * U
    if dtype != "float32":
        limit = limit + (np.abs(h) + limit) * unit + least
    y, limit = h * w, limit * np.abs(w)
    return y, limit + (np.abs(y) + limit) * (unit + U) + least


def normal(rng, *shape, dtype):
    return rng.standard_normal(shape).astype(DTYPES[dtype])


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    size=st.one_of(st.integers(1, 140), st.sampled_from([1023, 1024, 1025, 2048, 4097])),
    eps=st.sampled_from([1e-5, 1e-6, 0.0, 2.0]),
    scale=st.sampled_from([1.0, 1e-3, 100.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rms_norm(dtype, leading, size, eps, scale, seed):
    rng = np.random.default_rng(seed)
    x, w = normal(rng, *leading, size, dtype=dtype), normal(rng, size, dtype=dtype)
    x = (x.astype(np.float32) * scale).astype(x.dtype)
    if eps == 0:
        x[..., 0] = scale  # a row of zeros has no direction
    y = _C.rms_norm(x, w, eps)
    want, limit = norm(x, w, eps, dtype)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert (np.abs(y.astype(np.float64) - want) <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 1024), (2, 3, 1025), (40, 3000)])
def test_gate(dtype, activation, shape):
    rng = np.random.default_rng(len(shape))
    g, u = 4 * normal(rng, *shape, dtype=dtype), normal(rng, *shape, dtype=dtype)
    g = g.astype(u.dtype)
    x = g.astype(np.float64)
    z = x / 2 if activation == "silu" else math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    f = x / (1 + np.exp(-2 * z))
    unit, least = ROUNDING[dtype]
    limit = 4 * U * np.abs(f) if activation == "silu" else 8 * U * np.abs(x)
    if dtype != "float32":
        limit = limit + (np.abs(f) + limit) * unit + least
    want, limit = f * u.astype(np.float64), limit * np.abs(u.astype(np.float64))
    y = _C.gate(g, u, activation)
    assert y.shape == shape and y.dtype == u.dtype
    error = np.abs(y.astype(np.float64) - want)
    assert (error <= limit + (np.abs(want) + limit) * (unit + U) + least).all()


def test_nan_and_infinity_stay_in_their_row():
    x = np.ones((4, 100), np.float32)
    x[1, 50], x[2, 99] = np.nan, np.inf
    y = _C.rms_norm(x, np.ones(100, np.float32), 1e-5)
    assert np.isfinite(y[[0, 3]]).all() and np.isnan(y[1]).all()
    assert np.isnan(y[2, 99]) and (y[2, :99] == 0).all()
    g = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    y = _C.gate(g, np.ones(4, np.float32), "silu")
    assert np.isnan(y[[0, 2]]).all() and y[1] == np.inf and np.isfinite(y[3])


def test_rows_may_lie_anywhere_and_threads_change_nothing():
    rng = np.random.default_rng(0)
    x = normal(rng, 60, 3, 2100, dtype="bfloat16")
    view, w = x[::-1, 1:, 40:2040], normal(rng, 2000, dtype="bfloat16")
    before, found = _C.get_num_threads(), []
    try:
        for threads in (1, 3):
            _C.set_num_threads(threads)
            found.append((_C.rms_norm(view, w, 1e-6), _C.gate(view, view, "silu")))
    finally:
        _C.set_num_threads(before)
    copy = np.ascontiguousarray(view)
    found.append((_C.rms_norm(copy, w, 1e-6), _C.gate(copy, copy, "silu")))
    for norm_, gate in found[1:]:
        assert norm_.tobytes() == found[0][0].tobytes() and gate.tobytes() == found[0][1].tobytes()
    rows = [_C.rms_norm(row, w, 1e-6) for row in copy.reshape(-1, 2000)]
    assert np.stack(rows).tobytes() == found[0][0].tobytes()


F, H = np.float32, np.float16
BAD = [
    ((np.ones((2, 3), F), np.ones(2, F), 1e-5), ValueError, r"rms_norm: weight, expected shape \[3\]"),
    ((np.ones((2, 3), F), np.ones((1, 3), F), 1e-5), ValueError, "rms_norm: weight, expected shape"),
    ((np.ones((2, 3), F), np.ones(3, H), 1e-5), TypeError, "rms_norm: weight, expected float32, got float16"),
    ((np.ones((3, 2), F).T, np.ones(3, F), 1e-5), ValueError, "rms_norm: x, expected contiguous rows"),
    ((np.ones((), F), np.ones(1, F), 1e-5), ValueError, "rms_norm: x, expected at least one dimension"),
    ((np.ones(3), np.ones(3), 1e-5), TypeError, "rms_norm: x"),
    ((np.ones(3, F), np.ones(3, F), "0"), TypeError, "rms_norm: eps"),
    ((np.ones(3, F), np.ones(3, F)), TypeError, "rms_norm: expected 3 arguments, got 2"),
]


@pytest.mark.parametrize("arguments, error, message", BAD)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        _C.rms_norm(*arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            (np.ones((2, 3), F), np.ones((2, 4), F), "silu"),
            ValueError,
            "gate: up, expected size 3 in dimension 1",
        ),
        (
            (np.ones((2, 3), F), np.ones(3, F), "silu"),
            ValueError,
            "gate: up, expected 2 dimensions like gate, got 1",
        ),
        ((np.ones(3, F), np.ones(3, H), "silu"), TypeError, "gate: up, expected float32, got float16"),
        ((np.ones(3, F), np.ones(3, F), "relu"), ValueError, "gate: activation"),
        ((np.ones(3, F), np.ones(3, F)), TypeError, "gate: expected 3 arguments, got 2"),
    ],
)
def test_errors_of_gate(arguments, error, message):
    with pytest.raises(error, match=message):
        _C.gate(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, heads, depth", [(1, 1, 2), (2, 5, 64), (3, 2, 130)])
@pytest.mark.parametrize("angles", ["each", "one"])
def test_rotate_to_the_bit(dtype, batch, heads, depth, angles):
    rng = np.random.default_rng(depth)
    x = normal(rng, batch, 1, heads, depth, dtype=dtype).transpose(0, 2, 1, 3)
    rows = batch if angles == "each" else 1
    cos, sin = normal(rng, rows, 1, depth, dtype=dtype), normal(rng, rows, 1, depth, dtype=dtype)
    turned = np.concatenate([-x[..., depth // 2 :], x[..., : depth // 2]], -1)
    # In float32 as NumPy has it, because ml_dtypes and torch round a product and a sum once, too.
    a, b = (
        (p.astype(F) * q[:, None].astype(F)).astype(x.dtype).astype(F) for p, q in ((x, cos), (turned, sin))
    )
    assert _C.rotate(x, cos, sin).tobytes() == (a + b).astype(x.dtype).tobytes()


def attention(q, k, v, scale, dtype):
    """(y in float64 [batch, heads, depth], largest error).

    Scores: s = scale q.k with (depth/8 + 16) U sum|q k| scale of kernels_dense.h, one rounding for the scale, and
    subnormal products where hardware takes them as zero. An exponential has a relative error of twice that, for the
    largest moves with it, and 2 U (|s| + |m| + 2) of its own; so has their sum, whose lanes and additions add
    (length/32 + 34) U; the quotient 2 U. Adding up `length` products: (length + 1) U sum p |v|.
    """
    q, k, v = (np.asarray(a).astype(np.float64) for a in (q, k, v))
    shared, (depth, length) = q.shape[1] // k.shape[1], (q.shape[-1], k.shape[2])
    k, v = np.repeat(k, shared, 1), np.repeat(v, shared, 1)
    s = scale * np.einsum("bhid,bhtd->bht", q, k)
    off = ((depth / 8 + 16) * U * scale * np.einsum("bhid,bhtd->bht", abs(q), abs(k))).max(-1, keepdims=True)
    off += 2.0**-100 + U * abs(s).max(-1, keepdims=True)
    relative = 2 * off + 2 * U * (2 * abs(s).max(-1, keepdims=True) + 2)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    relative = np.expm1(2 * relative) + (length / 32 + 40 + length) * U * (1 + np.expm1(2 * relative))
    y, limit = np.einsum("bht,bhtd->bhd", p, v), relative * np.einsum("bht,bhtd->bhd", p, abs(v))
    unit, least = ROUNDING[dtype]
    return y, limit + (abs(y) + limit) * unit + least


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.sampled_from([1, 2, 4, 9]),
    length=st.one_of(st.integers(1, 70), st.sampled_from([300, 1500])),
    depth=st.sampled_from([1, 8, 33, 64, 128, 1024]),
    seed=st.integers(0, 2**32 - 1),
)
def test_attend(dtype, batch, groups, shared, length, depth, seed):
    rng = np.random.default_rng(seed)
    q = normal(rng, batch, groups * shared, 1, depth, dtype=dtype)
    k = normal(rng, batch, length + 2, groups, depth + 3, dtype=dtype).transpose(0, 2, 1, 3)[
        :, :, 1:-1, :depth
    ]
    v = normal(rng, batch, groups, length, depth, dtype=dtype)
    for keys, values in ((k, v), (v, k)):
        y = _C.attend(q, keys, values, depth**-0.5)
        want, limit = attention(q, keys, values, float(F(depth**-0.5)), dtype)
        assert y.shape == (batch, 1, groups * shared, depth) and y.dtype == q.dtype
        assert (abs(y[:, 0].astype(np.float64) - want) <= limit).all()


def test_attend_does_not_depend_on_threads_and_keeps_nan_in_its_head():
    rng = np.random.default_rng(1)
    q, k, v = (normal(rng, 1, 8, n, 64, dtype="bfloat16") for n in (1, 2000, 2000))
    before, found = _C.get_num_threads(), []
    try:
        for threads in (1, 3):
            _C.set_num_threads(threads)
            found.append(_C.attend(q, k, v, 0.125))
    finally:
        _C.set_num_threads(before)
    assert found[0].tobytes() == found[1].tobytes()
    k[0, 3, 1700, 5] = np.nan
    y = _C.attend(q, k, v, 0.125)
    assert np.isnan(y[0, 0, 3].astype(F)).all()
    assert np.delete(y, 3, axis=2).tobytes() == np.delete(found[0], 3, axis=2).tobytes()


KV = (1, 2, 5, 4)


@pytest.mark.parametrize(
    "name, shapes, message",
    [
        ("rotate", [(1, 2, 2, 4), (1, 1, 4), (1, 1, 4)], "x, expected size 1 in dimension 2, got 2"),
        ("rotate", [(1, 2, 1, 3), (1, 1, 3), (1, 1, 3)], "x, expected an even depth"),
        ("rotate", [(3, 2, 1, 4), (2, 1, 4), (3, 1, 4)], "cos, expected size 3 in dimension 0"),
        ("rotate", [(1, 2, 1, 4), (1, 1, 4), (1, 1, 2)], "sin, expected size 4 in dimension 2"),
        ("rotate", [(2, 1, 4), (1, 1, 4), (1, 1, 4)], "x, expected 4 dimensions, got 3"),
        ("attend", [(1, 3, 1, 4), KV, KV], "q, expected a multiple of 2 heads, got 3"),
        ("attend", [(1, 2, 1, 4), KV, (1, 2, 6, 4)], "v, expected size 5 in dimension 2, got 6"),
        ("attend", [(1, 2, 1, 4), (1, 2, 0, 4), (1, 2, 0, 4)], "k, expected at least one row, got none"),
        ("attend", [(1, 2, 2, 4), KV, KV], "q, expected size 1 in dimension 2, got 2"),
        ("attend", [(2, 1, 4), KV, KV], "q, expected 4 dimensions, got 3"),
        ("attend", [(1, 2, 1, 1025), (1, 2, 5, 1025), (1, 2, 5, 1025)], "q, expected a depth of 1 to 1024"),
    ],
)
def test_shapes_of_attention(name, shapes, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        getattr(_C, name)(*(np.ones(shape, F) for shape in shapes), *([1.0] if name == "attend" else []))


def test_errors_of_attention():
    q, kv, angle = np.ones((1, 2, 1, 4), F), np.ones(KV, F), np.ones((1, 1, 4), F)
    with pytest.raises(TypeError, match="rotate: cos, expected float32, got float16"):
        _C.rotate(q, angle.astype(H), angle)
    with pytest.raises(TypeError, match="rotate: expected 3 arguments, got 1"):
        _C.rotate(q)
    with pytest.raises(ValueError, match="attend: k, expected contiguous rows"):
        _C.attend(q, np.ones((1, 2, 5, 8), F)[..., ::2], kv, 1.0)
    with pytest.raises(TypeError, match="attend: expected 4 arguments, got 1"):
        _C.attend(q)
