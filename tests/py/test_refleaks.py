"""References and memory: every function, when it succeeds and when it fails, gives back what it took.

Three nets: reference counts of the arguments, the interpreter's count of small blocks
(sys.getallocatedblocks, and sys.gettotalrefcount where the interpreter has it), and resident memory.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import pickle
import sys
import weakref

import numpy as np
import pytest
from optional_torch import torch

from halfbyte import _C

X = np.random.default_rng(37).standard_normal((6, 128)).astype(np.float32)
T = None if torch is None else torch.from_numpy(X.copy())
INPUTS = {"numpy": X, "torch": T, "buffer": memoryview(X)}
if torch is None:
    del INPUTS["torch"]
FROZEN = np.zeros(3)
ANGLE, Q = X[:1, None, :8], X[:1, :32].reshape(1, 4, 1, 8)


def scenarios(label, x):
    """(watched objects, function) pairs; exceptions of the function are swallowed by the caller."""
    packed, absmax = _C.quantize_4bit(x)
    p, n = _C.Params4bit.quantize(x), _C.Params4bit.quantize(x, double_quant=True)
    i8, q8 = _C.Int8Params.quantize(x), _C.Params8bit.quantize(x)
    l4, l8 = _C.Linear4bit(p, X[:, 0]), _C.Linear8bit(i8, X[:, 0], 2.0)
    dy = l4(x)
    codes, scale, _ = _C.quantize_rows_int8(x, 1.0)
    out = np.zeros((6, 6), "f4")
    dense = np.zeros((6, 128), "f4")
    columns = X[:, ::2]
    shape = (6, 128)
    nested_parts = n.parts()
    square = (*_C.quantize_4bit(X[0].repeat(8)), "nf4", 64, (32, 32), X[0, :32])
    functions = {
        "quantize_4bit": lambda: _C.quantize_4bit(x),
        "quantize_4bit dtype": lambda: _C.quantize_4bit(np.zeros(64, "u2"), dtype="bfloat16"),
        "quantize_4bit bad": lambda: _C.quantize_4bit(x, blocksize=2**64),
        "quantize_4bit bad out": lambda: _C.quantize_4bit(x, packed=X),
        "dequantize_4bit": lambda: _C.dequantize_4bit(packed, absmax, "nf4", 64, shape, out=dense),
        "dequantize_4bit bad": lambda: _C.dequantize_4bit(packed, absmax, "nf4", 64, (7, 128)),
        "linear_4bit": lambda: _C.linear_4bit(x, packed, absmax, "nf4", 64, shape, X[:, 0]),
        "linear_4bit bad": lambda: _C.linear_4bit(x, packed, absmax, "nf4", 64, shape, X[0]),
        "grad_input": lambda: _C.linear_4bit_grad_input(dy, packed, absmax, "nf4", 64, shape),
        "nest_absmax": lambda: _C.nest_absmax(absmax),
        "quantize_8bit": lambda: _C.quantize_8bit(x, "dynamic", 64),
        "quantize_8bit bad": lambda: _C.quantize_8bit(x, FROZEN, 64),
        "dequantize_8bit": lambda: _C.dequantize_8bit(q8.codes, q8.absmax, q8.map, 256),
        "rows": lambda: _C.quantize_rows_int8(x, 1.0),
        "dequantize_rows": lambda: _C.dequantize_rows_int8(codes, scale),
        "matmul_int8": lambda: _C.matmul_int8(codes, codes),
        "matmul_int8 bad": lambda: _C.matmul_int8(codes, x),
        "linear_8bit": lambda: _C.linear_8bit(x, codes, scale, threshold=2.0),
        "linear_dense": lambda: (_C.linear_dense(x, x, X[:, 0]), _C.linear_dense(x, x, out=out)),
        "linear_dense strided": lambda: _C.linear_dense(columns, X[:, :64], X[:, 0]),
        "linear_dense bad": lambda: _C.linear_dense(x, x, X[0]),
        "linear_dense bad out": lambda: _C.linear_dense(x, x, out=X),
        "linear_dense_few": lambda: (_C.linear_dense_few(x, x, None), _C.linear_dense_few(x, x, X[:, 0])),
        "linear_dense_few not": lambda: (
            _C.linear_dense_few(dense.T, x, None),
            _C.linear_dense_few(x, x, X[0]),
        ),
        "linear_dense_few bad": lambda: _C.linear_dense_few(x, x, "rubbish"),
        "linear_dense_rows": lambda: _C.linear_dense_rows("bfloat16"),
        "rms_norm": lambda: _C.rms_norm(x, X[0], 1e-5),
        "rms_norm bad": lambda: _C.rms_norm(x, x, 1e-5),
        "gate": lambda: _C.gate(x, x, "silu"),
        "gate bad": lambda: _C.gate(x, X[0], "silu"),
        "rotate": lambda: _C.rotate(X[:1, None, None], X[:1, None], X[:1, None]),
        "rotate bad": lambda: _C.rotate(x, x, x),
        "attend": lambda: _C.attend(X[:1, None, None], X[None, None], X[None, None], 1.0),
        "mlp_4bit": lambda: _C.mlp_4bit(X[:, :32], square, square, square, "silu", "float32"),
        "mlp_4bit bad": lambda: _C.mlp_4bit(X[:, :32], square, square, square[:5], "silu", "float32"),
        "qkv_4bit": lambda: _C.qkv_4bit(X[:1, None, :32], *[square] * 3, ANGLE, ANGLE, 8, "float32"),
        "qkv_4bit bad": lambda: _C.qkv_4bit(X[:1, None, :32], *[square] * 3, ANGLE, ANGLE, 5, "float32"),
        "qkv_4bit bad angle": lambda: _C.qkv_4bit(X[:1, None, :32], *[square] * 3, ANGLE, X, 8, "float32"),
        "attend_4bit": lambda: _C.attend_4bit(Q, Q, Q, 1.0, square, "float32"),
        "attend_4bit bad": lambda: _C.attend_4bit(Q, Q, x, 1.0, square, "float32"),
        "attend bad": lambda: _C.attend(X[:1, None, None], X[None, None], x, 1.0),
        "linear_dense_rows bad": lambda: _C.linear_dense_rows("int8"),
        "params": lambda: (p.parts(), n.parts(), i8.parts(), q8.parts()),
        "from_parts": lambda: _C.Params4bit.from_parts(**nested_parts),
        "from_parts bad": lambda: _C.Params4bit.from_parts(**{**nested_parts, "shape": (6, 130)}),
        "dequantize": lambda: (p.dequantize(), n.dequantize("float16"), i8.dequantize(), q8.dequantize()),
        "rows of": lambda: (p[1:3], n[1:3], i8[1:3]),
        "rows of bad": lambda: p[::2],
        "call": lambda: (l4(x), l8(x), l4(x, out=out)),
        "call bad": lambda: l4(X[:, :3]),
        "grad": lambda: (l4.grad_input(dy), l8.grad_input(dy)),
        "from_float": lambda: (_C.Linear4bit.from_float(x), _C.Linear8bit.from_float(x, X[:, 0])),
        "from_float bad": lambda: _C.Linear4bit.from_float(x, X[0]),
        "copies": lambda: [k.__deepcopy__({}) for k in (p, n, i8, q8, l4, l8)],
        "pickle": lambda: [pickle.loads(pickle.dumps(k)) for k in (p, i8, q8)],
        "text": lambda: [(repr(k), k._repr_html_()) for k in (p, n, i8, q8, l4, l8)],
        "dlpack": lambda: (p.__dlpack__(max_version=(1, 0)), np.from_dlpack(i8), np.from_dlpack(q8)),
        "dlpack copy": lambda: (p.__dlpack__(copy=True), np.from_dlpack(p, copy=True)),
        "dlpack bad": lambda: p.__dlpack__(),
        "info": lambda: (_C.cpu_info(), _C.build_info(), _C.codebook("nf4"), _C.map8("linear")),
        "names": lambda: _C.quantize_4bit(x, rubbish=1),
    }
    watched = (x, packed, absmax, p, l4)
    return [pytest.param(watched, f, id=f"{label}: {name}") for name, f in functions.items()]


def repeat(function, count: int) -> None:
    for _ in range(count):
        with contextlib.suppress(TypeError, ValueError, BufferError):
            function()


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """torch alone keeps a million objects; the collector need not look at them again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    ("watched", "function"),
    [case for label, x in INPUTS.items() for case in scenarios(label, x)],
)
def test_nothing_stays_behind(watched, function):
    objects = (*watched, None, type(watched[3]), X)
    measure = getattr(sys, "gettotalrefcount", sys.getallocatedblocks)
    for _ in range(12):  # caches fill and others allocate too: noise ends, a leak goes on
        counts = [sys.getrefcount(o) for o in objects]
        before = measure()
        repeat(function, 100)
        gc.collect()
        grown = measure() - before
        drift = max(sys.getrefcount(o) - n for o, n in zip(objects, counts, strict=True))
        if grown < 50 and drift < 20:
            break
    assert grown < 50, f"{grown} blocks in 100 calls"  # a leak of one block a call is 100
    assert drift < 20, f"{drift} references in 100 calls"


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
@pytest.mark.no_asan(reason="the sanitizer's quarantine keeps freed memory")
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_resident_memory_stays(x):
    layer = _C.Linear4bit.from_float(x)

    def work():
        params = _C.Params4bit.quantize(x, double_quant=True)
        assert len(params.__deepcopy__(None).packed) > 0
        layer(x)
        params.__dlpack__(max_version=(1, 0))
        with contextlib.suppress(ValueError):
            layer(X[:, :2])

    repeat(work, 500)
    slopes = []
    for _ in range(3):
        gc.collect()
        before = resident_bytes()
        repeat(work, 3000)
        slopes.append(resident_bytes() - before)
    assert min(slopes) < 2**18, slopes  # 3000 leaked tensors of 384 bytes are four times as much


def test_second_module_shares_nothing_and_dies():
    """Multi-phase init: another module object has types of its own, and they can be collected."""
    spec = importlib.util.find_spec("halfbyte._C")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module is not _C and module.Params4bit is not _C.Params4bit
    params = module.Params4bit.quantize(X)
    assert not isinstance(params, _C.Params4bit)
    with pytest.raises(TypeError, match="expected Params4bit, got"):
        _C.Linear4bit(params)
    layer = module.Linear4bit(params)
    layer(X)
    alive = weakref.ref(module.Params4bit), weakref.ref(layer)
    del module, params, layer, spec
    gc.collect()
    assert [w() for w in alive] == [None, None]
