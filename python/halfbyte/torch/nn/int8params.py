"""`Int8Params`: a parameter that is quantized to row-wise int8 when it reaches a device.

W[r, k] = CB[r, k] * SCB[r] / 127. A float weight is quantized by `.to(device)`, `.cuda()`, `.cpu()` (also
when it is on that device already), unless `has_fp16_weights` asks to keep it. Afterwards `data` and `CB`
are the same int8 tensor and `SCB` the float32 scales, until the layer takes both over at its first call.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from halfbyte.torch.matmul import quantize_int8_weight
from halfbyte.torch.nn.params4bit import device_argument


class Int8Params(torch.nn.Parameter):
    """A weight in int8.

    Parameters
    ----------
    data
        The float weight, or int8 codes `[rows, depth]`.
    requires_grad
        int8 codes have no gradient; True only makes sense with `has_fp16_weights`.
    has_fp16_weights
        Keep the weight in float; the layer quantizes it at each training call.
    CB, SCB
        Codes and float32 scales `[rows]` of a quantized weight.
    **kwargs
        Ignored: marks that other libraries leave in a parameter's `__dict__`.
    """

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> "Int8Params":
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.CB = CB
        self.SCB = SCB
        self.has_fp16_weights = has_fp16_weights
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # everything happens in __new__; object.__init__ would refuse the arguments

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.requires_grad = False
        requires_grad = state.pop("requires_grad")
        self.data = state.pop("data")
        self.requires_grad = requires_grad
        self.__dict__.update(state)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _empty, (type(self),), self.__getstate__()

    def __deepcopy__(self, memo: dict) -> "Int8Params":
        new = _empty(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def _quantize(self, device: torch.device | str | int) -> "Int8Params":
        """Bring the float data to `device` and replace them by their codes."""
        codes, scale = quantize_int8_weight(self.data.to(device))
        self.requires_grad = False  # codes have none, and torch refuses it for int8
        self.data = codes
        self.CB = codes
        self.SCB = scale
        return self

    def to(self, *args: Any, **kwargs: Any) -> "Int8Params":
        """Move; a float weight that reaches a device other than meta is quantized (see `has_fp16_weights`).

        A dtype argument is ignored for int8 codes.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        quantized = self.dtype == torch.int8
        if not quantized and not self.has_fp16_weights and device is not None and device.type != "meta":
            return self._quantize(device)
        data = self.data.to(device=device, dtype=None if quantized else dtype, non_blocking=non_blocking)
        new = type(self)(data, self.requires_grad, has_fp16_weights=self.has_fp16_weights)
        if quantized:
            new.CB = new.data
            if self.SCB is not None:
                # A scale that is still on meta is nowhere yet: there is nothing to move.
                new.SCB = self.SCB if device is None or self.SCB.is_meta else self.SCB.to(device)
        return new

    def follow(self) -> None:
        """Bring CB and SCB to the data; for modules, after their parameters were moved."""
        if self.CB is not None:
            self.CB = self.data
        if self.SCB is not None and self.SCB.device != self.device:
            self.SCB = self.SCB.to(self.device)

    def cpu(self) -> "Int8Params":
        return self.to("cpu")

    def cuda(
        self, device: int | torch.device | str | None = None, non_blocking: bool = False
    ) -> "Int8Params":
        return self.to(device_argument("cuda", device), non_blocking=non_blocking)

    def xpu(self, device: int | torch.device | str | None = None, non_blocking: bool = False) -> "Int8Params":
        return self.to(device_argument("xpu", device), non_blocking=non_blocking)


def _empty(cls: type[Int8Params]) -> Int8Params:
    return cls.__new__(cls)
