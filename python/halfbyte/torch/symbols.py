"""`lib`: the C functions of bitsandbytes' library that other packages call through ctypes, by halfbyte.

Unsloth's kernels and a few others take functions such as `bitsandbytes.functional.lib.cdequantize_blockwise_fp32`
and pass them addresses. The functions here take the same arguments - addresses as ctypes' c_void_p, int or
None, sizes as ctypes' or Python's integers - view the memory as tensors and call the operators.

An address is a GPU's when CUDA knows it as memory of one; otherwise it is taken for the host's. On a
GPU work goes to the stream at the end, or to torch's current one where none is given, and nothing waits for it.

    c[de]quantize_blockwise_{fp32,fp16,bf16}[_nf4|_fp4] (code, A, absmax, out, blocksize, n[, stream])
    c[de]quantize_blockwise_cpu_{fp32,fp16,bf16}        (code, A, absmax, out, blocksize, n)
    cdequantize_blockwise_cpu_{nf4,fp4}_{...}           (A, absmax, out, blocksize, rows, depth)
    cgemm_4bit_inference_naive_{...}  (rows, 1, depth, x, W, absmax, code, out, lda, ldb, ldc, blocksize[, stream])
    cgemm_4bit_{fp32,fp16,bf16}       (x, W, absmax, absmax_8bit, absmax_code, absmax_offset, out, bias, rows of x,
                                       rows, depth, blocksize, 1: FP4 | 2: NF4, stream); absmax_8bit and the two
                                       after it are None without double quantization
    cint8_vector_quant                (A float16, out, row_stats, threshold, rows, depth[, stream])
    cdequant_mm_int32_fp16            (A, row_stats, col_stats, out, bias, rows, columns[, stream])
    cfill_fp32, cfill_uint8, c_mul_fp32 (A, B, value, n), cprefetch (does nothing)
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.torch.lowlevel import cuda_is_ready
from halfbyte.torch.ops_4bit import natural_compute
from halfbyte.torch.quant_state import format_at, format_of_codebook

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _int(value: Any) -> int:
    return int(getattr(value, "value", value))


def _address(pointer: Any) -> int:
    return getattr(pointer, "value", pointer) or 0


def _view(pointer: Any, dtype: torch.dtype, *shape: int) -> Tensor:
    """The memory at an address as a tensor that does not own it."""
    count = 1
    for size in shape:
        count *= size
    address = _address(pointer)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    if not address:
        raise ValueError("lib: a null pointer was given for memory that is needed")
    if torch.cuda.is_initialized() and cuda_is_ready():
        current = torch.cuda.current_device()
        for device in (current, *range(torch.cuda.device_count())):
            capsule = _C.cuda_view(address, count * dtype.itemsize, device)
            if capsule is not None:
                return torch.utils.dlpack.from_dlpack(capsule).view(dtype).view(shape)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def _blocks(n: int, blocksize: int) -> int:
    return -(-n // blocksize)


def _quantize_8bit(dtype: torch.dtype) -> Callable:
    def function(code, A, absmax, out, blocksize, n, stream=None):
        n, blocksize = _int(n), _int(blocksize)
        codes, scale = torch.ops.halfbyte.quantize_8bit(
            _view(A, dtype, n), _view(code, torch.float32, 256), blocksize
        )
        _view(out, torch.uint8, n).copy_(codes)
        _view(absmax, torch.float32, _blocks(n, blocksize)).copy_(scale)

    return function


def _dequantize_8bit(dtype: torch.dtype) -> Callable:
    def function(code, A, absmax, out, blocksize, n, stream=None):
        n, blocksize = _int(n), _int(blocksize)
        values = torch.ops.halfbyte.dequantize_8bit(
            _view(A, torch.uint8, n),
            _view(absmax, torch.float32, _blocks(n, blocksize)),
            _view(code, torch.float32, 256),
            blocksize,
            dtype,
        )
        _view(out, dtype, n).copy_(values)

    return function


def _quantize_4bit(dtype: torch.dtype, quant_type: str) -> Callable:
    def function(code, A, absmax, out, blocksize, n, stream=None):
        n, blocksize = _int(n), _int(blocksize)
        packed, scale = torch.ops.halfbyte.quantize_4bit(_view(A, dtype, n), quant_type, blocksize, "absmax")
        _view(out, torch.uint8, (n + 1) // 2).copy_(packed)
        _view(absmax, torch.float32, _blocks(n, blocksize)).copy_(scale)

    return function


def _dequantize_4bit(dtype: torch.dtype, quant_type: str) -> Callable:
    def function(code, A, absmax, out, blocksize, n, stream=None):
        n, blocksize = _int(n), _int(blocksize)
        values = torch.ops.halfbyte.dequantize_4bit(
            _view(A, torch.uint8, (n + 1) // 2),
            _view(absmax, torch.float32, _blocks(n, blocksize)),
            quant_type,
            blocksize,
            (n,),
            dtype,
        )
        _view(out, dtype, n).copy_(values)

    return function


def _dequantize_4bit_cpu(dtype: torch.dtype, quant_type: str) -> Callable:
    inner = _dequantize_4bit(dtype, quant_type)

    def function(A, absmax, out, blocksize, rows, depth):
        inner(None, A, absmax, out, blocksize, _int(rows) * _int(depth))

    return function


def _gemv_4bit(dtype: torch.dtype) -> Callable:
    def function(m, n, k, A, B, absmax, code, out, lda, ldb, ldc, blocksize, stream=None):
        rows, depth, blocksize = _int(m), _int(k), _int(blocksize)
        # No argument names the format; its codebook does. That of a QuantState is known without a look at it.
        quant_type = format_at(_address(code)) or format_of_codebook(_view(code, torch.float32, 16))
        y = torch.ops.halfbyte.linear_4bit(
            _view(A, dtype, 1, depth),
            _view(B, torch.uint8, (rows * depth + 1) // 2),
            _view(absmax, torch.float32, _blocks(rows * depth, blocksize)),
            quant_type,
            blocksize,
            (rows, depth),
            None,
            natural_compute(dtype),
        )
        _view(out, dtype, 1, rows).copy_(y)

    return function


def _gemm_4bit(dtype: torch.dtype) -> Callable:
    def function(A, B, absmax, codes, map, offset, out, bias, m, n, k, blocksize, quant_type, stream=None):
        m, rows, depth, blocksize = _int(m), _int(n), _int(k), _int(blocksize)
        blocks = _blocks(rows * depth, blocksize)
        nested: list[Tensor] = []
        if _address(codes):  # then `absmax` is that of the scales
            nested = [
                _view(absmax, torch.float32, _blocks(blocks, 256)),
                _view(map, torch.float32, 256),
                _view(offset, torch.float32, 1),
            ]
        scales = _view(codes, torch.uint8, blocks) if nested else _view(absmax, torch.float32, blocks)
        y = torch.ops.halfbyte.linear_4bit(
            _view(A, dtype, m, depth),
            _view(B, torch.uint8, (rows * depth + 1) // 2),
            scales,
            "fp4" if _int(quant_type) == 1 else "nf4",
            blocksize,
            (rows, depth),
            _view(bias, dtype, rows) if _address(bias) else None,
            natural_compute(dtype),
            *nested,
        )
        _view(out, dtype, m, rows).copy_(y)

    return function


def _int8_vector_quant(A, out, row_stats, threshold, rows, cols, stream=None):
    rows, cols, threshold = _int(rows), _int(cols), float(getattr(threshold, "value", threshold))
    x = _view(A, torch.float16, rows, cols)
    target, stats = _view(out, torch.int8, rows, cols), _view(row_stats, torch.float32, rows)
    if x.is_cuda:
        # Outliers are stored as 0, and so are zeros; their columns are zeroed by the caller.
        if threshold > 0.0:
            x = torch.where(x.abs() >= threshold, 0, x)
        codes, scale, _ = torch.ops.halfbyte.quantize_rows_int8(x, 0.0)
        target.copy_(codes)
        stats.copy_(scale)
        return
    # One row at a time: a column with an outlier is zeroed by the caller, here only the outlier itself.
    for i in range(rows):
        codes, scale, _ = torch.ops.halfbyte.quantize_rows_int8(x[i : i + 1], threshold)
        target[i : i + 1].copy_(codes)
        stats[i : i + 1].copy_(scale)


def _dequant_mm(A, row_stats, col_stats, out, bias, rows, cols, stream=None):
    rows, cols = _int(rows), _int(cols)
    y = _view(A, torch.int32, rows, cols).float() * _view(row_stats, torch.float32, rows, 1)
    y *= _view(col_stats, torch.float32, cols) / (127.0 * 127.0)
    if getattr(bias, "value", bias):
        y += _view(bias, torch.float16, cols).float()
    _view(out, torch.float16, rows, cols).copy_(y)


def _fill(dtype: torch.dtype) -> Callable:
    def function(A, B, value, n):
        _view(A, dtype, _int(n)).fill_(getattr(value, "value", value))

    return function


def _mul(A, B, value, n):
    _view(A, torch.float32, _int(n)).mul_(_view(B, torch.float32, _int(n)))


def _table() -> dict[str, Callable]:
    table: dict[str, Callable] = {
        "cint8_vector_quant": _int8_vector_quant,
        "cdequant_mm_int32_fp16": _dequant_mm,
        "cfill_fp32": _fill(torch.float32),
        "cfill_uint8": _fill(torch.uint8),
        "c_mul_fp32": _mul,
        "cprefetch": lambda pointer, size, device: None,
        "has_avx512f_cpu": lambda: _C.cpu_info()["detected"].startswith("avx512"),
        "has_avx512bf16_cpu": lambda: _C.cpu_info()["detected"] == "avx512bf16",
    }
    for name, dtype in _DTYPES.items():
        table[f"cgemm_4bit_inference_naive_{name}"] = _gemv_4bit(dtype)
        table[f"cgemm_4bit_{name}"] = _gemm_4bit(dtype)
        for cpu in ("", "cpu_"):
            table[f"cquantize_blockwise_{cpu}{name}"] = _quantize_8bit(dtype)
            table[f"cdequantize_blockwise_{cpu}{name}"] = _dequantize_8bit(dtype)
        for quant_type in ("nf4", "fp4"):
            table[f"cquantize_blockwise_{name}_{quant_type}"] = _quantize_4bit(dtype, quant_type)
            table[f"cdequantize_blockwise_{name}_{quant_type}"] = _dequantize_4bit(dtype, quant_type)
            table[f"cdequantize_blockwise_cpu_{quant_type}_{name}"] = _dequantize_4bit_cpu(dtype, quant_type)
    return table


def _on_stream(function: Callable) -> Callable:
    """The function with the stream that is its last argument, `stream`, made current where it is another."""
    place = function.__code__.co_argcount - 1
    if "stream" not in function.__code__.co_varnames[place : place + 1]:
        return function

    def call(*args: Any) -> Any:
        if len(args) <= place or args[place] is None or not torch.cuda.is_initialized():
            return function(*args)
        stream = _address(args[place])
        if stream == torch.cuda.current_stream().cuda_stream:
            return function(*args)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            return function(*args)

    return call


class NativeLibrary:
    """What `bitsandbytes.functional.lib` is: attributes are functions on addresses.

    A name that is not in the table is a function too, which raises RuntimeError when it is called: that is
    how bitsandbytes without a GPU behaves, and packages look names up when they are imported.
    """

    @property
    def compiled_with_cuda(self) -> bool:
        """Whether this build's CUDA library can be used here."""
        return cuda_is_ready()

    def __init__(self) -> None:
        self._functions = {name: _on_stream(function) for name, function in _table().items()}

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        function = self._functions.get(name)

        def call(*args: Any) -> Any:
            if function is None:
                raise RuntimeError(
                    f"lib.{name}: halfbyte, standing in for bitsandbytes, has no such function"
                )
            if torch.cuda.is_initialized() and not cuda_is_ready():
                raise RuntimeError(
                    f"lib.{name}: takes host memory only, and this process uses CUDA, whose addresses look the "
                    f"same; {_C.cuda_info()['reason']}"
                )
            return function(*args)

        call.__name__ = name
        return call

    def __getitem__(self, name: str) -> Callable:
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._functions})


lib = NativeLibrary()
