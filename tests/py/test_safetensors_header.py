"""The safetensors reader: what it accepts, and the broken and hostile files that it refuses."""

import errno
import json
import os
import struct
import time

import numpy as np
import pytest
import safetensors.numpy

from halfbyte.errors import CheckpointError
from halfbyte.formats.safetensors import DTYPE_BITS, SafetensorsFile, Slot, layout, write_at

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def raw(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes):
    return raw({"a": GOOD["a"] | changes})


HOSTILE = {
    "empty file": (b"", "E412", "8"),
    "seven bytes": (b"\x08\0\0\0\0\0\0", "E412", "7 bytes"),
    "length 0": (raw(b"", b""), "E410", "0 bytes"),
    "length 1": (raw(b"{", b""), "E410", "1 bytes"),
    "length 2^63": (raw(b"{}", length=2**63), "E410", "9,223,372,036,854,775,808"),
    "length 2^64-1": (raw(b"{}", length=2**64 - 1), "E410", "18,446,744,073,709,551,615"),
    "length over the limit": (raw(b"{}", length=100_000_001), "E410", "100,000,001"),
    "length beyond the file": (raw(b"{}", length=5000), "E412", "missing"),
    "length wraps to small": (raw(b"{}", length=2**64 - 8), "E410", "header"),
    "pickle of a zip": (b"PK\x03\x04\0\0\x08\x08" + b"\0" * 60, "E440", "pickle"),
    "pickle protocol 2": (b"\x80\x02}q\0." + b"\0" * 60, "E440", "pickle"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 60, "E410", "GGUF"),
    "header is a list": (raw(b"[]      "), "E410", "'{'"),
    "header begins with a space": (raw(b' {"a":1}'), "E410", "'{'"),
    "header is not JSON": (raw(b"{nonsense"), "E411", "not JSON"),
    "header is cut": (raw(json.dumps(GOOD).encode()[:-3]), "E411", "not JSON"),
    "second document behind it": (raw(json.dumps(GOOD).encode() + b"{}"), "E411", "not JSON"),
    "not UTF-8": (raw(b'{"\xff\xfe":1}'), "E411", "UTF-8"),
    "nested 100,000 deep": (raw(b'{"a":' + b"[" * 100_000), "E411", "deep"),
    "NaN as a number": (raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "E411", "NaN"),
    "integer of 5,000 digits": (raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "E411", "JSON"),
    "same tensor twice": (
        raw(b'{"a":%s,"a":%s}' % ((json.dumps(GOOD["a"]).encode(),) * 2)),
        "E411",
        "'a' twice",
    ),
    "same key twice in an entry": (
        raw(b'{"a":{"dtype":"F32","dtype":"U8","shape":[2],"data_offsets":[0,8]}}'),
        "E411",
        "'dtype' twice",
    ),
    "entry is a number": (raw({"a": 3}), "E414", "'a'"),
    "entry lacks the dtype": (raw({"a": {"shape": [2], "data_offsets": [0, 8]}}), "E414", "'a'"),
    "entry has a further key": (entry(more=1), "E414", "'a'"),
    "unknown dtype": (entry(dtype="F31"), "E414", "F31"),
    "dtype is a list": (entry(dtype=["F32"]), "E414", "dtype"),
    "shape is a number": (entry(shape=2), "E414", "shape"),
    "negative size": (entry(shape=[-2]), "E414", "-2"),
    "two negative sizes": (entry(shape=[-2, -1]), "E414", "shape"),
    "size is a float": (entry(shape=[2.0]), "E414", "2.0"),
    "size is true": (entry(shape=[True, 2]), "E414", "True"),
    "size is a string": (entry(shape=["2"]), "E414", "shape"),
    "too many dimensions": (entry(shape=[1] * 1000 + [2]), "E414", "shape"),
    "shape overflows 2^64 to 8": (entry(shape=[2**62 + 2]), "E414", "2^63"),
    "product overflows": (entry(shape=[2**32, 2**32]), "E414", "2^63"),
    "shape does not fit the offsets": (entry(shape=[3]), "E414", "12 bytes"),
    "offsets backwards": (entry(data_offsets=[8, 0]), "E414", "'a'"),
    "negative offset": (entry(data_offsets=[-8, 0]), "E414", "data_offsets"),
    "one offset": (entry(data_offsets=[8]), "E414", "data_offsets"),
    "offset of 2^64": (entry(data_offsets=[2**64, 2**64 + 8]), "E414", "data_offsets"),
    "tensor beyond the end": (raw(GOOD, b"\0" * 7), "E412", "1 missing"),
    "huge tensor in a small file": (entry(shape=[2**59], data_offsets=[0, 2**61]), "E412", "missing"),
    "bytes behind the data": (raw(GOOD, b"\0" * 9), "E413", "9"),
    "hole before the data": (entry(data_offsets=[8, 16]), "E413", "hole"),
    "sub-byte dtype of a broken byte": (entry(dtype="F4", shape=[3], data_offsets=[0, 1]), "E414", "'a'"),
    "tensors overlap": (
        raw({"a": GOOD["a"], "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}),
        "E413",
        "overlap",
    ),
    "hole between tensors": (
        raw({"a": GOOD["a"], "b": {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]}}, b"\0" * 16),
        "E413",
        "hole",
    ),
    "same bytes twice": (raw({"a": GOOD["a"], "b": GOOD["a"]}), "E413", "overlap"),
    "empty name": (raw({"": GOOD["a"]}), "E415", "name"),
    "name with NUL": (raw({"a\0b": GOOD["a"]}), "E415", "x00"),
    "name with a newline": (raw({"a\nb": GOOD["a"]}), "E415", "name"),
    "name of 2,000 bytes": (raw({"a" * 2000: GOOD["a"]}), "E415", "name"),
    "name that is half a surrogate": (
        raw(b'{"\\ud800":%s}' % json.dumps(GOOD["a"]).encode()),
        "E415",
        "name",
    ),
    "metadata is a list": (raw(GOOD | {"__metadata__": []}), "E411", "__metadata__"),
    "metadata holds a number": (raw(GOOD | {"__metadata__": {"a": 1}}), "E411", "__metadata__"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_file_is_refused(what, tmp_path):
    content, code, cause = HOSTILE[what]
    path = tmp_path / "shard.safetensors"
    path.write_bytes(content)
    began = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert time.perf_counter() - began < 0.5
    assert caught.value.code == "HB-" + code
    assert "shard.safetensors" in str(caught.value)
    assert cause in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_refused_file_is_closed(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE["not UTF-8"][0])
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
    assert set(os.listdir("/proc/self/fd")) == before


def test_every_truncation_is_refused(tmp_path):
    whole = safetensors.numpy.save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float16)})
    path = tmp_path / "x.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
    path.write_bytes(whole)
    SafetensorsFile(path).close()


def test_single_bit_flips_never_crash(tmp_path):
    """A flipped header either is refused with our error, or still describes the file exactly."""
    whole = safetensors.numpy.save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float16)})
    header_bytes = 8 + struct.unpack("<Q", whole[:8])[0]
    path = tmp_path / "x.safetensors"
    accepted = 0
    for bit in range(8 * header_bytes):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            with SafetensorsFile(path) as file:
                assert sum(t.nbytes for t in file.tensors.values()) == len(whole) - file.header_bytes
                accepted += 1
        except CheckpointError as error:
            assert error.exit_code == 4
    assert 0 < accepted < 8 * header_bytes  # flips in a name, and F16 <-> other 16-bit dtypes


def test_reads_what_the_reference_writes(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"layer.{d}.{i}": np.array(rng.random(shape) * 100, d)
        for d in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
        for i, shape in enumerate([(3, 5), (7,), (), (0, 4), (1, 2, 3, 1)])
    }
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    with SafetensorsFile(path) as file:
        assert file.metadata == {"format": "np"}
        assert file.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            tensor = file.tensors[name]
            assert tensor.shape == array.shape and tensor.nbytes == array.nbytes
            assert file.read(tensor) == array.tobytes()


def test_layout_is_the_reference_layout(tmp_path):
    """Byte for byte the file that safetensors itself writes."""
    rng = np.random.default_rng(1)
    names = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
             "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?"}  # fmt: skip
    arrays, slots = {}, []
    for dtype, code in names.items():
        for name, shape in (("b", (3, 5)), ("a", (7,)), ("ü", (2,))):
            arrays[f"{name}.{dtype}"] = (rng.random(shape) * 100).astype(code)
            slots.append(Slot(f"{name}.{dtype}", dtype, shape))
    header, placed, size = layout(slots, {"format": "pt"})
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.truncate(size)
        write_at(file.fileno(), header, 0)
        for name, slot in placed.items():
            write_at(file.fileno(), arrays[name], slot.start)
    assert path.read_bytes() == safetensors.numpy.save(arrays, {"format": "pt"})


@pytest.mark.parametrize("padding", range(0, 768, 8))
def test_headers_of_every_length(padding, tmp_path):
    """The length prefix may begin like another format's magic (0x80 is also how a pickle begins)."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(json.dumps(GOOD).encode().ljust(64 + padding)))
    SafetensorsFile(path).close()


def test_layout_refuses_two_tensors_of_one_name():
    with pytest.raises(ValueError, match="same name"):
        layout([Slot("a", "F32", (1,)), Slot("a", "U8", (1,))])


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_each_dtype_is_aligned_and_readable(dtype, tmp_path):
    header, placed, size = layout([Slot("x", "U8", (3,)), Slot("y", dtype, (8, 3))])
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + b"\1" * (size - len(header)))
    assert placed["y"].start % max(1, DTYPE_BITS[dtype] // 8) == 0
    with SafetensorsFile(path) as file:
        assert file.tensors["y"].nbytes == 24 * DTYPE_BITS[dtype] // 8


def test_a_file_that_shrinks_is_an_error_not_zeros(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.ones(10_000, np.float32)}, path)
    with SafetensorsFile(path) as file:
        os.truncate(path, 5_000)
        with pytest.raises(CheckpointError, match="became shorter"):
            file.read(file.tensors["a"])


def test_only_regular_files(tmp_path):
    fifo, folder, link = tmp_path / "fifo", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(fifo)
    folder.mkdir()
    (tmp_path / "real").write_bytes(raw(GOOD))
    link.symlink_to("real")
    for path in (fifo, folder, "/dev/zero"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            SafetensorsFile(path)
    with pytest.raises(CheckpointError) as caught:  # links are resolved by open_model, never here
        SafetensorsFile(link)
    assert caught.value.__cause__.errno == errno.ELOOP


def test_zero_sized_tensors_and_padding(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]}} | {"b": GOOD["a"]}
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(json.dumps(header).encode() + b"     "))
    with SafetensorsFile(path) as file:
        assert file.tensors["a"].nbytes == 0 and file.tensors["b"].start == file.size - 8
