"""`matmul` (int8) and `matmul_4bit`: products of activations with a quantized weight, with gradients.

`MatmulLtState` is what an int8 layer keeps between calls: CB the int8 codes `[rows, depth]`, SCB their
float32 scales `[rows]`. Inference is LLM.int8(): x is quantized row by row, columns with outliers stay
float32. Training multiplies x by the dequantized weight, so that its gradient dy W is the exact one.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halfbyte.torch._library import autocast_dtype
from halfbyte.torch.functional import int8_vectorwise_quant, linear_4bit, nested_tensors
from halfbyte.torch.ops_4bit import natural_compute
from halfbyte.torch.quant_state import QuantState

_REMOVED = ("CxB", "CxBt", "formatB", "_tile_indices")
_FLOAT16_MAX = 65504.0


@dataclass(eq=False)
class MatmulLtState:
    """State of an int8 layer. All attributes may be set; those of removed GPU layouts read as None."""

    force_no_igemmlt: bool = False
    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None
    SBt: Tensor | None = None
    CBt: Tensor | None = None
    subB: Tensor | None = None
    outlier_pool: Any = None
    idx: Tensor | None = None
    threshold: float = 0.0
    is_training: bool = True
    has_fp16_weights: bool = True
    use_pool: bool = False
    has_accumulated_gradients: bool = field(default=False, repr=False)

    def reset_grads(self) -> None:
        """Forget the quantized weight, so that the next call quantizes anew."""
        self.CB = self.CBt = None
        self.SB = self.SCB = self.SBt = None

    def __getattr__(self, name: str) -> None:
        if name in _REMOVED:
            warnings.warn(
                f"{type(self).__name__}.{name} is deprecated and always None", FutureWarning, stacklevel=2
            )
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MatmulLtState):
            return NotImplemented
        return all(_equal(value, getattr(other, name)) for name, value in vars(self).items())

    __hash__ = None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else bool(a == b)


def quantize_int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 `[rows, depth]`, scale float32 `[rows]`) of a float weight.

    The weight is rounded to float16 first, as LLM.int8() defines it (so codes and scales are those
    bitsandbytes stores) - unless it does not fit: then it is used as it is, where bitsandbytes makes inf.
    """
    weight = weight.detach().contiguous()
    half = weight.to(torch.float16)
    if weight.is_cuda:  # the same choice without asking the device
        if weight.dtype != torch.float16 and weight.numel():
            half = torch.where(weight.abs().max() > _FLOAT16_MAX, weight.float(), half.float())
        codes, scale, _ = int8_vectorwise_quant(half)
        return codes, scale
    if (
        weight.dtype != torch.float16
        and weight.numel()
        and not weight.is_meta
        and weight.abs().max() > _FLOAT16_MAX
    ):
        half = weight
    codes, scale, _ = int8_vectorwise_quant(half)
    return codes, scale


class _FloatWeight(torch.autograd.Function):
    """y = x Q(W)^T + b where the float W is trained too: dW = dy^T x, straight through the rounding."""

    @staticmethod
    def forward(ctx, x, weight, codes, scale, bias, threshold, mode):
        ctx.save_for_backward(x, codes, scale)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return torch.ops.halfbyte.linear_8bit(x, codes, scale, bias, threshold, mode)

    @staticmethod
    def backward(ctx, dy):
        x, codes, scale = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        dx = dw = dbias = None
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = torch.ops.halfbyte.linear_8bit_grad_input(dy, codes, scale)
        if ctx.needs_input_grad[1]:
            dw = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight_dtype)
        if bias_dtype is not None and ctx.needs_input_grad[4]:
            dbias = rows.sum(0).to(bias_dtype)
        return dx, dw, None, None, dbias, None, None


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """y = A W^T + bias with an int8 W; differentiable in A, bias and (a float) B.

    Parameters
    ----------
    A
        `[..., depth]` float32, bfloat16 or float16; the result has its dtype and range.
    B
        The weight `[rows, depth]`. Ignored when `state` holds the codes already and `has_fp16_weights` is
        off; else it is quantized at each call (it may have been trained since); the state keeps the codes.
    out
        Written if given.
    state
        Codes, scales and settings; `is_training` chooses between LLM.int8() and the dequantized weight.
    threshold
        Above 0: replaces the state's outlier threshold.
    """
    state = MatmulLtState() if state is None else state
    if threshold > 0.0:
        state.threshold = threshold
    mode = "exact" if state.is_training else "dynamic"
    dtype = A.dtype
    A = autocast(A)
    if state.CB is None or state.SCB is None or (state.has_fp16_weights and B.is_floating_point()):
        state.reset_grads()
        state.CB, state.SCB = quantize_int8_weight(B)
    if state.has_fp16_weights and B.requires_grad and torch.is_grad_enabled():
        y = _FloatWeight.apply(A, B, state.CB, state.SCB, bias, state.threshold, mode)
    else:
        y = torch.ops.halfbyte.linear_8bit(A, state.CB, state.SCB, bias, state.threshold, mode)
    y = y.to(dtype)
    return y if out is None else out.copy_(y)


def autocast(x: Tensor) -> Tensor:
    """What the int8 product of x takes: under autocast a float32 CUDA tensor in autocast's dtype."""
    dtype = autocast_dtype(x) if x.dtype == torch.float32 else None
    return x if dtype is None else x.to(dtype)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """y = A W^T + bias with a 4-bit W; differentiable in A and bias.

    Parameters
    ----------
    A
        `[..., depth]` float32, bfloat16 or float16; the result has its dtype.
    B, quant_state
        Packed codes (any strides, so `B.t()` too) and statistics of W `[rows, depth]`. A `[depth, rows]`
        weight still works, with a DeprecationWarning, when A's depth fits only that way.
    out
        Written if given.

    Raises
    ------
    ValueError
        No quant_state, or not that of a matrix; depths that do not fit.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit: quant_state is required (the QuantState that quantize_4bit returned)")
    shape = quant_state.shape
    if len(shape) != 2:
        raise ValueError(f"matmul_4bit: the weight must be a matrix, got shape {list(shape)}")
    depth = A.shape[-1]
    if depth == shape[1]:
        y = linear_4bit(A, B, quant_state, bias)
    elif depth == shape[0]:
        warnings.warn(
            f"matmul_4bit: the weight has shape {list(shape)}, taken as [depth, rows]; this is deprecated. "
            "Re-quantize from the weight in [rows, depth] order.",
            DeprecationWarning,
            stacklevel=2,
        )
        y = torch.ops.halfbyte.linear_4bit_grad_input(
            A,
            B.data if isinstance(B, torch.nn.Parameter) else B,
            quant_state.absmax,
            quant_state.quant_type,
            quant_state.blocksize,
            shape,
            natural_compute(A.dtype),
            *nested_tensors(quant_state),
        )
        y = y if bias is None else y + bias
    else:
        raise ValueError(f"matmul_4bit: A has depth {depth}, the weight has shape {list(shape)}")
    return y if out is None else out.copy_(y)
