"""The type Linear4bit: construction, calls, copies (csrc/python/linear4bit.c). The sums themselves are tested in
test_linear_4bit.py; here they only have to be those of the stateless function, bit for bit."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
from optional_torch import needs_torch, torch

from halfbyte import _C

RNG = np.random.default_rng(13)
W = RNG.standard_normal((24, 96)).astype(np.float32)
B = RNG.standard_normal(24).astype(np.float32)


def stateless(layer, x, bias=None):
    parts = layer.weight.parts()
    parts.pop("dtype")
    return _C.linear_4bit(
        x, parts.pop("packed"), parts.pop("absmax"), bias=bias, compute=layer.compute, **parts
    )


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_call_equals_the_stateless_function(compute, double_quant, quant_type):
    for bias in (None, B):
        layer = _C.Linear4bit.from_float(W, bias, quant_type, 32, double_quant, "absmax", compute)
        for shape in [(96,), (1, 96), (5, 96), (2, 3, 96), (0, 96), (130, 96)]:
            x = RNG.standard_normal(shape).astype(np.float32)
            y = layer(x)
            assert y.shape == (*shape[:-1], 24) and y.dtype == x.dtype
            np.testing.assert_array_equal(y, stateless(layer, x, bias))
            parts = layer.weight.parts()
            dx = layer.grad_input(y)
            assert dx.shape == shape
            parts.pop("dtype")
            want = _C.linear_4bit_grad_input(
                y, parts.pop("packed"), parts.pop("absmax"), compute=compute, **parts
            )
            np.testing.assert_array_equal(dx, want)


def test_sums_are_of_the_right_numbers():
    """float32: |error| <= depth * 2^-24 * sum |x||w| for any order of summation."""
    layer = _C.Linear4bit.from_float(W, B)
    x = RNG.standard_normal((7, 96)).astype(np.float32)
    w = layer.weight.dequantize().astype(np.float64)
    bound = 100 * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(w).T + np.abs(B))
    assert (np.abs(layer(x) - (x.astype(np.float64) @ w.T + B)) <= bound).all()


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_in_torch_out(dtype):
    layer = _C.Linear4bit.from_float(torch.from_numpy(W), torch.from_numpy(B).to(getattr(torch, dtype)))
    x = torch.randn(3, 96).to(getattr(torch, dtype))
    y = layer(x)
    assert type(y) is torch.Tensor and y.dtype == x.dtype and not y.requires_grad
    out = torch.empty_like(y)
    assert layer(x, out=out) is out and torch.equal(out, y)
    assert layer(x, out) is out
    assert torch.equal(layer(x.requires_grad_()), y)
    assert torch.equal(layer(torch.nn.Parameter(x)), y)
    assert layer.bias.dtype == getattr(torch, dtype) and torch.equal(
        layer.bias.float(), torch.from_numpy(B).to(x.dtype).float()
    )


@needs_torch
def test_mixed_frameworks():
    layer = _C.Linear4bit.from_float(W, torch.from_numpy(B))
    x = RNG.standard_normal((3, 96)).astype(np.float32)
    np.testing.assert_array_equal(layer(torch.from_numpy(x)).numpy(), layer(x))
    assert type(layer.bias) is np.ndarray


def test_input_strides():
    layer = _C.Linear4bit.from_float(W)
    x = RNG.standard_normal((96, 8)).astype(np.float32)
    want = layer(np.ascontiguousarray(x.T))
    np.testing.assert_array_equal(layer(x.T), want)
    np.testing.assert_array_equal(layer(x.T[::-1]), want[::-1])
    np.testing.assert_array_equal(layer(np.ascontiguousarray(x.T)[:, ::-1][:, ::-1]), want)
    same = np.broadcast_to(x[:, 0], (4, 96))
    np.testing.assert_array_equal(layer(same), layer(same.copy()))


def test_properties_and_descriptions():
    layer = _C.Linear4bit.from_float(W, B, compute="bfloat16")
    assert (layer.in_features, layer.out_features, layer.compute) == (96, 24, "bfloat16")
    assert isinstance(layer.weight, _C.Params4bit) and layer.weight is layer.weight
    np.testing.assert_array_equal(layer.bias, B)
    assert layer.bias.ctypes.data == B.ctypes.data and not layer.bias.flags.writeable
    assert _C.Linear4bit(layer.weight).bias is None
    text = repr(layer)
    assert (
        text == "Linear4bit(nf4, in_features=96, out_features=24, blocksize=64, bias=True, compute=bfloat16)"
    )
    assert f"{layer.weight.nbytes:,}</td>" in layer._repr_html_()
    assert layer._repr_html_().count("<tr>") == layer._repr_html_().count("</tr>") == 6
    with pytest.raises(AttributeError):
        layer.bias = None


def test_bias_with_strides_is_copied():
    wide = np.repeat(B, 2)
    layer = _C.Linear4bit.from_float(W, wide[::2])
    np.testing.assert_array_equal(layer.bias, B)
    x = RNG.standard_normal((2, 96)).astype(np.float32)
    np.testing.assert_array_equal(layer(x), _C.Linear4bit.from_float(W, B)(x))


def test_copies():
    bias = B.copy()
    layer = _C.Linear4bit.from_float(W, bias)
    x = RNG.standard_normal((2, 96)).astype(np.float32)
    want = layer(x)
    assert copy.copy(layer) is layer
    deep = copy.deepcopy(layer)
    bias[:] = 0
    np.testing.assert_array_equal(deep(x), want)
    assert not np.array_equal(layer(x), want)
    assert copy.deepcopy(_C.Linear4bit.from_float(W)).bias is None


def test_parts_live_as_long_as_the_layer():
    weight = _C.Params4bit.quantize(W)
    alive = weakref.ref(weight)
    layer = _C.Linear4bit(weight, B.copy())
    del weight
    gc.collect()
    assert alive() is not None
    layer(np.zeros((1, 96), np.float32))
    bias = layer.bias
    layer_alive = weakref.ref(layer)
    del layer
    assert layer_alive() is not None
    np.testing.assert_array_equal(bias, B)
    del bias
    assert layer_alive() is None and alive() is None


@pytest.mark.parametrize("shape", [(0, 96), (24, 0), (0, 0), (1, 1)])
def test_degenerate_layers(shape):
    layer = _C.Linear4bit.from_float(np.ones(shape, np.float32), np.full(shape[0], 2.0, np.float32))
    y = layer(np.ones((3, shape[1]), np.float32))
    np.testing.assert_array_equal(y, np.full((3, shape[0]), 2.0 + shape[1], np.float32))
    np.testing.assert_array_equal(layer.grad_input(y).shape, (3, shape[1]))
