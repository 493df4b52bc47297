"""The 4-bit operators `torch.ops.halfbyte.*`: schema, kernels, fake and gradient of each.

Layout: codes of the row-major flattened tensor, two per byte, the even element in the high nibble;
scale b belongs to elements [b*blocksize, (b+1)*blocksize). With double quantization `absmax` holds
uint8 codes and absmax[i] = nested_map[code] * nested_absmax[i // nested_blocksize] + nested_offset.

    linear_4bit:             y = x W^T + b       W = codebook[code] * absmax, W is [rows, depth]
    linear_4bit_grad_input:  dx = dy W
    embedding_4bit:          y[i] = W[index[i]]; an index outside is an error on the CPU, a row of NaN on CUDA

Each is the other's gradient, so both are differentiable any number of times in x (and dy) and b.
W is a constant. Everything is computed by `halfbyte._C`, with one exception: on CUDA many rows of x are multiplied by
torch, see `cuda_table`.

`compute` says how products are formed: "float32" exactly; "bfloat16", "float16": x and the codebook are rounded to
that dtype, sums are float32. On the CPU "float16" is "float32". On CUDA x is converted where it has another dtype,
and the result converted back, as bitsandbytes does.
"""

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.torch._library import as_it_is, blocks, define, flat_bytes
from halfbyte.torch.cuda_table import is_fused

_NESTED = (
    "Tensor? nested_absmax=None, Tensor? nested_map=None, Tensor? nested_offset=None, "
    "int nested_blocksize=256"
)
_WEIGHT = "Tensor packed, Tensor absmax, str quant_type, int blocksize, SymInt[] shape"


def nested_keywords(
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


def nested_on_device(
    device: torch.device,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_offset: Tensor | None,
    nested_blocksize: int,
) -> dict:
    """The same for CUDA: an offset on the device stays there, and the kernel reads it."""
    if nested_absmax is None:
        return {}
    offset: Tensor | float = 0.0
    if nested_offset is not None:
        if nested_offset.is_cpu:
            offset = float(nested_offset)
        elif nested_offset.dtype == torch.float32 and nested_offset.device == device:
            offset = nested_offset
        else:
            offset = nested_offset.to(device, torch.float32)
    return {
        "nested_absmax": nested_absmax,
        "nested_map": nested_map,
        "nested_offset": offset,
        "nested_blocksize": nested_blocksize,
    }


def natural_compute(dtype: torch.dtype) -> str:
    """The `compute` that a dtype of x asks for by itself."""
    return _NATURAL.get(dtype, "float32")


_NATURAL = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    _quantize_4bit,
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
    nested = nested_keywords(nested_absmax, nested_map, nested_offset, nested_blocksize)
    return _C.dequantize_4bit(
        flat_bytes(packed), absmax, quant_type, blocksize, tuple(shape), dtype, **nested
    )


def _dequantize_4bit_cuda(
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
    nested = nested_on_device(packed.device, nested_absmax, nested_map, nested_offset, nested_blocksize)
    return _C.dequantize_4bit(packed, absmax, quant_type, blocksize, tuple(shape), dtype, **nested)


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
    _dequantize_4bit,
    cuda=_dequantize_4bit_cuda,
    fake=_dequantize_4bit_fake,
)


def _nest_absmax(absmax: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    codes, nested_absmax, offset = _C.nest_absmax(absmax, blocksize)
    return codes, nested_absmax, torch.tensor(offset, dtype=torch.float32)


def _nest_absmax_cuda(absmax: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    codes, nested_absmax, offset = _C.nest_absmax(absmax, blocksize)
    return codes, nested_absmax, offset.reshape(())


def _nest_absmax_fake(absmax: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    n = absmax.numel()
    return (
        absmax.new_empty((n,), dtype=torch.uint8),
        absmax.new_empty((blocks(n, blocksize),), dtype=torch.float32),
        absmax.new_empty((), dtype=torch.float32),
    )


define(
    "nest_absmax(Tensor absmax, int blocksize=256) -> (Tensor, Tensor, Tensor)",
    _nest_absmax,
    cuda=_nest_absmax_cuda,
    fake=_nest_absmax_fake,
)


def _embedding_4bit(
    index: Tensor,
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
    rows, depth = shape
    nested = nested_absmax, nested_map, nested_offset, nested_blocksize
    if depth % blocksize:  # blocks go over the ends of rows: no row can be taken out
        table = _dequantize_4bit(packed, absmax, quant_type, blocksize, shape, dtype, *nested)
        return torch.nn.functional.embedding(index, table)
    if nested_absmax is not None and nested_map is not None:
        absmax = _C.dequantize_8bit(absmax, nested_absmax, nested_map, nested_blocksize, torch.float32)
        absmax = absmax if nested_offset is None else absmax + nested_offset
    flat = index.reshape(-1)
    return _C.dequantize_4bit(
        flat_bytes(packed).view(torch.uint8).view(rows, -1).index_select(0, flat).view(-1),
        absmax.view(rows, -1).index_select(0, flat).view(-1),
        quant_type,
        blocksize,
        (*index.shape, depth),
        dtype,
    )


def _embedding_4bit_cuda(
    index: Tensor,
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
    nested = nested_on_device(index.device, nested_absmax, nested_map, nested_offset, nested_blocksize)
    index = index if index.dtype == torch.int64 else index.to(torch.int64)
    return _C.gather_4bit(index, packed, absmax, quant_type, blocksize, tuple(shape), dtype, **nested)


def _embedding_4bit_fake(
    index: Tensor,
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
    *_: object,
) -> Tensor:
    torch._check(len(shape) == 2, lambda: f"embedding_4bit: shape must have 2 dimensions, got {len(shape)}")
    return packed.new_empty((*index.shape, shape[1]), dtype=dtype)


define(
    f"embedding_4bit(Tensor index, {_WEIGHT}, ScalarType dtype, {_NESTED}) -> Tensor",
    _embedding_4bit,
    cuda=_embedding_4bit_cuda,
    fake=_embedding_4bit_fake,
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
    nested = nested_keywords(nested_absmax, nested_map, nested_offset, nested_blocksize)
    compute = "float32" if compute == "float16" else compute
    return _C.linear_4bit(
        x, flat_bytes(packed), absmax, quant_type, blocksize, tuple(shape), bias, compute, **nested
    )


def linear_4bit_cuda(
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
    dtype = compute_dtype("linear_4bit", compute)
    nested = nested_on_device(x.device, nested_absmax, nested_map, nested_offset, nested_blocksize)
    weight = packed, absmax, quant_type, blocksize, tuple(shape)
    inside = x if x.dtype == dtype else x.to(dtype)
    if is_fused("linear_4bit", x, dtype, _rows(x)):
        y = _C.linear_4bit(inside, *weight, bias, **nested)
    else:
        _linear_4bit_fake(x, packed, absmax, quant_type, blocksize, shape)
        bias = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
        with as_it_is(x):
            y = torch.nn.functional.linear(inside, _C.dequantize_4bit(*weight, dtype, **nested), bias)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def compute_dtype(function: str, compute: str) -> torch.dtype:
    if compute not in _COMPUTE_DTYPES:
        raise ValueError(f"{function}: compute must be one of {list(_COMPUTE_DTYPES)}, got {compute!r}")
    return _COMPUTE_DTYPES[compute]


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1) if x.dim() else 0


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
    nested = nested_keywords(nested_absmax, nested_map, nested_offset, nested_blocksize)
    compute = "float32" if compute == "float16" else compute
    return _C.linear_4bit_grad_input(
        dy, flat_bytes(packed), absmax, quant_type, blocksize, tuple(shape), compute, **nested
    )


def linear_4bit_grad_input_cuda(
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
    dtype = compute_dtype("linear_4bit_grad_input", compute)
    nested = nested_on_device(dy.device, nested_absmax, nested_map, nested_offset, nested_blocksize)
    weight = packed, absmax, quant_type, blocksize, tuple(shape)
    inside = dy if dy.dtype == dtype else dy.to(dtype)
    if is_fused("linear_4bit_grad_input", dy, dtype, _rows(dy)):
        dx = _C.linear_4bit_grad_input(inside, *weight, **nested)
    else:
        _linear_4bit_grad_input_fake(dy, packed, absmax, quant_type, blocksize, shape)
        with as_it_is(dy):
            dx = torch.matmul(inside, _C.dequantize_4bit(*weight, dtype, **nested))
    return dx if dx.dtype == dy.dtype else dx.to(dy.dtype)


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
    _linear_4bit,
    cuda=linear_4bit_cuda,
    fake=_linear_4bit_fake,
    save=_save_linear,
    backward=_linear_backward,
)
define(
    f"linear_4bit_grad_input(Tensor dy, {_WEIGHT}, str compute='float32', {_NESTED}) -> Tensor",
    _linear_4bit_grad_input,
    cuda=linear_4bit_grad_input_cuda,
    fake=_linear_4bit_grad_input_fake,
    save=_save_grad_input,
    backward=_grad_input_backward,
)
