"""Params8bit and the block-wise 8-bit functions (csrc/python/params8bit.c, functions_8bit.c)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optional_torch import needs_torch, torch

from halfbyte import _C

RNG = np.random.default_rng(23)
X = RNG.standard_normal((7, 61)).astype(np.float32)
MAPS = ["dynamic", "dynamic_unsigned", "linear", "fp8_e4m3", "fp8_e5m2", "normal"]


@pytest.mark.parametrize("name", MAPS)
def test_maps(name):
    values = _C.map8(name)
    assert values.dtype == np.float32 and values.shape == (256,) and (np.diff(values) >= 0).all()
    values[0] = 99  # ours to write: the module's own copy stays
    assert _C.map8(name)[0] != 99


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("blocksize", [1, 3, 64, 256, 10**6, 2**62])
def test_quantize_picks_a_nearest_entry(name, blocksize):
    """Nearest to x * fl(1 / absmax) up to float32 roundings of that product (2^-23) and of the border (2^-24)."""
    x = np.abs(X) if name == "dynamic_unsigned" else X
    params = _C.Params8bit.quantize(x, name, blocksize)
    values = _C.map8(name).astype(np.float64)
    blocks = np.arange(x.size) // min(blocksize, x.size)
    scale = params.absmax.astype(np.float64)[blocks].reshape(x.shape)
    assert params.absmax.shape == (-(-x.size // blocksize),)
    v = x / scale
    best = np.abs(v[..., None] - values).min(axis=-1)
    assert (np.abs(v - values[params.codes]) <= best + 2.0**-22).all()
    np.testing.assert_allclose(params.dequantize(), values[params.codes] * scale, rtol=2.0**-23)


def test_named_map_equals_its_array():
    for name in MAPS:
        a, b = _C.quantize_8bit(X, name, 64), _C.quantize_8bit(X, _C.map8(name), 64)
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
        np.testing.assert_array_equal(
            _C.dequantize_8bit(*a, name, 64), _C.dequantize_8bit(*b, _C.map8(name), 64)
        )


@pytest.mark.parametrize("shape", [(), (5,), (3, 64), (2, 3, 4), (0,), (4, 0)])
def test_shapes(shape):
    x = RNG.standard_normal(shape).astype(np.float32)
    params = _C.Params8bit.quantize(x)
    assert params.shape == shape == params.codes.shape and params.dequantize().shape == shape
    codes, absmax = _C.quantize_8bit(x, "dynamic", 256)
    np.testing.assert_array_equal(codes, params.codes)
    np.testing.assert_array_equal(absmax, params.absmax)
    if shape:
        assert len(params) == shape[0]
    else:
        with pytest.raises(TypeError):
            len(params)


@needs_torch
def test_properties():
    params = _C.Params8bit.quantize(torch.from_numpy(X).half(), "linear", 64)
    assert (params.shape, params.dtype, params.blocksize, params.device) == ((7, 61), "float16", 64, "cpu")
    assert params.nbytes == sum(
        p.numel() * p.element_size() for p in (params.codes, params.absmax, params.map)
    )
    assert params.bits_per_param == 8 * params.nbytes / X.size
    assert torch.equal(params.map, torch.from_numpy(_C.map8("linear")))
    assert repr(params) == "Params8bit(shape=(7, 61), blocksize=64, dtype=float16)"
    assert params._repr_html_().startswith("<table>")
    with pytest.raises(TypeError):
        _C.Params8bit()


def test_parts_round_trip_and_copies():
    codes, absmax, values = np.arange(256, dtype=np.uint8), np.float32([2.0]), _C.map8("dynamic")
    params = _C.Params8bit.from_parts(codes, absmax, values, blocksize=256, shape=(16, 16))
    assert params.codes.ctypes.data == codes.ctypes.data and params.map.ctypes.data == values.ctypes.data
    np.testing.assert_array_equal(params.dequantize().ravel(), values * 2)
    again, deep = _C.Params8bit.from_parts(**params.parts()), copy.deepcopy(params)
    assert copy.copy(params) is params
    want = params.dequantize()
    absmax[:] = 0
    assert (again.dequantize() == 0).all()
    np.testing.assert_array_equal(deep.dequantize(), want)
    named = _C.Params8bit.from_parts(codes, np.float32([1]), "linear", blocksize=256, shape=(256,))
    np.testing.assert_array_equal(named.dequantize(), _C.map8("linear"))


def test_results_into_given_arrays():
    codes, absmax = np.zeros(X.shape, np.uint8), np.zeros(2, np.float32)
    got = _C.quantize_8bit(X, "dynamic", 256, codes=codes, absmax=absmax)
    assert got[0] is codes and got[1] is absmax
    np.testing.assert_array_equal(codes, _C.quantize_8bit(X, "dynamic", 256)[0])
    flat = np.zeros(X.size, np.uint8)
    _C.quantize_8bit(X, "dynamic", 256, codes=flat)
    np.testing.assert_array_equal(flat, codes.ravel())
    out = np.zeros((61, 7), np.float16).T
    assert _C.dequantize_8bit(codes, absmax, "dynamic", 256, out=out) is out
    np.testing.assert_array_equal(out, _C.dequantize_8bit(codes, absmax, "dynamic", 256).astype(np.float16))


def test_nest_absmax():
    absmax = np.abs(RNG.standard_normal(1000)).astype(np.float32)
    codes, nested, offset = _C.nest_absmax(absmax)
    assert codes.shape == (1000,) and nested.shape == (4,)
    assert abs(offset - absmax.astype(np.float64).mean()) <= 1000 * 2.0**-24 * absmax.mean()
    want = _C.quantize_8bit(absmax - np.float32(offset), "dynamic", 256)
    np.testing.assert_array_equal(codes, want[0])
    np.testing.assert_array_equal(nested, want[1])
    assert _C.nest_absmax(np.zeros(0, np.float32))[0].shape == (0,)
    if torch is not None:
        assert _C.nest_absmax(torch.from_numpy(absmax), 100)[1].shape == (10,)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=50),
    st.sampled_from(MAPS),
    st.integers(1, 70),
)
@settings(max_examples=100, deadline=None)
def test_strided_views_equal_their_copies(values, name, blocksize):
    x = np.repeat(np.array(values, np.float32), 2)[::-2]
    want = _C.quantize_8bit(np.ascontiguousarray(x), name, blocksize)
    for got, expected in zip(_C.quantize_8bit(x, name, blocksize), want, strict=True):
        np.testing.assert_array_equal(got, expected)
