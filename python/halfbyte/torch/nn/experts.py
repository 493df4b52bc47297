"""Fused experts of a mixture, `[experts, out, in]` in one parameter, in 4 or 8 bits.

transformers 5 keeps the experts of a layer in two such parameters (`gate_up_proj` and `down_proj`), which is why a
quantizer that knows only linear layers leaves most of the model as it is. `quantized_experts(module)` turns a module
with that interface (`transformers.integrations.moe.use_experts_implementation`) into one whose products read the
codes directly: tokens are sorted by expert, each expert that has tokens multiplies once, and no weight is ever
held dequantized. It traces as one graph (the loop over the experts is inside an operator) and carries gradients
to the tokens and the routing weights.

In a state dict a 4-bit parameter `name` is stored as `Linear4bit` stores its weight (`name`, `name.absmax`, ...),
an int8 one as `name` and `name.SCB` `[experts, rows]`.
"""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.torch._library import autocast_dtype
from halfbyte.torch.functional import nested_tensors
from halfbyte.torch.matmul import quantize_int8_weight
from halfbyte.torch.nn.int8params import Int8Params
from halfbyte.torch.nn.params4bit import Params4bit
from halfbyte.torch.ops_4bit import natural_compute

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


def has_experts_interface(module: nn.Module) -> bool:
    """Whether the module is one of transformers' fused experts, whose products can be taken over."""
    return all(hasattr(module, name) for name in _INTERFACE)


def int8_experts(weight: Tensor) -> Int8Params:
    """A stack `[experts, out, in]` of float weights in row-wise int8; its SCB is `[experts, out]`."""
    codes, scale = quantize_int8_weight(weight.reshape(-1, weight.shape[-1]))
    codes = codes.view(weight.shape)
    return Int8Params(codes, requires_grad=False, CB=codes, SCB=scale.view(weight.shape[:-1]))


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Params4bit | Int8Params,
    transposed: bool = False,
    compute: str = "float32",
    threshold: float = 0.0,
    mode: str = "dynamic",
) -> Tensor:
    """Rows of x, sorted by expert, times the weight of their expert; see `halfbyte.torch.ops_grouped`.

    Parameters
    ----------
    x
        `[rows, depth]` float32, bfloat16 or float16.
    offsets
        `[experts]` integers: the end of each expert's rows.
    weight
        A quantized stack of matrices.
    transposed
        Whether the stack is `[experts, depth, out]` instead of `[experts, out, depth]`.
    compute
        4 bits: "float32" or "bfloat16", as for `linear_4bit`.
    threshold, mode
        int8: as for `Linear8bitLt`; a transposed stack is always multiplied exactly.

    Returns
    -------
    Tensor
        `[rows, out]` of x's dtype; rows beyond the last offset are 0.
    """
    data = weight if torch.compiler.is_compiling() else weight.data
    if isinstance(weight, Int8Params):
        return torch.ops.halfbyte.grouped_linear_8bit(
            x, offsets, data, weight.SCB, transposed, threshold, mode
        )
    state = weight.quant_state
    return torch.ops.halfbyte.grouped_linear_4bit(
        x,
        offsets,
        data,
        state.absmax,
        state.quant_type,
        state.blocksize,
        state.shape,
        transposed,
        compute,
        *nested_tensors(state),
    )


class QuantizedExperts(nn.Module):
    """What `quantized_experts` puts before the module's own class.

    Attributes
    ----------
    quantized_names : tuple of str
        The parameters that are, or are about to be, quantized.
    compute_dtype, threshold
        As for `Linear4bit` and `Linear8bitLt`.
    """

    quantized_names: tuple[str, ...] = ()
    compute_dtype: torch.dtype | None = None
    threshold: float = 0.0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over a token's experts of weight times expert(token).

        Parameters
        ----------
        hidden_states
            `[tokens, hidden]`
        top_k_index, top_k_weights
            `[tokens, k]`; an index that is no expert stands for none.
        """
        tokens, k = top_k_index.shape
        experts = self._parameters[self.quantized_names[0]]
        n = (experts.quant_state.shape if isinstance(experts, Params4bit) else experts.shape)[0]
        chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
        offsets = torch.searchsorted(chosen, torch.arange(1, n + 1, device=chosen.device, dtype=chosen.dtype))
        inside = chosen.clamp(max=n - 1)
        x = hidden_states[order // k]
        x = self._product("gate_up_proj" if self.has_gate else "up_proj", x, offsets, inside)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = self._product("down_proj", x, offsets, inside)
        if getattr(self, "has_post_expert_norm", False):
            x = self.post_expert_norm(x)
        weights = torch.where(chosen < n, top_k_weights.reshape(-1)[order], 0)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=order.device))
        return (x * weights.unsqueeze(-1))[back].view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, offsets: Tensor, experts: Tensor) -> Tensor:
        y = grouped_linear(
            x,
            offsets,
            self._parameters[name],
            self.is_transposed,
            self._compute(x),
            self.threshold,
            "exact" if self.training else "dynamic",
        )
        return y + getattr(self, f"{name}_bias")[experts].to(y.dtype) if self.has_bias else y

    def _compute(self, x: Tensor) -> str:
        """As Linear4bit has it; CUDA has kernels of its own for float16."""
        dtype = x.dtype if self.compute_dtype is None and x.is_cuda else self.compute_dtype
        if x.is_cuda and dtype == torch.float32:
            dtype = autocast_dtype(x) or dtype
        return natural_compute(dtype) if x.is_cuda or dtype == torch.bfloat16 else "float32"

    def _quantized(self) -> list[tuple[str, Params4bit | Int8Params]]:
        found = ((name, self._parameters.get(name)) for name in self.quantized_names)
        return [(name, p) for name, p in found if _is_quantized(p)]

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedExperts":
        super()._apply(fn, recurse)
        for _, parameter in self._quantized():
            parameter.follow()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self._quantized():
            for key, value in statistics(parameter).items():
                destination[f"{prefix}{name}.{key}"] = value if keep_vars else value.detach()

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
        own = {}
        for name in self.quantized_names:
            start = f"{prefix}{name}"
            entries = {k: v for k, v in state_dict.items() if k == start or k.startswith(f"{start}.")}
            if len(entries) > 1:
                own[name] = entries
        taken = {key for entries in own.values() for key in entries}
        rest = {key: value for key, value in state_dict.items() if key not in taken}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, entries in own.items():
            start = f"{prefix}{name}"
            if start in missing_keys:
                missing_keys.remove(start)
            old = self._parameters[name]
            stack = {
                key.removeprefix(start).lstrip("."): value.detach().clone() for key, value in entries.items()
            }
            new = from_statistics(stack.pop(""), stack, None if old.is_meta else old.device)
            self._parameters[name] = new

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _empty, (type(self).__mro__[2],), self.__dict__

    def __deepcopy__(self, memo: dict) -> "QuantizedExperts":
        new = _empty(type(self).__mro__[2])
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _is_quantized(parameter: Any) -> bool:
    if isinstance(parameter, Params4bit):
        return parameter.quant_state is not None
    return isinstance(parameter, Int8Params) and parameter.SCB is not None


def statistics(parameter: Params4bit | Int8Params) -> dict[str, Tensor]:
    """What belongs to the codes in a state dict, without the parameter's name."""
    if isinstance(parameter, Int8Params):
        return {"SCB": parameter.SCB}
    return parameter.quant_state.as_dict(packed=True)


def from_statistics(
    codes: Tensor, entries: dict[str, Tensor], device: torch.device | None = None
) -> Params4bit | Int8Params:
    """The inverse: a parameter from its codes and `statistics`."""
    device = codes.device if device is None else device
    if "SCB" in entries:
        codes = codes.to(device)
        return Int8Params(codes, requires_grad=False, CB=codes, SCB=entries["SCB"].to(device))
    return Params4bit.from_prequantized(codes, entries, device=device)


@cache
def _class_of(base: type[nn.Module]) -> type[QuantizedExperts]:
    return type(f"Quantized{base.__name__}", (QuantizedExperts, base), {})


def _empty(base: type[nn.Module]) -> QuantizedExperts:
    cls = _class_of(base)
    return cls.__new__(cls)


def quantized_experts(
    module: nn.Module,
    names: tuple[str, ...],
    compute_dtype: torch.dtype | None = None,
    threshold: float = 0.0,
) -> nn.Module:
    """Make `module`, one of transformers' fused experts, multiply by quantized parameters; in place.

    The parameters may be replaced by quantized ones (`Params4bit` with a 3-d quant_state, `int8_experts`) before or
    after; all of `names` must be by the first call.
    """
    base = type(module)
    if not issubclass(base, QuantizedExperts):
        module.__class__ = _class_of(base)
    module.quantized_names = tuple(names)
    module.compute_dtype = compute_dtype
    module.threshold = threshold
    return module


def dense_experts(module: QuantizedExperts, dtype: torch.dtype | None = None) -> nn.Module:
    """Undo `quantized_experts`: parameters dequantized (to the dtype they had, or `dtype`), class restored."""
    from halfbyte.torch.functional import dequantize_4bit, int8_vectorwise_dequant

    for name, parameter in module._quantized():
        if isinstance(parameter, Int8Params):
            rows = parameter.data.reshape(-1, parameter.shape[-1])
            weight = int8_vectorwise_dequant(rows, parameter.SCB.reshape(-1)).view(parameter.shape)
        else:
            weight = dequantize_4bit(parameter.data, parameter.quant_state)
        module._parameters[name] = nn.Parameter(weight if dtype is None else weight.to(dtype))
    module.__class__ = type(module).__mro__[2]
    for attribute in ("quantized_names", "compute_dtype", "threshold"):
        module.__dict__.pop(attribute, None)
    return module


__all__ = [
    "QuantizedExperts",
    "dense_experts",
    "from_statistics",
    "grouped_linear",
    "has_experts_interface",
    "int8_experts",
    "quantized_experts",
    "statistics",
]
