"""Uploaded tables and expanded scales (cuda/tables.cu) on the emulator: the bits of the CPU's."""

import numpy as np
import pytest
from host_library import STRUCTURES, Scales4, emulated
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import _C

Upload, Expand4 = STRUCTURES["hb_cuda_upload"], STRUCTURES["hb_cuda_expand4"]


@pytest.mark.parametrize("count", [0, 1, 31, 255, 256])
def test_upload(count):
    emulator = emulated()
    emulator.reset(count % 3)
    target = np.full(257, -1, np.float32)
    args = Upload(target=emulator.register(target, writable=True), count=count)
    args.values[:] = [i + 0.5 for i in range(256)]
    emulator.run("upload", args)
    np.testing.assert_array_equal(target[:count], np.arange(count, dtype=np.float32) + 0.5)
    assert (target[count:] == -1).all()


def test_upload_refuses_more_than_it_carries():
    emulator = emulated()
    emulator.reset()
    with pytest.raises(AssertionError, match="invalid argument"):
        emulator.run("upload", Upload(count=257))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 700),
    st.integers(0, 600),
    st.integers(1, 300),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
)
def test_expand(first, n, nested_blocksize, nested, on_device, order):
    rng = np.random.default_rng(first * 1009 + n)
    absmax = rng.random(first + n).astype(np.float32)
    emulator = emulated()
    emulator.reset(order, seed=n)
    scales = Scales4(nested_blocksize=nested_blocksize)
    expected = absmax[first:]
    if nested:
        codes, outer, mean = _C.nest_absmax(absmax, nested_blocksize)
        table = np.asarray(_C.map8("dynamic"))
        offset = np.array([mean], np.float32)
        expected = (table[codes] * np.repeat(outer, nested_blocksize)[: codes.size] + offset)[first:]
        scales.absmax_codes, scales.nested_absmax = map(emulator.register, (codes, outer))
        scales.nested_map = emulator.register(table)
        if on_device:
            scales.nested_offset = emulator.register(offset)
        scales.nested_offset_value = np.nan if on_device else offset[0]
    else:
        scales.absmax = emulator.register(absmax)
    out = np.full(n + 1, -1, np.float32)
    args = Expand4(scales=scales, first=first, n=n, absmax=emulator.register(out, writable=True))
    if nested or first + n > 0:
        emulator.run("expand4", args)
        np.testing.assert_array_equal(out[:n].view("u4"), expected.view("u4"))
    assert out[n] == -1
