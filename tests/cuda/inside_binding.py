"""Every function and type of `halfbyte._C` on CUDA arrays gives the CPU's results, on the caller's device and stream;
every fault is an exception, and nothing stays behind.

Collected by test_binding.py, in a process of its own.
"""

from __future__ import annotations

import gc
import sys
import time

import numpy as np
import pytest
from binding_cases import (
    ABSMAX,
    ALSO,
    BIAS,
    CODES8,
    DENSE4,
    DENSE8,
    DEPTH,
    DTYPES,
    DY,
    PACKED,
    PRODUCTS,
    ROWS,
    SCALE8,
    SCENARIOS,
    UNIT,
    W,
    X,
    check_product,
    clean,
    device,
    flatten,
    needs,
    same,
)  # fmt: skip
from fake_device import host

from halfbyte import _C

__all__ = ["clean"]  # the fixture


@pytest.mark.parametrize("name", SCENARIOS)
def test_bits_of_the_processor(name):
    entries, run = SCENARIOS[name]
    needs(*entries)
    expected, found = flatten(run(same)), flatten(run(device.gpu))
    assert device.emulator.fault == ""
    assert len(expected) == len(found) > 0
    for want, got in zip(expected, found, strict=True):
        assert want.shape == got.shape or want.size == got.size == 1
        assert want.dtype == got.dtype
        if "optimizer" in name:  # what the kernel itself promises is tested beside it
            np.testing.assert_allclose(got.astype("f8"), want.astype("f8"), rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(got.view("u1"), want.view("u1"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, dtype):
    needs("linear4" if "4" in name else "linear8")
    x = X.astype(DTYPES[dtype])
    weight = DENSE4 if "4" in name else DENSE8
    for bias in (None, BIAS):
        y = PRODUCTS[name](device.gpu(x), None if bias is None else device.gpu(bias))
        check_product(y, x, weight, bias, dtype)
    lone = PRODUCTS[name](device.gpu(x[0]), None)  # no leading dimension
    check_product(lone, x[0], weight, None, dtype)
    assert host(PRODUCTS[name](device.gpu(x[:0]), None)).shape == (0, ROWS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_8bit_dynamic(dtype):
    needs("linear8")
    x = X.astype(DTYPES[dtype])
    for threshold in (0.0, 6.0):
        found = _C.linear_8bit(
            device.gpu(x), device.gpu(CODES8), device.gpu(SCALE8), device.gpu(BIAS), threshold
        )
        expected = np.asarray(_C.linear_8bit(x, CODES8, SCALE8, BIAS, threshold)).astype("f8")
        error = np.abs(host(found).astype("f8") - expected)
        # Both within one rounding of x's dtype and few float32 ones of the exact epilogue.
        assert (error <= np.abs(expected) * UNIT[dtype] * 2.1 + 64 * 2.0**-24 * np.abs(X).max() * DEPTH).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_input(dtype):
    dy = DY.astype(DTYPES[dtype])
    for dense, call in [
        (DENSE4, lambda g: _C.linear_4bit_grad_input(
            g, device.gpu(PACKED), device.gpu(ABSMAX), "nf4", 64, W.shape)),
        (DENSE4, lambda g: _C.Linear4bit(_C.Params4bit.from_parts(
            device.gpu(PACKED), device.gpu(ABSMAX), quant_type="nf4", blocksize=64, shape=W.shape)).grad_input(g)),
        (DENSE8, lambda g: _C.linear_8bit_grad_input(g, device.gpu(CODES8), device.gpu(SCALE8))),
        (DENSE8, lambda g: _C.Linear8bit(
            _C.Int8Params.from_parts(device.gpu(CODES8), device.gpu(SCALE8))).grad_input(g)),
    ]:  # fmt: skip
        found = call(device.gpu(dy))
        check_product(found, dy, dense.T, None, dtype)


@pytest.mark.parametrize("double_quant", [False, True])
def test_from_float(double_quant):
    needs("linear4", "quantize4", *(["nest4"] if double_quant else []))
    layer = _C.Linear4bit.from_float(device.gpu(W), device.gpu(BIAS), double_quant=double_quant)
    reference = _C.Linear4bit.from_float(W, BIAS, double_quant=double_quant)
    check_product(layer(device.gpu(X)), X, np.asarray(reference.weight.dequantize()), BIAS, "float32")
    np.testing.assert_array_equal(host(layer.bias), BIAS)
    assert layer.weight.device == "cuda:0"
    assert repr(layer) == repr(reference)[:-1] + ", device=cuda:0)"
    assert "cuda:0" in layer._repr_html_()
    copy = layer.__deepcopy__({})
    np.testing.assert_array_equal(host(copy(device.gpu(X))), host(layer(device.gpu(X))))
    assert host(copy.bias).ctypes.data != host(layer.bias).ctypes.data


# ---- device, stream, memory ------------------------------------------------------------------------------

RUNNING = SCENARIOS | ALSO


def runner(name, place=0, skip=True):
    """The scenario on device `place`; skip: launches are counted and fail, but no kernel runs, which takes long."""
    entries, run = RUNNING[name]
    needs(*entries)
    device.skip(skip)
    return lambda: run(lambda a: device.gpu(a, place))


@pytest.mark.parametrize("name", RUNNING)
def test_stream_and_device_reach_the_launcher(name):
    call = runner(name, place=1)
    device.framework.set_stream(0x1234560, 1)
    before = device.launches
    call()
    assert device.launches > before
    assert device.last[1:] == (1, 0x1234560)


@pytest.mark.parametrize("name", RUNNING)
def test_nothing_stays_behind(name):
    call = runner(name)
    call()
    measure = getattr(sys, "gettotalrefcount", sys.getallocatedblocks)
    for _ in range(12):
        gc.collect()
        live, blocks, references = device.framework.counts()[:2], measure(), sys.getrefcount(None)
        for _ in range(8):
            call()
        gc.collect()
        assert device.framework.counts()[:2] == live
        if measure() - blocks < 4 and sys.getrefcount(None) - references < 4:
            return
    pytest.fail(f"{measure() - blocks} blocks, {sys.getrefcount(None) - references} references in 8 calls")


@pytest.mark.parametrize("name", RUNNING)
def test_every_launch_fails_once(name):
    call = runner(name)
    call()
    live = device.framework.counts()[:2]
    for launch in range(100):
        device.fail(launch)
        try:
            call()
        except _C.CudaError as error:
            text = str(error)
        else:
            break
        finally:
            device.fail(-1)
        assert "unspecified launch failure (CUDA error 719)" in text
        gc.collect()
        assert device.framework.counts()[:2] == live
    assert 0 < launch < 99
    call()  # lives on


@pytest.mark.parametrize("name", RUNNING)
def test_every_allocation_fails_once(name):
    call = runner(name)
    call()
    live = device.framework.counts()[:2]
    for allocation in range(100):
        device.framework.knobs(fail_after=allocation)
        try:
            call()
        except MemoryError as error:
            assert str(error) == "the fake device is full"
        else:
            break
        finally:
            device.framework.knobs()
        gc.collect()
        assert device.framework.counts()[:2] == live
    assert 0 < allocation < 99 or "optimizer" in name
    call()


@pytest.mark.parametrize("name", RUNNING)
def test_a_library_without_the_kernel(name):
    call = runner(name)
    for entry in RUNNING[name][0]:
        device.hide(entry)
        try:
            with pytest.raises(
                _C.CudaError, match=r"^\w[\w.]+: this halfbyte's CUDA library has no kernel for it$"
            ):
                call()
        finally:
            device.hide(entry, False)


@pytest.mark.parametrize("name", RUNNING)
def test_no_stream(name):
    call = runner(name)
    device.framework.knobs(stream_fails=True)
    with pytest.raises(RuntimeError, match="the fake framework has lost its stream"):
        call()


@pytest.mark.parametrize("shift", [64, 4])
@pytest.mark.parametrize("name", RUNNING)
def test_memory_that_is_hardly_aligned(name, shift):
    """The allocator's memory begins `shift` bytes past a multiple of 256: outputs, copies, workspaces and tables."""
    call = runner(name, skip=False)
    expected = flatten(call())
    device.framework.knobs(shift=shift)
    for want, got in zip(expected, flatten(call()), strict=True):
        if "linear" in name.lower():  # another kernel may add in another order
            np.testing.assert_allclose(
                got, want, rtol=0, atol=(DEPTH + 8) * 2.0**-23 * np.abs(X).max() * DEPTH
            )
        else:
            np.testing.assert_array_equal(got.view("u1"), want.view("u1"))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("linear4", lambda: PRODUCTS["linear_4bit"](device.gpu(X), None)),
        ("linear4", lambda: PRODUCTS["Linear4bit"](device.gpu(X), None)),
        ("linear8", lambda: PRODUCTS["linear_8bit"](device.gpu(X), None)),
        ("linear8", lambda: PRODUCTS["Linear8bit"](device.gpu(X), None)),
        ("nest4", lambda: SCENARIOS["nest_absmax"][1](device.gpu)),
        ("nest4", lambda: SCENARIOS["Params4bit nested"][1](device.gpu)),
        ("optimizer", lambda: SCENARIOS["optimizer adam 8"][1](device.gpu)),
    ],
)
@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1])
def test_workspace(name, call, size):
    """A workspace that the library asks for is there, aligned, and given back."""
    needs(name)
    call()
    live = device.framework.counts()[:2]
    device.workspace(size)  # more than any of these small calls needs
    call()
    assert not device.bad_workspace
    device.workspace(-1)
    gc.collect()
    assert device.framework.counts()[:2] == live


# ---- cost ------------------------------------------------------------------------------------------------

COSTS = {
    "out given": lambda layer, x, out: layer(x, out=out),
    "out made": lambda layer, x, out: layer(x),
}


@pytest.mark.no_asan(reason="times calls")
@pytest.mark.parametrize("name", COSTS)
def test_host_cost_of_a_call(name):
    """At most 2 us to the launcher and back, on a busy machine too: the least of many runs, in up to three attempts."""
    layer = _C.Linear4bit(_C.Params4bit.quantize(device.gpu(W)), device.gpu(BIAS))
    x, out = device.gpu(X), device.gpu(np.zeros((3, ROWS), "f4"))
    call = COSTS[name]
    device.skip(True)
    best = float("inf")
    for _ in range(3 * 60):
        begin = time.perf_counter()
        for _ in range(50):
            call(layer, x, out)
        best = min(best, (time.perf_counter() - begin) / 50)
        if best < 2e-6:
            return
    assert best < 2e-6
