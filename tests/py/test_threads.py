"""Threads on shared objects: results never depend on who else is calling."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from halfbyte import _C

RNG = np.random.default_rng(31)


@pytest.fixture(autouse=True)
def _threads_restored():
    before = _C.get_num_threads()
    yield
    _C.set_num_threads(before)


def run(count: int, work) -> None:
    """work(i) in `count` threads that start together; the first exception is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def body(i):
        try:
            barrier.wait()
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


def test_eight_threads_on_one_object():
    layer = _C.Linear4bit.from_float(RNG.standard_normal((96, 256)).astype("f4"), double_quant=True)
    inputs = [RNG.standard_normal((1 + i, 256)).astype("f4") for i in range(8)]
    want = [(layer(x), layer.grad_input(layer(x))) for x in inputs]
    weight = layer.weight.dequantize()

    def work(i):
        for _ in range(60):
            np.testing.assert_array_equal(layer(inputs[i]), want[i][0])
            np.testing.assert_array_equal(layer.grad_input(want[i][0]), want[i][1])
            np.testing.assert_array_equal(layer.weight.dequantize(), weight)
            layer.weight[1:5].packed.sum()

    run(8, work)


def test_eight_threads_with_eight_maps():
    """A library that keeps the table of the last map in a static variable mixes them up here."""
    maps = [np.sort(RNG.standard_normal(256)).astype("f4") for _ in range(8)]
    xs = [RNG.standard_normal(3000).astype("f4") for _ in range(8)]
    want = [_C.quantize_8bit(x, m, 64) for x, m in zip(xs, maps, strict=True)]

    def work(i):
        for _ in range(150):
            codes, absmax = _C.quantize_8bit(xs[i], maps[i], 64)
            np.testing.assert_array_equal(codes, want[i][0])
            np.testing.assert_array_equal(absmax, want[i][1])

    run(8, work)


def test_thread_count_may_change_meanwhile():
    x = RNG.standard_normal((64, 4096)).astype("f4")
    want = _C.quantize_4bit(x)

    def work(i):
        for n in range(40):
            if i == 0:
                _C.set_num_threads(1 + n % 4)
            else:
                np.testing.assert_array_equal(_C.quantize_4bit(x)[0], want[0])

    run(4, work)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_results_do_not_depend_on_the_thread_count(threads):
    w = RNG.standard_normal((130, 448)).astype("f4")
    x = RNG.standard_normal((9, 448)).astype("f4")

    def everything():
        l4, l8 = _C.Linear4bit.from_float(w), _C.Linear8bit.from_float(w, threshold=2.0)
        y = l4(x)
        return [l4.weight.packed, l4.weight.dequantize(), y, l4.grad_input(y), l8(x), l8.grad_input(y),
                *_C.quantize_8bit(w, "dynamic", 256), *_C.nest_absmax(l4.weight.absmax)[:2]]  # fmt: skip

    _C.set_num_threads(1)
    want = everything()
    _C.set_num_threads(threads)
    assert _C.get_num_threads() == threads == _C.cpu_info()["threads"]
    for a, b in zip(everything(), want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_interpreter_runs_during_a_long_call():
    """The GIL is free while the core works: another thread's counter moves."""
    x = RNG.standard_normal(2**24).astype("f4")
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    _C.set_num_threads(1)
    _C.quantize_4bit(x, scales="search")
    end = time.perf_counter()
    stop.set()
    thread.join()
    if end - begin > 0.05:
        assert sum(begin < t < end for t in ticks) > 3
