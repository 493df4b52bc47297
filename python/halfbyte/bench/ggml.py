"""ggml, llama.cpp's library of kernels, through ctypes: Q4_0 weights where llama.cpp would put them.

    weight   Q4_0: 32 weights of one row share a float16 scale, 18 bytes; y = W x with x rounded to int8
    buffer   "CPU_REPACK" where ggml has a kernel for interleaved rows on this processor, else "CPU"

The shared libraries come with the package llama-cpp-python, which has no wheels on PyPI; to build it needs cmake and
a C++ compiler, some minutes and no network beyond the source:

    pip install cmake ninja scikit-build-core && pip install --no-build-isolation llama-cpp-python==0.3.36

It compiles for the processor it is built on. Names and argument lists below are those of ggml's public headers
(ggml.h, ggml-backend.h, ggml-cpu.h, installed by the package).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

PACKAGE = "llama-cpp-python"
Q4_0, F32 = 2, 0
CPU_DEVICE = 0
Q4_BLOCK, Q4_BLOCK_BYTES = 32, 18


@ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def _no_log(level: int, text: bytes, data: int) -> None:
    """ggml tells of every weight that it rearranges."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES = {
    "ggml_log_set": (None, c_void_p, c_void_p),
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead": (c_size_t,),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_backend_dev_by_type": (c_void_p, c_int),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_dev_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_dev_init": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
}


def installed() -> str | None:
    """The version of llama-cpp-python, or None; imports nothing."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def _load() -> ctypes.CDLL:
    """All of ggml: libggml.so needs the other two, so that one handle finds every name."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"ggml: {PACKAGE} is not installed")
    folder = Path(spec.origin).parent / "lib"
    found = [path for path in sorted(folder.glob("*ggml.*")) if path.suffix in (".so", ".dylib", ".dll")]
    if not found:
        raise RuntimeError(f"ggml: expected libggml in {folder}, found none")
    library = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Ggml:
    """ggml's CPU backend with a number of threads. What it makes lives as long as the process."""

    def __init__(self, threads: int) -> None:
        self.c = _load()
        self.c.ggml_log_set(_no_log, None)
        self._device = self.c.ggml_backend_dev_by_type(CPU_DEVICE)
        if not self._device:
            raise RuntimeError("ggml: found no CPU device")
        self._backend = self.c.ggml_backend_dev_init(self._device, None)
        registry = self.c.ggml_backend_dev_backend_reg(self._device)

        def address(name: bytes) -> int | None:
            found: int | None = self.c.ggml_backend_reg_get_proc_address(registry, name)
            return found

        set_threads = address(b"ggml_backend_set_n_threads")
        extra = address(b"ggml_backend_dev_get_extra_bufts")
        if not self._backend or not set_threads:
            raise RuntimeError("ggml: cannot start its CPU backend")
        ctypes.CFUNCTYPE(None, c_void_p, c_int)(set_threads)(self._backend, threads)
        self._buffers: list[int] = []  # those that llama.cpp tries, best first
        if extra:
            kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(extra)(self._device)
            i = 0
            while kinds and kinds[i]:
                self._buffers.append(kinds[i])
                i += 1
        self._plain = self.c.ggml_backend_dev_buffer_type(self._device)
        self._buffers.append(self._plain)

    def quantize(self, weight: np.ndarray) -> np.ndarray:
        """float32 [rows, depth], depth a multiple of 32 -> Q4_0 bytes [rows, depth / 32 * 18]."""
        rows, depth = weight.shape
        if depth % Q4_BLOCK:
            raise ValueError(f"quantize: depth, expected a multiple of {Q4_BLOCK}, got {depth}")
        weight = np.ascontiguousarray(weight, np.float32)
        packed = np.empty((rows, depth // Q4_BLOCK * Q4_BLOCK_BYTES), np.uint8)
        self.c.ggml_quantize_chunk(Q4_0, weight.ctypes.data, packed.ctypes.data, 0, rows, depth, None)
        return packed

    def _context(self, tensors: int) -> int:
        size = tensors * self.c.ggml_tensor_overhead() + self.c.ggml_graph_overhead()
        context: int | None = self.c.ggml_init(_InitParams(size, None, True))
        if not context:
            raise MemoryError("ggml: context")
        return context

    def _allocate(self, context: int, kind: int) -> None:
        if not self.c.ggml_backend_alloc_ctx_tensors_from_buft(context, kind):
            raise MemoryError("ggml: buffer")

    def layer(self, packed: np.ndarray) -> Layer:
        """A weight of Q4_0 bytes, in the first of ggml's buffers that has a product for it."""
        rows, depth = packed.shape[0], packed.shape[1] // Q4_BLOCK_BYTES * Q4_BLOCK
        for kind in self._buffers:
            context = self._context(4)
            weight = self.c.ggml_new_tensor_2d(context, Q4_0, depth, rows)
            self._allocate(context, kind)
            x = self.c.ggml_new_tensor_2d(context, F32, depth, 512)
            if self.c.ggml_backend_dev_supports_op(self._device, self.c.ggml_mul_mat(context, weight, x)):
                break
        packed = np.ascontiguousarray(packed)
        self.c.ggml_backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)
        return Layer(self, weight, rows, depth, self.c.ggml_backend_buft_name(kind).decode())


class Layer:
    """y = x W^T by ggml; `prepare` builds its graph, which costs no time when it runs."""

    def __init__(self, ggml: Ggml, weight: int, rows: int, depth: int, buffer: str) -> None:
        self._ggml, self._weight, self.rows, self.depth, self.buffer = ggml, weight, rows, depth, buffer
        self._graphs: dict[int, tuple[int, int, int]] = {}  # by rows of x: x, y, graph

    def prepare(self, x: np.ndarray) -> Layer:
        """Sets x, float32 [m, depth], for `run(m)`."""
        c, m = self._ggml.c, len(x)
        if m not in self._graphs:
            context = self._ggml._context(4)
            into = c.ggml_new_tensor_2d(context, F32, self.depth, m)
            y = c.ggml_mul_mat(context, self._weight, into)
            graph = c.ggml_new_graph(context)
            c.ggml_build_forward_expand(graph, y)
            self._ggml._allocate(context, self._ggml._plain)
            self._graphs[m] = into, y, graph
        x = np.ascontiguousarray(x, np.float32)
        c.ggml_backend_tensor_set(self._graphs[m][0], x.ctypes.data, 0, x.nbytes)
        return self

    def run(self, m: int) -> None:
        """The product. Raises RuntimeError where ggml reports a failure."""
        if self._ggml.c.ggml_backend_graph_compute(self._ggml._backend, self._graphs[m][2]):
            raise RuntimeError("ggml: graph_compute failed")

    def result(self, m: int) -> np.ndarray:
        """y of the last run, float32 [m, rows]."""
        y = np.empty((m, self.rows), np.float32)
        self._ggml.c.ggml_backend_tensor_get(self._graphs[m][1], y.ctypes.data, 0, y.nbytes)
        return y


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Q4_0 bytes [rows, n] -> float32 [rows, depth]: (code - 8) * scale; the low nibbles are the first 16."""
    blocks = packed.reshape(packed.shape[0], -1, Q4_BLOCK_BYTES)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1).astype(np.float32) - 8
    return (codes * scale).reshape(packed.shape[0], -1)
