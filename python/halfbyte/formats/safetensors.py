"""Reading and writing safetensors files, strictly.

    offset 0        8                8 + n                              end of file
    | n: uint64 LE | n bytes of JSON | tensor data, back to back, no gap |
    {"__metadata__": {str: str}, "<name>": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}

Offsets count from 8 + n. A reader must survive any bytes: the length is bounded before it is used, nothing
is allocated from a number in the file before that number is checked against the size of the file, duplicate
keys are refused, the tensors must tile the data exactly (no overlap, hole or trailing byte: a file that is
also another format is refused), and dtype x shape must give the size. Data is read with pread, never mapped:
a file that shrinks then gives an error, where a mapping gives SIGBUS or zeros.

Writing begins with `layout`, which places the tensors and gives the bytes before the data, because every size
is known before any data is. Tensors are placed as the reference writer places them, widest dtype first and
then by name, so that each is aligned to its item size.

Source: the format description of the safetensors project, and the findings of its published security audit.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from halfbyte.errors import CheckpointError, from_os_error

# Bits per element. The order is the reference writer's, narrow to wide; `layout` sorts by it.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_DTYPE_ORDER = {name: i for i, name in enumerate(DTYPE_BITS)}

MAX_HEADER_BYTES = 100_000_000
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 32
_MAX_BYTES = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. `start` is the absolute byte offset of its data in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    file: SafetensorsFile

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


class SafetensorsFile:
    """An open safetensors file whose header has been checked. Keeps one descriptor; close() or `with`.

    Attributes
    ----------
    path, name : str
        Where it was opened, and the name to show in messages.
    size : int
        Bytes of the file.
    header_bytes : int
        Bytes before the data (8 + n).
    tensors : dict of str to TensorInfo
        In order of their data.
    metadata : dict of str to str
    """

    def __init__(self, path: str | os.PathLike[str], name: str | None = None):
        self.path = os.fspath(path)
        self.name = name or os.path.basename(self.path)
        self.fd = open_regular(self.path, self.name)
        try:
            self.size = os.fstat(self.fd).st_size
            self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def read_into(self, buffer: Any, offset: int) -> None:
        """Fill the whole writable `buffer` from absolute byte `offset`; E412 when the file ends before."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise from_os_error(error, f"reading '{self.name}' at byte {offset + done:,}") from error
            if got == 0:
                raise CheckpointError(
                    "E412",
                    f"'{self.name}' became shorter while it was read",
                    [f"its header was read when it had {self.size:,} bytes; byte {offset + done:,} is gone"],
                    "stop the program that changes it and run again",
                )
            done += got

    def read(self, tensor: TensorInfo) -> bytes:
        """All bytes of a tensor."""
        buffer = bytearray(tensor.nbytes)
        self.read_into(buffer, tensor.start)
        return bytes(buffer)

    # ---- header ----

    def _bad(self, code: str, cause: str, *details: str, fix: str | None = None) -> NoReturn:
        raise CheckpointError(code, f"'{self.name}' {cause}", details, fix)

    def _read_header(self) -> None:
        if self.size < 8:
            self._bad("E412", f"is truncated: {self.size} bytes, the length of the header alone takes 8")
        prefix = bytearray(8)
        self.read_into(prefix, 0)
        (length,) = struct.unpack("<Q", prefix)
        if not 2 <= length <= min(MAX_HEADER_BYTES, self.size - 8):
            self._refuse_length(length, bytes(prefix))
        raw = bytearray(length)
        self.read_into(raw, 8)
        if raw[:1] != b"{":
            self._bad("E410", "is no safetensors file: its header does not begin with '{'")
        self.header_bytes = 8 + length
        self._check_entries(self._parse(bytes(raw)))

    def _refuse_length(self, length: int, prefix: bytes) -> NoReturn:
        if length < 2:
            self._bad("E410", f"is no safetensors file: its header has {length} bytes")
        if length <= MAX_HEADER_BYTES:
            self._truncated(8 + length)
        if prefix[:4] == b"PK\x03\x04" or (prefix[:1] == b"\x80" and prefix[1] <= 5):
            self._bad(
                "E440",
                "is a pickle, not safetensors",
                "unpickling runs code from the file; halfbyte never does it",
                fix="convert it with the program that made it (save_pretrained writes safetensors)",
            )
        if prefix[:4] == b"GGUF":
            self._bad("E410", "is a GGUF file, not safetensors")
        self._bad(
            "E410",
            "is no safetensors file, or a hostile one",
            f"it claims a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are accepted",
        )

    def _parse(self, raw: bytes) -> dict[str, Any]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            result = dict(pairs)
            if len(result) != len(pairs):
                seen: set[str] = set()
                for key, _ in pairs:
                    if key in seen:
                        self._bad("E411", f"names {_quote(key)} twice in its header")
                    seen.add(key)
            return result

        def constant(text: str) -> NoReturn:
            self._bad("E411", f"has {text} in its header, which is not JSON")

        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        except CheckpointError:
            raise
        except UnicodeDecodeError as error:
            self._bad("E411", f"has a header that is not UTF-8 (byte {error.start})")
        except RecursionError:
            self._bad("E411", "has a header nested too deeply")
        except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
            self._bad("E411", "has a header that is not JSON", str(error))
        return header

    def _check_entries(self, header: dict[str, Any]) -> None:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            self._bad("E411", "has a __metadata__ that is no map of strings")
        self.metadata: dict[str, str] = metadata
        data_bytes = self.size - self.header_bytes
        tensors = [self._check_entry(name, entry) for name, entry in header.items()]
        tensors.sort(key=lambda t: (t.start, t.nbytes))
        end = self.header_bytes
        for tensor in tensors:
            if tensor.start != end:
                kind = "overlap" if tensor.start < end else "leave a hole"
                self._bad(
                    "E413",
                    f"has tensors that {kind}",
                    f"{_quote(tensor.name)} begins at data byte {tensor.start - self.header_bytes:,},"
                    f" the tensor before it ends at {end - self.header_bytes:,}",
                )
            end += tensor.nbytes
        if end > self.size:
            self._truncated(end)
        if end < self.size:
            self._bad(
                "E413",
                "has bytes behind its last tensor",
                f"the header describes {end - self.header_bytes:,} bytes, the file has {data_bytes:,}",
            )
        self.tensors = {tensor.name: tensor for tensor in tensors}

    def _check_entry(self, name: str, entry: Any) -> TensorInfo:
        encoded = name.encode("utf-8", "surrogatepass")
        if not name or len(encoded) > MAX_NAME_BYTES or not name.isprintable():
            self._bad("E415", f"has a tensor with an unusable name: {_quote(name)}")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            self._bad(
                "E414", f"describes {_quote(name)} by something other than dtype, shape and data_offsets"
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            self._bad("E414", f"gives {_quote(name)} the unknown dtype {_quote(dtype)}")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
            self._bad("E414", f"gives {_quote(name)} the impossible shape {_quote(shape)}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            self._bad("E414", f"gives {_quote(name)} the impossible data_offsets {_quote(offsets)}")
        begin, end = offsets
        bits = DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        if bits > 8 * _MAX_BYTES:
            self._bad("E414", f"gives {_quote(name)} a shape of more than 2^63 bytes: {_quote(shape)}")
        if bits % 8 or end < begin or end - begin != bits // 8:
            self._bad(
                "E414",
                f"gives {_quote(name)} a size that does not fit its shape",
                f"{dtype} {shape} takes {bits // 8:,} bytes, data_offsets {offsets} hold {end - begin:,}",
            )
        return TensorInfo(name, dtype, tuple(shape), self.header_bytes + begin, end - begin, self)

    def _truncated(self, expected: int) -> NoReturn:
        self._bad(
            "E412",
            "is truncated",
            f"header says {expected:,} bytes, file has {self.size:,} ({expected - self.size:,} missing)",
            fix="download or copy it again",
        )


def open_regular(path: str, name: str) -> int:
    """A read-only descriptor of a regular file; a symlink, a FIFO or a device is refused."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, f"cannot open '{name}'") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError("E421", f"'{name}' is not a regular file")
    return fd


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_BYTES


def _quote(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 120 else text[:100] + "...'"


# ---- writing ----


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor to be written. `start` is the absolute byte offset in the new file, set by `layout`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        bits = DTYPE_BITS[self.dtype]
        for size in self.shape:
            bits *= size
        return bits // 8


def layout(
    slots: Iterable[Slot], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, Slot], int]:
    """Place tensors in a file.

    Parameters
    ----------
    slots : iterable of Slot
        Names must be distinct.
    metadata : dict, optional
        The `__metadata__` entry.

    Returns
    -------
    header : bytes
        What stands before the data, padded with spaces so that the data begins at a multiple of 8.
    placed : dict of str to Slot
        The slots with their `start`, in order of their data.
    size : int
        Bytes of the whole file.
    """
    ordered = sorted(slots, key=lambda s: (-_DTYPE_ORDER[s.dtype], s.name.encode()))
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for slot in ordered:
        end = offset + slot.nbytes
        entries[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [offset, end]}
        offset = end
    if len(entries) - bool(metadata) != len(ordered):
        raise ValueError("layout: two tensors have the same name")
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    placed = {}
    for slot in ordered:
        start = len(header) + entries[slot.name]["data_offsets"][0]
        placed[slot.name] = Slot(slot.name, slot.dtype, slot.shape, start)
    return header, placed, len(header) + offset


def write_at(fd: int, data: Any, offset: int) -> None:
    """pwrite all of `data` (any contiguous buffer); raises the operating system's error."""
    view = memoryview(data).cast("B")
    while len(view):
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
