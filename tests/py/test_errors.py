"""Bad arguments: the right exception, and a message that names function, argument, expected and got."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
from optional_torch import torch

from halfbyte import _C

X = np.ones((4, 64), np.float32)
PACKED, ABSMAX = _C.quantize_4bit(X)
NESTED = _C.Params4bit.quantize(X, double_quant=True).parts()
CODES8, ABSMAX8 = _C.quantize_8bit(X, "dynamic", 256)
CODES, SCALE, _ = _C.quantize_rows_int8(X)
P = _C.Params4bit.quantize(X)
L4, L8 = _C.Linear4bit(P), _C.Linear8bit.from_float(X)
ARGS = ("nf4", 64, (4, 64))


def call(function, *args, **kwargs):
    return lambda: function(*args, **kwargs)


def nested(**changes):
    return call(_C.Params4bit.from_parts, **{**NESTED, **changes})


def parts(**changes):
    good = {"packed": PACKED, "absmax": ABSMAX, "quant_type": "nf4", "blocksize": 64, "shape": (4, 64)}
    return call(_C.Params4bit.from_parts, **{**good, **changes})


V, T, B = ValueError, TypeError, BufferError
CASES = [
    # block sizes
    *[(call(_C.quantize_4bit, X, blocksize=b), V, "quantize_4bit: blocksize, expected", str(b))
      for b in (0, -1, 1, 16, 48, 8192, 2**63, 2**64, -(2**64))],
    *[(call(_C.quantize_8bit, X, "dynamic", b), V, "quantize_8bit: blocksize, expected", str(b))
      for b in (0, -1, 2**64)],
    *[(call(_C.nest_absmax, ABSMAX, b), V, "nest_absmax: blocksize, expected", str(b)) for b in (0, -5, 2**64)],
    (call(_C.quantize_4bit, X, blocksize=64.0), T, "quantize_4bit: blocksize, expected an int", "float"),
    (call(_C.quantize_4bit, X, blocksize=None), T, "quantize_4bit: blocksize, expected an int", "NoneType"),
    (parts(blocksize=2**64), V, "Params4bit.from_parts: blocksize", str(2**64)),
    (nested(nested_blocksize=0), V, "Params4bit.from_parts: nested_blocksize, expected at least 1", "0"),
    # names
    (call(_C.quantize_4bit, X, "nf5"), V, "quantize_4bit: quant_type, expected 'nf4' or 'fp4'", "'nf5'"),
    (call(_C.quantize_4bit, X, 4), T, "quantize_4bit: quant_type, expected 'nf4' or 'fp4'", "4"),
    (call(_C.quantize_4bit, X, "nf4\0"), V, "quantize_4bit: quant_type", "nf4"),
    (call(_C.quantize_4bit, X, scales="best"), V, "quantize_4bit: scales, expected 'absmax' or 'search'", "'best'"),
    (call(_C.linear_4bit, X, PACKED, ABSMAX, *ARGS, compute="int4"), V, "linear_4bit: compute, expected", "'int4'"),
    (call(_C.linear_8bit, X, CODES, SCALE, mode="fast"), V, "linear_8bit: mode, expected", "'fast'"),
    (call(_C.codebook, "int4"), V, "codebook: quant_type, expected", "'int4'"),
    (call(_C.map8, "log"), V, "map8: map, expected 'dynamic'", "'log'"),
    (call(_C.map8, 3), T, "map8: name, expected str", "int"),
    (call(P.dequantize, "float64"), V, "Params4bit.dequantize: dtype, expected float32", "'float64'"),
    (call(P.dequantize, np.float64), T, "Params4bit.dequantize: dtype, expected float32", "float64"),
    (call(P.dequantize, 3), T, "Params4bit.dequantize: dtype, expected float32", "3"),
    # dtypes
    (call(_C.quantize_4bit, X.astype("f8")), T, "quantize_4bit: x, expected dtype float32, bfloat16 or float16",
     "float64"),
    (call(_C.quantize_4bit, X.astype("i4")), T, "quantize_4bit: x, expected dtype", "int32"),
    (call(_C.quantize_4bit, None), T, "quantize_4bit: x, expected an array", "NoneType"),
    (call(_C.quantize_4bit, [1.0]), T, "quantize_4bit: x, expected an array", "list"),
    (call(_C.dequantize_4bit, PACKED, ABSMAX.astype("f8"), *ARGS), T, "dequantize_4bit: absmax, expected dtype",
     "float64"),
    (call(_C.dequantize_8bit, CODES8.view("i1"), ABSMAX8, "dynamic", 256), T, "dequantize_8bit: codes", "int8"),
    (call(_C.matmul_int8, X, CODES), T, "matmul_int8: a, expected dtype int8", "float32"),
    (call(_C.linear_8bit, X, CODES.view("u1"), SCALE), T, "linear_8bit: codes, expected dtype int8", "uint8"),
    (call(L4, X.astype("f8")), T, "Linear4bit: x, expected dtype", "float64"),
    (call(L8, X.astype("f8")), T, "Linear8bit: x, expected dtype", "float64"),
    (call(_C.Linear4bit, X), T, "Linear4bit: weight, expected Params4bit", "ndarray"),
    (call(_C.Linear8bit, P), T, "Linear8bit: weight, expected Int8Params", "Params4bit"),
    # shapes and sizes
    (call(L4, X[:, :63]), V, r"Linear4bit: x, expected a last dimension of 64 (weight is [4, 64])", "(4, 63)"),
    (call(L4, np.float32(1).reshape(())), V, "Linear4bit: x, expected a last dimension of 64", "()"),
    (call(L4.grad_input, X), V, "Linear4bit.grad_input: dy, expected a last dimension of 4", "(4, 64)"),
    (call(L8, X[:, :63]), V, "Linear8bit: x, expected a last dimension of 64", "(4, 63)"),
    (call(L8.grad_input, X), V, "Linear8bit.grad_input: dy, expected a last dimension of 4", "(4, 64)"),
    (call(_C.matmul_int8, CODES, CODES[:, :9]), V, "matmul_int8: a, expected a last dimension of 9", "(4, 64)"),
    (call(_C.matmul_int8, CODES, CODES[0]), V, "matmul_int8: b, expected shape [rows, depth]", "1 dimensions"),
    (call(_C.Linear4bit, P, X[0, :3]), V, "Linear4bit: bias, expected shape (4,)", "(3,)"),
    (call(_C.Linear4bit, P, X[:, :1]), V, "Linear4bit: bias, expected shape (4,)", "(4, 1)"),
    (call(_C.Linear4bit.from_float, X[0]), V, "Linear4bit.from_float: weight, expected shape [rows, depth]", "(64,)"),
    (call(_C.Int8Params.quantize, X[0]), V, "Int8Params.quantize: x, expected shape [rows, depth]", "(64,)"),
    (parts(packed=PACKED[:-1]), V, "Params4bit.from_parts: packed, expected 128 bytes for 256 elements", "127"),
    (parts(packed=np.zeros(129, "u1")), V, "Params4bit.from_parts: packed, expected 128 bytes", "129"),
    (parts(absmax=ABSMAX[:-1]), V, "Params4bit.from_parts: absmax, expected 4 elements", "3"),
    (parts(shape=(4, 66)), V, "Params4bit.from_parts: packed, expected 132 bytes", "128"),
    (parts(shape=(2**62, 4)), V, "Params4bit.from_parts: shape, expected sizes", str(2**62)),
    (parts(shape=(2**62, 1)), V, "Params4bit.from_parts: packed, expected", "128"),
    (parts(shape=(-1,)), V, "Params4bit.from_parts: shape, expected sizes >= 0", "-1"),
    (parts(shape=(1,) * 9), V, "Params4bit.from_parts: shape, expected at most 8 dimensions", "9"),
    (parts(shape=64), T, "Params4bit.from_parts: shape, expected a tuple of ints", "int"),
    (parts(shape="64"), T, "Params4bit.from_parts: shape, expected a tuple of ints", "str"),
    (parts(shape=(4.0, 64)), T, "Params4bit.from_parts: shape, expected an int", "float"),
    (nested(nested_absmax=np.ones(2, "f4")), V, "Params4bit.from_parts: nested_absmax, expected 1 elements", "2"),
    (nested(nested_map=np.ones(255, "f4")), V, "Params4bit.from_parts: nested_map, expected 256 elements", "255"),
    (nested(nested_absmax=None), V, "Params4bit.from_parts: absmax, expected float32", "without nested_absmax"),
    (nested(nested_map=None), V, "Params4bit.from_parts: absmax, expected float32", "without nested_map"),
    (nested(absmax=ABSMAX), T, "Params4bit.from_parts: absmax, expected uint8", "float32"),
    (nested(nested_offset="a"), T, "Params4bit.from_parts: nested_offset, expected a float", "str"),
    (call(_C.dequantize_4bit, PACKED, ABSMAX, "nf4", 64, (257,)), V, "dequantize_4bit: packed, expected", "256"),
    (call(_C.dequantize_4bit, PACKED, ABSMAX, "nf4", 64, (1,), start=256), V, "dequantize_4bit: packed", "256"),
    (call(_C.dequantize_4bit, PACKED, ABSMAX, "nf4", 64, (1,), start=-1), V, "dequantize_4bit: packed", "-1"),
    (call(_C.dequantize_4bit, PACKED, ABSMAX, "nf4", 64, (1,), start=2**63 - 1), V, "dequantize_4bit: packed", "1"),
    (call(_C.linear_4bit, X, PACKED, ABSMAX, "nf4", 64, (4, 8, 8)), V, "linear_4bit: shape, expected (rows, depth)",
     "(4, 8, 8)"),
    (call(_C.quantize_8bit, X, np.ones(255, "f4"), 64), V, "quantize_8bit: map, expected 256 elements", "255"),
    (call(_C.quantize_8bit, X, np.full(256, np.nan, "f4"), 64), V, "quantize_8bit: map", ""),
    (call(_C.quantize_8bit, X, _C.map8("linear")[::-1], 64), V, "quantize_8bit: map", ""),
    (call(_C.dequantize_8bit, CODES8, ABSMAX8[:0], "dynamic", 256), V, "dequantize_8bit: absmax, expected 1", "0"),
    (call(_C.dequantize_rows_int8, CODES, SCALE[:2]), V, "dequantize_rows_int8: scale, expected 4 elements", "2"),
    (call(_C.Int8Params.from_parts, CODES, SCALE, shape=(4, 63)), V, "Int8Params.from_parts: shape, expected (4, 64)",
     "(4, 63)"),
    (call(_C.quantize_4bit, X, packed=np.zeros(127, "u1")), V, "quantize_4bit: packed, expected 128 elements", "127"),
    *[(call(_C.quantize_rows_int8, X, t), V, "quantize_rows_int8: threshold, expected a finite number", str(t))
      for t in (-1.0, float("inf"), float("nan"))],
    (call(_C.set_num_threads, 0), V, "set_num_threads: n, expected 1 to 4096", "0"),
    (call(_C.set_num_threads, 10**30), V, "set_num_threads: n, expected", str(10**30)),
    # calls
    (call(_C.quantize_4bit), T, "quantize_4bit: x, expected an argument", "none"),
    (call(_C.quantize_4bit, X, "nf4", 64, "absmax", None), T, "quantize_4bit: positional arguments, expected at most 4",
     "5"),
    (call(_C.quantize_4bit, X, quant_typ="nf4"), T, "quantize_4bit: got an unexpected keyword argument", "quant_typ"),
    (call(_C.quantize_4bit, x=X), T, "quantize_4bit: got an unexpected keyword argument", "'x'"),
    (call(_C.quantize_4bit, X, "nf4", quant_type="nf4"), T, "quantize_4bit: quant_type, expected once", "by name"),
    (call(_C.Params4bit.quantize, X, double_quant=1), T, "Params4bit.quantize: double_quant, expected a bool", "int"),
    (call(L4), T, "Linear4bit: x, expected an argument", "none"),
    (call(L4, X, x=X), T, "Linear4bit: got an unexpected keyword argument", "'x'"),
    (call(_C.Linear4bit), T, "Linear4bit: weight, expected an argument", "none"),
    (call(_C.Linear4bit, weight=P, wait=1), T, "Linear4bit: got an unexpected keyword argument", "wait"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[2][:60])
def test_message_names_function_argument_expected_and_got(case):
    function, error, start, got = case
    with pytest.raises(error) as caught:
        function()
    assert type(caught.value) is error
    text = str(caught.value)
    assert (text.startswith(start) and got in text[len(start) :]) or (got in text and start in text), text
    assert "\n" not in text and len(text) < 400


ALLOWED = (TypeError, ValueError, BufferError, OverflowError, MemoryError)


class Odd:
    """Raises from everything that a binding may touch."""

    def __index__(self):
        raise ValueError("index")

    def __float__(self):
        raise ValueError("float")

    def __str__(self):
        raise ValueError("str")

    def __len__(self):
        raise ValueError("len")

    def __getitem__(self, _):
        raise ValueError("getitem")


def junk():
    released = memoryview(b"12")
    released.release()
    made = [None, 0, -1, 2**64, 1e300, float("nan"), "", "nf4", "\ud800", b"", b"1234", (), (4, 64), (2**62,) * 2, [1],
            {}, object(), Odd(), type, np.float32(1), X, X[:0], X.astype("f8"), PACKED, ABSMAX, np.zeros(3, object),
            np.zeros((1,) * 9, "f4"), released, P, L4, CODES, _C.map8("linear"), lambda: 0, True]  # fmt: skip
    return made + ([torch.zeros(3), torch.float32, torch.zeros(2).to_sparse()] if torch is not None else [])


FUNCTIONS = [
    getattr(_C, name) for name in dir(_C) if name[0] != "_" and name not in ("CudaError", "set_num_threads")
]
FUNCTIONS += [m for t in (_C.Params4bit, _C.Int8Params, _C.Params8bit) for m in (t.quantize, t.from_parts)]
FUNCTIONS += [
    _C.Linear4bit.from_float,
    _C.Linear8bit.from_float,
    P.dequantize,
    L4,
    L4.grad_input,
    L8,
    P.__getitem__,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: getattr(f, "__qualname__", repr(f))[:40])
def test_random_arguments_only_raise_what_they_may(function):
    rng = np.random.default_rng(3)
    things = junk()
    names = ["x", "packed", "absmax", "quant_type", "blocksize", "shape", "out", "dtype", "bias", "nested_absmax",
             "nested_map", "codes", "scale", "map", "threshold", "mode", "start", "rubbish"]  # fmt: skip
    for _ in range(400):
        args = [things[i] for i in rng.integers(0, len(things), rng.integers(0, 8))]
        kwargs = {
            names[i]: things[rng.integers(len(things))]
            for i in rng.integers(0, len(names), rng.integers(0, 3))
        }
        # Writing into what the other tests use would be the caller's wish; here it would only confuse.
        kwargs.pop("out", None), kwargs.pop("packed", None), kwargs.pop("absmax", None)
        with contextlib.suppress(*ALLOWED):
            function(*args, **kwargs)


def test_nan_and_infinity_stay_in_their_block():
    x = np.ones((4, 64), np.float32)
    x[1, 3], x[2, 5] = np.nan, np.inf
    packed, absmax = _C.quantize_4bit(x)
    out = _C.dequantize_4bit(packed, absmax, *ARGS)
    np.testing.assert_array_equal(out[[0, 3]], x[[0, 3]])


def test_unknown_cpu_name_warns():
    code = "import warnings; warnings.simplefilter('error'); import halfbyte._C"
    env = {**os.environ, "HALFBYTE_CPU": "pentium", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "RuntimeWarning: HALFBYTE_CPU" in done.stderr
    env["HALFBYTE_CPU"] = "ref"
    code = "from halfbyte import _C; print(_C.cpu_info()['used'])"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "ref\n" and done.stderr == ""


def test_amx_has_to_be_asked_for():
    """Where there are tile registers, only HALFBYTE_CPU=amx uses them; without them it changes nothing."""
    code = "from halfbyte import _C; i = _C.cpu_info(); print(i['detected'], i['used'], i['amx'])"
    env = {**os.environ, "HALFBYTE_CPU": "", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    told = {}
    for wish in ("", "amx"):
        env["HALFBYTE_CPU"] = wish
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stderr == ""
        told[wish] = done.stdout.split()
    detected, used, amx = told[""]
    assert used == detected != "amx" and amx in ("no", "off")
    assert told["amx"] in ([detected, used, amx], [detected, "amx", "used"])
    assert amx == "off" or told["amx"][2] == "no"
