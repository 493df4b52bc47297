"""`Linear8bitLt`: a linear layer with a row-wise int8 weight, LLM.int8().

    y = (x_int8 W_int8^T) * scale_x * scale_w / 127^2 + x_outlier W_outlier^T + b

x is quantized row by row; columns with any |x| >= threshold are multiplied in float32 instead. Sums are exact
int32, the rest is float32, rounded once to x's dtype: nothing passes through float16.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import _C
from halfbyte.torch.matmul import MatmulLtState, autocast, matmul
from halfbyte.torch.nn.int8params import Int8Params
from halfbyte.torch.nn.linear4bit import cast_bias, refuse_tangent
from halfbyte.torch.nn.plain import runs_eagerly
from halfbyte.torch.ops_8bit import linear_8bit_cuda

# How old files named the layout of the codes; only row-major is still written, or read.
WEIGHT_FORMATS = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}


class Linear8bitLt(nn.Linear):
    """y = x W^T + b with W in int8. The weight is quantized when the layer is moved to its device.

    Parameters
    ----------
    input_features, output_features
        depth and rows of W.
    bias
        Whether there is one. It is kept in the dtype of the last input (as bitsandbytes does).
    has_fp16_weights
        Keep the float weight, train it, and quantize it at each training call.
    threshold
        Outlier threshold on |x|; 0: no outliers.
    index
        Kept as an attribute for callers that read it.
    device
        Where the float weight is made; "meta" for none yet.

    Shape
    -----
    x `[..., input_features]` float32, bfloat16 or float16 -> `[..., output_features]` of x's dtype.
    In training mode x is multiplied by the dequantized weight instead.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0.0 and not has_fp16_weights
        self.index = index
        self.weight = Int8Params(
            self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights
        )
        self._register_load_state_dict_pre_hook(maybe_rearrange_weight)

    def __setstate__(self, state: dict) -> None:
        # A pickle made by bitsandbytes holds its parameter as an nn.Parameter with the attributes of Int8Params.
        super().__setstate__(state)
        weight = self._parameters.get("weight")
        if type(weight) is nn.Parameter and "SCB" in weight.__dict__:
            self.weight = Int8Params(weight.data, weight.requires_grad, **weight.__dict__)

    def init_8bit_state(self) -> None:
        """Take codes and scales over from the parameter."""
        self.state.CB = self.weight.CB
        if self.weight.SCB is not None:
            self.state.SCB = self.weight.SCB
        self.weight.CB = None
        self.weight.SCB = None

    def forward(self, x: Tensor) -> Tensor:
        state = self.state
        weight = self.weight
        state.is_training = self.training
        if getattr(weight, "CB", None) is not None:
            self.init_8bit_state()
        bias = cast_bias(self.bias, x)
        if state.has_fp16_weights:
            return matmul(x, weight, state=state, bias=bias)
        codes = weight if weight.dtype == torch.int8 else state.CB
        if codes is None or state.SCB is None:
            raise RuntimeError(
                f"{type(self).__name__}: the weight is not quantized yet; move the layer to its device "
                "first, e.g. layer.to('cpu') or layer.cuda()"
            )
        mode = "exact" if state.is_training else "dynamic"
        wants_grad = torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        )
        if not wants_grad and runs_eagerly(x):
            if not x.is_cuda:
                return _C.linear_8bit(x, codes, state.SCB, bias, state.threshold, mode)
            y = linear_8bit_cuda(autocast(x), codes.data, state.SCB, bias, state.threshold, mode)
            return y.to(x.dtype)
        refuse_tangent("Linear8bitLt", x)
        y = torch.ops.halfbyte.linear_8bit(autocast(x), codes, state.SCB, bias, state.threshold, mode)
        return y.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "Linear8bitLt":
        # bitsandbytes moves the state only when `.to` is called on the layer itself, not on its parent.
        super()._apply(fn, recurse)
        weight, state = self._parameters.get("weight"), self.state
        if isinstance(weight, Int8Params):
            weight.follow()
        if weight is not None and state.CB is not None:
            state.CB = weight.data if weight.dtype == torch.int8 else state.CB.to(weight.device)
            state.SCB = None if state.SCB is None else state.SCB.to(weight.device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scale = self._scale()
        if scale is not None and not self.state.has_fp16_weights:
            destination[f"{prefix}SCB"] = scale if keep_vars else scale.detach()
            destination[f"{prefix}weight_format"] = torch.tensor(WEIGHT_FORMATS["row"], dtype=torch.uint8)

    def _scale(self) -> Tensor | None:
        """The scales: in the parameter until the first call, in the state afterwards."""
        scale = getattr(self.weight, "SCB", None)
        return self.state.SCB if scale is None else scale

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list,
        unexpected_keys: list,
        error_msgs: list,
    ) -> None:
        key = f"{prefix}SCB"
        scale = self._scale()
        if key in state_dict and scale is None:
            raise RuntimeError(
                "Loading a quantized checkpoint into non-quantized Linear8bitLt is not supported. "
                "Please call module.cuda() before module.load_state_dict()"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in state_dict:
            with torch.no_grad():
                scale.copy_(state_dict[key])
            if key in unexpected_keys:
                unexpected_keys.remove(key)


def maybe_rearrange_weight(
    state_dict: dict,
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list,
    unexpected_keys: list,
    error_msgs: list,
) -> None:
    """Load hook: take the entry `weight_format` out, and accept only row-major codes.

    Raises
    ------
    ValueError
        The codes are in the layout of an old GPU kernel.
    """
    if f"{prefix}weight" not in state_dict:
        return
    found = state_dict.pop(f"{prefix}weight_format", WEIGHT_FORMATS["row"])
    found = found.item() if isinstance(found, Tensor) else found
    name = next((name for name, number in WEIGHT_FORMATS.items() if found in (name, number)), None)
    if name != "row":
        raise ValueError(
            f"{prefix}weight_format: only row-major int8 weights can be loaded, got {name or found!r}"
        )
