"""The 8-bit operators `torch.ops.halfbyte.*`: block-wise with a 256-entry map, and row-wise int8.

    quantize_8bit, dequantize_8bit            x = map[code] * absmax[i // blocksize]
    quantize_rows_int8, dequantize_rows_int8  x[r, k] = codes[r, k] * scale[r] / 127
    matmul_int8                               exact int32 product of two int8 matrices
    linear_8bit                               y = x W^T + b for a row-wise int8 W [rows, depth]
    linear_8bit_grad_input                    dx = dy W with the dequantized W

linear_8bit in mode "dynamic" is LLM.int8() (Dettmers et al. 2022, section 3): x is quantized row by row,
columns with any |x| >= threshold are multiplied in float32. Mode "exact" keeps x in float32. The gradient
with respect to x is dy W in both modes (straight through the rounding of x). On CUDA many rows of x in mode "exact"
are multiplied by torch with the weight in x's dtype, see `cuda_table`.
"""

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.torch._library import as_it_is, blocks, define
from halfbyte.torch.cuda_table import is_fused

# ---- block-wise with a map -----------------------------------------------------------------------


def _quantize_8bit(x: Tensor, map: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return _C.quantize_8bit(x, map, blocksize)


def _quantize_8bit_fake(x: Tensor, map: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return codes, x.new_empty((blocks(x.numel(), blocksize),), dtype=torch.float32)


def _dequantize_8bit(
    codes: Tensor, absmax: Tensor, map: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    return _C.dequantize_8bit(codes.contiguous(), absmax, map, blocksize, dtype)


def _dequantize_8bit_fake(
    codes: Tensor, absmax: Tensor, map: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


define(
    "quantize_8bit(Tensor x, Tensor map, int blocksize) -> (Tensor, Tensor)",
    _quantize_8bit,
    fake=_quantize_8bit_fake,
)
define(
    "dequantize_8bit(Tensor codes, Tensor absmax, Tensor map, int blocksize, ScalarType dtype) -> Tensor",
    _dequantize_8bit,
    fake=_dequantize_8bit_fake,
)


# ---- row-wise int8 -------------------------------------------------------------------------------


def _quantize_rows_int8(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, outliers = _C.quantize_rows_int8(x, threshold)
    if outliers is None:
        outliers = x.new_empty((0,), dtype=torch.bool)
    return codes, scale, outliers


def _quantize_rows_int8_fake(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.dim() > 0, lambda: "quantize_rows_int8: x must have at least 1 dimension, got 0")
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((rows,), dtype=torch.float32),
        x.new_empty((x.shape[-1] if threshold > 0.0 else 0,), dtype=torch.bool),
    )


def _dequantize_rows_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _C.dequantize_rows_int8(codes, scale, dtype)


def _dequantize_rows_int8_fake(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _matmul_int8(a: Tensor, b: Tensor) -> Tensor:
    return _C.matmul_int8(a.contiguous(), b.contiguous())


def _matmul_int8_fake(a: Tensor, b: Tensor) -> Tensor:
    torch._check(b.dim() == 2, lambda: f"matmul_int8: b must have 2 dimensions, got {b.dim()}")
    torch._check(
        a.shape[-1] == b.shape[-1],
        lambda: f"matmul_int8: a has depth {a.shape[-1]}, b has {b.shape[-1]}",
    )
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=torch.int32)


define(
    "quantize_rows_int8(Tensor x, float threshold=0.0) -> (Tensor, Tensor, Tensor)",
    _quantize_rows_int8,
    fake=_quantize_rows_int8_fake,
)
define(
    "dequantize_rows_int8(Tensor codes, Tensor scale, ScalarType dtype) -> Tensor",
    _dequantize_rows_int8,
    fake=_dequantize_rows_int8_fake,
)
define("matmul_int8(Tensor a, Tensor b) -> Tensor", _matmul_int8, fake=_matmul_int8_fake)


# ---- y = x W^T + b and dx = dy W -----------------------------------------------------------------


def _linear_8bit(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    mode: str = "dynamic",
) -> Tensor:
    return _C.linear_8bit(x, codes, scale, bias, threshold, mode)


def linear_8bit_cuda(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    mode: str = "dynamic",
) -> Tensor:
    if mode != "exact" or is_fused("linear_8bit", x, x.dtype, x.numel() // max(codes.shape[-1], 1)):
        return _C.linear_8bit(x, codes, scale, bias, threshold, mode)
    _linear_8bit_fake(x, codes)
    bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
    with as_it_is(x):
        return torch.nn.functional.linear(x, _C.dequantize_rows_int8(codes, scale, x.dtype), bias)


def _linear_8bit_fake(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    torch._check(codes.dim() == 2, lambda: f"linear_8bit: codes must have 2 dimensions, got {codes.dim()}")
    torch._check(
        x.shape[-1] == codes.shape[1],
        lambda: f"linear_8bit: x has depth {x.shape[-1]}, weight has {codes.shape[1]}",
    )
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _linear_8bit_grad_input(dy: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return _C.linear_8bit_grad_input(dy, codes, scale)


def _linear_8bit_grad_input_cuda(dy: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    if is_fused("linear_8bit_grad_input", dy, dy.dtype, dy.numel() // max(codes.shape[0], 1)):
        return _C.linear_8bit_grad_input(dy, codes, scale)
    _linear_8bit_grad_input_fake(dy, codes, scale)
    with as_it_is(dy):
        return torch.matmul(dy, _C.dequantize_rows_int8(codes, scale, dy.dtype))


def _linear_8bit_grad_input_fake(dy: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    torch._check(
        dy.shape[-1] == codes.shape[0],
        lambda: f"linear_8bit_grad_input: dy has {dy.shape[-1]} columns, weight has {codes.shape[0]} rows",
    )
    return dy.new_empty((*dy.shape[:-1], codes.shape[1]))


def _save_linear(ctx, inputs: tuple, output: Tensor) -> None:
    _, codes, scale, bias, _, _ = inputs
    ctx.save_for_backward(codes, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, dy: Tensor):
    codes, scale = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.halfbyte.linear_8bit_grad_input(dy, codes, scale)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        dbias = dy.sum_to_size(dy.shape[-1]).to(ctx.bias_dtype)
    return dx, None, None, dbias, None, None


def _save_grad_input(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _grad_input_backward(ctx, ddx: Tensor):
    ddy = None
    if ctx.needs_input_grad[0]:
        ddy = torch.ops.halfbyte.linear_8bit(ddx, *ctx.saved_tensors, None, 0.0, "exact")
    return ddy, None, None


define(
    "linear_8bit(Tensor x, Tensor codes, Tensor scale, Tensor? bias=None, float threshold=0.0, "
    "str mode='dynamic') -> Tensor",
    _linear_8bit,
    cuda=linear_8bit_cuda,
    fake=_linear_8bit_fake,
    save=_save_linear,
    backward=_linear_backward,
)
define(
    "linear_8bit_grad_input(Tensor dy, Tensor codes, Tensor scale) -> Tensor",
    _linear_8bit_grad_input,
    cuda=_linear_8bit_grad_input_cuda,
    fake=_linear_8bit_grad_input_fake,
    save=_save_grad_input,
    backward=_grad_input_backward,
)
