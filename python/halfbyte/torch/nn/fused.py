"""Faster forward passes, in eager mode on the CPU, for what lies between a model's linear layers.

torch carries out a norm in eight operations. Each takes some microseconds, whatever it computes, and those of one token
add up to more than the products of a small model. `use_fused_kernels` lets modules do such work in one call of `_C`.

How a module is recognised. Not by its name: by what it computes. A copy of the module, with numbers of ours in the
place of its parameters, runs its own forward pass on inputs whose result does not depend on the order of a sum; only
if that gives the bits that ours gives, in all three dtypes, the module is changed. A norm that multiplies by 1 + w,
rounds elsewhere or divides by something else stays as it is, whatever its name.

How it is changed. Its class becomes a subclass of its own class: parameters, attributes, hooks, state dict and
isinstance stay. Whatever our kernels do not do (gradients to record, other devices and dtypes, compilers, tracers,
autocast, modes, transforms) the original forward pass does. A changed module pickles and copies as what it is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from halfbyte import _C
from halfbyte.torch.nn.fused_attention import attention_forward
from halfbyte.torch.nn.fused_projections import project_and_attend, projects_and_attends
from halfbyte.torch.nn.linear4bit import operands
from halfbyte.torch.nn.plain import DTYPES, are_plain

__all__ = ["FusedAttention", "FusedMLP", "FusedNorm", "use_fused_kernels"]

# Rows up to which an MLP's products are one call: what lies between them stays in the caches.
FEW_ROWS = 16

_tracing_state = torch._C._get_tracing_state


class _Fused(nn.Module):
    """What `_class_of` puts before a module's own class."""

    fused_base: type[nn.Module]
    projects: bool  # attention: `project_and_attend` does what the original does

    def __reduce_ex__(self, protocol: int) -> tuple:
        cls = type(self)
        return _empty, (cls.__mro__[1], cls.fused_base, cls.projects), self.__dict__


@cache
def _class_of(mixin: type[_Fused], base: type[nn.Module], projects: bool = False) -> type[_Fused]:
    members = {"fused_base": base, "projects": projects, "__doc__": base.__doc__}
    return type(f"Fused{base.__name__}", (mixin, base), members)


def _empty(mixin: type[_Fused], base: type[nn.Module], projects: bool = False) -> nn.Module:
    cls = _class_of(mixin, base, projects)
    return cls.__new__(cls)


class FusedNorm(_Fused):
    """Root mean square norms: y = weight * round(x / sqrt(mean(x^2) + eps)), as `LlamaRMSNorm` rounds.

    The mean is summed in float64, torch sums it in float32; beyond that the results are the same bits.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs:
            result = self._fused(args[0])
            if result is not None:
                return result
        return super().forward(*args, **kwargs)

    def _fused(self, x: Tensor) -> Tensor | None:
        weight = self._parameters.get("weight")
        if (
            not are_plain(x, weight)
            or weight.dim() != 1
            or x.shape[-1:] != weight.shape
            or not (x.is_contiguous() and weight.is_contiguous())
        ):
            return None
        return _C.rms_norm(x, weight, _eps(self))


class FusedAttention(_Fused):
    """Attention of transformers, of one token with functions of ours (`fused_attention`, `fused_projections`)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or _tracing_state() is not None:
            return super().forward(*args, **kwargs)
        if self.projects and not args:
            result = project_and_attend(self, kwargs)
            if result is not None:
                return result
        return attention_forward(self.fused_base)(self, *args, **kwargs)


class FusedMLP(_Fused):
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)) with activation and product in one call.

    Few rows and three layers of 4 bits are one call altogether, with the same result to the bit. Otherwise the
    projections are called as modules, with whatever hooks or adapters they have.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        modules = self._modules
        activation = modules.get("act_fn")
        name = None
        if len(args) == 1 and not kwargs and not is_compiling() and activation is not None:
            name = _activation(type(activation))
        if name is None or activation._forward_hooks or activation._forward_pre_hooks:
            return super().forward(*args, **kwargs)
        result = _few_rows(args[0], modules, name)
        if result is not None:
            return result
        gate, up = modules["gate_proj"](args[0]), modules["up_proj"](args[0])
        if (
            are_plain(gate, up)
            and gate.dim() > 0
            and up.shape == gate.shape
            and gate.is_contiguous()
            and up.is_contiguous()
        ):
            return modules["down_proj"](_C.gate(gate, up, name))
        return modules["down_proj"](activation(gate) * up)


def _few_rows(x: Any, modules: dict[str, Any], activation: str) -> Tensor | None:
    """All of an MLP of 4-bit layers in one call; None: go by the modules."""
    if (
        not are_plain(x)
        or x.dim() == 0
        or not 0 < x.numel() <= FEW_ROWS * x.shape[-1]
        or not x.is_contiguous()
    ):
        return None
    layers = operands(x, modules["gate_proj"], modules["up_proj"], modules["down_proj"])
    if layers is None:
        return None
    compute, (gate, up, down) = layers
    return _C.mlp_4bit(x, gate, up, down, activation, compute)


@cache
def _activation(cls: type[nn.Module]) -> str | None:
    """The name in `_C` of an activation without settings."""
    if cls is nn.SiLU or (cls.__module__, cls.__name__) == ("transformers.activations", "SiLUActivation"):
        return "silu"
    return "gelu_tanh" if (cls.__module__, cls.__name__) == ("transformers.activations", "GELUTanh") else None


def _is_mlp(module: nn.Module, known: dict[Any, bool]) -> bool:
    activation = module._modules.get("act_fn")
    if (
        module._modules.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}
        or module._parameters
        or module._buffers
    ):
        return False
    if activation is None or _activation(type(activation)) is None:
        return False
    key = type(module), id(module.__dict__.get("config"))
    if key not in known:
        known[key] = _computes_mlp(module)
    return known[key]


def _computes_mlp(module: nn.Module) -> bool:
    """Whether the module's own forward pass gives the formula's bits with three matrices of ours."""
    x = torch.arange(-8, 8, device="cpu").float().view(2, 8) / 4

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.factor) * self.factor

    gate, up, down, act = Times(1.5), Times(0.75), Times(-0.5), module._modules["act_fn"]
    probe = type(module).__new__(type(module))
    probe.__dict__.update(module.__dict__)
    probe.__dict__["_modules"] = {"gate_proj": gate, "up_proj": up, "down_proj": down, "act_fn": act}
    try:
        with torch.no_grad():
            found = type(module).forward(probe, x)
            return isinstance(found, Tensor) and torch.equal(found, down(act(gate(x)) * up(x)))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False


def _eps(module: nn.Module) -> float:
    attributes = module.__dict__
    eps = attributes.get("variance_epsilon")
    return attributes["eps"] if eps is None else eps


def _settings(module: nn.Module) -> frozenset | None:
    """The plain attributes of a module, by which one probe serves all modules alike; None: there are others."""
    own = {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k != "training"}
    simple = all(isinstance(v, bool | int | float | str | tuple | torch.Size) for v in own.values())
    return frozenset(own.items()) if simple else None


def _is_norm(module: nn.Module, known: dict[Any, bool]) -> bool:
    weight = module._parameters.get("weight")
    settings = _settings(module)
    if (
        settings is None
        or len(module._parameters) != 1
        or weight is None
        or weight.dim() != 1
        or not len(weight)
    ):
        return False
    if module._buffers or module._modules:
        return False
    names = [name for name in ("variance_epsilon", "eps") if isinstance(module.__dict__.get(name), float)]
    if len(names) != 1:
        return False
    key = type(module), settings, len(weight)
    if key not in known:
        known[key] = all(_computes_norm(module, names[0], len(weight), dtype) for dtype in DTYPES)
    return known[key]


def _computes_norm(module: nn.Module, eps: str, size: int, dtype: torch.dtype) -> bool:
    steps = torch.arange(3 * size, device="cpu")
    # Multiples of 1/8 below 2: squares are multiples of 1/64, and up to 2^16 of them have an exact sum in float32.
    # Row 2 is so small that eps counts.
    x = ((steps * 5 % 31 - 15).float() / 8).view(3, size)
    x[2] /= 128
    x = x.to(dtype)
    weight = (1 + (steps[:size] * 37 % 128).float() / 128).to(dtype)
    probe = type(module).__new__(type(module))
    probe.__dict__.update(module.__dict__)
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    probe.__dict__[eps] = 2.0**-10
    try:
        with torch.no_grad():
            found = type(module).forward(probe, x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    wanted = _C.rms_norm(x, weight, 2.0**-10)
    return isinstance(found, Tensor) and found.dtype is dtype and torch.equal(found, wanted)


def use_fused_kernels(model: nn.Module, enabled: bool = True) -> int:
    """Let a model's norms, gates and attention of one token run in halfbyte's kernels on the CPU, in place.

    For a model that was quantized with `BitsAndBytesConfig`, or not at all: one that `HalfbyteConfig` has made is
    changed already. Changed are modules that compute y = weight * round(x / sqrt(mean(x^2) + eps)), as the norms of
    Llama, Mistral, Qwen and many others do, attention modules of transformers, and gated MLPs; this module and
    `fused_attention` say how they are recognised, and when the original forward pass runs. Parameters stay the
    same objects.

    Parameters
    ----------
    model : torch.nn.Module
        Any module; itself included.
    enabled : bool
        False gives the modules their own classes back.

    Returns
    -------
    int
        How many modules were changed.
    """
    count = 0
    known: dict[Any, bool] = {}
    for module in model.modules():
        if isinstance(module, _Fused):
            if not enabled:
                module.__class__ = module.fused_base
                count += 1
        elif enabled and "forward" not in module.__dict__:  # as a hook of accelerate leaves it
            mixin = FusedNorm if _is_norm(module, known) else None
            if mixin is None and attention_forward(type(module)) is not None:
                mixin = FusedAttention
            if mixin is None and _is_mlp(module, known):
                mixin = FusedMLP
            if mixin is not None:
                projects = mixin is FusedAttention and projects_and_attends(module, known)
                module.__class__ = _class_of(mixin, type(module), projects)
                count += 1
    return count
