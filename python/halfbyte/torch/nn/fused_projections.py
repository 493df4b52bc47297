"""Attention of one token with 4-bit projections in two calls of `_C`: q, k, v and their rotation; attention and out.

Between the two calls the cache of keys and values is updated, as transformers does it. For modules whose forward pass
is this and nothing else, found out by computing: a copy with projections and a cache of ours in place of its own runs
the forward pass of `fused_attention` on small tensors, and output and what the cache was given must have our bits.

What a call may ask for beyond that, and projections that are not plain 4-bit layers (adapters, hooks, gradients, other
devices) leave it to `fused_attention`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte import _C
from halfbyte.torch.nn.fused_attention import (
    HEEDED,
    MAX_DEPTH,
    TABLE,
    attention_forward,
    can_attend,
    is_given,
)
from halfbyte.torch.nn.linear4bit import operands
from halfbyte.torch.nn.plain import are_plain, have_rows

__all__ = ["project_and_attend", "projects_and_attends"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_OWN = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
_UNKNOWN = frozenset((*HEEDED, "dropout", "scaling"))


@cache
def _tables(cls: type[nn.Module]) -> tuple[Any, Any]:
    """The table in which a class looks up attention functions, and transformers' sdpa."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return cls.forward.__globals__[TABLE], sdpa_attention_forward


def _sdpa(module: Any) -> Any:
    """transformers' function of that name if the module's next call would be its; else None."""
    # Past the configuration's own __getattribute__, which takes longer than the rest of these checks.
    config = object.__getattribute__(module.__dict__["config"], "__dict__")
    if config.get("_attn_implementation_internal") != "sdpa":
        return None
    table, sdpa = _tables(module.fused_base)
    return sdpa if table["sdpa"] is sdpa else None


def _can_project(module: Any, call: dict[str, Any]) -> bool:
    x, angles = call.get("hidden_states"), call.get("position_embeddings")
    if (
        call.get("attention_mask") is not None
        or module.training
        or type(x) is not Tensor
        or type(angles) is not tuple
        or len(angles) != 2
        or (not _UNKNOWN.isdisjoint(call) and any(is_given(call.get(name)) for name in _UNKNOWN))
    ):
        return False
    cos, sin = angles
    if not are_plain(x, cos, sin) or x.dim() != 3 or x.shape[1] != 1 or not x.is_contiguous():
        return False
    depth = module.__dict__["head_dim"]
    return (
        cos.shape in ((1, 1, depth), (x.shape[0], 1, depth))
        and sin.shape == cos.shape
        and have_rows(cos, sin)
        and x.numel() > 0
        and depth <= MAX_DEPTH
    )


def project_and_attend(module: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """What the module's forward pass gives for a call by keywords; None: it is none for us, and nothing was done."""
    if not _can_project(module, call) or (sdpa := _sdpa(module)) is None:
        return None
    x, (cos, sin), cache = call["hidden_states"], call["position_embeddings"], call.get("past_key_values")
    own, modules = module.__dict__, module._modules
    layers = operands(x, *map(modules.get, _PROJECTIONS))
    if layers is None:
        return None
    compute, (q, k, v, out) = layers
    query, key, value = _C.qkv_4bit(x, q, k, v, cos, sin, own["head_dim"], compute)
    if cache is not None:
        key, value = cache.update(key, value, own["layer_idx"])
    if can_attend(module, query, key, value):
        return _C.attend_4bit(query, key, value, own["scaling"], out, compute), None
    more = {name: given for name, given in call.items() if name not in _OWN}
    attended, weights = sdpa(module, query, key, value, None, dropout=0.0, scaling=own["scaling"], **more)
    return modules["o_proj"](attended.reshape(x.shape[0], 1, -1).contiguous()), weights


# ---- recognition --------------------------------------------------------------------------------


class _Times(nn.Module):
    def __init__(self, rows: int, depth: int, dtype: torch.dtype, step: float) -> None:
        super().__init__()
        self.matrix = torch.sin(torch.arange(rows * depth, device="cpu") * step).view(rows, depth).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


class _Cache:
    """Three tokens before, and what it was given."""

    def __init__(self, heads: int, depth: int, dtype: torch.dtype) -> None:
        past = torch.cos(torch.arange(2 * heads * 3 * depth, device="cpu") * 0.7)
        self.past = past.view(2, heads, 3, depth).to(dtype)
        self.given: list[tuple] = []

    def update(self, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        self.given.append((key, value, rest, more))
        return torch.cat([self.past, key], 2), torch.cat([self.past, value], 2)


def _computes(module: nn.Module, dtype: torch.dtype) -> bool:
    own, width = module.__dict__, 8
    depth, groups = own["head_dim"], own["num_key_value_groups"]
    rows = (2 * groups * depth, 2 * depth, 2 * depth, width)
    steps = torch.arange(2 * width, device="cpu")
    x = torch.cos(steps).view(2, 1, width).to(dtype)
    cos, sin = (f(steps[:2, None, None] + torch.arange(depth) / 7).to(dtype) for f in (torch.cos, torch.sin))
    layers = {
        name: _Times(n, rows[0] if name == "o_proj" else width, dtype, 0.3 + 0.1 * i)
        for i, (name, n) in enumerate(zip(_PROJECTIONS, rows, strict=True))
    }
    probe = type(module).__new__(type(module))
    probe.__dict__.update(own)
    probe.__dict__.update(_modules=dict(layers), training=False)
    theirs, ours = _Cache(2, depth, dtype), _Cache(2, depth, dtype)
    call = {"hidden_states": x, "position_embeddings": (cos, sin), "attention_mask": None}
    try:
        with torch.no_grad():
            found = attention_forward(type(module))(probe, past_key_values=theirs, **call)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return False
    with torch.no_grad():
        q, k, v = (layers[name](x).view(2, 1, -1, depth).transpose(1, 2) for name in _PROJECTIONS[:3])
        key, value = ours.update(_C.rotate(k, cos, sin), v, own["layer_idx"])
        attended = _C.attend(_C.rotate(q, cos, sin), key, value, own["scaling"])
        wanted = layers["o_proj"](attended.reshape(2, 1, -1))
    if type(found) is not tuple or len(found) != 2 or found[1] is not None or len(theirs.given) != 1:
        return False
    (key, value, *rest), (our_key, our_value, *our_rest) = theirs.given[0], ours.given[0]
    pairs = ((found[0], wanted), (key, our_key), (value, our_value))
    return rest == our_rest and all(isinstance(a, Tensor) and torch.equal(a, b) for a, b in pairs)


def projects_and_attends(module: nn.Module, known: dict[Any, bool]) -> bool:
    """Whether `project_and_attend` does what the module's forward pass does. `known`: answers for modules alike."""
    own = module.__dict__
    names = {"head_dim": int, "num_key_value_groups": int, "layer_idx": int, "scaling": float}
    settings = tuple(own.get(name) for name in names)
    if (
        module._modules.keys() != set(_PROJECTIONS)
        or module._parameters
        or module._buffers
        or not all(type(value) is kind for value, kind in zip(settings, names.values(), strict=True))
        or TABLE not in type(module).forward.__globals__
        or "config" not in own
        or not (
            0 < own["head_dim"] <= MAX_DEPTH and own["head_dim"] % 2 == 0 and own["num_key_value_groups"] > 0
        )
    ):
        return False
    key = type(module), id(own["config"]), settings[:2] + settings[3:]
    if key not in known:
        known[key] = all(_computes(module, dtype) for dtype in (torch.float32, torch.bfloat16))
    return known[key]
