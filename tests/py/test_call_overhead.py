"""What a call costs beside the arithmetic. Bounds are the project's promises: `_C.Linear4bit` at most 3 us over its
kernel, a torch layer without gradient at most 1.5 times `torch.nn.Linear` (64 x 64).

Shared machines are noisy, upwards only: each figure is the least of many short runs, the two sides of a ratio
take turns, and a bound must be missed three times over to count.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from halfbyte import _C

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.no_asan(reason="times calls")


def least(*functions, calls: int = 50, runs: int = 60) -> list[float]:
    """Seconds of one call of each function, the least of `runs` runs that take turns."""
    best = [float("inf")] * len(functions)
    for _ in range(runs):
        for i, function in enumerate(functions):
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            best[i] = min(best[i], (time.perf_counter() - begin) / calls)
    return best


def holds(measure, attempts: int = 3) -> None:
    """measure() returns (what was measured, its bound); the last attempt is final."""
    for _ in range(attempts):
        found, bound = measure()
        if found <= bound:
            return
    assert found <= bound


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize("kind", [_C.Linear4bit, _C.Linear8bit])
def test_call_with_torch_tensors(kind, given_out):
    """The kernel for one row of 32 takes some 0.1 us, so that the call is all there is to see."""
    layer = kind.from_float(torch.randn(1, 32), torch.randn(1))
    x = torch.randn(1, 32)
    out = torch.empty(1, 1)
    call = (lambda: layer(x, out=out)) if given_out else (lambda: layer(x))
    holds(lambda: (least(call)[0], 3e-6))


def test_call_with_numpy_arrays():
    layer = _C.Linear4bit.from_float(np.ones((1, 32), np.float32))
    x = np.ones((1, 32), np.float32)
    holds(lambda: (least(lambda: layer(x))[0], 3e-6))


def layers(rows: int):
    from halfbyte.torch import nn

    yield "4-bit", nn.Linear4bit(64, 64, compress_statistics=False, quant_type="nf4").to("cpu")
    yield "4-bit nested", nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    yield "8-bit", nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0).to("cpu").eval()


@pytest.mark.parametrize("rows", [1, 8])
def test_layers_beside_dense_ones(rows):
    x = torch.randn(rows, 64)
    dense = torch.nn.Linear(64, 64)
    for _, layer in layers(rows):
        with torch.inference_mode():
            layer(x)

            def ratio(layer=layer):
                ours, theirs = least(lambda: layer(x), lambda: dense(x))
                return ours / theirs, 1.5

            holds(ratio)
