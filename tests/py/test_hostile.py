"""What a hostile or careless caller can do: hypothesis chooses sizes, layouts and junk; other threads change, collect
and fork meanwhile; producers raise; Ctrl-C comes. Nothing may crash, leak, hang or write where it was not asked."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from dlpack_producer import Producer
from hypothesis import given, settings
from hypothesis import strategies as st
from optional_torch import needs_torch, torch

from halfbyte import _C

ALLOWED = (TypeError, ValueError, BufferError, OverflowError, MemoryError)
RNG = np.random.default_rng(43)

# ---- sizes -------------------------------------------------------------------------------------------------

HUGE = [2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, -1, -(2**63), -(2**70)]
sizes = st.one_of(st.integers(-2, 70), st.sampled_from(HUGE))
shapes = st.lists(sizes, max_size=4).map(tuple)


@given(shapes, sizes, sizes, st.sampled_from(["nf4", "fp4"]))
@settings(max_examples=300, deadline=None)
def test_sizes_that_the_arrays_do_not_have(shape, blocksize, start, quant_type):
    """Every size is compared with the arrays' own before a byte is read."""
    packed, absmax = np.zeros(128, np.uint8), np.ones(4, np.float32)
    x = np.ones((1, 64), np.float32)
    for call in (
        lambda: _C.dequantize_4bit(packed, absmax, quant_type, blocksize, shape, start=start),
        lambda: _C.dequantize_4bit(packed, absmax, quant_type, blocksize, shape),
        lambda: _C.linear_4bit(x, packed, absmax, quant_type, blocksize, shape),
        lambda: _C.linear_4bit_grad_input(x, packed, absmax, quant_type, blocksize, shape),
        lambda: _C.Params4bit.from_parts(
            packed, absmax, quant_type=quant_type, blocksize=blocksize, shape=shape
        ).dequantize(),
        lambda: _C.Params4bit.from_parts(
            packed, absmax.view("u1")[:4], quant_type=quant_type, blocksize=64, shape=shape,
            nested_absmax=absmax, nested_map=np.zeros(256, "f4"), nested_blocksize=blocksize,
        ).dequantize(),
        lambda: _C.dequantize_8bit(packed, absmax, "dynamic", blocksize),
        lambda: _C.nest_absmax(absmax, blocksize),
        lambda: _C.Int8Params.from_parts(packed.view("i1").reshape(2, 64), absmax[:2], shape=shape),
    ):  # fmt: skip
        try:
            result = call()
        except ALLOWED as error:
            assert ": " in str(error)
        else:
            for part in result if isinstance(result, tuple) else (result,):
                assert getattr(part, "size", 0) <= 256


HUGE_SHAPES = [
    (2**62,),
    (2**50,),
    (2**31, 2**31),
    (2**35, 2**25),
    (2**50, 2),
    (3, 2**60),
    (2**63 - 1, 2**63 - 1),
]


@pytest.mark.parametrize("shape", HUGE_SHAPES)
@pytest.mark.parametrize("framework", ["dlpack", pytest.param("torch", marks=needs_torch)])
def test_tensors_too_large_for_any_memory(shape, framework):
    """Broadcast views claim more elements than there is address space; the results cannot be allocated."""
    if framework == "torch":
        try:
            x = torch.ones(1).expand(shape)
        except RuntimeError:
            return  # torch itself refuses
        make = lambda: x  # noqa: E731
    else:
        one = np.ones(1, np.float32)
        make = lambda: Producer(one, shape=shape, strides=(0,) * len(shape))  # noqa: E731
    layer = _C.Linear4bit.from_float(np.ones((2, 2), "f4"))
    layer8 = _C.Linear8bit.from_float(np.ones((2, 2), "f4"))
    for call in (
        _C.quantize_4bit,
        _C.Params4bit.quantize,
        lambda x: _C.Params4bit.quantize(x, double_quant=True),
        lambda x: _C.quantize_8bit(x, "dynamic", 256),
        _C.Params8bit.quantize,
        _C.Int8Params.quantize,
        _C.quantize_rows_int8,
        _C.Linear4bit.from_float,
        layer,
        layer.grad_input,
        layer8,
        layer8.grad_input,
        lambda x: _C.linear_4bit(np.ones((1, 2), "f4"), x, np.ones(1, "f4"), "nf4", 64, (1, 2)),
    ):
        with pytest.raises((MemoryError, ValueError)):
            call(make())


# ---- layouts of outputs --------------------------------------------------------------------------------------


@st.composite
def output_views(draw):
    """A [4, 64] view of a larger array: any order, any direction, any gap."""
    step = draw(st.sampled_from([1, -1, 2, -3]))
    gap = draw(st.sampled_from([1, -1, 2, -2]))
    first = draw(st.integers(0, 7))
    base = np.full(4096, 7.0, np.float32)
    if draw(st.booleans()):
        rows = base[first : first + 64 * 4 * 6].reshape(-1, 64 * 3)[::gap, ::step]
        return base, rows[:4, :64]
    columns = base[first : first + 64 * 12 * 2].reshape(64 * 2, 12).T
    return base, columns[::gap][:4, ::step][:, :64] if abs(step) < 3 else columns[::gap][:4, 9:73]


@given(output_views())
@settings(max_examples=100, deadline=None)
def test_outputs_are_written_where_they_are_and_nowhere_else(case):
    base, out = case
    if out.shape != (4, 64):
        return
    x = np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 64)
    params = _C.Params4bit.quantize(x)
    want = params.dequantize()
    inside = np.zeros(base.size, bool)
    where = (out.__array_interface__["data"][0] - base.ctypes.data) // 4
    for i in range(4):
        for j in range(64):
            inside[where + (i * out.strides[0] + j * out.strides[1]) // 4] = True
    assert params.dequantize(out=out) is out
    np.testing.assert_array_equal(out, want)
    assert (base[~inside] == 7).all()


@given(st.integers(-300, 300), st.sampled_from(["dequantize", "layer", "quantize"]))
@settings(max_examples=150, deadline=None)
def test_outputs_that_overlap_inputs_are_refused(shift, what):
    """Exactly those whose bytes the input shares."""
    memory = np.zeros(1200, np.float32)
    x = memory[400:656].reshape(4, 64)
    out = memory[400 + shift : 656 + shift].reshape(4, 64)
    if what == "layer":
        layer = _C.Linear4bit.from_float(np.ones((64, 64), "f4"))
        call, shares = (lambda: layer(x, out=out)), abs(shift) < 256
    elif what == "dequantize":
        packed = x.view(np.uint8).reshape(-1)[:128]
        params = _C.Params4bit.from_parts(
            packed, np.ones(4, "f4"), quant_type="nf4", blocksize=64, shape=(4, 64)
        )
        call, shares = (lambda: params.dequantize(out=out)), -256 < shift < 32
    else:
        packed = out.view(np.uint8).reshape(-1)[:128]
        call, shares = (lambda: _C.quantize_4bit(x, packed=packed)), -32 < shift < 256
    if shares:
        with pytest.raises(ValueError, match="expected memory apart from"):
            call()
    else:
        call()


# ---- producers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, ValueError, ZeroDivisionError])
@pytest.mark.parametrize("method", ["__dlpack__", "__dlpack_device__"])
def test_exceptions_of_producers_pass(error, method):
    class Raises(Producer):
        pass

    def fail(self, **kwargs):
        raise error("mine")

    setattr(Raises, method, fail)
    layer = _C.Linear4bit.from_float(np.ones((2, 64), "f4"))
    bad = Raises(np.ones((2, 64), np.float32))
    for call in (lambda: _C.quantize_4bit(bad), lambda: layer(bad), lambda: _C.Linear4bit(layer.weight, bad)):
        with pytest.raises(error, match="mine"):
            call()


def test_producer_that_changes_the_arguments_meanwhile():
    """__dlpack__ runs Python code in the middle of a call: it may drop what the call was made with."""
    held = [np.ones((2, 64), np.float32)]

    class Drops(Producer):
        def __dlpack__(self, **kwargs):
            held.clear()
            gc.collect()
            return super().__dlpack__(**kwargs)

    packed, absmax = _C.quantize_4bit(held[0])
    bias = Drops(np.zeros(2, np.float32))
    y = _C.linear_4bit(held[0], packed, absmax, "nf4", 64, (2, 64), bias)
    np.testing.assert_array_equal(y, np.full((2, 2), 64, "f4"))


def test_index_that_runs_python_code():
    class Number:
        def __index__(self):
            gc.collect()
            _C.quantize_4bit(np.ones(64, "f4"))
            return 64

    packed, absmax = _C.quantize_4bit(np.ones((2, 64), "f4"), blocksize=Number())
    got = _C.dequantize_4bit(packed, absmax, "nf4", Number(), [2, Number()])
    assert (got == 1).all()


def test_shape_that_shrinks_while_it_is_read():
    class Size:
        def __index__(self):
            shape.clear()
            gc.collect()
            return 2

    packed, absmax = _C.quantize_4bit(np.ones((2, 64), "f4"))
    shape = [Size(), Size(), 64]
    with pytest.raises(ValueError, match="dequantize_4bit: packed, expected"):
        _C.dequantize_4bit(packed, absmax, "nf4", 64, shape)


# ---- other threads ------------------------------------------------------------------------------------------------


def together(*works, seconds: float = 0.7) -> None:
    """Each work again and again in a thread of its own; the first exception is raised here."""
    errors: list[BaseException] = []
    end = time.monotonic() + seconds

    def body(work):
        try:
            while time.monotonic() < end and not errors:
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(w,)) for w in works]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


def test_memory_that_others_change_meanwhile():
    """A race on the caller's array: the numbers may be any mixture, the process lives, the shapes hold."""
    x = RNG.standard_normal((64, 512)).astype(np.float32)
    layer = _C.Linear4bit.from_float(x)
    noise = RNG.integers(0, 2**32, x.shape, dtype=np.uint32).view(
        np.float32
    )  # NaN, infinities, denormals too

    def change():
        x[:] = noise
        x[:] = 1.0

    def work():
        packed, absmax = _C.quantize_4bit(x, scales="search")
        assert _C.dequantize_4bit(packed, absmax, "nf4", 64, x.shape).shape == x.shape
        assert layer(x).shape == (64, 64)
        _C.quantize_8bit(x, "dynamic", 256)
        _C.quantize_rows_int8(x, 3.0)

    together(change, work, work)


def test_collector_runs_meanwhile():
    layer = _C.Linear4bit.from_float(RNG.standard_normal((32, 128)).astype(np.float32), double_quant=True)
    x = RNG.standard_normal((4, 128)).astype(np.float32)
    want = layer(x)

    def work():
        holder: list = [layer.weight[2:10], _C.Params4bit.quantize(x), Producer(x)]
        holder.append(holder)
        np.testing.assert_array_equal(layer(holder[2]), want)

    together(gc.collect, work, work)


def test_layer_replaced_while_it_is_called():
    """The last reference to a layer goes while another thread computes with it."""
    shared = {}
    x = RNG.standard_normal((64, 256)).astype(np.float32)

    def replace():
        shared["layer"] = _C.Linear4bit.from_float(np.ones((256, 256), "f4"), np.zeros(256, "f4"))

    replace()
    want = shared["layer"](x)
    together(replace, lambda: np.testing.assert_array_equal(shared["layer"](x), want))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_the_pool_is_at_work():
    """Children get a pool of their own and the right result, whatever the parent's threads were doing."""
    code = """
import os, sys, threading, time
import numpy as np
from halfbyte import _C
_C.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((256, 4096)).astype("f4")
want = _C.quantize_4bit(x)[0].tobytes()
stop = threading.Event()
def busy():
    while not stop.is_set():
        _C.quantize_4bit(x)
threads = [threading.Thread(target=busy) for _ in range(2)]
for t in threads: t.start()
codes = []
for _ in range(12):
    child = os.fork()
    if child == 0:
        os._exit(0 if _C.quantize_4bit(x)[0].tobytes() == want else 9)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set()
for t in threads: t.join()
assert _C.quantize_4bit(x)[0].tobytes() == want
print(codes)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == f"{[0] * 12}\n", done.stderr


def test_daemon_threads_at_exit():
    """The interpreter goes down while a daemon thread computes and a DLPack consumer holds our memory."""
    code = """
import threading
import numpy as np
from halfbyte import _C
x = np.ones((512, 4096), "f4")
def busy():
    while True:
        _C.quantize_4bit(x, scales="search")
for _ in range(2): threading.Thread(target=busy, daemon=True).start()
kept = [_C.Params4bit.quantize(x).__dlpack__(max_version=(1, 0)) for _ in range(3)]
layer = _C.Linear4bit.from_float(x[:8])
layer(x[:2])
print("end")
"""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout == "end\n", done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_keyboard_interrupt_after_the_call():
    """Ctrl-C during a kernel: the call finishes, the exception comes right after it, the pool goes on working."""
    x = RNG.standard_normal(2**19).astype(np.float32)
    want = _C.quantize_4bit(x, scales="search")[0]
    timer = threading.Timer(0.02, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    interrupted, end = False, time.monotonic() + 60
    try:
        timer.start()
        while time.monotonic() < end:
            _C.quantize_4bit(x, scales="search")
    except KeyboardInterrupt:
        interrupted = True
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert interrupted
    np.testing.assert_array_equal(_C.quantize_4bit(x, scales="search")[0], want)


# ---- a long life -----------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
@pytest.mark.no_asan(reason="the sanitizer's quarantine keeps freed memory")
@needs_torch
def test_memory_after_a_hundred_thousand_calls():
    layer4 = _C.Linear4bit.from_float(torch.randn(16, 64), torch.randn(16), double_quant=True)
    layer8 = _C.Linear8bit.from_float(torch.randn(16, 64), torch.randn(16), 1.0)
    x = torch.randn(2, 64)
    wrong = torch.randn(2, 63)

    def work(count):
        for i in range(count):
            layer4(x)
            layer8(x)
            if i % 8 == 0:
                with contextlib.suppress(ValueError):
                    layer4(wrong)
                layer4.weight.packed  # noqa: B018

    work(2000)
    gc.collect()
    before = resident_bytes()
    work(50_000)  # two layers: a hundred thousand calls
    gc.collect()
    assert resident_bytes() - before < 2**20, "a leak of 16 bytes a call is 1.6 MB"
