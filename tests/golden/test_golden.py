"""Known answers: what _C computes is, bit for bit, what the slow reference computed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from halfbyte import _C

HERE = Path(__file__).parent
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def load(name: str):
    return json.loads((HERE / f"{name}.json").read_text(encoding="ascii"))


def array(text: str, dtype) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), dtype=dtype)


def assert_same_bits(got, expected: str, what: str) -> None:
    raw = np.ascontiguousarray(got).tobytes()
    if expected.startswith("sha256:"):
        assert hashlib.sha256(raw).hexdigest() == expected[7:], what
    else:
        expected_raw = bytes.fromhex(expected)
        assert len(raw) == len(expected_raw), what
        if raw != expected_raw:
            different = np.nonzero(np.frombuffer(raw, np.uint8) != np.frombuffer(expected_raw, np.uint8))[0]
            pytest.fail(f"{what}: {len(different)} bytes differ, the first at byte {different[0]}")


CASES_4BIT = [pytest.param(case, id=f"{q}-{case['name']}") for q in ("nf4", "fp4") for case in load(q)]


@pytest.mark.parametrize("case", CASES_4BIT)
def test_4bit(case):
    quant_type, blocksize = case["quant_type"], case["blocksize"]
    x = array(case["x"], NUMPY[case["dtype"]])
    packed, absmax = _C.quantize_4bit(x, quant_type, blocksize)
    assert_same_bits(packed, case["packed"], "packed")
    assert_same_bits(absmax, case["absmax"], "absmax")
    for dtype, expected in case["dequantized"].items():
        got = _C.dequantize_4bit(packed, absmax, quant_type, blocksize, x.shape, NUMPY[dtype])
        assert_same_bits(got, expected, f"dequantized to {dtype}")


@pytest.mark.parametrize("case", CASES_4BIT)
def test_4bit_nested(case):
    quant_type, blocksize, nested = case["quant_type"], case["blocksize"], case["nested"]
    codes, nested_absmax, offset = _C.nest_absmax(array(case["absmax"], np.float32))
    assert_same_bits(codes, nested["codes"], "codes of absmax")
    assert_same_bits(nested_absmax, nested["nested_absmax"], "nested absmax")
    assert_same_bits(np.float32(offset), nested["offset"], "offset")
    x = array(case["x"], NUMPY[case["dtype"]])
    got = _C.dequantize_4bit(
        array(case["packed"], np.uint8), codes, quant_type, blocksize, x.shape, "float32",
        nested_absmax=nested_absmax, nested_map=_C.map8("dynamic"), nested_offset=offset,
    )  # fmt: skip
    assert_same_bits(got, nested["dequantized_float32"], "dequantized through nested scales")


def test_4bit_types_hold_the_same_bits():
    """The same through the type: quantize, parts, dequantize."""
    for case in load("nf4")[:4] + load("fp4")[:4]:
        x = array(case["x"], NUMPY[case["dtype"]])
        q = _C.Params4bit.quantize(x, case["quant_type"], case["blocksize"])
        assert_same_bits(q.parts()["packed"], case["packed"], "packed")
        assert_same_bits(q.dequantize(NUMPY["float32"]), case["dequantized"]["float32"], "dequantized")
        assert_same_bits(q.dequantize(), case["dequantized"][case["dtype"]], "dequantized to x's dtype")


@pytest.mark.parametrize("name", load("blockwise8")["maps"])
def test_map8(name):
    golden = load("blockwise8")
    table = _C.map8(name)
    assert_same_bits(table, golden["maps"][name], name)
    assert hashlib.sha256(table.tobytes()).hexdigest() == golden["sha256_of_float32_bytes"][name]
    assert np.all(np.diff(table) >= 0)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c['map']}-{i}") for i, c in enumerate(load("blockwise8")["cases"])]
)
def test_8bit(case):
    x = array(case["x"], NUMPY[case["dtype"]])
    table = _C.map8(case["map"])
    codes, absmax = _C.quantize_8bit(x, table, case["blocksize"])
    assert_same_bits(codes, case["codes"], "codes")
    assert_same_bits(absmax, case["absmax"], "absmax")
    for dtype, expected in case["dequantized"].items():
        got = _C.dequantize_8bit(codes, absmax, table, case["blocksize"], NUMPY[dtype])
        assert_same_bits(got, expected, f"dequantized to {dtype}")


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c['rows']}x{c['depth']}") for c in load("int8_rows")])
def test_int8_rows(case):
    x = array(case["x"], NUMPY[case["dtype"]]).reshape(case["rows"], case["depth"])
    codes, scale, outliers = _C.quantize_rows_int8(x, case["threshold"])
    assert_same_bits(codes, case["codes"], "codes")
    assert_same_bits(scale, case["scale"], "scale")
    marked = [] if outliers is None else np.nonzero(outliers)[0].tolist()
    assert marked == case["outlier_columns"]
    for dtype, expected in case["dequantized"].items():
        got = _C.dequantize_rows_int8(codes, scale, NUMPY[dtype])
        assert_same_bits(got, expected, f"dequantized to {dtype}")


def test_vectors_are_what_the_reference_writes(monkeypatch):
    """The smallest file is made anew: the reference beside this test is the one that made the vectors."""
    monkeypatch.syspath_prepend(str(HERE))
    import make_golden

    assert make_golden.vectors_int8() == load("int8_rows")


def test_codebooks_and_maps_are_bitsandbytes():
    """The installed bitsandbytes package holds the same tables."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    if "halfbyte" in (functional.__file__ or ""):
        pytest.skip("halfbyte stands in for bitsandbytes in this process")
    for quant_type in ("nf4", "fp4"):
        expected = functional.get_4bit_type(quant_type, device="cpu").numpy()
        # FP4's code 8 is minus zero, as CUDA decodes it; the Python table of bitsandbytes says zero there.
        assert np.array_equal(_C.codebook(quant_type), expected), quant_type
    made = {
        "dynamic": functional.create_dynamic_map(signed=True),
        "dynamic_unsigned": functional.create_dynamic_map(signed=False),
        "linear": functional.create_linear_map(),
        "fp8_e4m3": functional.create_fp8_map(signed=True, exponent_bits=4, precision_bits=3),
        "fp8_e5m2": functional.create_fp8_map(signed=True, exponent_bits=5, precision_bits=2),
        "normal": functional.create_normal_map(),
    }
    for name, expected in made.items():
        assert np.array_equal(
            _C.map8(name).view(np.int32), expected.to(torch.float32).numpy().view(np.int32)
        ), name
