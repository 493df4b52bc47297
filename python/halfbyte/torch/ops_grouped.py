"""Products with a stack of quantized weights, one for each expert: `torch.ops.halfbyte.grouped_linear_*`.

The rows of x are sorted by expert; expert e has the rows [offsets[e-1], offsets[e]), with offsets[-1] = 0:

    y[r] = x[r] W[e]^T      W is [experts, rows, depth]     transposed=False
    y[r] = x[r] W[e]                                        transposed=True

Rows of x beyond the last offset belong to nobody: their y is 0. Each direction is the other's gradient, so both
are differentiable in x any number of times. Only the experts that have rows are read, and none is ever held
dequantized, with one exception: where the weights of an expert do not begin with a block of their own (rows * depth
is no multiple of blocksize, or with double quantization of blocksize * nested_blocksize) that expert's matrix is
dequantized to float32 for the product. On CUDA one kernel does all of it, which reads the offsets on the device:
offsets that do not ascend, an error on the CPU, are taken there as if they did.

Layout: codes and scales of the whole stack, flattened row-major, as `quantize_4bit` of a 3-d tensor gives them;
int8 codes `[experts, rows, depth]` with one scale a row, `[experts, rows]`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.torch._library import define, flat_bytes
from halfbyte.torch.ops_4bit import compute_dtype, nested_keywords, nested_on_device

_STACK = "Tensor packed, Tensor absmax, str quant_type, int blocksize, SymInt[] shape"
_NESTED = (
    "Tensor? nested_absmax=None, Tensor? nested_map=None, Tensor? nested_offset=None, "
    "int nested_blocksize=256"
)


def _check(function: str, x: Tensor, shape: tuple[int, ...], transposed: bool) -> int:
    """Columns of y."""
    torch._check(len(shape) == 3, lambda: f"{function}: shape must have 3 dimensions, got {len(shape)}")
    torch._check(x.dim() == 2, lambda: f"{function}: x must have 2 dimensions, got {x.dim()}")
    columns, depth = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
    torch._check(x.shape[1] == depth, lambda: f"{function}: x has depth {x.shape[1]}, weight has {depth}")
    return columns


def _groups(function: str, offsets: Tensor, experts: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end) of each expert that has rows."""
    ends = offsets.tolist()
    if len(ends) != experts:
        raise ValueError(f"{function}: offsets must have {experts} entries, got {len(ends)}")
    start = 0
    for expert, end in enumerate(ends):
        if not start <= end <= rows:
            raise ValueError(f"{function}: offsets must ascend from 0 to at most {rows}, got {ends}")
        if end > start:
            yield expert, start, end
        start = end


# ---- 4 bits --------------------------------------------------------------------------------------


def _grouped_linear_4bit(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    transposed: bool = False,
    compute: str = "float32",
    nested_absmax: Tensor | None = None,
    nested_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    columns = _check("grouped_linear_4bit", x, tuple(shape), transposed)
    experts, *matrix = shape
    size = math.prod(matrix)
    nested = nested_keywords(nested_absmax, nested_map, nested_offset, nested_blocksize)
    unit = blocksize * (nested_blocksize if nested else 1)
    compute = "float32" if compute == "float16" else compute
    product = _C.linear_4bit_grad_input if transposed else _C.linear_4bit
    codes = flat_bytes(packed)
    x = x.contiguous()
    y = x.new_zeros((x.shape[0], columns))
    for e, start, end in _groups("grouped_linear_4bit", offsets, experts, x.shape[0]):
        if size % unit == 0:
            first = e * size
            if nested:
                nested["nested_absmax"] = nested_absmax[first // unit : (first + size) // unit]
            rows = product(
                x[start:end],
                codes[first // 2 : (first + size) // 2],
                absmax[first // blocksize : (first + size) // blocksize],
                quant_type,
                blocksize,
                tuple(matrix),
                compute=compute,
                **nested,
            )
        else:
            weight = _C.dequantize_4bit(
                codes,
                absmax,
                quant_type,
                blocksize,
                tuple(matrix),
                torch.float32,
                start=e * size,
                **nested,
            )
            rows = x[start:end].float() @ (weight if transposed else weight.t())
        y[start:end] = rows
    return y


def _grouped_linear_4bit_cuda(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    transposed: bool = False,
    compute: str = "float32",
    nested_absmax: Tensor | None = None,
    nested_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    dtype = compute_dtype("grouped_linear_4bit", compute)
    nested = nested_on_device(x.device, nested_absmax, nested_map, nested_offset, nested_blocksize)
    inside = x if x.dtype == dtype else x.to(dtype)
    y = _C.grouped_linear_4bit(
        inside,
        offsets,
        flat_bytes(packed),
        absmax,
        quant_type,
        blocksize,
        tuple(shape),
        transposed,
        **nested,
    )
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _grouped_linear_4bit_fake(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    transposed: bool = False,
    *_: object,
) -> Tensor:
    return x.new_empty((x.shape[0], _check("grouped_linear_4bit", x, tuple(shape), transposed)))


def _save_4bit(ctx, inputs: tuple, output: Tensor) -> None:
    _, offsets, packed, absmax, quant_type, blocksize, shape, transposed, compute, *nested = inputs
    ctx.save_for_backward(offsets, packed, absmax, *nested[:3])
    ctx.settings = (quant_type, blocksize, shape, not transposed, compute)
    ctx.nested_blocksize = nested[3]


def _backward_4bit(ctx, dy: Tensor):
    dx = None
    if ctx.needs_input_grad[0]:
        offsets, packed, absmax, *nested = ctx.saved_tensors
        dx = torch.ops.halfbyte.grouped_linear_4bit(
            dy, offsets, packed, absmax, *ctx.settings, *nested, ctx.nested_blocksize
        )
    return dx, *[None] * 12


define(
    f"grouped_linear_4bit(Tensor x, Tensor offsets, {_STACK}, bool transposed=False, str compute='float32', "
    f"{_NESTED}) -> Tensor",
    _grouped_linear_4bit,
    cuda=_grouped_linear_4bit_cuda,
    fake=_grouped_linear_4bit_fake,
    save=_save_4bit,
    backward=_backward_4bit,
)


# ---- int8 ----------------------------------------------------------------------------------------


def _grouped_linear_8bit(
    x: Tensor,
    offsets: Tensor,
    codes: Tensor,
    scale: Tensor,
    transposed: bool = False,
    threshold: float = 0.0,
    mode: str = "dynamic",
) -> Tensor:
    columns = _check("grouped_linear_8bit", x, tuple(codes.shape), transposed)
    x = x.contiguous()
    y = x.new_zeros((x.shape[0], columns))
    for e, start, end in _groups("grouped_linear_8bit", offsets, codes.shape[0], x.shape[0]):
        rows = x[start:end]
        if transposed:
            y[start:end] = _C.linear_8bit_grad_input(rows, codes[e], scale[e])
        else:
            y[start:end] = _C.linear_8bit(rows, codes[e], scale[e], None, threshold, mode)
    return y


def _grouped_linear_8bit_cuda(
    x: Tensor,
    offsets: Tensor,
    codes: Tensor,
    scale: Tensor,
    transposed: bool = False,
    threshold: float = 0.0,
    mode: str = "dynamic",
) -> Tensor:
    return _C.grouped_linear_8bit(x, offsets, codes, scale, transposed, threshold, mode)


def _grouped_linear_8bit_fake(
    x: Tensor, offsets: Tensor, codes: Tensor, scale: Tensor, transposed: bool = False, *_: object
) -> Tensor:
    return x.new_empty((x.shape[0], _check("grouped_linear_8bit", x, tuple(codes.shape), transposed)))


def _save_8bit(ctx, inputs: tuple, output: Tensor) -> None:
    _, offsets, codes, scale, transposed, _, _ = inputs
    ctx.save_for_backward(offsets, codes, scale)
    ctx.transposed = transposed


def _backward_8bit(ctx, dy: Tensor):
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.halfbyte.grouped_linear_8bit(dy, *ctx.saved_tensors, not ctx.transposed, 0.0, "exact")
    return dx, *[None] * 6


define(
    "grouped_linear_8bit(Tensor x, Tensor offsets, Tensor codes, Tensor scale, bool transposed=False, "
    "float threshold=0.0, str mode='dynamic') -> Tensor",
    _grouped_linear_8bit,
    cuda=_grouped_linear_8bit_cuda,
    fake=_grouped_linear_8bit_fake,
    save=_save_8bit,
    backward=_backward_8bit,
)
