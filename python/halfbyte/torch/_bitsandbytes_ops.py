"""The operators `torch.ops.bitsandbytes.*`, by the kernels of halfbyte. Imported by the stand-in alone.

Schemas are those of bitsandbytes 0.50. This file is no part of the stand-in's folder, which may be executed
under two names (`bitsandbytes` and `halfbyte.bitsandbytes`), while operators can be defined only once.
"""

import sys
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from halfbyte import shim
from halfbyte.torch import functional as F
from halfbyte.torch.ops_4bit import natural_compute
from halfbyte.torch.quant_state import format_of_codebook

_loaded = sys.modules.get(shim.NAME)
if _loaded is not None and not shim.is_ours(_loaded):
    raise ImportError(
        "halfbyte.bitsandbytes: the real bitsandbytes is imported already and owns torch.ops.bitsandbytes"
    )

_LIBRARY = torch.library.Library("bitsandbytes", "DEF")


def _define(schema: str, kernel: Callable, fake: Callable) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"bitsandbytes::{name}", fake, lib=_LIBRARY)


def _copies(kernel: Callable) -> Callable:
    """The `.out` form of a kernel: its last argument gets the result."""

    def into(*args, out: Tensor | None = None) -> None:
        *inputs, target = args if out is None else (*args, out)
        target.copy_(kernel(*inputs))

    return into


def _nothing(*args, **kwargs) -> None:
    return None


# ---- int8 ----------------------------------------------------------------------------------------


def _outlier_columns_fake(A: Tensor, threshold: float) -> Tensor | None:
    return (
        A.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)
        if threshold > 0.0
        else None
    )


def _vectorwise_quant_fake(A: Tensor, threshold: float = 0.0):
    return (
        A.new_empty(A.shape, dtype=torch.int8),
        A.new_empty(prod(A.shape[:-1]), dtype=torch.float32),
        _outlier_columns_fake(A, threshold),
    )


def _double_quant_fake(A: Tensor, threshold: float = 0.0):
    codes, scale, outliers = _vectorwise_quant_fake(A, threshold)
    return codes, torch.empty_like(codes), scale, A.new_empty(A.shape[-1], dtype=torch.float32), outliers


def _scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return F.int8_mm_dequant(F.int8_linear_matmul(A, B), row_stats, col_stats, bias=bias, dtype=dtype)


def _scaled_mm_fake(A, B, row_stats, col_stats, bias=None, dtype=None):
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16)


def _mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """int8 product plus the outlier columns of A, which CA holds as zeros, in float32."""
    y = _scaled_mm(CA, CB, SCA, SCB, bias, torch.float32)
    columns = None
    if outlier_cols is not None:
        columns = A[:, outlier_cols].contiguous()
        y = y + columns.float() @ F.int8_vectorwise_dequant(CB[:, outlier_cols].contiguous(), SCB).t()
    return y.to(A.dtype), columns


def _mixed_scaled_mm_fake(A, CA, CB, SCA, SCB, outlier_cols=None, bias=None):
    columns = None if outlier_cols is None else A.new_empty((A.shape[0], outlier_cols.shape[0]))
    return A.new_empty((*CA.shape[:-1], CB.shape[0])), columns


_define(
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)",
    _mixed_scaled_mm,
    _mixed_scaled_mm_fake,
)
_define(
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor",
    _scaled_mm,
    _scaled_mm_fake,
)
_define(
    "int8_linear_matmul(Tensor A, Tensor B) -> Tensor",
    F.int8_linear_matmul,
    lambda A, B: A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32),
)
_define(
    "int8_linear_matmul.out(Tensor A, Tensor B, Tensor! out) -> ()", _copies(F.int8_linear_matmul), _nothing
)
_define(
    "int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    F.int8_vectorwise_quant,
    _vectorwise_quant_fake,
)
_define(
    "int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor",
    F.int8_vectorwise_dequant,
    lambda A, stats: A.new_empty(A.shape, dtype=torch.float32),
)
_define(
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, "
    "Tensor? bias=None) -> Tensor",
    lambda A, row_stats, col_stats, dtype=None, bias=None: F.int8_mm_dequant(
        A, row_stats, col_stats, bias=bias, dtype=dtype
    ),
    lambda A, row_stats, col_stats, dtype=None, bias=None: A.new_empty(A.shape, dtype=dtype or torch.float16),
)
_define(
    "int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    lambda A, threshold=0.0: F.int8_double_quant(A, threshold=threshold),
    _double_quant_fake,
)

# ---- 4-bit ---------------------------------------------------------------------------------------


def _quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    packed, state = F.quantize_4bit(
        A, blocksize=blocksize, quant_type=quant_type, quant_storage=quant_storage
    )
    return packed, state.absmax


def _quantize_4bit_fake(A, blocksize, quant_type, quant_storage):
    n = A.numel()
    return (
        A.new_empty(((n + 1) // 2 // quant_storage.itemsize, 1), dtype=quant_storage),
        A.new_empty(((n + blocksize - 1) // blocksize,), dtype=torch.float32),
    )


def _dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype) -> Tensor:
    return torch.ops.halfbyte.dequantize_4bit(A, absmax, quant_type, blocksize, shape, dtype)


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """With double quantization `absmax` holds the second-level scales, `absmax_8bit` the first codes."""
    nested = () if absmax_8bit is None else (absmax, absmax_code, absmax_offset.float())
    return torch.ops.halfbyte.linear_4bit(
        A,
        B,
        absmax if absmax_8bit is None else absmax_8bit,
        quant_type,
        blocksize,
        shapeB,
        bias,
        natural_compute(A.dtype),
        *nested,
    )


def _gemm_4bit_fake(A, B, shapeB, *args, **kwargs):
    torch._check(A.shape[-1] == shapeB[1], lambda: f"gemm_4bit: A has depth {A.shape[-1]}, B has {shapeB[1]}")
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _gemv_4bit(A, B, shapeB, absmax, code, blocksize) -> Tensor:
    return _gemm_4bit(A, B, shapeB, absmax, blocksize, format_of_codebook(code))


_define(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    _quantize_4bit,
    _quantize_4bit_fake,
)
_DEQUANTIZE = "Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype"
_define(
    f"dequantize_4bit({_DEQUANTIZE}) -> Tensor",
    _dequantize_4bit,
    lambda A, absmax, blocksize, quant_type, shape, dtype: A.new_empty(shape, dtype=dtype),
)
_define(f"dequantize_4bit.out({_DEQUANTIZE}, Tensor! out) -> ()", _copies(_dequantize_4bit), _nothing)
_define(
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) "
    "-> Tensor",
    _gemm_4bit,
    _gemm_4bit_fake,
)
_GEMV = "Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize"
_define(f"gemv_4bit({_GEMV}) -> Tensor", _gemv_4bit, _gemm_4bit_fake)
_define(f"gemv_4bit.out({_GEMV}, Tensor! out) -> ()", _copies(_gemv_4bit), _nothing)

# ---- 8-bit block-wise ----------------------------------------------------------------------------


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return torch.ops.halfbyte.quantize_8bit(A, code.float(), blocksize)


def _dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    return torch.ops.halfbyte.dequantize_8bit(A, absmax, code.float(), blocksize, dtype)


def _quantize_blockwise_fake(A, code, blocksize):
    blocks = (A.numel() + blocksize - 1) // blocksize
    return A.new_empty(A.shape, dtype=torch.uint8), A.new_empty((blocks,), dtype=torch.float32)


_define(
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    _quantize_blockwise,
    _quantize_blockwise_fake,
)
_BLOCKWISE = "Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"
_define(
    f"dequantize_blockwise({_BLOCKWISE}) -> Tensor",
    _dequantize_blockwise,
    lambda A, absmax, code, blocksize, dtype: A.new_empty(A.shape, dtype=dtype),
)
_define(
    f"dequantize_blockwise.out({_BLOCKWISE}, Tensor! out) -> ()", _copies(_dequantize_blockwise), _nothing
)

# ---- optimizers: one update of one parameter -----------------------------------------------------


def _optimizer_32bit(
    optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, param_norm, beta1, beta2, beta3, alpha, eps,
    weight_decay, step, lr, gnorm_scale, skip_zeros=False,
) -> None:  # fmt: skip
    """`param_norm` is not needed: the core takes the norm of p itself."""
    F.optimizer_update_32bit(
        optimizer_name, g, p, state1, beta1, eps, step, lr, state2, beta2, beta3, alpha, weight_decay,
        gnorm_scale, unorm_vec, max_unorm, skip_zeros,
    )  # fmt: skip


_define(
    "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, "
    "float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, "
    "bool skip_zeros=False) -> ()",
    _optimizer_32bit,
    _nothing,
)
_define(
    "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
    "Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, "
    "float gnorm_scale, bool skip_zeros=False) -> ()",
    F.optimizer_update_8bit_blockwise,
    _nothing,
)
