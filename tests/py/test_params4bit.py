"""Params4bit: making, reading, slicing, describing (csrc/python/params4bit.c). Numbers of the codes themselves are
tests/golden's business; here a slow decoder of the layout checks that the object hands out the right ones."""

from __future__ import annotations

import copy
import gc
import html.parser
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from optional_torch import FRAMEWORKS, needs_torch, torch

from halfbyte import _C

RNG = np.random.default_rng(11)
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def decode(params) -> np.ndarray:
    """The layout, spelt out: even index in the high nibble, value = codebook[code] * absmax[block]."""
    parts = {k: np.asarray(v) if hasattr(v, "shape") else v for k, v in params.parts().items()}
    absmax = parts["absmax"]
    if absmax.dtype == np.uint8:
        block = np.arange(absmax.size) // parts["nested_blocksize"]
        absmax = parts["nested_map"][absmax] * parts["nested_absmax"][block] + np.float32(
            parts["nested_offset"]
        )
    code = np.stack([parts["packed"] >> 4, parts["packed"] & 15], axis=1).reshape(-1)
    n = int(np.prod(params.shape, dtype=np.int64))
    values = _C.codebook(params.quant_type)[code[:n]] * absmax[np.arange(n) // params.blocksize]
    return values.reshape(params.shape)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_follows_the_layout(quant_type, blocksize, double_quant):
    for n in (0, 1, 2, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize + 7):
        x = RNG.standard_normal(n).astype(np.float32)
        params = _C.Params4bit.quantize(x, quant_type, blocksize, double_quant)
        assert params.packed.shape == ((n + 1) // 2,) and params.absmax.shape == (-(-n // blocksize),)
        np.testing.assert_array_equal(params.dequantize(), decode(params))
        if not double_quant and n:
            padded = np.pad(np.abs(x), (0, -n % blocksize)).reshape(-1, blocksize)
            np.testing.assert_array_equal(params.absmax, padded.max(axis=1))


@pytest.mark.parametrize(
    "shape", [(), (5,), (3, 64), (2, 3, 64), (2, 1, 3, 5), (0,), (0, 64), (4, 0), (1,) * 8]
)
def test_shapes(shape):
    params = _C.Params4bit.quantize(RNG.standard_normal(shape).astype(np.float32))
    assert params.shape == shape and params.dequantize().shape == shape
    np.testing.assert_array_equal(params.dequantize(), decode(params))
    if shape:
        assert len(params) == shape[0]
    else:
        with pytest.raises(TypeError):
            len(params)


def test_properties():
    x = RNG.standard_normal((64, 128)).astype(np.float16)
    params = _C.Params4bit.quantize(x, "fp4", 128)
    assert (params.quant_type, params.blocksize, params.dtype, params.device) == (
        "fp4",
        128,
        "float16",
        "cpu",
    )
    assert params.double_quant is False
    assert params.nbytes == params.packed.nbytes + params.absmax.nbytes == 64 * 64 + 64 * 4
    assert params.bits_per_param == 4.25
    nested = _C.Params4bit.quantize(x, "fp4", 128, True)
    parts = nested.parts()
    assert nested.double_quant and parts["absmax"].dtype == np.uint8
    assert nested.nbytes == sum(v.nbytes for v in parts.values() if isinstance(v, np.ndarray))
    with pytest.raises(AttributeError):
        params.shape = (1,)
    with pytest.raises(AttributeError):
        params.new = 1
    with pytest.raises(TypeError):
        _C.Params4bit()
    with pytest.raises(TypeError):
        type("Sub", (_C.Params4bit,), {})


def test_dequantize_dtypes_round_once():
    params = _C.Params4bit.quantize(RNG.standard_normal((8, 64)).astype(np.float32))
    exact = params.dequantize()
    np.testing.assert_array_equal(params.dequantize("float16"), exact.astype(np.float16))
    if torch is not None:
        bf16 = torch.empty(8, 64, dtype=torch.bfloat16)
        params.dequantize(out=bf16)
        assert torch.equal(bf16, torch.from_numpy(exact).bfloat16())


def test_searched_scales_are_never_worse():
    x = RNG.standard_normal((16, 256)).astype(np.float32)
    errors = {}
    for scales in ("absmax", "search"):
        params = _C.Params4bit.quantize(x, scales=scales)
        errors[scales] = ((params.dequantize().astype(np.float64) - x) ** 2).reshape(-1, 64).sum(axis=1)
    assert (errors["search"] <= errors["absmax"] * (1 + 1e-5)).all()
    assert errors["search"].sum() < 0.99 * errors["absmax"].sum()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_parts_round_trip(double_quant, framework):
    x = framework(RNG.standard_normal((33, 65)).astype(np.float32))
    params = _C.Params4bit.quantize(x, double_quant=double_quant)
    parts = params.parts()
    again = _C.Params4bit.from_parts(**parts)
    assert list(parts)[:2] == ["packed", "absmax"] and type(parts["packed"]) is type(x)
    assert repr(again) == repr(params) and type(again.packed) is type(x)
    np.testing.assert_array_equal(np.asarray(again.dequantize()), np.asarray(params.dequantize()))


def test_from_parts_is_zero_copy():
    packed, absmax = np.zeros(32, np.uint8), np.ones(1, np.float32)
    params = _C.Params4bit.from_parts(packed, absmax, quant_type="nf4", blocksize=64, shape=(64,))
    assert params.packed.ctypes.data == packed.ctypes.data and params.absmax.ctypes.data == absmax.ctypes.data
    packed[:] = 0xFF
    np.testing.assert_array_equal(params.dequantize(), np.ones(64, np.float32))


@needs_torch
def test_from_parts_is_zero_copy_over_any_storage():
    storage = torch.zeros(8, 1, dtype=torch.float32)  # quant_storage float32, bitsandbytes' [n, 1]
    params = _C.Params4bit.from_parts(storage, torch.ones(1), quant_type="nf4", blocksize=64, shape=(64,))
    assert params.packed.data_ptr() == storage.data_ptr() and params.packed.dtype == torch.uint8


@needs_torch
def test_from_parts_offset_may_be_a_tensor():
    params = _C.Params4bit.quantize(torch.randn(64, 64), double_quant=True)
    parts = params.parts()
    parts["nested_offset"] = torch.tensor(parts["nested_offset"])
    assert torch.equal(_C.Params4bit.from_parts(**parts).dequantize(), params.dequantize())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(40, 128), (6, 4, 64), (9, 640)])
def test_rows(shape, double_quant):
    """640 elements are ten blocks a row: slices of nested scales begin inside a nested block of 256."""
    params = _C.Params4bit.quantize(RNG.standard_normal(shape).astype(np.float32), double_quant=double_quant)
    whole = params.dequantize()
    for rows in (
        slice(0, 2),
        slice(1, 5),
        slice(None),
        slice(3, 3),
        slice(-2, None),
        slice(5, 2),
        slice(2, 999),
    ):
        part = params[rows]
        assert part.shape == whole[rows].shape and len(part) == len(whole[rows])
        np.testing.assert_array_equal(part.dequantize(), whole[rows])
        np.testing.assert_array_equal(decode(part), whole[rows])
        if part.packed.size:
            offset = range(shape[0])[rows].start * whole[0].size // 2
            assert part.packed.ctypes.data == params.packed.ctypes.data + offset
    np.testing.assert_array_equal(params[1:5][1:3].dequantize(), whole[2:4])


def test_rows_of_nested_scales_on_a_nested_border():
    """256 blocks of 64 a nested block, two blocks a row: row 128 begins one; its codes are shared, not expanded."""
    params = _C.Params4bit.quantize(RNG.standard_normal((300, 128)).astype(np.float32), double_quant=True)
    whole = params.dequantize()
    assert params[128:].double_quant and not params[127:].double_quant
    for start in (127, 128, 129):
        np.testing.assert_array_equal(params[start:].dequantize(), whole[start:])


def test_rows_refused():
    params = _C.Params4bit.quantize(np.zeros((8, 100), np.float32))
    np.testing.assert_array_equal(params[:].dequantize(), params.dequantize())
    with pytest.raises(ValueError, match=r"whole blocks.*depth 100 and blocksize 64"):
        params[1:]
    with pytest.raises(ValueError, match="step 1, got step 2"):
        params[::2]
    for bad in (1, "a", (slice(1), slice(1)), None):
        with pytest.raises(TypeError, match="rows, expected a slice"):
            params[bad]
    with pytest.raises(TypeError, match="scalar"):
        _C.Params4bit.quantize(np.float32(1.0).reshape(()))[:]


def test_copies():
    packed = np.zeros(32, np.uint8)
    params = _C.Params4bit.from_parts(packed, np.ones(1, "f4"), quant_type="nf4", blocksize=64, shape=(64,))
    assert copy.copy(params) is params
    deep = copy.deepcopy(params)
    packed[:] = 0xFF
    assert (params.dequantize() == 1).all() and (deep.dequantize() == -1).all()


def test_objects_in_cycles_are_collected():
    class Holder(np.ndarray):
        pass

    packed = np.zeros(32, np.uint8).view(Holder)
    params = _C.Params4bit.from_parts(packed, np.ones(1, "f4"), quant_type="nf4", blocksize=64, shape=(64,))
    packed.params = params
    alive = weakref.ref(params)
    del params, packed
    gc.collect()
    assert alive() is None


class Cells(html.parser.HTMLParser):
    """Text of the table's cells; fails on unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag in {"table", "caption", "b", "tbody", "tr", "th", "td"}
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells.append(data)


def test_descriptions():
    params = _C.Params4bit.quantize(np.zeros((64, 1024), np.float32), double_quant=True)
    assert repr(params) == "Params4bit(nf4, shape=(64, 1024), blocksize=64, dtype=float32, double_quant=True)"
    cells = Cells(params._repr_html_()).cells
    table = dict(zip(cells[1::2], cells[2::2], strict=True))
    assert cells[0] == "Params4bit"
    assert table["shape"] == "(64, 1024)" and table["bytes"] == f"{params.nbytes:,}"
    assert table["bits per parameter"] == f"{params.bits_per_param:.2f}"
    assert table["compression"] == f"{64 * 1024 * 4 / params.nbytes:.2f}x"
    for odd in (_C.Params4bit.quantize(np.zeros(0, "f4")), _C.Params4bit.quantize(np.zeros((), "f4"))):
        assert "\n" not in repr(odd)
        Cells(odd._repr_html_())


# ---- properties that hold for every tensor -------------------------------------------------------------------

finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
quant_types = st.sampled_from(["nf4", "fp4"])


@st.composite
def strided(draw):
    """(a view of `base` with drawn strides, its offset): forwards, backwards, broadcast, overlapping."""
    base = np.array(draw(st.lists(finite, min_size=40, max_size=40)), np.float32)
    shape, strides, low, high = [], [], 0, 0
    for _ in range(draw(st.integers(0, 3))):
        size = draw(st.integers(0, 4))
        stride = draw(st.integers(-4, 4))
        reach = max(size - 1, 0) * stride
        low, high = low + min(reach, 0), high + max(reach, 0)
        shape.append(size)
        strides.append(4 * stride)
    return as_strided(base[-low:], shape, strides) if high - low < 40 else base


@given(strided(), quant_types, st.sampled_from([32, 64, 128]))
@settings(max_examples=150, deadline=None)
def test_strided_views_equal_their_copies(view, quant_type, blocksize):
    want = _C.quantize_4bit(np.ascontiguousarray(view).reshape(view.shape), quant_type, blocksize)
    got = _C.quantize_4bit(view, quant_type, blocksize)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.lists(finite, min_size=1, max_size=200), quant_types, st.sampled_from([32, 64]))
@settings(max_examples=150, deadline=None)
def test_round_trip_error(values, quant_type, blocksize):
    """At most half the widest gap of the codebook, times absmax, but for roundings of float32.

    With v = x * fl(1 / absmax): |v| <= 1 + 2^-23, and v is off by at most 2^-23 (two roundings, each 2^-24
    relative). A threshold is off the midpoint by at most 4e-7 (FP4's are short decimals), the product by 2^-24.
    """
    x = np.array(values, np.float32)
    params = _C.Params4bit.quantize(x, quant_type, blocksize)
    scale = np.repeat(params.absmax.astype(np.float64), blocksize)[: x.size]
    levels = np.sort(_C.codebook(quant_type).astype(np.float64))
    if quant_type == "nf4":
        assert levels[0] == -1 and levels[-1] == 1
    bound = (np.diff(levels).max() / 2 + 2.0**-23 + 4e-7 + 2.0**-24) * scale
    usable = scale >= 2.0**-120  # below, 1 / absmax leaves float32
    error = np.abs(params.dequantize().astype(np.float64) - x)
    assert (error <= bound)[usable].all()


@given(st.lists(finite, min_size=1, max_size=100), st.integers(-40, 40), quant_types)
@settings(max_examples=100, deadline=None)
def test_powers_of_two_pass_through(values, exponent, quant_type):
    """Scaling by 2^k is exact, so codes stay and absmax scales (where nothing leaves the normal range)."""
    x = np.array(values, np.float32)
    x[np.abs(x) < 2.0**-60] = 0
    packed, absmax = _C.quantize_4bit(x, quant_type)
    scaled_packed, scaled_absmax = _C.quantize_4bit(np.ldexp(x, exponent), quant_type)
    np.testing.assert_array_equal(packed, scaled_packed)
    np.testing.assert_array_equal(np.ldexp(absmax, exponent), scaled_absmax)


@given(st.lists(finite, min_size=1, max_size=300), quant_types)
@settings(max_examples=50, deadline=None)
def test_dequantize_any_range(values, quant_type):
    x = np.array(values, np.float32)
    packed, absmax = _C.quantize_4bit(x, quant_type)
    whole = _C.dequantize_4bit(packed, absmax, quant_type, 64, x.shape)
    for start in {0, 1, len(x) // 2, len(x) - 1, len(x)}:
        for stop in {start, (start + len(x)) // 2, len(x)}:
            part = _C.dequantize_4bit(packed, absmax, quant_type, 64, (stop - start,), start=start)
            np.testing.assert_array_equal(part, whole[start:stop])
