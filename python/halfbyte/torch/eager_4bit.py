"""y = x W^T + b with gradient in eager mode, without the dispatcher in between.

`torch.ops.halfbyte.linear_4bit` computes the same and serves compilers and tracers; on its way to
`halfbyte._C` it passes through Python several times, 80 us in the forward and 90 us in the backward pass, as long as
the product of a small layer takes. `Linear4bit` comes here where nobody watches.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.torch.ops_4bit import linear_4bit_cuda, linear_4bit_grad_input_cuda, nested_keywords
from halfbyte.torch.quant_state import QuantState


def nested_operands(state: QuantState) -> tuple[Any, ...]:
    """The last arguments of the operators, which leave the offset where it is."""
    if not state.nested:
        return ()
    state2 = state.state2
    return state2.absmax, state2.code, state.offset, state2.blocksize


def nested_statistics(state: QuantState) -> dict[str, Any]:
    """The nested_* keyword arguments of `_C` for a state on the CPU."""
    return nested_keywords(*nested_operands(state)) if state.nested else {}


class EagerLinear4bit(torch.autograd.Function):
    """`apply(x, packed, bias, state, compute)`; gradients of x and bias, any number of times."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, state: QuantState, compute: str
    ) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state, ctx.compute = state, compute
        ctx.bias_dtype = None if bias is None else bias.dtype
        layout = state.quant_type, state.blocksize, state.shape, bias, compute
        if x.is_cuda:
            return linear_4bit_cuda(x, packed, state.absmax, *layout, *nested_operands(state))
        return _C.linear_4bit(x, packed, state.absmax, *layout, **nested_statistics(state))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        (packed,) = ctx.saved_tensors
        state = ctx.state
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            layout = state.quant_type, state.blocksize, state.shape, ctx.compute
            if torch.is_grad_enabled():  # somebody wants the gradient of the gradient
                dx = torch.ops.halfbyte.linear_4bit_grad_input(
                    dy, packed.detach().as_subclass(Tensor), state.absmax, *layout, *nested_operands(state)
                )
            elif dy.is_cuda:
                dx = linear_4bit_grad_input_cuda(dy, packed, state.absmax, *layout, *nested_operands(state))
            else:
                dx = _C.linear_4bit_grad_input(dy, packed, state.absmax, *layout, **nested_statistics(state))
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            dbias = dy.sum_to_size(dy.shape[-1]).to(ctx.bias_dtype)
        return dx, None, dbias, None, None
