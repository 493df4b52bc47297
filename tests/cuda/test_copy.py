"""Strided copies and managed memory of the CUDA library, on the emulator."""

import ctypes

import numpy as np
import pytest
from host_library import STRUCTURES, Queue, emulated
from hypothesis import given, settings
from hypothesis import strategies as st

Copy = STRUCTURES["hb_cuda_copy"]
ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def copy(source, target, source_base, target_base, order=0):
    """target[...] = source[...] by the library; the bases own the memory of the two views."""
    emulator = emulated()
    emulator.reset(order, seed=source.size)
    emulator.register(source_base)
    emulator.register(target_base, True)
    item = source.dtype.itemsize
    strides = [[s // item for s in view.strides] for view in (source, target)]
    emulator.run("copy", Copy(source=source.ctypes.data, target=target.ctypes.data, item_bytes=item,
                 ndim=source.ndim, shape=(ctypes.c_int64 * 8)(*source.shape),
                 source_stride=(ctypes.c_int64 * 8)(*strides[0]),
                 target_stride=(ctypes.c_int64 * 8)(*strides[1])))  # fmt: skip


def memory(n, dtype, offset, seed):
    """Random bytes, n elements at `offset` elements behind a multiple of 256 bytes."""
    size = np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, (n + offset) * size + 256, np.uint8)
    start = -raw.ctypes.data % 256 + offset * size
    return raw[start : start + n * size].view(dtype)


@st.composite
def layouts(draw):
    """A shape, and for source and target a padded array with permuted axes, steps, signs and offset."""
    shape = draw(st.lists(st.integers(1, 6), max_size=5))
    if shape and draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([0, 16, 33, 64, 300]))
    views = []
    for side in range(2):
        axes = draw(st.permutations(range(len(shape))))
        views.append({
            "axes": axes,
            "step": [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape],
            "pad": [draw(st.sampled_from([0, 0, 1, 4])) for _ in shape],
            "sign": [draw(st.sampled_from([1, 1, -1])) for _ in shape],
            "broadcast": [side == 0 and draw(st.sampled_from([False, False, False, True])) for _ in shape],
            "offset": draw(st.integers(0, 9)),
        })  # fmt: skip
    return shape, views


def view_of(shape, layout, dtype, seed):
    full = [1 if layout["broadcast"][a] else shape[a] * layout["step"][a] + layout["pad"][a]
            for a in layout["axes"]]  # fmt: skip
    base = memory(int(np.prod(full, dtype=np.int64)), dtype, layout["offset"], seed)
    view = base.reshape(full).transpose(np.argsort(layout["axes"]))
    for a, n in enumerate(shape):
        if layout["broadcast"][a]:
            view = np.broadcast_to(view, [n if b == a else m for b, m in enumerate(view.shape)])
        else:
            index = [slice(None)] * len(shape)
            index[a] = slice(0, n * layout["step"][a], layout["step"][a])
            view = view[tuple(index)]
        if layout["sign"][a] < 0:
            view = np.flip(view, a)
    return base, view


@settings(deadline=None, max_examples=150)
@given(layouts(), st.sampled_from(sorted(ITEMS)), st.integers(0, 2))
def test_any_layout(layout, item, order):
    shape, (source_layout, target_layout) = layout
    source_base, source = view_of(shape, source_layout, ITEMS[item], 1)
    target_base, target = view_of(shape, target_layout, ITEMS[item], 2)
    expected_base = target_base.copy()
    expected = np.lib.stride_tricks.as_strided(
        expected_base[(target.ctypes.data - target_base.ctypes.data) // item :] if target.size else target,
        target.shape, target.strides) if target.size else target  # fmt: skip
    if target.size:
        expected[...] = source
    copy(source, target, source_base, target_base, order)
    assert np.array_equal(target_base, expected_base)  # the gaps too


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_shapes_of_models(item, order):
    """Contiguous runs at every alignment, transposed matrices, columns cut out, rows repeated."""
    for n, a, b in [
        (1, 0, 0),
        (15, 3, 3),
        (16, 0, 0),
        (4099, 0, 0),
        (4099, 5, 5),
        (3000, 1, 2),
        (2100, 8, 0),
    ]:
        source, target = memory(n, ITEMS[item], a, 1), memory(n, ITEMS[item], b, 2)
        copy(source, target, source, target, order)
        assert np.array_equal(source, target)
    base = memory(70 * 129, ITEMS[item], 0, 3)
    matrix = base.reshape(70, 129)
    for source in (matrix.T, matrix[:, 1:65], matrix[::2, ::-1], np.broadcast_to(matrix[3], (40, 129)),
                   base[: 70 * 128].reshape(2, 35, 8, 16).transpose(0, 2, 1, 3)):  # fmt: skip
        target = memory(source.size, ITEMS[item], 0, 4)
        copy(source, target.reshape(source.shape), base, target, order)
        assert np.array_equal(target.reshape(source.shape), source)
    out = memory(129 * 80, ITEMS[item], 0, 5)
    columns = out.reshape(129, 80)[:, 4:74]
    copy(matrix.T, columns, base, out, order)
    assert np.array_equal(columns, matrix.T)


def test_eight_dimensions_that_do_not_join():
    shape = (2, 3, 2, 3, 2, 3, 2, 3)
    base = memory(int(np.prod(np.add(shape, 1))), np.uint16, 0, 1)
    source = base.reshape(np.add(shape, 1))[tuple(slice(0, n) for n in shape)]
    target = memory(source.size, np.uint16, 0, 2)
    copy(source, target.reshape(shape), base, target)
    assert np.array_equal(target.reshape(shape), source)


def test_reciprocals():
    """The copy's n / d by a multiplication is exact at both ends of every quotient."""
    rng = np.random.default_rng(0)
    small, powers = np.arange(1, 3000), 2 ** np.arange(31)
    d = np.unique(
        np.concatenate([small, powers, powers[1:] - 1, powers[1:] + 1, rng.integers(1, 2**31, 20000)])
    )
    shift = np.array([int(x - 1).bit_length() for x in d], np.uint64)
    wide = d.astype(np.uint64)
    multiplier = (((np.uint64(1) << shift) - wide << np.uint64(32)) + wide - np.uint64(1)) // wide
    for quotient in (0, 1, 2, 3, 1000):
        for edge in (-1, 0, 1):
            n = d * quotient + edge
            n = np.where((n >= 0) & (n < 2**31), n, 2**31 - 1).astype(np.uint64)
            got = ((n * multiplier >> np.uint64(32)) + n & np.uint64(0xFFFFFFFF)) >> shift
            assert np.array_equal(got, n // wide)
    n = np.full_like(wide, 2**31 - 1)
    assert np.array_equal(((n * multiplier >> np.uint64(32)) + n) >> shift, n // wide)


def test_managed_memory():
    emulator = emulated()
    emulator.reset()
    api, queue = emulator.api, Queue(0, None)
    pointer, readable = ctypes.c_void_p(), ctypes.c_int32(-1)

    def on_device(address):
        assert api.memory_on_device(0, address, ctypes.byref(readable)) == 0
        return readable.value

    assert api.managed_new(0, 1000, ctypes.byref(pointer)) == 0
    assert pointer.value % 256 == 0
    assert on_device(pointer.value) == 1
    assert on_device(pointer.value + 999) == 1
    assert api.managed_prefetch(ctypes.byref(queue), pointer, 1000) == 0
    source = np.arange(125, dtype=np.uint64)
    assert on_device(source.ctypes.data) == 0
    emulator.reset()
    emulator.register(source)
    assert on_device(source.ctypes.data) == 1
    shape, stride = (ctypes.c_int64 * 8)(125), (ctypes.c_int64 * 8)(1)
    emulator.run("copy", Copy(source=source.ctypes.data, target=pointer, item_bytes=8, ndim=1, shape=shape,
                 source_stride=stride, target_stride=stride))  # fmt: skip
    assert ctypes.string_at(pointer, 1000) == source.tobytes()
    assert api.managed_free(pointer) == 0
    assert on_device(pointer.value) == 0
    assert api.managed_free(pointer) != 0
    assert api.managed_new(0, 0, ctypes.byref(pointer)) == 0
    assert pointer.value is None
    assert api.managed_free(None) == 0
    assert api.managed_new(0, -1, ctypes.byref(pointer)) != 0
    assert api.managed_new(7, 16, ctypes.byref(pointer)) != 0
