"""The steps by which a tensor of a checkpoint becomes a parameter, as transformers' loader wants them.

`hf_quantizer` is the `HalfbyteQuantizer` that does the work.
"""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

__all__ = ["Deserialize", "Quantize"]


class _Operation(ConversionOps):
    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict) -> _Operation:  # transformers makes a copy for each tensor
        return type(self)(self.hf_quantizer)


class Quantize(_Operation):
    """The last step for a tensor of a dense checkpoint."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        result = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if self.hf_quantizer.param_needs_quantization(model, name):
                value = self.hf_quantizer.quantize(get_module_from_name(model, name)[0], value)
            result[name] = value
        return result


class Deserialize(_Operation):
    """The only step for the tensors of a quantized checkpoint that make one parameter."""

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        module, parameter = get_module_from_name(model, full_layer_name)
        tensors = {
            key.strip("$").removeprefix(parameter).lstrip("."): value[0] if isinstance(value, list) else value
            for key, value in input_dict.items()
        }
        if not self.hf_quantizer.param_needs_quantization(model, full_layer_name):
            return {full_layer_name: tensors[""]}  # a dense parameter that has the name of a quantized one
        return {full_layer_name: self.hf_quantizer.deserialize(module, full_layer_name, tensors)}
