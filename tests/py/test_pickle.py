"""Pickle and multiprocessing: what comes back is the same object, byte for byte, in the same framework."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optional_torch import FRAMEWORKS, needs_torch, torch

from halfbyte import _C

X = np.random.default_rng(29).standard_normal((6, 128)).astype(np.float32)


def make(framework):
    x = framework(X)
    return [
        _C.Params4bit.quantize(x), _C.Params4bit.quantize(x, "fp4", 128, True), _C.Params4bit.quantize(x)[2:4],
        _C.Linear4bit.from_float(x), _C.Linear4bit.from_float(x, framework(X[:, 0].copy()), compute="bfloat16"),
        _C.Int8Params.quantize(x), _C.Linear8bit.from_float(x, framework(X[:, 0].copy()), 6.0, "exact"),
        _C.Params8bit.quantize(x, "linear", 64),
    ]  # fmt: skip


def same(a, b) -> bool:
    """Equal types, values and frameworks of everything that the two objects say about themselves."""
    assert type(a) is type(b) and repr(a) == repr(b)
    for name in ("weight", "bias", "parts"):
        if not hasattr(a, name):
            continue
        one, two = getattr(a, name), getattr(b, name)
        if name == "parts":
            one, two = one(), two()
            assert list(one) == list(two)
            for key in one:
                assert type(one[key]) is type(two[key])
                np.testing.assert_array_equal(np.asarray(one[key]), np.asarray(two[key]))
        elif name == "weight":
            same(one, two)
        elif one is not None:
            assert type(one) is type(two)
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    return True


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_round_trip(framework, protocol):
    for thing in make(framework):
        assert same(pickle.loads(pickle.dumps(thing, protocol)), thing)


def test_out_of_band_buffers_are_not_copied():
    params = _C.Params4bit.quantize(X)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(params, 5, buffer_callback=buffers.append)
    assert sum(b.raw().nbytes for b in buffers) == params.nbytes and len(data) < 1000
    again = pickle.loads(data, buffers=[bytes(b.raw()) for b in buffers])
    assert same(again, params)


@needs_torch
def test_torch_save_and_load(tmp_path):
    layer = _C.Linear4bit.from_float(torch.from_numpy(X))
    torch.save({"layer": layer}, tmp_path / "layer.pt")
    assert same(torch.load(tmp_path / "layer.pt", weights_only=False)["layer"], layer)


def test_views_pickle_their_own_rows_only():
    params = _C.Params4bit.quantize(np.zeros((4096, 64), np.float32))
    assert len(pickle.dumps(params[:2])) < 2000


@given(st.lists(st.floats(-100, 100, width=32), max_size=200), st.sampled_from(["nf4", "fp4"]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_identity(values, quant_type, double_quant):
    params = _C.Params4bit.quantize(np.array(values, np.float32), quant_type, 32, double_quant)
    assert same(pickle.loads(pickle.dumps(params)), params)


def test_damaged_state_is_refused():
    params = _C.Params4bit.quantize(X)
    partial, _ = params.__reduce__()
    with pytest.raises(ValueError, match=r"Params4bit\.from_parts: packed"):
        partial(packed=params.packed[:-1])
