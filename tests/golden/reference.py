"""A slow, plain reference of every format, written from the published definitions and from nothing else here.

It shares no line and no table with the C sources. Each float32 operation is one exact rational operation
followed by one rounding (`f32`), so that nothing depends on a compiler, a vector unit or a summation order.
`make_golden.py` turns it into the vectors beside it.

Sources: NF4 - Dettmers et al., QLoRA, arXiv:2305.14314, appendix E, with the thresholds of bitsandbytes' CUDA
encoder; FP4 - bitsandbytes' table and its CUDA encoder; dynamic map - Dettmers, arXiv:1511.04561; block-wise
8 bit - Dettmers et al., arXiv:2110.02861; LLM.int8() - Dettmers et al., arXiv:2208.07339.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from itertools import pairwise
from math import inf, isinf, isnan

NF4_VALUES = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
              0.7229568362236023, 1.0]  # fmt: skip
# Decimal texts: a C compiler rounds the literal 0.8480964004993439f to float32 at once; on the way through
# float64 it would become another number.
NF4_THRESHOLDS = [
    "-0.8480964004993439", "-0.6106329262256622", "-0.4599952697753906", "-0.33967943489551544",
    "-0.23460740596055984", "-0.13791173323988914", "-0.045525018125772476", "0.03979014977812767",
    "0.1202552504837513", "0.2035212516784668", "0.2920137718319893", "0.3893125355243683", "0.5016634166240692",
    "0.6427869200706482", "0.8614784181118011",
]  # fmt: skip
# magnitude of code & 7; the codes of a rising magnitude, each with the bound that the value must exceed
FP4_MAGNITUDES = [0.0, 0.005208333333, 0.666666667, 1.0, 0.333333333, 0.5, 0.166666667, 0.25]
FP4_LADDER = [("0.00260417", 1), ("0.0859375", 6), ("0.20833333", 7), ("0.29166667", 4), ("0.4166667", 5),
              ("0.583333", 2), ("0.8333333", 3)]  # fmt: skip

# ---- rounding -------------------------------------------------------------------------------------------


def round_float(value: Fraction, precision: int, min_exponent: int, max_value: Fraction) -> float:
    """Nearest m * 2^e with |m| < 2^precision and e >= min_exponent, ties to even m; inf beyond max_value."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - precision - 1
    while magnitude >= Fraction(2) ** (exponent + precision):
        exponent += 1
    exponent = max(exponent, min_exponent)
    scaled = magnitude / Fraction(2) ** exponent
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1):
        whole += 1
    result = whole * Fraction(2) ** exponent
    signed = inf if result > max_value else float(result)
    return -signed if value < 0 else signed


F32_MAX = (2 - Fraction(1, 2**23)) * 2**127
F16_MAX = Fraction(65504)
BF16_MAX = (2 - Fraction(1, 2**7)) * 2**127


def _round(value: float | Fraction, precision: int, min_exponent: int, max_value: Fraction) -> float:
    if isinstance(value, float) and (isnan(value) or isinf(value) or value == 0):
        return value
    return round_float(Fraction(value), precision, min_exponent, max_value)


def f32(value: float | Fraction) -> float:
    return _round(value, 24, -149, F32_MAX)


def f16(value: float | Fraction) -> float:
    return _round(value, 11, -24, F16_MAX)


def bf16(value: float | Fraction) -> float:
    return _round(value, 8, -133, BF16_MAX)


ROUND = {"float32": f32, "float16": f16, "bfloat16": bf16}


def multiply(a: float, b: float) -> float:
    """float32 product."""
    if isnan(a) or isnan(b) or isinf(a) or isinf(b) or a == 0 or b == 0:
        return a * b
    return f32(Fraction(a) * Fraction(b))


def divide(a: float, b: float) -> float:
    """float32 quotient of finite numbers, b > 0."""
    return a if a == 0 else f32(Fraction(a) / Fraction(b))


def reciprocal(a: float) -> float:
    """float32 1 / a, a >= 0; 0 for zero and the smallest number for infinity."""
    return 0.0 if a == 0 else 2.0**-149 if isinf(a) else f32(1 / Fraction(a))


# ---- bits -----------------------------------------------------------------------------------------------


def to_hex(values: list[float], dtype: str) -> str:
    """Little-endian bits of values that the dtype represents exactly, as hexadecimal digits."""
    if dtype == "float32":
        return struct.pack(f"<{len(values)}f", *values).hex()
    if dtype == "float16":
        return struct.pack(f"<{len(values)}e", *values).hex()
    return b"".join(
        struct.pack("<f", value)[2:] for value in values
    ).hex()  # bfloat16 is float32's upper half


def from_hex(text: str, dtype: str) -> list[float]:
    raw = bytes.fromhex(text)
    if dtype == "float32":
        return list(struct.unpack(f"<{len(raw) // 4}f", raw))
    if dtype == "float16":
        return list(struct.unpack(f"<{len(raw) // 2}e", raw))
    return [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)]


# ---- 4 bit ----------------------------------------------------------------------------------------------


def blocks(values: list, blocksize: int) -> list[list]:
    return [values[i : i + blocksize] for i in range(0, len(values), blocksize)]


def encode_nf4(v: float) -> int:
    return sum(v > f32(Fraction(t)) for t in NF4_THRESHOLDS)  # NaN exceeds nothing: code 0


def encode_fp4(v: float) -> int:
    code = 0
    for bound, candidate in FP4_LADDER:
        if abs(v) > f32(Fraction(bound)):
            code = candidate
    return code + 8 if v < 0 else code


def value_4bit(code: int, quant_type: str) -> float:
    if quant_type == "nf4":
        return f32(NF4_VALUES[code])
    return -f32(FP4_MAGNITUDES[code - 8]) if code >= 8 else f32(FP4_MAGNITUDES[code])


def quantize_4bit(x: list[float], quant_type: str, blocksize: int) -> tuple[bytes, list[float]]:
    encode = {"nf4": encode_nf4, "fp4": encode_fp4}[quant_type]
    codes, absmax = [], []
    for block in blocks(x, blocksize):
        absmax.append(max(abs(value) for value in block))
        inverse = reciprocal(absmax[-1])
        codes += [encode(multiply(value, inverse)) for value in block]
    if len(codes) % 2:
        codes.append(encode(0.0))
    return bytes(high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True)), absmax


def dequantize_4bit(
    packed: bytes, absmax: list[float], quant_type: str, blocksize: int, n: int, dtype: str
) -> list[float]:
    codes = [code for byte in packed for code in (byte >> 4, byte & 15)][:n]
    return [
        ROUND[dtype](multiply(value_4bit(code, quant_type), absmax[i // blocksize]))
        for i, code in enumerate(codes)
    ]


def nest_absmax(absmax: list[float], blocksize: int = 256) -> tuple[list[int], list[float], float]:
    offset = f32(sum(map(Fraction, absmax)) / len(absmax))
    centred = [f32(Fraction(value) - Fraction(offset)) for value in absmax]
    codes, nested_absmax = quantize_8bit(centred, dynamic_map(signed=True), blocksize)
    return codes, nested_absmax, offset


def expand_absmax(
    codes: list[int], nested_absmax: list[float], offset: float, blocksize: int = 256
) -> list[float]:
    table = dynamic_map(signed=True)
    products = [multiply(table[code], nested_absmax[i // blocksize]) for i, code in enumerate(codes)]
    return [f32(Fraction(product) + Fraction(offset)) for product in products]


# ---- 8-bit maps -----------------------------------------------------------------------------------------


def linspace(start: float, end: float, count: int) -> list[float]:
    """float32 points from both ends towards the middle, one fused multiply-add each, as torch makes them."""
    start, end = f32(start), f32(end)
    step = f32(f32(Fraction(end) - Fraction(start)) / Fraction(count - 1))
    half = count // 2
    return [f32(Fraction(start) + i * Fraction(step)) if i < half
            else f32(Fraction(end) - (count - 1 - i) * Fraction(step)) for i in range(count)]  # fmt: skip


def dynamic_map(signed: bool) -> list[float]:
    """An exponent of 10^-6 .. 1 in unary, and the bits that are left for a linear fraction of 0.1 .. 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = linspace(0.1, 1.0, 2 ** (exponent if signed else exponent + 1) + 1)
        scale = f32(10.0 ** (exponent - 6))
        for low, high in pairwise(edges):
            mean = f32(f32(Fraction(low) + Fraction(high)) / 2)
            values += [multiply(scale, mean), -multiply(scale, mean)] if signed else [multiply(scale, mean)]
    return sorted(values)


def linear_map() -> list[float]:
    """255 equal steps from -1 to 1, and a second zero so that there are 256."""
    values = linspace(-1.0, 1.0, 255)
    return values[:127] + [0.0] + values[127:]


def fp8_map(exponent_bits: int, precision_bits: int) -> list[float]:
    """Every sign, exponent and fraction of a small float, divided by the largest."""
    bias = 2 ** (exponent_bits - 1)
    values = []
    for exponent in range(2**exponent_bits):
        for fraction in range(2**precision_bits):
            part = Fraction(fraction, 2**precision_bits)
            value = float(
                part / 2**bias if exponent == 0 else (1 + part) * Fraction(2) ** (bias + 1 - exponent)
            )
            values += [value, -value]
    largest = f32(max(values))
    return sorted(divide(f32(value), largest) for value in values)  # stable: 0.0, then -0.0


def normal_map() -> list[float]:
    """15 quantiles of the normal distribution divided by the largest, and 241 zeros."""
    from scipy.special import ndtri

    offset = 0.9677083
    negative = [float(ndtri(p)) for p in linspace(offset, 0.5, 9)[:-1]]
    positive = [-float(ndtri(p)) for p in linspace(offset, 0.5, 8)[:-1]]
    values = sorted(f32(value) for value in negative + [0.0] * 241 + positive)
    largest = values[-1]
    return [divide(value, largest) for value in values]


MAPS = {
    "dynamic": lambda: dynamic_map(signed=True),
    "dynamic_unsigned": lambda: dynamic_map(signed=False),
    "linear": linear_map,
    "fp8_e4m3": lambda: fp8_map(4, 3),
    "fp8_e5m2": lambda: fp8_map(5, 2),
    "normal": normal_map,
}


# ---- 8 bit ----------------------------------------------------------------------------------------------


def nearest(v: float, table: list[float]) -> int:
    """Index of the nearest entry as bitsandbytes' CUDA search decides it; NaN gives 0.

    The border of two neighbours is their float32 midpoint, and the midpoint itself goes to the even index. Of
    equal entries the first stands for values up to theirs and the last for values above.
    """
    code = 0
    for i, (low, high) in enumerate(pairwise(table)):
        middle = f32(Fraction(f32(Fraction(low) + Fraction(high))) / 2)
        if v > middle or (v == middle and i % 2 == 1 and low != high):
            code = i + 1
    return code


def quantize_8bit(x: list[float], table: list[float], blocksize: int) -> tuple[list[int], list[float]]:
    codes, absmax = [], []
    for block in blocks(x, blocksize):
        absmax.append(max(abs(value) for value in block))
        inverse = reciprocal(absmax[-1])
        codes += [nearest(multiply(value, inverse), table) for value in block]
    return codes, absmax


def dequantize_8bit(
    codes: list[int], absmax: list[float], table: list[float], blocksize: int, dtype: str
) -> list[float]:
    return [ROUND[dtype](multiply(table[code], absmax[i // blocksize])) for i, code in enumerate(codes)]


# ---- int8 by rows ---------------------------------------------------------------------------------------


def quantize_rows_int8(
    rows: list[list[float]], threshold: float = 0.0
) -> tuple[list[int], list[float], list[int]]:
    """Codes (row-major), scale of each row, outlier columns."""
    outliers = sorted({k for row in rows for k, x in enumerate(row) if threshold > 0 and abs(x) >= threshold})
    codes, scales = [], []
    for row in rows:
        kept = [abs(x) for x in row if threshold == 0 or abs(x) < threshold]
        scale = max(kept, default=0.0)
        factor = 0.0 if scale == 0 else f32(127 / Fraction(scale))
        for k, x in enumerate(row):
            dropped = threshold > 0 and (abs(x) >= threshold or (len(rows) > 1 and k in outliers))
            codes.append(0 if dropped else round(Fraction(multiply(x, factor))))  # round() is half to even
        scales.append(scale)
    return codes, scales, outliers


def dequantize_rows_int8(codes: list[int], scales: list[float], depth: int, dtype: str) -> list[float]:
    unit = f32(Fraction(1, 127))
    return [
        ROUND[dtype](multiply(multiply(float(code), scales[i // depth]), unit))
        for i, code in enumerate(codes)
    ]
