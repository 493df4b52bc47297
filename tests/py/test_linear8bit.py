"""Linear8bit and the int8 products (csrc/python/linear8bit.c, functions_8bit.c)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from optional_torch import needs_torch, torch

from halfbyte import _C

RNG = np.random.default_rng(19)
W = RNG.standard_normal((24, 70)).astype(np.float32)
B = RNG.standard_normal(24).astype(np.float32)
SHAPES = [(70,), (1, 70), (5, 70), (2, 3, 70), (0, 70), (40, 70)]


@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_int8_is_exact(shape):
    a = RNG.integers(-128, 128, shape, dtype=np.int8)
    b = RNG.integers(-128, 128, (24, 70), dtype=np.int8)
    want = a.astype(np.int32) @ b.astype(np.int32).T
    c = _C.matmul_int8(a, b)
    assert c.dtype == np.int32
    np.testing.assert_array_equal(c, want)
    out = np.zeros_like(want)
    assert _C.matmul_int8(a, b, out=out) is out
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(_C.matmul_int8(np.asfortranarray(a), np.asfortranarray(b)), want)
    if torch is not None:
        assert torch.equal(_C.matmul_int8(torch.from_numpy(a), torch.from_numpy(b)), torch.from_numpy(want))


@pytest.mark.parametrize("shape", [(3, 5, 0), (3, 40, 31), (5, 66, 2500), (70, 130, 1025), (1030, 66, 70)])
@pytest.mark.parametrize("fill", ["any", -128, 127, "extremes"])
def test_matmul_int8_is_exact_with_many_rows_and_at_the_extremes(shape, fill):
    """127 * 127 + 127 * 127 does not fit where bytes are multiplied to pairs of 16 bits, nor does -(-128)."""
    m, n, depth = shape
    if fill == "extremes":
        a, b = (RNG.choice(np.array([-128, 127], np.int8), (rows, depth)) for rows in (m, n))
    elif fill == "any":
        a, b = (RNG.integers(-128, 128, (rows, depth), dtype=np.int8) for rows in (m, n))
    else:
        a, b = np.full((m, depth), fill, np.int8), np.full((n, depth), fill, np.int8)
    want = a.astype(np.float64) @ b.T.astype(np.float64)  # exact: less than 2^53
    np.testing.assert_array_equal(_C.matmul_int8(a, b), want)
    np.testing.assert_array_equal(_C.matmul_int8(a[:2], b), want[:2])


@pytest.mark.parametrize("mode", ["dynamic", "exact"])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("bias", [None, B])
def test_call_equals_the_stateless_function(mode, threshold, bias):
    layer = _C.Linear8bit.from_float(W, bias, threshold, mode)
    codes, scale = layer.weight.codes, layer.weight.scale
    for shape in SHAPES:
        x = RNG.standard_normal(shape).astype(np.float32)
        y = layer(x)
        assert y.shape == (*shape[:-1], 24) and y.dtype == x.dtype
        np.testing.assert_array_equal(y, _C.linear_8bit(x, codes, scale, bias, threshold, mode))
        dx = layer.grad_input(y)
        assert dx.shape == shape
        np.testing.assert_array_equal(dx, _C.linear_8bit_grad_input(y, codes, scale))


def test_exact_mode_and_gradient_sum_the_right_numbers():
    """float32 sums of 70 terms; 72 roundings of 2^-24 relative to sum |x||w|."""
    layer = _C.Linear8bit.from_float(W, B, mode="exact")
    x = RNG.standard_normal((7, 70)).astype(np.float32)
    w = layer.weight.codes.astype(np.float64) * layer.weight.scale[:, None] / 127
    bound = 80 * 2.0**-24 * (np.abs(x) @ np.abs(w).T + np.abs(B))
    assert (np.abs(layer(x) - (x @ w.T + B)) <= bound).all()
    dy = RNG.standard_normal((7, 24)).astype(np.float32)
    bound = 30 * 2.0**-24 * (np.abs(dy) @ np.abs(w))
    assert (np.abs(layer.grad_input(dy) - dy @ w) <= bound).all()


def test_dynamic_mode_is_llm_int8():
    """Quantize rows, exact integer product, scales; outlier columns in float32."""
    x = RNG.standard_normal((6, 70)).astype(np.float32)
    x[2, 5] = 9.0
    layer = _C.Linear8bit.from_float(W, B, threshold=6.0)
    codes, scale, outliers = _C.quantize_rows_int8(x, 6.0)
    w = layer.weight
    want = _C.matmul_int8(codes, w.codes) * (scale[:, None].astype(np.float64) * w.scale / 127**2) + B
    want += (
        x[:, outliers].astype(np.float64)
        @ (w.codes[:, outliers] * w.scale[:, None].astype(np.float64) / 127).T
    )
    np.testing.assert_allclose(layer(x), want, rtol=0, atol=2.0**-20 * np.abs(want).max())
    assert outliers.sum() == 1


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["dynamic", "exact"])
def test_torch_dtypes(dtype, mode):
    layer = _C.Linear8bit.from_float(torch.from_numpy(W), torch.from_numpy(B), mode=mode)
    x = torch.randn(3, 70).to(getattr(torch, dtype))
    y = layer(x)
    assert y.dtype == x.dtype
    exact = layer(x.float())
    assert torch.equal(y, exact.to(x.dtype))  # one rounding, at the end
    out = torch.empty_like(y)
    assert layer(x, out=out) is out and torch.equal(out, y)


def test_properties_and_copies():
    bias = B.copy()
    layer = _C.Linear8bit.from_float(W, bias, 6.0, "exact")
    assert (layer.in_features, layer.out_features, layer.threshold, layer.mode) == (70, 24, 6.0, "exact")
    assert repr(layer) == "Linear8bit(in_features=70, out_features=24, bias=True, threshold=6.0, mode=exact)"
    assert isinstance(layer.weight, _C.Int8Params)
    assert _C.Linear8bit(layer.weight).bias is None and _C.Linear8bit(layer.weight).mode == "dynamic"
    x = RNG.standard_normal((2, 70)).astype(np.float32)
    want = layer(x)
    assert copy.copy(layer) is layer
    deep = copy.deepcopy(layer)
    bias[:] = 0
    np.testing.assert_array_equal(deep(x), want)
    assert deep.threshold == 6.0 and deep.mode == "exact"
    assert layer._repr_html_().count("<tr>") == 7
