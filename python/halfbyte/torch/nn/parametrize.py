"""Any parameter of any module in 4 bits, by torch's parametrizations: it is dequantized when it is read.

For fused expert weights `[experts, out, in]`, which no Linear4bit can hold. Within one forward call the
dequantized tensor is kept (torch's parametrization cache), afterwards it is dropped.

In a state dict the parameter `name` is stored as Linear4bit stores its weight: `name`, `name.absmax`, ...
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from halfbyte.torch.functional import dequantize_4bit, quantize_4bit
from halfbyte.torch.quant_state import QuantState


class Bnb4bitParametrization(nn.Module):
    """Turns the packed tensor into the tensor it stands for.

    Parameters
    ----------
    quant_state
        From `quantize_4bit`.
    """

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        return dequantize_4bit(quantized_param, self.quant_state)


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize `module.<param_name>` in place. It has no gradient from then on.

    Raises
    ------
    AttributeError
        No such attribute.
    TypeError
        It is no nn.Parameter.
    """
    original = _parameter(module, param_name)
    packed, state = quantize_4bit(
        original.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    register_quantized(module, param_name, packed, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device
) -> None:
    """Tell `module.<param_name>`, which holds packed codes, what its codes mean.

    Parameters
    ----------
    qs_dict
        The statistics, as in a state dict (see `QuantState.from_dict`); changed by the call.
    device
        Where codes and statistics go.

    Raises
    ------
    AttributeError
        No such attribute.
    TypeError
        It is no nn.Parameter.
    """
    original = _parameter(module, param_name)
    state = QuantState.from_dict(qs_dict, device=device)
    register_quantized(module, param_name, original.data.to(device), state)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return parameter


def register_quantized(module: nn.Module, name: str, packed: Tensor, state: QuantState) -> None:
    """Let `module.<name>` stand for the tensor that `packed` and `state` encode; in place."""
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    # unsafe: torch would check that the parametrization keeps dtype and shape, which is not its job here.
    parametrize.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    """Cache the dequantized tensor during forward; rename the entries of the state dict."""
    register = getattr(
        module, "register_state_dict_post_hook", module._register_state_dict_hook
    )  # torch < 2.5
    register(partial(_parametrized_state_dict_post_hook, param_name=param_name))
    module.register_forward_pre_hook(_enable_parametrization_cache)
    # always_call: activation checkpointing aborts a recomputation midway, and then the cache would stay on.
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    parametrize._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    # Never below 0: with always_call this also runs when an earlier hook raised before the cache was enabled.
    parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)
    if not parametrize._cache_enabled:
        parametrize._cache = {}


def _parametrized_state_dict_post_hook(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    *,
    param_name: str = "weight",
    **kwargs: Any,
) -> None:
    inner = f"{prefix}parametrizations.{param_name}.original"
    if inner not in state_dict:
        return
    state_dict[f"{prefix}{param_name}"] = state_dict.pop(inner)
    parametrization = next(
        p for p in module.parametrizations[param_name] if isinstance(p, Bnb4bitParametrization)
    )
    for key, value in parametrization.quant_state.as_dict(packed=True).items():
        state_dict[f"{prefix}{param_name}.{key}"] = value
