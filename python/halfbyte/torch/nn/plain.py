"""Which calls our kernels may answer in place of torch: those with plain tensors that nobody watches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_autocast_enabled = torch.is_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled
_strided = torch.strided
_tracing_state = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack


def runs_eagerly(x: Tensor) -> bool:
    """Whether x is a plain CPU or CUDA tensor and nobody watches: no compiler, tracer, dispatch mode, transform of
    `torch.func` or forward differentiation, whose tensors are plain ones by their type."""
    return (
        not is_compiling()
        and type(x) is Tensor
        and (x.is_cpu or x.is_cuda)
        and not _dispatch_modes()
        and _tracing_state() is None
        and _transforms() is None
        and forward_ad._current_level < 0
    )


def are_plain(x: Any, *others: Any) -> bool:
    """Whether x, which runs eagerly, and others, tensors or parameters, are strided ones of one dtype of DTYPES on the
    CPU, with no gradient to record, no function mode and no autocast."""
    if not runs_eagerly(x):
        return False
    dtype = x.dtype
    if dtype not in DTYPES or _function_modes() or _is_autocast_enabled("cpu"):
        return False
    grad = _is_grad_enabled()
    for y in (x, *others):
        if (
            (type(y) is not Tensor and type(y) is not Parameter)
            or not y.is_cpu
            or y.dtype is not dtype
            or y.layout is not _strided
            or y.is_nested
            or (grad and y.requires_grad)
        ):
            return False
    return True


def have_rows(*tensors: Tensor) -> bool:
    """Whether each has a last dimension, whose elements are neighbours in memory."""
    for x in tensors:  # noqa: SIM110 (all() of a generator takes twice as long)
        if x.dim() == 0 or (x.stride(-1) != 1 and x.shape[-1] != 1):
            return False
    return True
