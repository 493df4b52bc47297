"""`Linear4bit`: a linear layer with a 4-bit weight.

Where a call goes. In eager mode, with a plain CPU or CUDA tensor and no gradient to record, `forward` hands the
tensors straight to `halfbyte._C`, a few microseconds for a small layer. Every call reads the weight, its
statistics and the bias anew (zero-copy views), so nothing can be stale after `load_state_dict`, `.to`,
a replaced parameter or an in-place update. With a gradient to record it does so through one autograd
function (`eager_4bit`). Everything else - torch.compile, fake tensors, dispatch modes - goes through
`torch.ops.halfbyte.linear_4bit`.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from halfbyte import _C
from halfbyte.torch._library import autocast_dtype
from halfbyte.torch.eager_4bit import EagerLinear4bit, nested_operands
from halfbyte.torch.functional import linear_4bit
from halfbyte.torch.nn.params4bit import Params4bit, repair_quant_state
from halfbyte.torch.nn.plain import runs_eagerly
from halfbyte.torch.nn.saving import Saves4bit
from halfbyte.torch.ops_4bit import linear_4bit_cuda, natural_compute
from halfbyte.torch.quant_state import QuantState

logger = logging.getLogger(__name__)


def refuse_tangent(layer: str, x: Tensor) -> None:
    """The operators have no forward derivative, and torch would go on as if it were zero."""
    if (
        not is_compiling()
        and forward_ad._current_level >= 0
        and forward_ad.unpack_dual(x).tangent is not None
    ):
        raise NotImplementedError(
            f"{layer}: x, expected no tangent (forward differentiation is not there), got one"
        )


def cast_bias(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """The bias in x's dtype. The parameter itself is changed, as callers of bitsandbytes expect."""
    if bias is None or bias.dtype == x.dtype:
        return bias
    if is_compiling():  # which cannot trace the change of a parameter's dtype
        return bias.to(x.dtype)
    bias.data = bias.data.to(x.dtype)
    return bias


def _requires_grad(x: Tensor, bias: Tensor | None) -> bool:
    return x.requires_grad or (bias is not None and bias.requires_grad)


class Linear4bit(Saves4bit, nn.Linear):
    """y = x W^T + b with W in 4 bits. The weight is quantized when the layer is moved to its device.

    Parameters
    ----------
    input_features, output_features
        depth and rows of W.
    bias
        Whether there is one. It is kept in the dtype of the last input (as bitsandbytes does).
    compute_dtype
        How products are formed: float32, and float16, in float32; bfloat16: x and codebook are rounded to
        bfloat16 first; sums are float32 in any case. None: taken from the first float32 or bfloat16 input.
    compress_statistics
        Double quantization of the scales.
    quant_type
        "nf4" or "fp4".
    quant_storage
        dtype the packed bytes are kept in.
    device
        Where the float weight is made; "meta" for none yet.
    arithmetic
        Not in bitsandbytes. "int16" or "int8": the forward product rounds x and the codebook to integers, as
        `functional.linear_4bit` says of `compute`; on the CPU only (ValueError on CUDA). None: `compute_dtype` decides.

    Shape
    -----
    x `[..., input_features]` float32, bfloat16 or float16 -> `[..., output_features]` of x's dtype.
    """

    arithmetic: str | None = None  # also of layers that older versions pickled

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        *,
        arithmetic: str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        if arithmetic not in (None, "int16", "int8"):
            raise ValueError(f"Linear4bit: arithmetic, expected 'int16', 'int8' or None, got {arithmetic!r}")
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage
        self.arithmetic = arithmetic

    def set_compute_type(self, x: Tensor) -> None:
        """Adopt x's dtype as compute dtype where that is fast and safe; warn where the setting is slow."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        elif x.dtype == torch.float16:
            # float16 may overflow between layers, so an explicit float32 or bfloat16 is the user's to choose.
            slow = (
                "Input type into Linear4bit is torch.float16, but bnb_4bit_compute_dtype=torch.float32 "
                "(default). This will lead to slow inference"
            )
            if self.compute_dtype in (None, torch.float32):
                logger.warning(slow + ("." if x.numel() == x.shape[-1] else " or training speed."))

    def _compute(self, x: Tensor) -> str:
        if self.arithmetic is not None:
            return self.arithmetic
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        if self.compute_dtype == torch.bfloat16:
            return "bfloat16"
        if x.is_cuda:
            return self._compute_on_cuda(x)
        return "float32"

    def _compute_on_cuda(self, x: Tensor) -> str:
        """As bitsandbytes does there: no compute dtype means x's, and autocast multiplies in its own dtype."""
        dtype = x.dtype if self.compute_dtype is None else self.compute_dtype
        if dtype == torch.float32:
            dtype = autocast_dtype(x) or dtype
        return natural_compute(dtype)

    def forward(self, x: Tensor) -> Tensor:
        parameters = self._parameters
        weight = parameters.get("weight")
        bias = parameters.get("bias")
        if runs_eagerly(x) and type(weight) is Params4bit and (state := weight.quant_state) is not None:
            if bias is not None and bias.dtype != x.dtype:
                cast_bias(bias, x)
            compute = self._compute(x)
            if torch.is_grad_enabled() and _requires_grad(x, bias):
                return EagerLinear4bit.apply(x, weight, bias, state, compute)
            if x.is_cuda:
                layout = state.quant_type, state.blocksize, state.shape, bias, compute
                return linear_4bit_cuda(x, weight, state.absmax, *layout, *nested_operands(state))
            # Both calls are written out: to unpack arguments costs as much as to check them.
            if not state.nested:
                return _C.linear_4bit(
                    x, weight, state.absmax, state.quant_type, state.blocksize, state.shape, bias, compute
                )
            outer = state.state2
            return _C.linear_4bit(
                x, weight, state.absmax, state.quant_type, state.blocksize, state.shape, bias, compute,
                nested_absmax=outer.absmax, nested_map=outer.code,
                nested_offset=0.0 if state.offset is None else state.offset,
                nested_blocksize=outer.blocksize,
            )  # fmt: skip
        refuse_tangent("Linear4bit", x)
        state = repair_quant_state(self)
        bias = cast_bias(self.bias, x)
        return linear_4bit(x, self.weight, state, bias, self._compute(x))

    def _apply(self, fn: Any, recurse: bool = True) -> "Linear4bit":
        super()._apply(fn, recurse)
        weight = self._parameters.get("weight")
        if isinstance(weight, Params4bit) and weight.quant_state is not None:
            weight.follow()
            self.quant_state = weight.quant_state
        return self

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


class LinearNF4(Linear4bit):
    """`Linear4bit` with NF4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        *,
        arithmetic: str | None = None,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "nf4",
            quant_storage,
            device,
            arithmetic=arithmetic,
        )


class LinearFP4(Linear4bit):
    """`Linear4bit` with FP4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        *,
        arithmetic: str | None = None,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "fp4",
            quant_storage,
            device,
            arithmetic=arithmetic,
        )


_LAYERS = (Linear4bit, LinearNF4, LinearFP4)
_GLOBAL_HOOKS = tuple(
    getattr(nn.modules.module, f"_global_{name}_hooks")
    for name in ("forward", "forward_pre", "backward", "backward_pre")
)


def operands(x: Tensor, *layers: Any) -> tuple[str, list[tuple]] | None:
    """How to multiply and, of each layer, the arguments of `_C.mlp_4bit` and its like; None: call the layers.

    x is a plain tensor of the CPU that nobody watches (`are_plain`). Not None where a call of each layer with x's dtype
    would form a product, all in one way, and nothing else: no subclasses, hooks, adapters, gradients. That the weights
    lie on the CPU, too, is checked in C: a tensor subclass takes 1.4 us to answer.
    """
    if any(_GLOBAL_HOOKS):
        return None
    compute, found = "", []
    for layer in layers:
        if type(layer) not in _LAYERS:
            return None
        own = layer.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
            or own.get("_compiled_call_impl") is not None
        ):
            return None
        parameters = own["_parameters"]
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if type(weight) is not Params4bit or (state := weight.quant_state) is None:
            return None
        if bias is not None and (
            bias.dtype is not x.dtype or (torch.is_grad_enabled() and bias.requires_grad)
        ):
            return None
        way = layer._compute(x)
        if compute and way != compute:
            return None
        compute = way
        plain = (weight, state.absmax, state.quant_type, state.blocksize, state.shape, bias)
        if state.nested:
            outer, offset = state.state2, state.offset
            plain += (outer.absmax, outer.code, 0.0 if offset is None else offset, outer.blocksize)
        found.append(plain)
    return compute, found
