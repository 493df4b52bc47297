"""What the tests of the binding drive on CUDA arrays of a fake framework: calls, their arguments, their bounds.

Imported in a process of its own (test_binding.py): it puts the emulated library behind `halfbyte._C`.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from fake_device import Device, host

device = Device()

from halfbyte import _C  # noqa: E402

RNG = np.random.default_rng(11)
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype("f4"), "bfloat16": BF16, "float16": np.dtype("f2")}
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
ROWS, DEPTH = 6, 128
W = RNG.standard_normal((ROWS, DEPTH)).astype(np.float32)
X = RNG.standard_normal((3, DEPTH)).astype(np.float32)
X[:, 5] *= 9  # an outlier column
DY = RNG.standard_normal((3, ROWS)).astype(np.float32)
BIAS = RNG.standard_normal(ROWS).astype(np.float32)
BIG = RNG.standard_normal((270, 32)).astype(np.float32)  # more blocks than a nested block has


@pytest.fixture(autouse=True)
def clean():
    """No fault of one test stays for the next."""
    device.reset()
    yield
    device.reset()


def needs(*entries):
    missing = [e for e in entries if not device.has(e)]
    if missing:
        pytest.skip(f"the library has no {', '.join(missing)} yet")


def flatten(value):
    """The arrays in a result, as NumPy arrays."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [a for v in value for a in flatten(v)]
    if hasattr(value, "info"):
        return [np.array(host(value))]
    if isinstance(value, float):
        return [np.array([value], np.float32)]
    return [np.array(value)] if isinstance(value, np.ndarray) else []


# ---- what is driven: name -> (entries of the library, function of `put`, exact?) ------------------------


def optimizer(optimizer, eight_bit):
    def run(put):
        rng = np.random.default_rng(3)
        n = 300
        result = []
        for step in (1, 2):
            arrays = [put(rng.standard_normal(n).astype("f4")) for _ in range(2)]
            second = optimizer in ("adam", "ademamix")
            rows = 2 if optimizer == "ademamix" else 1
            if eight_bit:
                states = [put(np.full(rows * n, 127, "u1")), put(np.zeros(n, "u1")) if second else None]
                scales = [put(np.ones(rows * 2, "f4")), put(np.ones(2, "f4")) if second else None]
            else:
                states = [put(np.zeros(rows * n, "f4")), put(np.zeros(n, "f4")) if second else None]
                scales = [None, None]
            tensors = [(*arrays, *states, *scales, None, step)]
            _C.optimizer_step(optimizer, tensors, lr=0.1, beta1=0.9, beta2=0.99, beta3=0.999, alpha=2.0,
                              eps=1e-8, weight_decay=0.1, map1="dynamic", map2="dynamic_unsigned")  # fmt: skip
            result += [arrays[0], *states, *scales]
        return result

    return run


def type4(method):
    def run(put):
        p = _C.Params4bit.quantize(put(BIG), blocksize=32)
        return method(p, put)

    return run


def type4_nested(method):
    def run(put):
        return method(_C.Params4bit.quantize(put(BIG), blocksize=32, double_quant=True), put)

    return run


def same(array):
    """`put` of the processor."""
    return array


def nested_parts():
    packed, absmax = _C.quantize_4bit(BIG, blocksize=32)
    codes, nested, offset = _C.nest_absmax(absmax)
    return packed, codes, nested, offset


def with_nested(call):
    """call(packed, codes, keywords): nested scales with everything on the device."""

    def run(put):
        packed, codes, nested, offset = nested_parts()
        keywords = dict(
            nested_absmax=put(nested),
            nested_map=put(_C.map8("dynamic")),
            nested_offset=offset if put is same else put(np.array([offset], "f4")),
        )
        return call(put(packed), put(codes), keywords)

    return run


PACKED, ABSMAX = (np.asarray(a) for a in _C.quantize_4bit(W))
CODES8, SCALE8, _ = (np.asarray(a) for a in _C.quantize_rows_int8(W))
MAP = np.asarray(_C.map8("dynamic"))


SCENARIOS = {
    "quantize_4bit": (
        ["quantize4"],
        lambda put: [
            _C.quantize_4bit(put(W.astype(d)), q)
            for d, q in zip(DTYPES.values(), ["nf4", "fp4", "nf4"], strict=True)
        ],
    ),
    "quantize_4bit search": (["quantize4"], lambda put: _C.quantize_4bit(put(W), scales="search")),
    "dequantize_4bit": (
        ["dequantize4"],
        lambda put: [
            _C.dequantize_4bit(put(PACKED), put(ABSMAX), "nf4", 64, (5, 100), d, start=77) for d in DTYPES
        ],
    ),
    "dequantize_4bit nested": (
        ["dequantize4"],
        with_nested(lambda p, a, kw: _C.dequantize_4bit(p, a, "nf4", 32, BIG.shape, **kw)),
    ),
    "nest_absmax": (["nest4", "upload"], lambda put: _C.nest_absmax(put(np.abs(BIG[:, 0])))),
    "quantize_8bit": (
        ["quantize8"],
        lambda put: [_C.quantize_8bit(put(W.astype(d)), put(MAP), 100) for d in DTYPES.values()],
    ),
    "quantize_8bit named": (["quantize8", "upload"], lambda put: _C.quantize_8bit(put(W), "linear", 10**9)),
    "quantize_8bit map of the processor": (
        ["quantize8", "upload"],
        lambda put: _C.quantize_8bit(put(W), MAP, 64),
    ),
    "dequantize_8bit": (
        ["dequantize8"],
        lambda put: _C.dequantize_8bit(put(np.arange(256, dtype="u1")), put(np.ones(3, "f4")), put(MAP), 100),
    ),
    "quantize_rows_int8": (
        ["quantize_rows8"],
        lambda put: [
            _C.quantize_rows_int8(put(X.astype(d)), t)
            for d, t in zip(DTYPES.values(), [0.0, 6.0, 2.0], strict=True)
        ],
    ),
    "dequantize_rows_int8": (
        ["dequantize_rows8"],
        lambda put: [_C.dequantize_rows_int8(put(CODES8), put(SCALE8), d) for d in DTYPES],
    ),
    "matmul_int8": (["matmul8"], lambda put: _C.matmul_int8(put(CODES8[:3]), put(CODES8))),
    "Params4bit": (["quantize4", "dequantize4"], type4(lambda p, put: [p.parts(), p.dequantize()])),
    "Params4bit nested": (
        ["quantize4", "nest4", "dequantize4"],
        type4_nested(lambda p, put: [p.parts(), p.dequantize("float16")]),
    ),
    "Params4bit rows": (
        ["quantize4", "dequantize4"],
        type4(lambda p, put: [p[3:9].parts(), p[7:].dequantize()]),
    ),
    "Params4bit nested rows": (
        ["quantize4", "nest4", "expand4", "dequantize4"],
        type4_nested(lambda p, put: [p[5:9].dequantize(), p[256:].dequantize(), p[269:].parts()]),
    ),
    "Params4bit copy": (["copy"], type4(lambda p, put: p.__deepcopy__({}).parts())),
    "Params4bit nested copy": (
        ["copy", "nest4"],
        type4_nested(lambda p, put: [p.__deepcopy__({}).parts(), p.__deepcopy__({}).dequantize()]),
    ),
    "Params4bit.from_parts": (
        ["dequantize4"],
        with_nested(
            lambda p, a, kw: _C.Params4bit.from_parts(
                p, a, quant_type="nf4", blocksize=32, shape=BIG.shape, **kw
            ).dequantize()
        ),
    ),
    "Int8Params": (
        ["quantize_rows8", "dequantize_rows8", "copy"],
        lambda put: (lambda p: [p.parts(), p[2:4].dequantize("float32"), p.__deepcopy__({}).parts()])(
            _C.Int8Params.quantize(put(W))
        ),
    ),
    "Params8bit": (
        ["quantize8", "dequantize8", "upload", "copy"],
        lambda put: (lambda p: [p.parts(), p.dequantize(), p.__deepcopy__({}).parts()])(
            _C.Params8bit.quantize(put(W))
        ),
    ),
    "Params8bit.from_parts": (
        ["dequantize8", "upload"],
        lambda put: _C.Params8bit.from_parts(
            put(np.arange(200, dtype="u1")), put(np.ones(1, "f4")), "dynamic", blocksize=256, shape=(200,)
        ).dequantize(),
    ),
    **{
        f"optimizer {name} {8 if eight else 32}": (["optimizer", "upload"], optimizer(name, eight))
        for name, eight in itertools.product(["adam", "lion", "momentum"], [True, False])
    },
}

# ---- products: float64 and a bound ---------------------------------------------------------------------


def check_product(found, x, weight, bias, dtype):
    """Sums in any order (depth + 8 roundings), one rounding of x's dtype; 16-bit codebooks are rounded to it."""
    wide, bias = x.astype("f8"), 0.0 if bias is None else bias.astype("f8")
    expected, size = wide @ weight.T.astype("f8") + bias, np.abs(wide) @ np.abs(weight.T.astype("f8"))
    unit = UNIT[dtype]
    bound = size * (x.shape[-1] + 8) * 2.0**-24 + np.abs(expected) * unit * 1.01
    if dtype != "float32":
        bound += size * unit * 1.01
    error = np.abs(host(found).astype("f8") - expected)
    assert (error <= bound).all(), (error - bound).max()
    assert device.emulator.fault == ""


PRODUCTS = {
    "linear_4bit": lambda x, bias, out=None, put=device.gpu: _C.linear_4bit(
        x, put(PACKED), put(ABSMAX), "nf4", 64, W.shape, bias, out=out
    ),
    "Linear4bit": lambda x, bias, out=None, put=device.gpu: _C.Linear4bit(
        _C.Params4bit.from_parts(put(PACKED), put(ABSMAX), quant_type="nf4", blocksize=64, shape=W.shape),
        bias,
    )(x, out=out),
    "linear_8bit": lambda x, bias, out=None, put=device.gpu: _C.linear_8bit(
        x, put(CODES8), put(SCALE8), bias, mode="exact", out=out
    ),
    "Linear8bit": lambda x, bias, out=None, put=device.gpu: _C.Linear8bit(
        _C.Int8Params.from_parts(put(CODES8), put(SCALE8)), bias, 0.0, "exact"
    )(x, out=out),
}
DENSE4 = np.asarray(_C.dequantize_4bit(PACKED, ABSMAX, "nf4", 64, W.shape))
DENSE8 = np.asarray(_C.dequantize_rows_int8(CODES8, SCALE8))

# ---- calls that only CUDA has, and products: here for streams and faults; the numbers are tested elsewhere --

OFFSETS = np.array([1, 1, 3], np.int64)
ALSO = {
    "grouped_linear_4bit": (
        ["linear4"],
        lambda put: _C.grouped_linear_4bit(
            put(X), put(OFFSETS), put(PACKED), put(ABSMAX), "nf4", 64, (3, ROWS // 3, DEPTH)
        ),
    ),
    "grouped_linear_8bit": (
        ["linear8"],
        lambda put: _C.grouped_linear_8bit(
            put(X),
            put(OFFSETS.astype("i4")),
            put(CODES8.reshape(3, ROWS // 3, DEPTH)),
            put(SCALE8),
            threshold=6.0,
        ),
    ),
    "gather_4bit": (
        ["gather4"],
        lambda put: _C.gather_4bit(
            put(np.array([[5, 0], [-1, 9]])), put(PACKED), put(ABSMAX), "nf4", 64, W.shape
        ),
    ),
} | {
    name: (["linear4" if "4" in name else "linear8"], lambda put, f=f: f(put(X), put(BIAS), None, put))
    for name, f in PRODUCTS.items()
}
