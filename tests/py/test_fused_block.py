"""_C.mlp_4bit, _C.qkv_4bit, _C.attend_4bit: the bits of the calls that they stand for, whatever the layers; errors."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import _C

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
COMPUTES = ["float32", "bfloat16", "int16", "int8"]


class Layer:
    """A layer of 4 bits: as the functions here take it, and called as linear_4bit."""

    def __init__(
        self, rng, rows, depth, *, nested=False, bias=False, blocksize=64, quant_type="nf4", dtype="float32"
    ):
        weight = rng.standard_normal((rows, depth)).astype(np.float32)
        packed, absmax = _C.quantize_4bit(weight, quant_type, blocksize)
        self.bias = rng.standard_normal(rows).astype(DTYPES[dtype]) if bias else None
        self.parts = (packed, absmax, quant_type, blocksize, (rows, depth), self.bias)
        self.more = {}
        if nested:
            codes, nested_absmax, offset = _C.nest_absmax(absmax)
            scales = _C.map8("dynamic")
            self.parts = (packed, codes, *self.parts[2:], nested_absmax, scales, offset, 256)
            names = ("nested_absmax", "nested_map", "nested_offset", "nested_blocksize")
            self.more = dict(zip(names, self.parts[6:], strict=True))

    def __call__(self, x, compute):
        return _C.linear_4bit(x, *self.parts[:6], compute, **self.more)


@st.composite
def kinds(draw):
    return {
        "nested": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "blocksize": draw(st.sampled_from([32, 64, 256])),
        "quant_type": draw(st.sampled_from(["nf4", "fp4"])),
    }


def same(found, wanted):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    compute=st.sampled_from(COMPUTES),
    leading=st.sampled_from([(), (1,), (1, 1), (3,), (2, 4), (17,), (0,), (2, 0)]),
    depth=st.sampled_from([32, 64, 100, 320]),
    inner=st.sampled_from([1, 31, 64, 200]),
    each=st.tuples(kinds(), kinds(), kinds()),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_mlp(dtype, compute, leading, depth, inner, each, activation, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*leading, depth)).astype(DTYPES[dtype])
    gate, up = (Layer(rng, inner, depth, dtype=dtype, **kind) for kind in each[:2])
    down = Layer(rng, 40, inner, dtype=dtype, **each[2])
    wanted = down(_C.gate(gate(x, compute), up(x, compute), activation), compute)
    same(_C.mlp_4bit(x, gate.parts, up.parts, down.parts, activation, compute), wanted)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    compute=st.sampled_from(COMPUTES),
    batch=st.integers(1, 9),
    width=st.sampled_from([32, 64, 100, 320]),
    depth=st.sampled_from([2, 16, 64]),
    heads=st.tuples(*[st.integers(1, 5)] * 3),
    angles=st.sampled_from(["each", "one"]),
    each=st.tuples(kinds(), kinds(), kinds()),
    seed=st.integers(0, 2**32 - 1),
)
def test_qkv(dtype, compute, batch, width, depth, heads, angles, each, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, 1, width)).astype(DTYPES[dtype])
    turn = rng.standard_normal((2, batch if angles == "each" else 1, 1, depth)).astype(x.dtype)
    layers = [Layer(rng, n * depth, width, dtype=dtype, **kind) for n, kind in zip(heads, each, strict=True)]
    found = _C.qkv_4bit(x, *(layer.parts for layer in layers), *turn, depth, compute)
    assert type(found) is tuple and len(found) == 3
    for i, (layer, y) in enumerate(zip(layers, found, strict=True)):
        wanted = layer(x, compute).reshape(batch, heads[i], 1, depth)
        same(y, wanted if i == 2 else _C.rotate(wanted, *turn))


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    compute=st.sampled_from(COMPUTES),
    batch=st.integers(1, 4),
    groups=st.integers(1, 3),
    shared=st.integers(1, 4),
    length=st.integers(1, 40),
    kind=kinds(),
    seed=st.integers(0, 2**32 - 1),
)
def test_attend(dtype, compute, batch, groups, shared, length, kind, seed):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, groups * shared, 1, 16)).astype(DTYPES[dtype])
    k = rng.standard_normal((batch, length, groups, 16)).astype(q.dtype).transpose(0, 2, 1, 3)
    v = rng.standard_normal((batch, groups, length, 16)).astype(q.dtype)
    out = Layer(rng, 24, groups * shared * 16, dtype=dtype, **kind)
    wanted = out(_C.attend(q, k, v, 0.25).reshape(batch, 1, -1), compute)
    same(_C.attend_4bit(q, k, v, 0.25, out.parts, compute), wanted)


@pytest.mark.parametrize(
    "dtype, compute", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "int8")]
)
def test_large_layers_and_threads(dtype, compute):
    """Weights that are split over threads: one loop for all has the bits of a loop for each, on any number of them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, 1024)).astype(DTYPES[dtype])
    turn = rng.standard_normal((2, 1, 1, 64)).astype(x.dtype)
    qkv = [Layer(rng, rows, 1024, bias=True, dtype=dtype) for rows in (1024, 320, 192)]
    gate, up, down = (Layer(rng, *shape) for shape in ((1500, 1024), (1500, 1024), (1024, 1500)))
    before, found = _C.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            _C.set_num_threads(threads)
            each = _C.qkv_4bit(x, *(layer.parts for layer in qkv), *turn, 64, compute)
            y = _C.mlp_4bit(x, gate.parts, up.parts, down.parts, "silu", compute)
            found.append(b"".join(a.tobytes() for a in (*each, y)))
    finally:
        _C.set_num_threads(before)
    assert len(set(found)) == 1
    same(each[2], qkv[2](x, compute).reshape(1, 3, 1, 64))
    same(y, down(_C.gate(gate(x, compute), up(x, compute), "silu"), compute))


RNG = np.random.default_rng(1)
A, B, OUT = Layer(RNG, 8, 32).parts, Layer(RNG, 12, 32).parts, Layer(RNG, 6, 8).parts
X, ANGLE = np.ones((1, 1, 32), np.float32), np.ones((1, 1, 4), np.float32)
Q, KV = np.ones((1, 2, 1, 4), np.float32), np.ones((1, 2, 3, 4), np.float32)
HALF = X.astype(np.float16)


@pytest.mark.parametrize(
    "name, arguments, error, message",
    [
        ("mlp_4bit", (X, A, A, OUT, "silu"), TypeError, "mlp_4bit: expected 6 arguments, got 5"),
        ("mlp_4bit", (X, A, B, OUT, "silu", "float32"), ValueError, "mlp_4bit: down, expected a depth of 12"),
        ("mlp_4bit", (X, A, A, A, "silu", "float32"), ValueError, "mlp_4bit: down, expected a depth of 8"),
        ("mlp_4bit", (X, A, A, OUT, "relu", "float32"), ValueError, "mlp_4bit: activation"),
        ("mlp_4bit", (X, A, A, OUT, "silu", "float64"), ValueError, "mlp_4bit: compute"),
        ("mlp_4bit", (X, A[:5], A, OUT, "silu", "float32"), TypeError, "mlp_4bit: gate, expected a tuple of 6 or 10"),
        ("mlp_4bit", (X, A, list(A), OUT, "silu", "float32"), TypeError, "mlp_4bit: up, expected a tuple of 6 or 10"),
        ("mlp_4bit", (X[..., :16], A, A, OUT, "silu", "float32"), ValueError, "mlp_4bit: x, expected a last dimen"),
        ("mlp_4bit", (X[..., ::2], *[Layer(RNG, 8, 16).parts] * 2, OUT, "silu", "float32"), ValueError,
         "mlp_4bit: x, expected contiguous rows"),
        ("mlp_4bit", (X.astype(np.float64), A, A, OUT, "silu", "float32"), TypeError, "mlp_4bit: x, expected dtype"),
        ("mlp_4bit", (X, (*A[:4], (8, 33), None), A, OUT, "silu", "float32"), ValueError, "mlp_4bit: packed"),
        ("mlp_4bit", (X, (*A[:5], np.ones(7, np.float32)), A, OUT, "silu", "float32"), ValueError, "mlp_4bit: bias"),
        ("qkv_4bit", (X, A, A, A, ANGLE, ANGLE, 4), TypeError, "qkv_4bit: expected 8 arguments, got 7"),
        ("qkv_4bit", (X, A, A, B, ANGLE, ANGLE, 8, "float32"), ValueError, "qkv_4bit: v, expected a multiple of"),
        ("qkv_4bit", (X, A, A, A, ANGLE, ANGLE, 0, "float32"), ValueError, "qkv_4bit: q, expected a multiple of"),
        ("qkv_4bit", (X[0], A, A, A, ANGLE, ANGLE, 4, "float32"), ValueError, "qkv_4bit: x, expected 3 dimensions"),
        ("qkv_4bit", (np.ones((1, 2, 32), "f4"), A, A, A, ANGLE, ANGLE, 4, "float32"), ValueError,
         r"qkv_4bit: x, expected shape \[batch, 1, depth\]"),
        ("qkv_4bit", (X, A, A, OUT, ANGLE, ANGLE, 2, "float32"), ValueError, "linear_4bit_group: x has depth 32"),
        ("qkv_4bit", (X, A, A, A, ANGLE, ANGLE, 8, "float32"), ValueError, "rotate: cos, expected size 8"),
        ("qkv_4bit", (HALF, A, A, A, ANGLE, ANGLE, 4, "float32"), TypeError, "rotate: cos, expected float16"),
        ("attend_4bit", (Q, KV, KV, 1.0, OUT), TypeError, "attend_4bit: expected 6 arguments, got 5"),
        ("attend_4bit", (Q, KV, KV, 1.0, A, "float32"), ValueError, "linear_4bit: x"),
        ("attend_4bit", (Q[0], KV, KV, 1.0, OUT, "float32"), ValueError, "attend_4bit: q, expected shape"),
        ("attend_4bit", (KV, KV, KV, 1.0, OUT, "float32"), ValueError, "attend_4bit: q, expected shape"),
        ("attend_4bit", (Q, KV[:, :, :0], KV[:, :, :0], 1.0, OUT, "float32"), ValueError, "attend: k, expected"),
        ("attend_4bit", (Q, KV, KV, "1", OUT, "float32"), TypeError, "attend_4bit: scale"),
    ],
)  # fmt: skip
def test_errors(name, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(_C, name)(*arguments)
