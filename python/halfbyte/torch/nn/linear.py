"""`Linear`: torch's linear layer, unquantized, whose few rows on the CPU are multiplied by `_C.linear_dense`.

What a quantized model leaves dense, above all the head, is read once for every token. torch's products of one or a
few rows read memory at a third to a half of its speed; ours at the speed that it has. Everything else is
torch's: parameters, state dict, pickling, and every call that our product was not measured to be faster for or that
somebody watches (gradients, compilers, tracers, autocast, modes, transforms).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from halfbyte import _C
from halfbyte.torch.nn.plain import are_plain

__all__ = ["Linear", "use_dense_kernels"]

# Rows of x that are worth it, on the instruction set in use; no entry: none.
_ROWS = {
    getattr(torch, name): rows
    for name in ("float32", "bfloat16", "float16")
    if (rows := _C.linear_dense_rows(name)) > 0
}


class Linear(nn.Linear):
    """`torch.nn.Linear` with a faster forward pass for few rows on the CPU.

    y = x W^T + b, summed in float32, rounded once to x's dtype (`csrc/core/kernels_dense.h` has the bound). Up to
    `_C.linear_dense_rows(dtype)` rows of a float32, bfloat16 or float16 x of the weight's dtype, with no gradient to
    record, go to halfbyte; all other calls, and all errors, are `torch.nn.functional.linear`'s.

    Parameters, attributes and shapes are those of `torch.nn.Linear`. `use_dense_kernels` makes layers of a model such.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            result = self._few_rows(input)
            if result is not None:
                return result
        return F.linear(input, self.weight, self.bias)

    @torch.jit.unused
    def _few_rows(self, x: Tensor) -> Tensor | None:
        """The product, or None where torch has to form it."""
        if is_compiling():
            return None
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if type(weight) is not nn.Parameter or weight.dtype not in _ROWS:
            return None
        if not (are_plain(x, weight) if bias is None else are_plain(x, weight, bias)):
            return None
        return _C.linear_dense_few(x, weight, bias)


def use_dense_kernels(model: nn.Module, enabled: bool = True) -> int:
    """Let the unquantized linear layers of a model multiply few rows with halfbyte's kernels, in place.

    For a model that was quantized with `BitsAndBytesConfig`, or not at all: one that `HalfbyteConfig` or
    `halfbyte.load` has made is changed already. Only modules whose type is exactly `torch.nn.Linear` become
    `halfbyte.torch.nn.Linear`; their parameters stay the same objects, so tied weights stay tied.

    Parameters
    ----------
    model : torch.nn.Module
        Any module; itself included.
    enabled : bool
        False turns exactly those layers back into `torch.nn.Linear`.

    Returns
    -------
    int
        How many modules were changed.
    """
    old, new = (nn.Linear, Linear) if enabled else (Linear, nn.Linear)
    count = 0
    for module in model.modules():
        if type(module) is old and "forward" not in module.__dict__:  # as a hook of accelerate leaves it
            module.__class__ = new
            count += 1
    return count
