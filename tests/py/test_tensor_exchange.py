"""Arrays in and out of halfbyte._C: every protocol, every lie that a producer can tell (csrc/python/tensor.c,
dlpack.c, numpy.c)."""

from __future__ import annotations

import array
import ctypes
import gc
import sys
import weakref

import numpy as np
import pytest
from dlpack_producer import READ_ONLY, DLTensor, Producer, named_capsule
from numpy.lib.stride_tricks import as_strided
from optional_torch import needs_torch, torch

from halfbyte import _C

ml_dtypes = pytest.importorskip("ml_dtypes")

RNG = np.random.default_rng(7)
X = RNG.standard_normal((6, 64)).astype(np.float32)


def codes(x, **kwargs):
    """The packed codes and scales as NumPy arrays."""
    packed, absmax = _C.quantize_4bit(x, **kwargs)
    return np.asarray(packed), np.asarray(absmax)


def assert_reads(x, expected: np.ndarray, **kwargs) -> None:
    """quantize_4bit sees in `x` the numbers of `expected`."""
    want = codes(np.ascontiguousarray(expected))
    got = codes(x, **kwargs)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


# ---- capsules: what must work ----------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_capsule_contiguous(legacy):
    producer = Producer(X, legacy=legacy)
    assert_reads(producer, X)
    assert producer.deleted == producer.produced == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_capsule_null_strides_mean_row_major(legacy):
    assert_reads(Producer(X, strides=None, legacy=legacy), X)


VIEWS = {
    "reversed": X[::-1], "both reversed": X[::-1, ::-1], "every second": X[:, ::2], "transposed": X.T,
    "broadcast": np.broadcast_to(X[0], (5, 64)), "one column": X[:, 3:4], "inner": X[1:4, 5:60],
    "negative step": X[:, ::-3], "three axes": X.reshape(2, 3, 64).transpose(2, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_capsule_strides(name):
    assert_reads(Producer(VIEWS[name]), VIEWS[name])


@pytest.mark.parametrize("name", VIEWS)
def test_numpy_strides(name):
    assert_reads(VIEWS[name], VIEWS[name])


@needs_torch
@pytest.mark.parametrize("name", [n for n in VIEWS if min(VIEWS[n].strides) >= 0])
def test_torch_strides(name):
    tensor = torch.as_strided(torch.from_numpy(X), VIEWS[name].shape, [s // 4 for s in VIEWS[name].strides],
                              (VIEWS[name].ctypes.data - X.ctypes.data) // 4)  # fmt: skip
    assert_reads(tensor, VIEWS[name])


def test_capsule_byte_offset():
    assert_reads(Producer(X, byte_offset=64 * 4, shape=(5, 64)), X[1:])


def test_capsule_misaligned_memory_is_copied():
    raw = np.zeros(X.nbytes + 1, np.uint8)
    raw[1:] = np.frombuffer(X.tobytes(), np.uint8)
    assert_reads(Producer(raw, dtype="float32", shape=X.shape, strides=None, byte_offset=1), X)


@pytest.mark.parametrize("data", [None, -1])
def test_capsule_size_zero(data):
    packed, absmax = codes(Producer(np.zeros((0, 4), np.float32), shape=(0, 4), data=data))
    assert packed.shape == (0,) and absmax.shape == (0,)


def test_capsule_scalar_without_shape():
    assert_reads(Producer(np.float32([2.5]), shape=None, strides=None, ndim=0), np.float32(2.5))


def test_capsule_newer_minor_version():
    assert_reads(Producer(X, version=(1, 99)), X)


def test_capsule_read_only_is_a_fine_input():
    assert_reads(Producer(X, flags=READ_ONLY), X)


def test_capsule_without_deleter():
    assert_reads(Producer(X, with_deleter=False), X)


def test_capsule_itself_as_argument():
    producer = Producer(X)
    assert_reads(producer.capsule(), X)
    assert producer.deleted == 1


def test_capsule_as_out():
    packed, absmax = _C.quantize_4bit(X)
    out = np.zeros_like(X)
    producer = Producer(out)
    assert _C.dequantize_4bit(packed, absmax, "nf4", 64, X.shape, out=producer) is producer
    np.testing.assert_array_equal(out, _C.dequantize_4bit(packed, absmax, "nf4", 64, X.shape))
    assert producer.deleted == producer.produced  # once to learn the dtype, once to write


def test_more_than_two_gib_between_elements():
    far = 2**29 + 1024  # elements of 4 bytes; pages that nobody touches stay virtual
    memory = np.zeros(far + 64, np.float32)
    memory[:64], memory[far:] = X[0], X[1]
    view = as_strided(memory, (2, 64), (far * 4, 4))
    assert_reads(view, X[:2])
    assert_reads(Producer(view), X[:2])
    assert_reads(view[::-1], X[1::-1])


def test_from_parts_keeps_the_producer_until_it_dies():
    packed, absmax = _C.quantize_4bit(X)
    parts = Producer(packed), Producer(absmax)
    params = _C.Params4bit.from_parts(*parts, quant_type="nf4", blocksize=64, shape=X.shape)
    view = params.packed
    rows = params[2:4]
    del params
    gc.collect()
    assert [p.deleted for p in parts] == [0, 0]
    del view
    assert [p.deleted for p in parts] == [0, 0]
    del rows
    assert [p.deleted for p in parts] == [1, 1]


# ---- capsules: what must be refused ------------------------------------------------------------------------

HUGE = 2**62
REFUSED = {
    "nine dimensions": (dict(shape=(1,) * 9, strides=None), ValueError, "dimensions"),
    "negative ndim": (dict(ndim=-1), ValueError, "dimensions"),
    "shape is NULL": (dict(shape=None, ndim=2), ValueError, "dimensions"),
    "negative size": (dict(shape=(-1, 64)), ValueError, "sizes"),
    "sizes overflow": (dict(shape=(HUGE, 4)), ValueError, "64 bits"),
    "bytes overflow": (dict(shape=(HUGE,), strides=(1,)), ValueError, "64 bits"),
    "strides overflow": (dict(shape=(4, 64), strides=(HUGE, 1)), ValueError, "64 bits"),
    "smallest stride": (dict(shape=(3, 64), strides=(-(2**63), 1)), ValueError, "64 bits"),
    "NULL data": (dict(data=None), BufferError, "null pointer"),
    "vector lanes": (dict(lanes=4), TypeError, "float32x4"),
    "float64": (dict(dtype="float64", shape=(6, 32)), TypeError, "float64"),
    "uint16": (dict(dtype="uint16"), TypeError, "uint16"),
    "no index": (dict(device=(2, -1)), BufferError, "cuda:-1"),
    "metal": (dict(device=(8, 0)), BufferError, "metal:0"),
    "no such device": (dict(device=(77, 0)), BufferError, "77"),
    "major version 2": (dict(version=(2, 0)), BufferError, "2.0"),
    "major version 0": (dict(version=(0, 8)), BufferError, "0.8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_capsule_refused(name):
    changes, error, word = REFUSED[name]
    producer = Producer(X, **changes)
    capsule = producer.capsule()
    with pytest.raises(error, match=f"quantize_4bit: x, .*{word}"):
        _C.quantize_4bit(capsule)
    assert producer.deleted == ("used" in repr(capsule))  # whoever takes the tensor deletes it
    assert ("used" in repr(capsule)) == ("major" not in name)  # a version that we cannot read is left alone


def test_device_is_asked_before_the_tensor():
    producer = Producer(X, device=(8, 0))
    with pytest.raises(BufferError, match="metal:0"):
        _C.quantize_4bit(producer)
    assert producer.produced == 0


@pytest.mark.skipif(_C.cuda_info()["available"], reason="there is a GPU, which cannot read this memory")
@pytest.mark.parametrize("kind", [2, 13])
def test_cuda_without_a_gpu(kind):
    producer = Producer(X, device=(kind, 1))
    with pytest.raises(_C.CudaError, match=r"quantize_4bit: x is on cuda:1, which cannot be used: \w+"):
        _C.quantize_4bit(producer)
    assert producer.produced == 0
    with pytest.raises(_C.CudaError, match="quantize_4bit: x is on cuda:1"):
        _C.quantize_4bit(producer.capsule())
    assert producer.deleted == 1


def test_consumed_capsule():
    producer = Producer(X)
    capsule = producer.capsule()
    _C.quantize_4bit(capsule)
    with pytest.raises(BufferError, match=r"quantize_4bit: x, .*already consumed"):
        _C.quantize_4bit(capsule)
    assert producer.deleted == 1


def test_producer_that_gives_the_same_capsule_twice():
    producer = Producer(X)
    capsule = producer.capsule()
    producer.capsule = lambda: capsule  # type: ignore[method-assign]
    _C.quantize_4bit(producer)
    with pytest.raises(BufferError, match="already consumed"):
        _C.quantize_4bit(producer)
    assert producer.deleted == 1


@pytest.mark.parametrize("name", [b"dltensor_versioned_2", b"", b"numpy"])
def test_capsule_of_somebody_else(name):
    with pytest.raises(BufferError, match="quantize_4bit: x, expected a fresh DLPack capsule"):
        _C.quantize_4bit(named_capsule(name))


class Answers:
    """`__dlpack__` does what `function` says."""

    def __init__(self, function, device=lambda: (1, 0)):
        self.function, self.device = function, device

    def __dlpack__(self, **kwargs):
        return self.function(**kwargs)

    def __dlpack_device__(self):
        return self.device()


@pytest.mark.parametrize("junk", [None, 3, "capsule", X, object()])
def test_dlpack_returns_junk(junk):
    with pytest.raises(TypeError, match=r"x\.__dlpack__\(\), expected a capsule, got"):
        _C.quantize_4bit(Answers(lambda **_: junk))


@pytest.mark.parametrize("junk", [None, 3, (1,), (1, 0, 0), "ab", (2**70, 0), ("cpu", 0)])
def test_device_is_junk(junk):
    with pytest.raises((TypeError, ValueError), match="quantize_4bit"):
        _C.quantize_4bit(Answers(lambda **_: None, device=lambda: junk))


def test_exceptions_of_the_producer():
    def fails(error):
        def function(**_):
            raise error("the producer's own words")

        return Answers(function)

    for error, seen in [(RuntimeError, BufferError), (NotImplementedError, BufferError), (BufferError, BufferError),
                        (ValueError, ValueError), (KeyError, KeyError), (MemoryError, MemoryError)]:  # fmt: skip
        with pytest.raises(seen, match="own words"):
            _C.quantize_4bit(fails(error))
    with pytest.raises(KeyboardInterrupt):
        _C.quantize_4bit(fails(KeyboardInterrupt))


def test_bare_call_after_type_error_only():
    class Old:
        """Before DLPack 1.0."""

        def __dlpack__(self):
            return Producer(X, legacy=True, with_deleter=False).capsule() if keep is None else keep.capsule()

    keep = Producer(X, legacy=True)
    assert_reads(Old(), X)
    calls = []

    def fails(**kwargs):
        calls.append(kwargs)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        _C.quantize_4bit(Answers(fails))
    assert calls == [{"max_version": (1, 3)}]


def test_class_instead_of_array():
    with pytest.raises(TypeError, match="quantize_4bit: x, expected an array"):
        _C.quantize_4bit(Producer)
    if torch is not None:
        with pytest.raises(TypeError, match="quantize_4bit: x, expected an array"):
            _C.quantize_4bit(torch.Tensor)


def test_attribute_that_raises():
    class Bad:
        @property
        def __dlpack__(self):
            raise ZeroDivisionError("property")

    with pytest.raises(ZeroDivisionError):
        _C.quantize_4bit(Bad())


# ---- the exchange API ---------------------------------------------------------------------------------------


class Table(ctypes.Structure):
    """DLPackExchangeAPI; only what the tests fill in."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("prev", ctypes.c_void_p),
                ("allocator", ctypes.c_void_p), ("managed_from", ctypes.c_void_p), ("managed_to", ctypes.c_void_p),
                ("tensor_from", ctypes.c_void_p), ("stream", ctypes.c_void_p)]  # fmt: skip


FromObject = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.c_void_p))


def exchange_type(table: Table):
    new = ctypes.pythonapi.PyCapsule_New
    name = ctypes.create_string_buffer(b"dlpack_exchange_api")
    capsule = new(ctypes.addressof(table), name, None)
    return type("Exchange", (), {"__dlpack_c_exchange_api__": capsule, "keep": (table, name)})


def test_exchange_managed_only():
    """A table without the borrowing function serves through the owning one; the deleter runs once."""
    producer = Producer(X)

    def managed_from(_object, out):
        out[0] = ctypes.addressof(producer.managed)
        return 0

    function = FromObject(managed_from)
    old = Table(1, 3, None, None, ctypes.cast(function, ctypes.c_void_p), None, None, None)
    new = Table(2, 0, ctypes.addressof(old), None, None, None, None, None)
    for table in (old, new):  # a newer major version leads to the older table behind it
        producer.deleted = 0
        packed = np.zeros(X.size // 2, np.uint8)
        absmax = np.zeros(6, np.float32)
        _C.quantize_4bit(exchange_type(table)(), packed=packed, absmax=absmax)
        np.testing.assert_array_equal(packed, codes(X)[0])
        assert producer.deleted == 1


def test_exchange_table_of_a_newer_major_version_is_left_alone():
    table = Table(2, 0, None, None, None, None, None, None)
    kind = exchange_type(table)
    with pytest.raises(TypeError, match="quantize_4bit: x, expected an array"):
        _C.quantize_4bit(kind())
    kind.__dlpack__ = lambda self, max_version=None: Producer(X, with_deleter=False).capsule()
    keep = Producer(X)
    kind.__dlpack__ = lambda self, max_version=None: keep.capsule()
    assert_reads(kind(), X)


def test_exchange_failure_without_exception():
    function = FromObject(lambda _object, _out: -1)
    address = ctypes.cast(function, ctypes.c_void_p)
    for table in (Table(1, 3, None, None, None, None, address, None), Table(1, 3, None, None, address)):
        with pytest.raises(BufferError, match=r"quantize_4bit: x, .*failed without an exception"):
            _C.quantize_4bit(exchange_type(table)())


def test_attribute_that_is_no_capsule_is_ignored():
    class Odd:
        __dlpack_c_exchange_api__ = 42

        def __dlpack__(self, max_version=None):
            return keep.capsule()

    keep = Producer(X)
    assert_reads(Odd(), X)
    assert ctypes.sizeof(DLTensor) == 48


@needs_torch
@pytest.mark.parametrize(
    "make",
    [
        lambda t: t,
        lambda t: t.requires_grad_(),
        lambda t: torch.nn.Parameter(t),
        lambda t: t.as_subclass(type("Sub", (torch.Tensor,), {})),
        lambda t: torch.nn.Buffer(t),
        lambda t: torch.nn.Parameter(t.as_subclass(type("Sub", (torch.Tensor,), {}))),
        lambda t: t.requires_grad_() * 1.0,
    ],
)
def test_torch_tensors_of_all_kinds(make):
    tensor = make(torch.from_numpy(X.copy()))
    assert_reads(tensor, X)
    packed, absmax = _C.quantize_4bit(tensor)
    assert type(packed) is torch.Tensor and type(absmax) is torch.Tensor
    assert packed.dtype == torch.uint8 and not packed.requires_grad


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_dtypes(dtype):
    tensor = torch.from_numpy(X).to(getattr(torch, dtype))
    assert_reads(tensor, tensor.float().numpy())
    params = _C.Params4bit.quantize(tensor)
    assert params.dtype == dtype and params.dequantize().dtype == getattr(torch, dtype)


@needs_torch
def test_torch_negated_views():
    """The imaginary part of a conjugate is stored without its sign."""
    z = torch.complex(torch.from_numpy(X), torch.from_numpy(X[::-1].copy()))
    negated = z.conj().imag
    assert negated.is_neg() and negated.data_ptr() != 0
    exact = -X[::-1]
    assert_reads(negated, exact)
    assert_reads(torch._neg_view(torch.from_numpy(X)), -X)
    layer = _C.Linear4bit.from_float(torch.randn(5, 64))
    assert torch.equal(layer(negated), layer(torch.from_numpy(exact.copy())))
    eight = _C.Linear8bit.from_float(torch.randn(5, 64))
    assert torch.equal(eight(negated), eight(torch.from_numpy(exact.copy())))
    bias = torch._neg_view(torch.ones(5))
    assert torch.equal(_C.Linear4bit(layer.weight, bias).bias, torch.full((5,), -1.0))
    with pytest.raises(BufferError, match=r"Params4bit.dequantize: out, .* got a negated view"):
        layer.weight.dequantize(out=torch._neg_view(torch.ones(5, 64)))


@needs_torch
def test_torch_memory_that_does_not_exist():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(64)
    sparse = torch.zeros(4, 4).to_sparse()
    for bad in (fake, torch.zeros(3, device="meta"), sparse):
        with pytest.raises(
            BufferError, match=r"quantize_4bit: x, expected a (dense )?tensor with memory"
        ) as caught:
            _C.quantize_4bit(bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(BufferError):
        _C.Params4bit.from_parts(fake, torch.zeros(1), quant_type="nf4", blocksize=64, shape=(64,))


@needs_torch
def test_torch_misaligned():
    raw = bytearray(X.nbytes + 1)
    raw[1:] = X.tobytes()
    tensor = torch.frombuffer(raw, dtype=torch.float32, offset=1)
    assert tensor.data_ptr() % 4
    assert_reads(tensor, X.ravel())
    packed, absmax = _C.quantize_4bit(X)
    with pytest.raises(BufferError, match="misaligned"):
        _C.dequantize_4bit(packed, absmax, "nf4", 64, (6 * 64,), out=tensor)


@needs_torch
def test_torch_parts_survive_swapped_data():
    """The object keeps the storage, not the Python tensor."""
    packed, absmax = (torch.from_numpy(p) for p in _C.quantize_4bit(X))
    params = _C.Params4bit.from_parts(packed, absmax, quant_type="nf4", blocksize=64, shape=X.shape)
    want = params.dequantize().clone()
    packed.data = torch.zeros(1, dtype=torch.uint8)
    absmax.data = torch.zeros(1)
    gc.collect()
    assert torch.equal(params.dequantize(), want)


# ---- NumPy and the buffer protocol ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numpy_dtypes(dtype):
    x = X.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert_reads(x, x.astype(np.float32))
    params = _C.Params4bit.quantize(x)
    assert params.dtype == dtype and params.dequantize().dtype == x.dtype


def test_numpy_uint16_holds_bfloat16_when_told():
    x = X.astype(ml_dtypes.bfloat16)
    assert_reads(x.view(np.uint16), x.astype(np.float32), dtype="bfloat16")
    for function in (_C.Params4bit.quantize, _C.Params8bit.quantize, _C.Int8Params.quantize):
        assert function(x.view(np.uint16), dtype="bfloat16").dtype == "bfloat16"
        with pytest.raises(TypeError, match="uint16"):
            function(x.view(np.uint16))
        with pytest.raises(TypeError, match="expected dtype bfloat16"):
            function(X, dtype="bfloat16")
    out = np.zeros(X.shape, np.uint16)
    params = _C.Params4bit.quantize(X)
    params.dequantize("bfloat16", out=out)
    np.testing.assert_array_equal(out, params.dequantize().astype(ml_dtypes.bfloat16).view(np.uint16))
    with pytest.raises(TypeError, match="uint16"):
        params.dequantize(out=out)


def test_numpy_layouts_that_dlpack_cannot_say():
    swapped = X.astype(">f4")
    assert_reads(swapped, X)
    record = np.zeros(X.shape, [("a", "u1"), ("x", "<f4"), ("b", "u1")])
    record["x"] = X
    assert_reads(record["x"], X)  # strides of 6 bytes, misaligned
    packed, absmax = _C.quantize_4bit(X)
    for out in (record["x"], swapped):
        with pytest.raises(BufferError, match="dequantize_4bit: out"):
            _C.dequantize_4bit(packed, absmax, "nf4", 64, X.shape, out=out)


def test_numpy_subclass_matrix_and_masked():
    class Mine(np.ndarray):
        pass

    assert_reads(X.view(Mine), X)
    assert type(_C.quantize_4bit(X.view(Mine))[0]) is np.ndarray


@pytest.mark.parametrize("bad", [np.zeros(3, object), np.zeros(3, "S4"), np.zeros(3, "M8[s]"), np.zeros(3, complex),
                                 np.zeros(3, bool), np.zeros(3, np.longdouble), np.zeros(3, [("a", "f4")]),
                                 np.zeros(3, ml_dtypes.float8_e4m3fn), np.zeros((1,) * 9, "f4")])  # fmt: skip
def test_numpy_refused(bad):
    with pytest.raises((TypeError, ValueError), match="quantize_4bit: x, expected"):
        _C.quantize_4bit(bad)


def test_buffer_protocol():
    assert_reads(array.array("f", X.ravel().tolist()), X.ravel())
    assert_reads(memoryview(X), X)
    assert_reads(memoryview(X)[::-1], X[::-1])
    packed, absmax = _C.quantize_4bit(X)
    want = _C.dequantize_4bit(packed, absmax, "nf4", 64, X.shape)
    for kind in (bytes, bytearray, memoryview):
        got = _C.dequantize_4bit(kind(packed.tobytes()), absmax, "nf4", 64, X.shape)
        np.testing.assert_array_equal(got, want)
    out = bytearray(packed.nbytes)
    _C.quantize_4bit(X, packed=out, absmax=np.zeros(6, "f4"))
    assert bytes(out) == packed.tobytes()
    with pytest.raises(BufferError, match="read-only"):
        _C.quantize_4bit(X, packed=bytes(packed.nbytes), absmax=np.zeros(6, "f4"))
    with pytest.raises(TypeError, match="float64"):
        _C.quantize_4bit(array.array("d", [1.0]))
    view = memoryview(b"1234")
    view.release()
    with pytest.raises(ValueError, match="released"):
        _C.quantize_4bit(view)


def test_buffer_is_held_while_it_is_used():
    raw = bytearray(_C.quantize_4bit(X)[0].tobytes())
    params = _C.Params4bit.from_parts(raw, np.ones(6, "f4"), quant_type="nf4", blocksize=64, shape=X.shape)
    with pytest.raises(BufferError):
        raw.append(0)
    del params
    raw.append(0)


@needs_torch
def test_bytes_of_any_storage_dtype():
    packed, absmax = _C.quantize_4bit(X)
    want = _C.dequantize_4bit(packed, absmax, "nf4", 64, X.shape)
    for dtype in (
        torch.uint8,
        torch.int8,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int64,
    ):
        storage = torch.from_numpy(packed).view(dtype).reshape(-1, 1)
        for form in (storage, storage.t()):
            assert torch.equal(_C.dequantize_4bit(form, absmax, "nf4", 64, X.shape), torch.from_numpy(want))


def test_bytes_with_strides():
    packed, absmax = _C.quantize_4bit(X)
    want = _C.dequantize_4bit(packed, absmax, "nf4", 64, X.shape)
    every_second = np.zeros(2 * packed.size, np.uint8)
    every_second[::2] = packed
    np.testing.assert_array_equal(_C.dequantize_4bit(every_second[::2], absmax, "nf4", 64, X.shape), want)


# ---- results ----------------------------------------------------------------------------------------------------


@needs_torch
def test_result_framework_follows_the_first_tensor():
    packed, absmax = _C.quantize_4bit(X)
    args = ("nf4", 64, X.shape)
    assert type(_C.linear_4bit(torch.from_numpy(X), packed, absmax, *args)) is torch.Tensor
    assert type(_C.linear_4bit(X, torch.from_numpy(packed), torch.from_numpy(absmax), *args)) is np.ndarray
    assert type(_C.dequantize_4bit(torch.from_numpy(packed), absmax, *args)) is torch.Tensor
    assert type(_C.quantize_4bit(Producer(X))[0]) is np.ndarray
    assert type(_C.quantize_4bit(memoryview(X))[0]) is np.ndarray


def test_bfloat16_results_without_ml_dtypes(monkeypatch):
    params = _C.Params4bit.quantize(X)
    want = params.dequantize("bfloat16")
    assert want.dtype == ml_dtypes.bfloat16
    monkeypatch.delitem(sys.modules, "ml_dtypes")
    got = params.dequantize("bfloat16")
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, want.view(np.uint16))


@pytest.mark.parametrize(
    "dtype", ["float32", np.float32, np.dtype("f4"), "torch.float32", *([torch.float32] if torch else [])]
)
def test_dtype_arguments(dtype):
    assert _C.Params4bit.quantize(X.astype(np.float16)).dequantize(dtype).dtype == np.float32


@pytest.mark.parametrize("out", [
    lambda: np.zeros((6, 64), "f4"), lambda: np.zeros((64, 6), "f4").T, lambda: np.zeros((12, 128), "f4")[::2, ::-2],
    *([lambda: torch.zeros(6, 64), lambda: torch.zeros(64, 6).t(), lambda: torch.zeros(6, 3, 64)[:, 1]] if torch
      else [])])  # fmt: skip
def test_out_with_any_strides(out):
    params = _C.Params4bit.quantize(X)
    want = params.dequantize()
    target = out()
    assert params.dequantize(out=target) is target
    np.testing.assert_array_equal(np.asarray(target), want)
    layer = _C.Linear4bit.from_float(RNG.standard_normal((64, 64)).astype("f4"))
    target = out()
    assert layer(X, out=target) is target
    np.testing.assert_array_equal(np.asarray(target), layer(X))
    for dtype in ("bfloat16", "float16"):
        if torch is not None and isinstance(target, torch.Tensor):
            half = target.to(getattr(torch, dtype))
            params.dequantize(out=half)
            assert torch.equal(half, params.dequantize(out=torch.empty(6, 64, dtype=half.dtype)))


def test_out_that_cannot_be_written():
    params = _C.Params4bit.quantize(X)
    layer = _C.Linear4bit.from_float(RNG.standard_normal((64, 64)).astype("f4"))
    frozen = np.zeros((6, 64), "f4")
    frozen.flags.writeable = False
    cases = [
        (frozen, BufferError, "read-only"),
        (np.zeros((6, 65), "f4"), ValueError, r"expected shape \(6, 64\), got \(6, 65\)"),
        (np.zeros((6, 64), "f8"), TypeError, "float64"),
        (np.broadcast_to(np.zeros(64, "f4"), (6, 64)), BufferError, "read-only"),
        (as_strided(np.zeros(64, "f4"), (6, 64), (0, 4)), ValueError, "overlap"),
        (as_strided(np.zeros(640, "f4"), (6, 64), (32, 4)), ValueError, "overlap"),
    ]
    if torch is not None:
        cases.append((torch.zeros(1, 64).expand(6, 64), ValueError, "overlap"))
    for out, error, words in cases:
        with pytest.raises(error, match=f"Params4bit.dequantize: out, .*{words}"):
            params.dequantize(out=out)
        with pytest.raises(error, match=f"Linear4bit: out, .*{words}"):
            layer(X, out=out)


def test_out_must_not_share_memory_with_inputs():
    both = np.zeros((2, 64), "f4")
    layer = _C.Linear4bit.from_float(RNG.standard_normal((64, 64)).astype("f4"))
    with pytest.raises(ValueError, match="Linear4bit: out, expected memory apart from x"):
        layer(both, out=both)
    with pytest.raises(ValueError, match="apart from x"):
        layer(both[:1], out=both.reshape(-1)[32:96].reshape(1, 64))
    layer(both[:1], out=both[1:])
    storage = np.zeros(64 * 64 * 4, np.uint8)
    packed = storage[: 64 * 32]
    params = _C.Params4bit.from_parts(
        packed, np.ones(64, "f4"), quant_type="nf4", blocksize=64, shape=(64, 64)
    )
    with pytest.raises(ValueError, match="apart from packed"):
        params.dequantize(out=storage.view("f4").reshape(64, 64))
    with pytest.raises(ValueError, match="apart from x"):
        _C.quantize_4bit(X, packed=X.view(np.uint8).reshape(-1)[: X.size // 2])


# ---- properties and exports --------------------------------------------------------------------------------------


def test_views_are_zero_copy_and_keep_their_object():
    params = _C.Params4bit.quantize(X)
    packed = params.packed
    assert not packed.flags.writeable and packed.base is params
    assert params.packed.ctypes.data == packed.ctypes.data
    want = packed.copy()
    alive = weakref.ref(params)
    del params
    gc.collect()
    assert alive() is not None
    np.testing.assert_array_equal(packed, want)
    del packed
    assert alive() is None


@needs_torch
def test_torch_views_are_zero_copy_and_keep_their_object():
    params = _C.Params4bit.quantize(torch.from_numpy(X))
    tensor = params.packed
    alive = weakref.ref(params)
    del params
    assert alive() is not None and tensor.data_ptr() == alive().packed.data_ptr()
    del tensor
    assert alive() is None


# NumPy before 2.1 cannot say to a producer that it understands read-only memory.
ASKS_FOR_VERSIONED = np.lib.NumpyVersion(np.__version__) >= "2.1.0"


@pytest.mark.parametrize("kind", [_C.Params4bit, _C.Int8Params, _C.Params8bit])
def test_dlpack_export(kind):
    params = kind.quantize(X)
    want = params.packed if kind is _C.Params4bit else params.codes
    assert params.__dlpack_device__() == (1, 0)
    if ASKS_FOR_VERSIONED:
        array = np.from_dlpack(params)
        np.testing.assert_array_equal(array, want)
        assert not array.flags.writeable
        copy = np.from_dlpack(params, copy=True)
        assert copy.flags.writeable and copy.ctypes.data != want.ctypes.data
        np.testing.assert_array_equal(copy, want)
    else:
        with pytest.raises(BufferError, match="read-only"):
            np.from_dlpack(params)
    if torch is not None:
        assert torch.equal(torch.from_dlpack(params), torch.from_numpy(want.copy()))

    before = sys.getrefcount(params)
    capsule = params.__dlpack__(max_version=(1, 0))
    assert sys.getrefcount(params) == before + 1
    del capsule
    assert sys.getrefcount(params) == before
    legacy = params.__dlpack__(copy=True)
    assert "dltensor" in repr(legacy) and "versioned" not in repr(legacy)
    del legacy
    for kwargs, error in [
        ({}, BufferError),
        ({"max_version": (0, 8)}, BufferError),
        ({"stream": 1, "max_version": (1, 0)}, ValueError),
        ({"dl_device": (2, 0), "max_version": (1, 0)}, BufferError),
        ({"max_version": 1}, TypeError),
        ({"max_version": (1, 0), "copy": "yes"}, TypeError),
    ]:
        with pytest.raises(error, match=f"{kind.__name__}.__dlpack__: "):
            params.__dlpack__(**kwargs)


def test_our_own_objects_are_arrays_too():
    params = _C.Params4bit.quantize(X)
    again = _C.Params4bit.from_parts(params, params.absmax, quant_type="nf4", blocksize=64, shape=X.shape)
    np.testing.assert_array_equal(again.dequantize(), params.dequantize())
    codes8 = _C.Params8bit.quantize(X)
    got = _C.dequantize_8bit(codes8, codes8.absmax, codes8.map, 256)
    np.testing.assert_array_equal(got, codes8.dequantize())


def test_export_of_nothing():
    params = _C.Params4bit.quantize(np.zeros((0, 64), "f4"))
    assert params.packed.shape == (0,)
    if ASKS_FOR_VERSIONED:
        assert np.from_dlpack(params).shape == (0,)
    if torch is not None:
        assert _C.Params4bit.quantize(torch.zeros(0, 64)).packed.shape == (0,)
