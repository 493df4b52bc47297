"""Int8Params: row-wise int8 (csrc/python/int8params.c)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optional_torch import needs_torch, torch

from halfbyte import _C

RNG = np.random.default_rng(17)
W = RNG.standard_normal((12, 50)).astype(np.float32)


def test_quantize_is_round_half_even_of_127_over_absmax():
    params = _C.Int8Params.quantize(W)
    scale = np.abs(W).max(axis=1)
    np.testing.assert_array_equal(params.scale, scale)
    exact = W.astype(np.float64) * 127 / scale[:, None].astype(np.float64)
    assert (np.abs(params.codes - exact) <= 0.5 + 127 * 2.0**-22).all()  # float32 products before rint
    assert params.codes.dtype == np.int8 and np.abs(params.codes).max() == 127


def test_dequantize():
    params = _C.Int8Params.quantize(W)
    exact = params.codes.astype(np.float64) * params.scale[:, None] / 127
    np.testing.assert_allclose(params.dequantize(), exact, rtol=2.0**-22, atol=0)
    half = params.dequantize("float16")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, params.dequantize().astype(np.float16))
    out = np.zeros((50, 12), np.float32).T
    assert params.dequantize(out=out) is out
    np.testing.assert_array_equal(out, params.dequantize())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (3, 7)])
def test_shapes(shape):
    params = _C.Int8Params.quantize(np.zeros(shape, np.float32))
    assert params.shape == shape == params.codes.shape and len(params) == shape[0]
    np.testing.assert_array_equal(params.dequantize(), np.zeros(shape))


@needs_torch
def test_properties():
    params = _C.Int8Params.quantize(torch.from_numpy(W).bfloat16())
    assert (params.shape, params.dtype, params.device) == ((12, 50), "bfloat16", "cpu")
    assert params.nbytes == 12 * 50 + 12 * 4 and params.bits_per_param == 8 * params.nbytes / 600
    assert params.codes.dtype == torch.int8 and params.scale.dtype == torch.float32
    assert repr(params) == "Int8Params(shape=(12, 50), dtype=bfloat16)"
    assert params._repr_html_().startswith("<table>")
    with pytest.raises(TypeError):
        _C.Int8Params()


def test_parts_round_trip_and_copies():
    codes, scale = np.arange(-6, 6, dtype=np.int8).reshape(3, 4), np.float32([1, 2, 127])
    params = _C.Int8Params.from_parts(codes, scale)
    assert params.dtype == "float16" and params.codes.ctypes.data == codes.ctypes.data
    again = _C.Int8Params.from_parts(**params.parts())
    deep = copy.deepcopy(params)
    assert copy.copy(params) is params
    want = params.dequantize("float32").copy()
    np.testing.assert_array_equal(want[2], codes[2].astype(np.float32))
    codes[:] = 0
    np.testing.assert_array_equal(deep.dequantize("float32"), want)
    assert (again.dequantize() == 0).all()


def test_rows():
    params = _C.Int8Params.quantize(W)
    whole = params.dequantize()
    for rows in (slice(2, 5), slice(None), slice(4, 4), slice(-3, None)):
        np.testing.assert_array_equal(params[rows].dequantize(), whole[rows])
    assert params[2:].codes.ctypes.data == params.codes.ctypes.data + 100
    for bad, error in ((1, TypeError), (slice(None, None, -1), ValueError)):
        with pytest.raises(error, match=r"Int8Params\.__getitem__: rows"):
            params[bad]


def test_stateless_functions_agree():
    params = _C.Int8Params.quantize(W)
    codes, scale, outliers = _C.quantize_rows_int8(W)
    assert outliers is None
    np.testing.assert_array_equal(codes, params.codes)
    np.testing.assert_array_equal(scale, params.scale)
    np.testing.assert_array_equal(_C.dequantize_rows_int8(codes, scale), params.dequantize())
    three = W.reshape(3, 4, 50)
    codes, scale, _ = _C.quantize_rows_int8(three)
    assert codes.shape == three.shape and scale.shape == (12,)
    np.testing.assert_array_equal(_C.dequantize_rows_int8(codes, scale).reshape(12, 50), params.dequantize())
    out_codes, out_scale = np.zeros((12, 50), np.int8), np.zeros(12, np.float32)
    got = _C.quantize_rows_int8(W, codes=out_codes, scale=out_scale)
    assert got[0] is out_codes and got[1] is out_scale
    np.testing.assert_array_equal(out_codes, params.codes)


def test_outliers():
    x = W.copy()
    x[3, 7] = 50.0
    codes, scale, outliers = _C.quantize_rows_int8(x, 6.0)
    assert outliers.dtype == bool and np.flatnonzero(outliers).tolist() == [7]
    assert (codes[:, 7] == 0).all() and scale[3] == np.abs(np.delete(x[3], 7)).max()
    if torch is not None:
        tensors = _C.quantize_rows_int8(torch.from_numpy(x), 6.0)
        assert tensors[2].dtype == torch.bool and torch.equal(tensors[0], torch.from_numpy(codes))


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=60),
    st.integers(1, 6),
)
@settings(max_examples=100, deadline=None)
def test_round_trip_error(values, rows):
    """Half a step of absmax / 127, but for the roundings of float32 (4 of 2^-24 relative to absmax)."""
    x = np.resize(np.array(values, np.float32), (rows, len(values)))
    params = _C.Int8Params.quantize(x)
    scale = params.scale.astype(np.float64)[:, None]
    error = np.abs(params.dequantize().astype(np.float64) - x)
    usable = np.broadcast_to(scale >= 2.0**-100, x.shape)
    assert (error <= scale * (0.5 / 127 + 2.0**-22))[usable].all()
