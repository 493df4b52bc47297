"""CUDA arrays of every kind in and out of `halfbyte._C`: strides, alignment, outputs, two devices, two streams,
producers without an allocator, tables of the processor, exports.

Collected by test_binding.py, in a process of its own.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from binding_cases import (
    ABSMAX,
    BIAS,
    BIG,
    CODES8,
    DENSE4,
    DEPTH,
    DTYPES,
    MAP,
    PACKED,
    PRODUCTS,
    ROWS,
    SCALE8,
    W,
    X,
    check_product,
    clean,
    device,
    needs,
    nested_parts,
)  # fmt: skip
from fake_device import host

from halfbyte import _C

__all__ = ["clean"]  # the fixture


# ---- strides, alignment, outputs ---------------------------------------------------------------------------
def strided(array, steps, offset=0):
    """The same numbers with other strides: a view of larger memory on the device."""
    block = device.gpu(np.zeros(offset + 1 + sum((n - 1) * s for n, s in zip(array.shape, steps, strict=True)),
                                array.dtype))  # fmt: skip
    view = block.view(array.shape, tuple(steps), offset * array.itemsize)
    host(view)[...] = array
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [(300, 2), (1, 3), (128, 1)])
def test_strided_input(steps, dtype):
    x = X.astype(DTYPES[dtype])
    before = device.gpu(x)
    expected = [np.array(host(a)) for a in _C.quantize_4bit(before)]
    found = _C.quantize_4bit(strided(x, steps))
    for want, got in zip(expected, found, strict=True):
        np.testing.assert_array_equal(host(got), want)
    check_product(PRODUCTS["linear_4bit"](strided(x, steps), strided(BIAS, (3,))), x, DENSE4, BIAS, dtype)


def test_strided_weight():
    """The bytes of a strided `packed` are those of its elements in order, as on the processor."""
    packed = strided(PACKED, (2,))
    y = _C.dequantize_4bit(packed, strided(ABSMAX, (3,)), "nf4", 64, W.shape)
    np.testing.assert_array_equal(host(y), DENSE4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_input(dtype):
    x = X.astype(DTYPES[dtype])
    block = device.gpu(np.zeros(x.size + 1, x.dtype))
    view = block.view(x.shape, (DEPTH, 1), 1)
    host(view)[...] = x
    expected = _C.quantize_4bit(x)
    for want, got in zip(expected, _C.quantize_4bit(view), strict=True):
        np.testing.assert_array_equal(host(got), want)


OUTPUTS = {
    "linear_4bit": lambda out: PRODUCTS["linear_4bit"](device.gpu(X), device.gpu(BIAS), out),
    "Linear4bit": lambda out: PRODUCTS["Linear4bit"](device.gpu(X), device.gpu(BIAS), out),
    "linear_8bit": lambda out: PRODUCTS["linear_8bit"](device.gpu(X), device.gpu(BIAS), out),
    "dequantize_4bit": lambda out: _C.dequantize_4bit(
        device.gpu(PACKED), device.gpu(ABSMAX), "nf4", 64, (3, 6), start=5, out=out
    ),
    "dequantize_8bit": lambda out: _C.dequantize_8bit(
        device.gpu(PACKED[:18].reshape(3, 6)), device.gpu(ABSMAX[:2]), "dynamic", 9, out=out
    ),
    "dequantize_rows_int8": lambda out: _C.dequantize_rows_int8(
        device.gpu(CODES8[:3, :6].copy()), device.gpu(SCALE8[:3]), out=out
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_out(name):
    needs(*(["linear8"] if name == "linear_8bit" else []))
    call = OUTPUTS[name]
    expected = np.array(host(call(None)))
    assert expected.shape == (3, 6)
    for steps in ((6, 1), (20, 2), (1, 5)):
        out = strided(np.full((3, 6), np.nan, np.float32), steps)
        live = device.framework.counts()[0]
        assert call(out) is out
        np.testing.assert_array_equal(host(out), expected)
        assert device.framework.counts()[0] == live


@pytest.mark.parametrize("name", OUTPUTS)
def test_out_refused(name):
    needs(*(["linear8"] if name == "linear_8bit" else []))
    call = OUTPUTS[name]
    zeros = np.zeros((3, 6), np.float32)
    with pytest.raises(ValueError, match="out, expected an array on cuda:0 as the others, got one on cpu"):
        call(zeros)
    with pytest.raises(ValueError, match="out, expected an array on cuda:0 as the others, got one on cuda:1"):
        call(device.gpu(zeros, 1))
    with pytest.raises(ValueError, match=r"out, expected shape \(3, 6\)"):
        call(device.gpu(zeros[:2]))
    with pytest.raises(ValueError, match="elements do not overlap"):
        call(device.gpu(zeros).view((3, 6), (0, 1), 0))
    readonly = device.gpu(zeros, plain=True)
    readonly.readonly = True
    with pytest.raises(BufferError, match="read-only"):
        call(readonly)


def test_given_outputs_of_quantizers():
    x = device.gpu(W)
    packed, absmax = device.gpu(np.zeros((96, 2), "f2")), device.gpu(np.zeros(12, "f4"))
    assert _C.quantize_4bit(x, packed=packed, absmax=absmax) == (packed, absmax)
    np.testing.assert_array_equal(host(packed).view("u1").ravel(), PACKED)
    np.testing.assert_array_equal(host(absmax), ABSMAX)
    with pytest.raises(ValueError, match="packed, expected an array on cuda:0 as the others, got one on cpu"):
        _C.quantize_4bit(x, packed=np.zeros(384, "u1"))
    with pytest.raises(BufferError, match="packed, expected writable memory, got a strided view"):
        _C.quantize_4bit(x, packed=strided(PACKED, (2,)))
    with pytest.raises(ValueError, match="packed, expected memory apart from x"):
        _C.quantize_4bit(x, packed=x.view((96,), (1,), 0))
    with pytest.raises(ValueError, match="out, expected memory apart from x"):
        square = device.gpu(np.zeros((DEPTH, DEPTH), "f4"))
        _C.linear_4bit(
            square, *map(device.gpu, _C.quantize_4bit(host(square))), "nf4", 64, (DEPTH, DEPTH), out=square
        )


# ---- one device, one stream ------------------------------------------------------------------------------

NESTED = nested_parts()
PLACES = {
    "linear_4bit": (
        ["x", "packed", "absmax", "bias"],
        lambda x, packed, absmax, bias: _C.linear_4bit(x, packed, absmax, "nf4", 64, W.shape, bias),
        (X, PACKED, ABSMAX, BIAS),
    ),
    "dequantize_4bit": (
        ["packed", "absmax", "nested_absmax"],
        lambda p, a, n: _C.dequantize_4bit(p, a, "nf4", 32, BIG.shape, nested_absmax=n, nested_map=MAP),
        NESTED[:3],
    ),
    "quantize_8bit": (["x"], lambda x: _C.quantize_8bit(x, device.gpu(MAP), 64), (X,)),
    "dequantize_8bit": (
        ["codes", "absmax"],
        lambda c, a: _C.dequantize_8bit(c, a, "linear", 64),
        (PACKED[:64], ABSMAX[:1]),
    ),
    "dequantize_rows_int8": (["codes", "scale"], _C.dequantize_rows_int8, (CODES8, SCALE8)),
    "matmul_int8": (["a", "b"], _C.matmul_int8, (CODES8, CODES8)),
    "linear_8bit": (["x", "codes", "scale", "bias"], _C.linear_8bit, (X, CODES8, SCALE8, BIAS)),
    "Params4bit.from_parts": (
        ["packed", "absmax"],
        lambda p, a: _C.Params4bit.from_parts(p, a, quant_type="nf4", blocksize=64, shape=W.shape),
        (PACKED, ABSMAX),
    ),
    "Int8Params.from_parts": (["codes", "scale"], _C.Int8Params.from_parts, (CODES8, SCALE8)),
    "Params8bit.from_parts": (
        ["codes", "absmax"],
        lambda c, a: _C.Params8bit.from_parts(c, a, "linear", blocksize=64, shape=(64,)),
        (PACKED[:64], ABSMAX[:1]),
    ),
    "optimizer_step": (
        ["p", "g", "state1", "state2"],
        lambda *t: _C.optimizer_step("adam", [(*t, None, None, None, 1)], lr=0.1),
        tuple(np.zeros(9, "f4") for _ in range(4)),
    ),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("elsewhere", ["cpu", "cuda:1"])
def test_arrays_on_two_devices(name, elsewhere):
    _, call, arrays = PLACES[name]
    launches = device.launches
    for i in range(len(arrays)):
        mixed = [
            device.gpu(a) if i != j else a if elsewhere == "cpu" else device.gpu(a, 1)
            for j, a in enumerate(arrays)
        ]
        if len(arrays) == 1 and elsewhere == "cuda:1":
            continue  # its map on cuda:0
        with pytest.raises(
            ValueError, match=rf"^{name}: (\w+), expected an array on [\w:]+ as the others, got one "
        ):
            call(*mixed)
    assert device.launches == launches


def test_layers_on_two_devices():
    weight4, weight8 = _C.Params4bit.quantize(device.gpu(W)), None
    with pytest.raises(
        ValueError, match="Linear4bit: bias, expected an array on cuda:0 as the others, got one on cpu"
    ):
        _C.Linear4bit(weight4, BIAS)
    with pytest.raises(
        ValueError, match="Linear4bit: x, expected an array on cuda:0 as the others, got one on cpu"
    ):
        _C.Linear4bit(weight4)(X)
    with pytest.raises(
        ValueError, match="Linear4bit: x, expected an array on cpu as the others, got one on cuda:0"
    ):
        _C.Linear4bit.from_float(W)(device.gpu(X))
    weight8 = _C.Int8Params.from_parts(device.gpu(CODES8), device.gpu(SCALE8))
    with pytest.raises(
        ValueError, match="Linear8bit: x, expected an array on cuda:0 as the others, got one on cpu"
    ):
        _C.Linear8bit(weight8)(X)
    with pytest.raises(
        ValueError, match="Linear8bit: bias, expected an array on cuda:0 as the others, got one on"
    ):
        _C.Linear8bit(weight8, device.gpu(BIAS, 1))
    with pytest.raises(ValueError, match="out, expected an array on cuda:0 as the others, got one on cpu"):
        weight4.dequantize(out=np.zeros(W.shape, "f4"))


def test_frameworks_on_two_streams():
    """A __dlpack__ producer is asked for the default stream: its arrays do not mix with another stream's."""
    device.framework.set_stream(0x88)
    with pytest.raises(
        ValueError, match=r"absmax, expected an array whose framework works on the stream of the"
    ):
        _C.dequantize_4bit(device.gpu(PACKED), device.gpu(ABSMAX, plain=True), "nf4", 64, W.shape)
    device.framework.set_stream(0)
    y = _C.dequantize_4bit(device.gpu(PACKED), device.gpu(ABSMAX, plain=True), "nf4", 64, W.shape)
    np.testing.assert_array_equal(host(y), DENSE4)


def test_weights_outlive_the_stream_that_made_them():
    device.framework.set_stream(0x88)
    weight = _C.Params4bit.quantize(device.gpu(W))
    device.framework.set_stream(0x99)
    np.testing.assert_array_equal(host(weight.dequantize()), DENSE4)
    assert device.last == ("dequantize4", 0, 0x99)


def test_managed_memory_is_of_every_device():
    """DLPack gives managed memory index 0."""
    y = _C.dequantize_4bit(device.gpu(PACKED, 1), device.gpu(ABSMAX, kind=13), "nf4", 64, W.shape)
    np.testing.assert_array_equal(host(y), DENSE4)
    assert device.last[1] == 1


# ---- producers without the exchange API ------------------------------------------------------------------


def test_plain_producer():
    x = device.gpu(W, plain=True)
    packed, absmax = (device.gpu(np.zeros_like(a), plain=True) for a in (PACKED, ABSMAX))
    device.framework.set_stream(0x77)  # another framework's: of no interest here
    assert _C.quantize_4bit(x, packed=packed, absmax=absmax) == (packed, absmax)
    assert device.last == ("quantize4", 0, 0)
    np.testing.assert_array_equal(host(packed), PACKED)
    np.testing.assert_array_equal(host(absmax), ABSMAX)
    for tensor in (x, packed, absmax):
        assert [a["stream"] for a in tensor.asked] == [1]


def test_plain_producer_has_no_allocator():
    x = device.gpu(X, plain=True)
    with pytest.raises(BufferError, match="quantize_4bit: packed, expected an output array on cuda:0"):
        _C.quantize_4bit(x)
    with pytest.raises(
        BufferError, match=r"this call needs \d+ bytes on cuda:0, expected arrays of a framework"
    ):
        _C.Params4bit.quantize(x)
    with pytest.raises(BufferError, match="this call needs 1536 bytes on cuda:0"):  # a copy
        _C.quantize_4bit(x.view((128, 3), (1, 128), 0))
    weight = _C.Params4bit.from_parts(
        device.gpu(PACKED, plain=True),
        device.gpu(ABSMAX, plain=True),
        quant_type="nf4",
        blocksize=64,
        shape=W.shape,
    )
    assert weight.device == "cuda:0"
    for read in (
        lambda: weight.packed,
        weight.parts,
        lambda: pickle.dumps(weight),
        lambda: weight.__deepcopy__({}),
    ):
        with pytest.raises(BufferError, match="on cuda:0"):
            read()
    out = device.gpu(np.zeros_like(W), plain=True)
    assert weight.dequantize(out=out) is out
    np.testing.assert_array_equal(host(out), DENSE4)
    y = device.gpu(np.zeros((3, ROWS), "f4"), plain=True)
    _C.Linear4bit(weight)(x, out=y)
    check_product(y, X, DENSE4, None, "float32")


class Old:
    """A producer from before DLPack 1.0: __dlpack__(stream=None) and no more."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, stream=None):
        self.stream = stream
        return self.tensor.__dlpack__()

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_old_producer():
    old = Old(device.gpu(W, plain=True))
    packed, absmax = device.gpu(np.zeros_like(PACKED)), device.gpu(np.zeros_like(ABSMAX))
    _C.quantize_4bit(old, packed=packed, absmax=absmax)
    assert old.stream == 1
    np.testing.assert_array_equal(host(packed), PACKED)


# ---- tables and offsets ------------------------------------------------------------------------------------


def test_offset_on_the_device_is_not_read():
    """A fake tensor raises where it is asked for a float."""
    packed, codes, nested, offset = NESTED
    expected = np.asarray(_C.dequantize_4bit(packed, codes, "nf4", 32, BIG.shape, nested_absmax=nested, nested_map=MAP,
                                             nested_offset=offset))  # fmt: skip

    def run(value, map_=None):
        keywords = dict(
            nested_absmax=device.gpu(nested), nested_map=device.gpu(MAP) if map_ is None else map_
        )
        y = _C.dequantize_4bit(device.gpu(packed), device.gpu(codes), "nf4", 32, BIG.shape, nested_offset=value,
                               **keywords)  # fmt: skip
        np.testing.assert_array_equal(host(y), expected)

    run(device.gpu(np.float32(offset)))  # a scalar
    run(device.gpu(np.array([offset], "f4")))
    run(offset)
    run(np.array(offset, "f4"))
    run(np.float32(offset))
    run(offset, MAP)  # the map of the processor
    with pytest.raises(TypeError, match="nested_offset, expected dtype float32, got float64"):
        run(device.gpu(np.float64(offset)))
    with pytest.raises(ValueError, match="nested_offset, expected 1 elements, got 2"):
        run(device.gpu(np.zeros(2, "f4")))
    with pytest.raises(
        ValueError, match="nested_offset, expected an array on cuda:0 as the others, got one on cuda:1"
    ):
        run(device.gpu(np.float32(offset), 1))
    with pytest.raises(
        ValueError, match="nested_map, expected an array on cuda:0 as the others, got one on cuda:1"
    ):
        run(offset, device.gpu(MAP, 1))


def test_no_map_of_the_device_for_the_processor():
    with pytest.raises(ValueError, match="map, expected an array on cpu as the others, got one on cuda:0"):
        _C.quantize_8bit(X, device.gpu(MAP), 64)


# ---- exports ---------------------------------------------------------------------------------------------


def weights():
    yield _C.Params4bit.quantize(device.gpu(W)), "packed"
    yield _C.Params8bit.quantize(device.gpu(W)), "codes"
    yield _C.Int8Params.from_parts(device.gpu(CODES8), device.gpu(SCALE8)), "codes"


def test_exports():
    for weight, part in weights():
        assert (
            weight.device == "cuda:0" and "device=cuda:0" in repr(weight) and "cuda:0" in weight._repr_html_()
        )
        assert weight.__dlpack_device__() == (2, 0)
        codes = getattr(weight, part)
        assert codes.info["device"] == (2, 0)
        capsule = weight.__dlpack__(max_version=(1, 3))
        assert "dltensor_versioned" in repr(capsule)
        with pytest.raises(
            BufferError, match="stream, expected the stream that the weight's framework works on now"
        ):
            weight.__dlpack__(max_version=(1, 3), stream=0x99)
        with pytest.raises(BufferError, match="stream"):
            weight.__dlpack__(max_version=(1, 3), stream=0)
        device.framework.set_stream(0x99)
        weight.__dlpack__(max_version=(1, 3), stream=0x99)
        weight.__dlpack__(max_version=(1, 3), stream=-1)
        with pytest.raises(BufferError, match="stream"):
            weight.__dlpack__(max_version=(1, 3))
        weight.__dlpack__(max_version=(1, 3), stream=0x99, copy=True, dl_device=(2, 0))
        assert device.last == ("copy", 0, 0x99)
        device.framework.set_stream(0)
        for place in ((1, 0), (2, 1)):
            with pytest.raises(BufferError, match=r"dl_device, expected \(2, 0\), where the memory is"):
                weight.__dlpack__(max_version=(1, 3), dl_device=place)
        with pytest.raises(BufferError, match="max_version"):
            weight.__dlpack__()
        with pytest.raises((BufferError, RuntimeError)):
            np.from_dlpack(weight)


def test_export_of_a_capsule_reads_the_codes():
    weight = _C.Params4bit.quantize(device.gpu(W))
    y = _C.dequantize_4bit(weight.__dlpack__(max_version=(1, 3)), weight.absmax, "nf4", 64, W.shape,
                           out=device.gpu(np.zeros_like(W)))  # fmt: skip
    np.testing.assert_array_equal(host(y), DENSE4)


def to_device(array):
    return device.gpu(array)


def test_pickle_goes_through_the_framework(monkeypatch):
    import copyreg

    monkeypatch.setitem(
        copyreg.dispatch_table, device.framework.Tensor, lambda t: (to_device, (np.array(host(t)),))
    )
    for weight in (_C.Params4bit.quantize(device.gpu(W)), _C.Params8bit.quantize(device.gpu(W))):
        again = pickle.loads(pickle.dumps(weight))
        assert again.device == "cuda:0"
        np.testing.assert_array_equal(host(again.dequantize()), host(weight.dequantize()))
    layer = _C.Linear4bit(_C.Params4bit.quantize(device.gpu(W)), device.gpu(BIAS))
    again = pickle.loads(pickle.dumps(layer))
    np.testing.assert_array_equal(host(again(device.gpu(X))), host(layer(device.gpu(X))))


def test_empty():
    packed, absmax = _C.quantize_4bit(device.gpu(np.zeros((0, 64), "f4")))
    assert host(packed).shape == host(absmax).shape == (0,)
    weight = _C.Params4bit.quantize(device.gpu(np.zeros((0, 64), "f4")), double_quant=device.has("nest4"))
    assert host(weight.dequantize()).shape == (0, 64)
    no_depth = _C.Params4bit.from_parts(
        device.gpu(np.zeros(0, "u1")),
        device.gpu(np.zeros(0, "f4")),
        quant_type="nf4",
        blocksize=64,
        shape=(6, 0),
    )
    y = _C.Linear4bit(no_depth, device.gpu(BIAS))(device.gpu(np.zeros((2, 0), "f4")))
    np.testing.assert_array_equal(host(y), np.stack([BIAS, BIAS]))
    for shape in ((0, 64), (3, 0), (0, 0)):
        x, none = device.gpu(np.zeros(shape, "f4")), device.gpu(np.zeros(shape, "i1"))
        codes, scale, outliers = _C.quantize_rows_int8(x, 6.0)
        np.testing.assert_array_equal(host(scale), np.zeros(shape[0], "f4"))
        np.testing.assert_array_equal(host(outliers), np.zeros(shape[1], "?"))
        assert host(codes).shape == host(_C.dequantize_rows_int8(codes, scale)).shape == shape
        np.testing.assert_array_equal(host(_C.matmul_int8(none, none)), np.zeros((shape[0],) * 2, "i4"))
        for mode in ("dynamic", "exact"):
            y = _C.linear_8bit(x, none, device.gpu(np.zeros(shape[0], "f4")), threshold=6.0, mode=mode)
            np.testing.assert_array_equal(host(y), np.zeros((shape[0],) * 2, "f4"))
        dx = _C.linear_8bit_grad_input(device.gpu(np.zeros((2, shape[0]), "f4")), none, scale)
        np.testing.assert_array_equal(host(dx), np.zeros((2, shape[1]), "f4"))
    assert device.emulator.fault == ""


def test_thresholds_and_names_are_checked_before_any_launch():
    launches = device.launches
    for bad in (
        lambda: _C.quantize_4bit(device.gpu(W), "nf5"),
        lambda: _C.quantize_4bit(device.gpu(W), blocksize=48),
        lambda: _C.quantize_4bit(device.gpu(W.astype("f8"))),
        lambda: _C.quantize_rows_int8(device.gpu(W), -1.0),
        lambda: _C.linear_4bit(
            device.gpu(X[:, :64]), device.gpu(PACKED), device.gpu(ABSMAX), "nf4", 64, W.shape
        ),
        lambda: _C.dequantize_4bit(device.gpu(PACKED), device.gpu(ABSMAX[1:]), "nf4", 64, W.shape),
        lambda: _C.optimizer_step("adam", [(*[device.gpu(BIAS)] * 3, None, None, None, None, 1)], lr=0.1),
    ):
        with pytest.raises((ValueError, TypeError)):
            bad()
    assert device.launches == launches


def test_paged_states():
    """Managed memory that says it is the processor's (kDLCPU) is a state's; ordinary memory of the processor is not."""
    rng = np.random.default_rng(5)
    n = 600
    g = rng.standard_normal(n).astype("f4")

    def step(put, put_state):
        p, states = put(np.ones(n, "f4")), [put_state(np.full(n, c, "u1")) for c in (127, 0)]
        scales = [put_state(np.ones(3, "f4")) for _ in range(2)]
        entry = (p, put(g), *states, *scales, None, 1)
        _C.optimizer_step("adam", [entry], lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, map1="dynamic",
                          map2="dynamic_unsigned")  # fmt: skip
        return [p, *states, *scales]

    expected = step(device.gpu, device.gpu)
    paged = step(device.gpu, lambda a: device.gpu(a, kind=1))
    for want, got in zip(expected, paged, strict=True):
        np.testing.assert_array_equal(host(got), host(want))
    with pytest.raises(ValueError, match="state1, expected an array on cuda:0 as the others, got one on cpu"):
        step(device.gpu, lambda a: a)
    with pytest.raises(ValueError, match="g, expected an array on cuda:0"):
        _C.optimizer_step(
            "lion", [(*map(device.gpu, [g]), device.gpu(g, kind=1), device.gpu(g), *[None] * 4, 1)], lr=0.1
        )


def test_managed_memory():
    capsule = _C.cuda_managed_memory(1, 64)
    absmax = device.gpu(np.zeros(1, "f4"), 1)
    out = device.gpu(np.ones(64, "f4"), 1)
    _C.dequantize_8bit(capsule, absmax, device.gpu(np.zeros(256, "f4"), 1), 64, out=out)
    np.testing.assert_array_equal(host(out), np.zeros(64, "f4"))
    assert device.last == ("dequantize8", 1, 0)
    assert device.emulator.fault == ""
    for bad, message in [
        (lambda: _C.cuda_managed_memory(0, 0), "size, expected at least 1 byte, got 0"),
        (lambda: _C.cuda_managed_memory(-1, 1), "device, expected the number of a GPU, got -1"),
        (lambda: _C.cuda_prefetch(W), "array, expected one on a CUDA device, got one on cpu"),
        (lambda: _C.cuda_view(0, 1, 0), "address, expected that of memory, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
    with pytest.raises(_C.CudaError, match="cuda_managed_memory: invalid device ordinal"):
        _C.cuda_managed_memory(77, 1)
    assert _C.cuda_view(X.ctypes.data, X.nbytes, 0) is None
