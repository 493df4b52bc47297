"""Known-answer tests of the kernels in use, against references in numpy float64. For `halfbyte doctor`.

Each function raises AssertionError with what differs, or returns one line. Codes are compared exactly: the test
values keep a distance from every rounding boundary that exceeds float32 error. Sums of `depth` products in
float32 may be off by depth + 4 half-units of the sum of magnitudes (any order of summation, and the rounding of
codebook times scale).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from halfbyte import _C

_HALF_UNIT = 2.0**-24
_IO = ("float32", "bfloat16", "float16")
_FLOAT16_HALF_UNIT = 2.0**-11
_BFLOAT16_HALF_UNIT = 2.0**-8


def _input(shape: tuple[int, ...], dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(what is passed to the kernel, the same values in float64)."""
    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    if dtype == "bfloat16":
        bits = (x.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    stored = x.astype(dtype)
    return stored, stored.astype(np.float64)


def _numpy_bfloat16() -> Any:
    """NumPy's bfloat16 where ml_dtypes is installed, or None."""
    if importlib.util.find_spec("ml_dtypes") is None:
        return None
    return importlib.import_module("ml_dtypes").bfloat16


def _output(y: np.ndarray) -> np.ndarray:
    if y.dtype == np.uint16:
        return (y.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return y.astype(np.float64)


def _same(what: str, got: np.ndarray, expected: np.ndarray) -> None:
    wrong = np.count_nonzero(got != expected)
    if wrong or got.shape != expected.shape:
        raise AssertionError(f"{what}: {wrong} of {expected.size} values are wrong")


def _near(what: str, got: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    error = np.abs(got - expected) - bound
    if not (error <= 0).all():  # also when a value is NaN
        raise AssertionError(
            f"{what}: off by {np.nanmax(np.abs(got - expected)):g}, allowed {np.max(bound):g}"
        )


def _nearest(scaled: np.ndarray, book: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(code of the nearest entry, whether the value is clear of every boundary)."""
    order = np.argsort(book, kind="stable")
    middle = (book[order][1:] + book[order][:-1]) / 2
    codes = order[np.searchsorted(middle, scaled)]
    distance = np.abs(scaled[:, None] - middle).min(1)
    return codes, distance > 1e-6


def _quantize_4bit(quant_type: str) -> str:
    book = _C.codebook(quant_type).astype(np.float64)
    for dtype in _IO:
        for n, blocksize in ((1, 64), (63, 32), (1000, 64), (4097, 4096)):
            x, exact = _input((n,), dtype, n)
            packed, absmax = _C.quantize_4bit(
                x, quant_type, blocksize, dtype="bfloat16" if dtype == "bfloat16" else None
            )
            padded = np.zeros(len(absmax) * blocksize)
            padded[:n] = exact
            _same(f"{dtype} scales", absmax, np.abs(padded.reshape(-1, blocksize)).max(1).astype(np.float32))
            codes = np.stack([packed >> 4, packed & 15], 1).ravel()[:n]
            scale = np.repeat(absmax.astype(np.float64), blocksize)[:n]
            expected, clear = _nearest(exact / scale, book)
            _same(f"{dtype} codes", book[codes[clear]], book[expected[clear]])  # FP4 has two zeros
            values = _C.dequantize_4bit(packed, absmax, quant_type, blocksize, (n,))
            _same(f"{dtype} values", values, (book[codes].astype(np.float32) * scale.astype(np.float32)))
    return "codes and values are exact in float32, bfloat16, float16"


def _double_quant() -> str:
    absmax = np.abs(np.random.default_rng(1).standard_normal(1000, dtype=np.float32)) + 1
    codes, nested, offset = _C.nest_absmax(absmax)
    if abs(offset - absmax.mean(dtype=np.float64)) > 1000 * _HALF_UNIT * absmax.max():
        raise AssertionError(f"offset {offset}, expected the mean {absmax.mean()}")
    book = _C.map8("dynamic").astype(np.float64)
    centred = absmax - np.float32(offset)
    scale = np.repeat(nested, 256)[:1000].astype(np.float64)
    expected, clear = _nearest(centred / scale, book)
    _same("codes", codes[clear], expected[clear])
    return "scales in 8 bits are exact"


def _quantize_8bit() -> str:
    for name in ("dynamic", "dynamic_unsigned", "linear", "fp8_e4m3", "fp8_e5m2", "normal"):
        book = _C.map8(name)
        x, exact = _input((1003,), "float32", 2)
        codes, absmax = _C.quantize_8bit(x, book, 256)
        scale = np.repeat(absmax, 256)[:1003]
        expected, clear = _nearest(exact / scale, book.astype(np.float64))
        _same(f"{name} codes", book[codes[clear]], book[expected[clear]])
        values = _C.dequantize_8bit(codes, absmax, book, 256)
        _same(f"{name} values", values, book[codes] * scale)
    return "six maps are exact"


def _quantize_int8() -> str:
    for dtype in ("float32", "float16"):
        x, exact = _input((7, 131), dtype, 3)
        codes, scale, _ = _C.quantize_rows_int8(x)
        _same("scales", scale, np.abs(exact).max(1).astype(np.float32))
        scaled = exact * 127 / scale[:, None]
        clear = np.abs(scaled - np.floor(scaled) - 0.5) > 1e-4
        _same("codes", codes[clear], np.rint(scaled)[clear].astype(np.int8))
    return "codes are exact"


def _linear_4bit(quant_type: str) -> str:
    rows, depth = 37, 320
    w, _ = _input((rows, depth), "float32", 4)
    packed, absmax = _C.quantize_4bit(w, quant_type)
    exact_w = _C.dequantize_4bit(packed, absmax, quant_type, 64, (rows, depth)).astype(np.float64)
    for n in (1, 3, 70):
        wide, _ = _input((n, 2 * depth), "float32", n)
        x = wide[:, ::2]  # strided
        y = _C.linear_4bit(x, packed, absmax, quant_type, 64, (rows, depth))
        exact_x = x.astype(np.float64)
        bound = (depth + 4) * _HALF_UNIT * (np.abs(exact_x) @ np.abs(exact_w).T)
        _near(f"{n} rows", _output(y), exact_x @ exact_w.T, bound)
        dy, exact_dy = _input((n, rows), "float32", n + 1)
        dx = _C.linear_4bit_grad_input(dy, packed, absmax, quant_type, 64, (rows, depth))
        bound = (rows + 4) * _HALF_UNIT * (np.abs(exact_dy) @ np.abs(exact_w))
        _near(f"gradient of {n} rows", _output(dx), exact_dy @ exact_w, bound)
    return "1, 3 and 70 rows and their gradients are within the float32 bound"


def _linear_float16() -> str:
    rows, depth = 19, 128
    w, _ = _input((rows, depth), "float32", 5)
    packed, absmax = _C.quantize_4bit(w)
    exact_w = _C.dequantize_4bit(packed, absmax, "nf4", 64, (rows, depth)).astype(np.float64)
    x, exact_x = _input((5, depth), "float16", 6)
    y = _C.linear_4bit(x, packed, absmax, "nf4", 64, (rows, depth))
    exact = exact_x @ exact_w.T
    bound = (depth + 4) * _HALF_UNIT * (np.abs(exact_x) @ np.abs(exact_w).T)
    bound = bound + (np.abs(exact) + bound) * _FLOAT16_HALF_UNIT
    _near("float16", _output(y), exact, bound)
    return "float16 is rounded once"


def _linear_8bit() -> str:
    rows, depth = 29, 200
    w, _ = _input((rows, depth), "float32", 7)
    codes, scale, _ = _C.quantize_rows_int8(w)
    x, exact_x = _input((6, depth), "float32", 8)
    exact_w = codes.astype(np.float64) * scale[:, None] / 127
    y = _C.linear_8bit(x, codes, scale, mode="exact")
    bound = (depth + 6) * _HALF_UNIT * (np.abs(exact_x) @ np.abs(exact_w).T)
    _near("exact", _output(y), exact_x @ exact_w.T, bound)
    x_codes, x_scale, _ = _C.quantize_rows_int8(x)
    expected = (x_codes.astype(np.int64) @ codes.astype(np.int64).T) * (x_scale[:, None] * scale / 127.0**2)
    y = _C.linear_8bit(x, codes, scale, mode="dynamic")
    _near("dynamic", _output(y), expected, 8 * _HALF_UNIT * np.abs(expected))
    _same(
        "int32 products", _C.matmul_int8(x_codes, codes), x_codes.astype(np.int32) @ codes.astype(np.int32).T
    )
    return "exact and LLM.int8() products are right"


def _linear_dense() -> str:
    rows, depth = 67, 333
    units = {"float32": _HALF_UNIT, "float16": _FLOAT16_HALF_UNIT}
    bfloat16 = _numpy_bfloat16()
    if bfloat16 is not None:
        units["bfloat16"] = _BFLOAT16_HALF_UNIT
    for dtype, unit in units.items():
        wide_w, exact_w = _input((rows, 2 * depth), dtype, 11)
        for n in (1, 2, 5, 11):
            wide_x, exact_x = _input((n, 2 * depth), dtype, 12 + n)
            if dtype == "bfloat16":
                wide_w, wide_x = wide_w.view(bfloat16), wide_x.view(bfloat16)
            y = _C.linear_dense(wide_x[:, ::2], wide_w[:, :depth])  # strided, and rows of a wider matrix
            exact = exact_x[:, ::2] @ exact_w[:, :depth].T
            magnitude = np.abs(exact_x[:, ::2]) @ np.abs(exact_w[:, :depth]).T
            bound = (depth / 8 + 16) * _HALF_UNIT * magnitude  # csrc/core/kernels_dense.h
            _near(f"{dtype} {n} rows", _output(y), exact, bound + (np.abs(exact) + bound) * unit)
    return f"{', '.join(units)}: 1, 2, 5 and 11 rows are rounded once from the float32 bound"


def _thread_independence() -> str:
    w, _ = _input((300, 512), "float32", 9)
    x, _ = _input((40, 512), "float32", 10)
    before = _C.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            _C.set_num_threads(threads)
            packed, absmax = _C.quantize_4bit(w)
            y = _C.linear_4bit(x, packed, absmax, "nf4", 64, (300, 512))
            dense = _C.linear_dense(x[:5], w)
            results.append(packed.tobytes() + absmax.tobytes() + y.tobytes() + dense.tobytes())
    finally:
        _C.set_num_threads(before)
    if len(set(results)) != 1:
        raise AssertionError("results differ between 1, 2 and 4 threads")
    return "1, 2 and 4 threads give the same bits"


KNOWN_ANSWERS: dict[str, Callable[[], str]] = {
    "quantize nf4": lambda: _quantize_4bit("nf4"),
    "quantize fp4": lambda: _quantize_4bit("fp4"),
    "double quantization": _double_quant,
    "quantize 8 bit": _quantize_8bit,
    "quantize int8": _quantize_int8,
    "product nf4": lambda: _linear_4bit("nf4"),
    "product fp4": lambda: _linear_4bit("fp4"),
    "product float16": _linear_float16,
    "product int8": _linear_8bit,
    "product dense": _linear_dense,
    "thread independence": _thread_independence,
}
