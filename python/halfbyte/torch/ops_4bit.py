"""The 4-bit operators `torch.ops.halfbyte.*`: schema, CPU kernel, fake and gradient of each.

Layout: codes of the row-major flattened tensor, two per byte, the even element in the high nibble;
scale b belongs to elements [b*blocksize, (b+1)*blocksize). With double quantization `absmax` holds
uint8 codes and absmax[i] = nested_map[code] * nested_absmax[i // nested_blocksize] + nested_offset.

    linear_4bit:             y = x W^T + b       W = codebook[code] * absmax, W is [rows, depth]
    linear_4bit_grad_input:  dx = dy W

Each is the other's gradient, so both are differentiable any number of times in x (and dy) and b.
W is a constant. Everything is computed by `halfbyte._C`; no arithmetic happens here.
"""

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.torch._library import blocks, define, flat_bytes

_NESTED = (
    "Tensor? nested_absmax=None, Tensor? nested_map=None, Tensor? nested_offset=None, "
    "int nested_blocksize=256"
)
_WEIGHT = "Tensor packed, Tensor absmax, str quant_type, int blocksize, SymInt[] shape"


def nested_arguments(
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_offset: Tensor | None,
    nested_blocksize: int,
) -> dict:
    """The nested_* keyword arguments of `_C` for the optional tensors of an operator."""
    if nested_absmax is None:
        return {}
    return {
        "nested_absmax": nested_absmax,
        "nested_map": nested_map,
        "nested_offset": 0.0 if nested_offset is None else float(nested_offset),
        "nested_blocksize": nested_blocksize,
    }


# ---- quantize and dequantize ---------------------------------------------------------------------


def _quantize_4bit(
    x: Tensor, quant_type: str = "nf4", blocksize: int = 64, scales: str = "absmax"
) -> tuple[Tensor, Tensor]:
    return _C.quantize_4bit(x, quant_type, blocksize, scales)


def _quantize_4bit_fake(
    x: Tensor, quant_type: str = "nf4", blocksize: int = 64, scales: str = "absmax"
) -> tuple[Tensor, Tensor]:
    n = x.numel()
    return (
        x.new_empty(((n + 1) // 2,), dtype=torch.uint8),
        x.new_empty((blocks(n, blocksize),), dtype=torch.float32),
    )


define(
    "quantize_4bit(Tensor x, str quant_type='nf4', int blocksize=64, str scales='absmax')"
    " -> (Tensor, Tensor)",
    cpu=_quantize_4bit,
    fake=_quantize_4bit_fake,
)


def _dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
    nested_absmax: Tensor | None = None,
    nested_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    nested = nested_arguments(nested_absmax, nested_map, nested_offset, nested_blocksize)
    return _C.dequantize_4bit(
        flat_bytes(packed), absmax, quant_type, blocksize, tuple(shape), dtype, **nested
    )


def _dequantize_4bit_fake(
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
    *_: object,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


define(
    f"dequantize_4bit({_WEIGHT}, ScalarType dtype, {_NESTED}) -> Tensor",
    cpu=_dequantize_4bit,
    fake=_dequantize_4bit_fake,
)


def _nest_absmax(absmax: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    codes, nested_absmax, offset = _C.nest_absmax(absmax, blocksize)
    return codes, nested_absmax, torch.tensor(offset, dtype=torch.float32)


def _nest_absmax_fake(absmax: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    n = absmax.numel()
    return (
        absmax.new_empty((n,), dtype=torch.uint8),
        absmax.new_empty((blocks(n, blocksize),), dtype=torch.float32),
        absmax.new_empty((), dtype=torch.float32),
    )


define(
    "nest_absmax(Tensor absmax, int blocksize=256) -> (Tensor, Tensor, Tensor)",
    cpu=_nest_absmax,
    fake=_nest_absmax_fake,
)


# ---- y = x W^T + b and dx = dy W -----------------------------------------------------------------


def _linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    bias: Tensor | None = None,
    compute: str = "float32",
    nested_absmax: Tensor | None = None,
    nested_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    nested = nested_arguments(nested_absmax, nested_map, nested_offset, nested_blocksize)
    return _C.linear_4bit(
        x, flat_bytes(packed), absmax, quant_type, blocksize, tuple(shape), bias, compute, **nested
    )


def _linear_4bit_fake(
    x: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int, shape: list[int], *_: object
) -> Tensor:
    torch._check(len(shape) == 2, lambda: f"linear_4bit: shape must have 2 dimensions, got {len(shape)}")
    torch._check(x.dim() > 0, lambda: "linear_4bit: x must have at least 1 dimension, got 0")
    torch._check(
        x.shape[-1] == shape[1], lambda: f"linear_4bit: x has depth {x.shape[-1]}, weight has {shape[1]}"
    )
    return x.new_empty((*x.shape[:-1], shape[0]))


def _linear_4bit_grad_input(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    compute: str = "float32",
    nested_absmax: Tensor | None = None,
    nested_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    nested = nested_arguments(nested_absmax, nested_map, nested_offset, nested_blocksize)
    return _C.linear_4bit_grad_input(
        dy, flat_bytes(packed), absmax, quant_type, blocksize, tuple(shape), compute, **nested
    )


def _linear_4bit_grad_input_fake(
    dy: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int, shape: list[int], *_: object
) -> Tensor:
    torch._check(
        len(shape) == 2, lambda: f"linear_4bit_grad_input: shape must have 2 dimensions, got {len(shape)}"
    )
    torch._check(
        dy.shape[-1] == shape[0],
        lambda: f"linear_4bit_grad_input: dy has {dy.shape[-1]} columns, weight has {shape[0]} rows",
    )
    return dy.new_empty((*dy.shape[:-1], shape[1]))


def _save_linear(ctx, inputs: tuple, output: Tensor) -> None:
    _, packed, absmax, quant_type, blocksize, shape, bias, compute, nabsmax, nmap, noffset, nblocksize = (
        inputs
    )
    ctx.save_for_backward(packed, absmax, nabsmax, nmap, noffset)
    ctx.settings = (quant_type, blocksize, shape, compute, nblocksize)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, dy: Tensor):
    packed, absmax, nabsmax, nmap, noffset = ctx.saved_tensors
    quant_type, blocksize, shape, compute, nblocksize = ctx.settings
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.halfbyte.linear_4bit_grad_input(
            dy, packed, absmax, quant_type, blocksize, shape, compute, nabsmax, nmap, noffset, nblocksize
        )
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        dbias = dy.sum_to_size(dy.shape[-1]).to(ctx.bias_dtype)
    return dx, None, None, None, None, None, dbias, None, None, None, None, None


def _save_grad_input(ctx, inputs: tuple, output: Tensor) -> None:
    _, packed, absmax, quant_type, blocksize, shape, compute, nabsmax, nmap, noffset, nblocksize = inputs
    ctx.save_for_backward(packed, absmax, nabsmax, nmap, noffset)
    ctx.settings = (quant_type, blocksize, shape, compute, nblocksize)


def _grad_input_backward(ctx, ddx: Tensor):
    packed, absmax, nabsmax, nmap, noffset = ctx.saved_tensors
    quant_type, blocksize, shape, compute, nblocksize = ctx.settings
    ddy = None
    if ctx.needs_input_grad[0]:
        ddy = torch.ops.halfbyte.linear_4bit(
            ddx,
            packed,
            absmax,
            quant_type,
            blocksize,
            shape,
            None,
            compute,
            nabsmax,
            nmap,
            noffset,
            nblocksize,
        )
    return ddy, None, None, None, None, None, None, None, None, None, None


define(
    f"linear_4bit(Tensor x, {_WEIGHT}, Tensor? bias=None, str compute='float32', {_NESTED}) -> Tensor",
    cpu=_linear_4bit,
    fake=_linear_4bit_fake,
    save=_save_linear,
    backward=_linear_backward,
)
define(
    f"linear_4bit_grad_input(Tensor dy, {_WEIGHT}, str compute='float32', {_NESTED}) -> Tensor",
    cpu=_linear_4bit_grad_input,
    fake=_linear_4bit_grad_input_fake,
    save=_save_grad_input,
    backward=_grad_input_backward,
)
