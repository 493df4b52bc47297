"""Writes the known-answer vectors beside this file: python tests/golden/make_golden.py

Floats are stored as the hexadecimal digits of their little-endian bits, so that any language can read them
without rounding. The inputs are stored too; the generator below only has to be varied, not reproduced.
"""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from math import copysign, frexp, inf, ldexp
from pathlib import Path

import reference as R

HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16", "float16")


class Random:
    """A 64-bit linear congruential generator (Knuth's constants)."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def uniform(self) -> float:
        self.state = (6364136223846793005 * self.state + 1442695040888963407) % 2**64
        return (self.state >> 11) / 2**53

    def bell(self) -> float:
        """About normal with variance 1: the sum of twelve uniforms."""
        return sum(self.uniform() for _ in range(12)) - 6


def bells(n: int, seed: int, dtype: str, scale: float = 0.02) -> list[float]:
    random = Random(seed)
    return [R.ROUND[dtype](R.f32(random.bell() * scale)) for _ in range(n)]


def next_f32(value: float, towards: float) -> float:
    """The float32 beside `value`, which is not zero."""
    exponent = frexp(value)[1] - 24
    for quarters in (1, 2, 3, 4):  # a step is half as wide below a power of two
        moved = R.f32(value + copysign(ldexp(quarters / 4, exponent), towards - value))
        if moved != value:
            return moved
    raise AssertionError(value)


def thresholds(quant_type: str) -> list[float]:
    """Every decision point and the float32 on each side of it, in blocks of 64 with absmax 1."""
    mirrored = [sign + bound for bound, _ in R.FP4_LADDER for sign in ("", "-")]
    points = R.NF4_THRESHOLDS if quant_type == "nf4" else mirrored
    values = [0.0, -0.0, 2.0**-149, -(2.0**-149), 1.0, -1.0]
    for point in [R.f32(Fraction(text)) for text in points]:
        values += [point, next_f32(point, inf), next_f32(point, -inf)]
    return [v for block in R.blocks(values, 63) for v in [*block, 1.0]]


def floats(values: list[float], dtype: str) -> str:
    """The bits, or (for many) their digest."""
    text = R.to_hex(values, dtype)
    return text if len(values) <= 600 else "sha256:" + hashlib.sha256(bytes.fromhex(text)).hexdigest()


def case_4bit(name: str, x: list[float], dtype: str, quant_type: str, blocksize: int) -> dict:
    packed, absmax = R.quantize_4bit(x, quant_type, blocksize)
    codes, nested_absmax, offset = R.nest_absmax(absmax)
    expanded = R.expand_absmax(codes, nested_absmax, offset)
    return {
        "name": name,
        "quant_type": quant_type,
        "blocksize": blocksize,
        "dtype": dtype,
        "x": R.to_hex(x, dtype),
        "packed": packed.hex(),
        "absmax": R.to_hex(absmax, "float32"),
        "dequantized": {
            out: floats(R.dequantize_4bit(packed, absmax, quant_type, blocksize, len(x), out), out)
            for out in DTYPES
        },
        "nested": {
            "codes": bytes(codes).hex(),
            "nested_absmax": R.to_hex(nested_absmax, "float32"),
            "offset": R.to_hex([offset], "float32"),
            "dequantized_float32": floats(
                R.dequantize_4bit(packed, expanded, quant_type, blocksize, len(x), "float32"), "float32"
            ),
        },
    }


def vectors_4bit(quant_type: str) -> list[dict]:
    cases = []
    for i, (n, blocksize) in enumerate(
        [(1, 64), (2, 32), (63, 64), (64, 64), (65, 64), (131, 32), (300, 128), (515, 256)]
    ):
        dtype = DTYPES[i % 3]
        cases.append(case_4bit(f"bell_{n}", bells(n, 17 * i + 1, dtype), dtype, quant_type, blocksize))
    for i, blocksize in enumerate((512, 1024, 2048, 4096)):
        n = blocksize + 7
        dtype = DTYPES[i % 3]
        cases.append(
            case_4bit(f"large_block_{blocksize}", bells(n, 91 + i, dtype), dtype, quant_type, blocksize)
        )
    cases.append(case_4bit("zeros", [0.0, -0.0] * 40 + [0.5] * 17, "float32", quant_type, 32))
    cases.append(
        case_4bit("tiny", [v * 2.0**-120 for v in (1.0, -0.25, 0.5, 0.0)] * 9, "float32", quant_type, 32)
    )
    cases.append(
        case_4bit("huge", [v * 2.0**127 for v in (1.0, -0.25, 0.5, 0.0)] * 9, "float32", quant_type, 32)
    )
    cases.append(case_4bit("thresholds", thresholds(quant_type), "float32", quant_type, 64))
    cases.append(case_4bit("thirds", [k / 32 * 0.75 for k in range(-32, 33)], "float32", quant_type, 128))
    # more than 256 blocks, so that nesting has a second, shorter block of its own
    cases.append(case_4bit("nested_tail", bells(32 * 259 + 5, 7, "bfloat16"), "bfloat16", quant_type, 32))
    return cases


def vectors_8bit() -> dict:
    maps = {name: make() for name, make in R.MAPS.items()}
    cases = []
    for i, (name, table) in enumerate(maps.items()):
        unsigned = min(table) >= 0
        for j, (n, blocksize) in enumerate([(1, 256), (255, 256), (300, 64), (257, 256)]):
            dtype = DTYPES[(i + j) % 3]
            x = bells(n, 1000 + 10 * i + j, dtype)
            if unsigned:  # second moments: squares over many magnitudes
                x = [R.ROUND[dtype](R.f32(v * v)) for v in x]
            codes, absmax = R.quantize_8bit(x, table, blocksize)
            cases.append(
                {
                    "map": name,
                    "blocksize": blocksize,
                    "dtype": dtype,
                    "x": R.to_hex(x, dtype),
                    "codes": bytes(codes).hex(),
                    "absmax": R.to_hex(absmax, "float32"),
                    "dequantized": {
                        out: R.to_hex(R.dequantize_8bit(codes, absmax, table, blocksize, out), out)
                        for out in DTYPES
                    },
                }
            )
    digests = {
        name: hashlib.sha256(bytes.fromhex(R.to_hex(table, "float32"))).hexdigest()
        for name, table in maps.items()
    }
    return {
        "sha256_of_float32_bytes": digests,
        "maps": {name: R.to_hex(table, "float32") for name, table in maps.items()},
        "cases": cases,
    }


def case_int8(flat: list[float], depth: int, threshold: float, dtype: str) -> dict:
    rows = R.blocks(flat, depth)
    codes, scale, outliers = R.quantize_rows_int8(rows, threshold)
    return {
        "rows": len(rows),
        "depth": depth,
        "threshold": threshold,
        "dtype": dtype,
        "x": R.to_hex(flat, dtype),
        "codes": bytes(code % 256 for code in codes).hex(),
        "scale": R.to_hex(scale, "float32"),
        "outlier_columns": outliers,
        "dequantized": {
            out: R.to_hex(R.dequantize_rows_int8(codes, scale, depth, out), out) for out in DTYPES
        },
    }


def vectors_int8() -> list[dict]:
    cases = []
    for i, (rows, depth, threshold) in enumerate(
        [(1, 1, 0), (3, 64, 0), (5, 33, 0), (4, 40, 2.0), (1, 40, 2.0)]
    ):
        flat = bells(rows * depth, 500 + i, DTYPES[i % 3], scale=1.0)
        cases.append(case_int8(flat, depth, threshold, DTYPES[i % 3]))
    # a row of zeros; ties, which go to even
    ties = [0.0] * 8 + [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.0]
    cases.append(case_int8(ties, 8, 0, "float32"))
    return cases


def write(name: str, content: object) -> None:
    text = json.dumps(content, indent=1) + "\n"
    (HERE / name).write_text(text, encoding="ascii")
    print(f"{name}: {len(text):,} bytes")


if __name__ == "__main__":
    write("nf4.json", vectors_4bit("nf4"))
    write("fp4.json", vectors_4bit("fp4"))
    write("blockwise8.json", vectors_8bit())
    write("int8_rows.json", vectors_int8())
