"""A DLPack producer made with ctypes: any descriptor, honest or not, and a count of its deleter's calls.

Kept apart from NumPy's and torch's producers so that tests can say things that these never say: NULL strides,
wrong versions, sizes that overflow, capsules that come twice.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


class DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device", DLDevice), ("ndim", ctypes.c_int32), ("dtype", DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class DLManagedTensor(ctypes.Structure):
    _fields_ = [("dl_tensor", DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", Deleter)]


class DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("manager_ctx", ctypes.c_void_p),
        ("deleter", Deleter), ("flags", ctypes.c_uint64), ("dl_tensor", DLTensor),
    ]  # fmt: skip


_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

READ_ONLY = 1
CODES = {"float32": (2, 32), "float64": (2, 64), "float16": (2, 16), "bfloat16": (4, 16), "uint8": (1, 8),
         "int8": (0, 8), "uint16": (1, 16), "int64": (0, 64)}  # fmt: skip


class Producer:
    """`array` gives the memory; every other argument overrides what its descriptor says.

    strides and shape count elements; strides=None writes a NULL pointer; `deleted` counts deleter calls.
    A capsule that nobody consumes is not deleted.
    """

    def __init__(self, array: np.ndarray, *, dtype: str | None = None, shape: Any = "array", strides: Any = "array",
                 ndim: int | None = None, data: int | None = -1, byte_offset: int = 0, flags: int = 0,
                 version: tuple[int, int] = (1, 3), device: tuple[int, int] = (1, 0), lanes: int = 1,
                 legacy: bool = False, with_deleter: bool = True) -> None:  # fmt: skip
        self.array, self.legacy, self.device = array, legacy, device
        self.deleted = 0
        self.produced = 0
        shape = array.shape if isinstance(shape, str) else shape
        if isinstance(strides, str):
            strides = [s // array.itemsize for s in array.strides]
        code, bits = CODES[dtype or str(array.dtype)]
        self._shape = None if shape is None else (ctypes.c_int64 * max(len(shape), 1))(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * max(len(strides), 1))(*strides)
        pointer = ctypes.POINTER(ctypes.c_int64)
        tensor = DLTensor(
            data=array.ctypes.data if data == -1 else data,
            device=DLDevice(*device),
            ndim=len(shape or ()) if ndim is None else ndim,
            dtype=DLDataType(code, bits, lanes),
            shape=pointer() if self._shape is None else ctypes.cast(self._shape, pointer),
            strides=pointer() if self._strides is None else ctypes.cast(self._strides, pointer),
            byte_offset=byte_offset,
        )
        self._deleter = Deleter(self._delete) if with_deleter else Deleter()
        if legacy:
            self.managed: Any = DLManagedTensor(tensor, None, self._deleter)
        else:
            self.managed = DLManagedTensorVersioned(*version, None, self._deleter, flags, tensor)

    def _delete(self, _address: int) -> None:
        self.deleted += 1

    def capsule(self) -> Any:
        self.produced += 1
        name = b"dltensor" if self.legacy else b"dltensor_versioned"
        return _api.PyCapsule_New(ctypes.addressof(self.managed), name, None)

    def __dlpack__(self, *, max_version: Any = None) -> Any:
        return self.capsule()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def named_capsule(name: bytes) -> Any:
    """A capsule that is none of DLPack's."""
    keep = ctypes.create_string_buffer(name)
    capsule = _api.PyCapsule_New(ctypes.addressof(keep), keep, None)
    _keep_alive.append(keep)
    return capsule


_keep_alive: list[Any] = []
