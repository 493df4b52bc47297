"""Attention of one token in eager mode on the CPU: rotary embedding, and softmax(q K^T) V, in one call of `_C` each.

transformers' attention modules call two things that they look up in the globals of their own module: the function
`apply_rotary_pos_emb`, and the table `ALL_ATTENTION_FUNCTIONS`. A changed module runs its class's own forward pass, the
same code, with other globals, in which these two names mean ours, and every other name what it means in the original.
Nothing of transformers is changed, and what a model does in between (norms of q and k, gates, sliding windows) stays.

Ours take calls with one new token, no mask, no dropout and nothing to record; all others go to the originals. Rotation
gives the original's bits. The attention sums in float32 and rounds once, torch's rounds the probabilities to the
dtype, too.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import _C
from halfbyte.torch.nn.plain import DTYPES, are_plain, have_rows

__all__ = ["attention_forward"]

TABLE, _ROTARY = "ALL_ATTENTION_FUNCTIONS", "apply_rotary_pos_emb"
MAX_DEPTH = 1024


class _Globals(dict):
    """Ours first, then what the original's globals say at that moment."""

    def __init__(self, original: dict[str, Any], ours: dict[str, Any]) -> None:
        super().__init__(ours)
        self.original = original

    def __missing__(self, name: str) -> Any:
        return self.original[name]


def _can_rotate(x: Any, cos: Tensor, sin: Tensor) -> bool:
    if (
        type(x) is not Tensor
        or x.dim() != 4
        or cos.dim() != 3
        or cos.shape != sin.shape
        or not are_plain(x, cos, sin)
        or not have_rows(x, cos, sin)
    ):
        return False
    batch, heads, tokens, depth = x.shape
    rows, one, width = cos.shape
    fits = depth == width and tokens == one == 1 and rows in (1, batch)
    return fits and batch * heads > 0 and 0 < depth <= MAX_DEPTH and depth % 2 == 0


def _rotary(original: Any) -> Any:
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *rest: Any, **more: Any) -> Any:
        if not rest and not more and _can_rotate(q, cos, sin) and _can_rotate(k, cos, sin):
            return _C.rotate(q, cos, sin), _C.rotate(k, cos, sin)
        return original(q, k, cos, sin, *rest, **more)

    return apply_rotary_pos_emb


@cache
def _rotates(function: Any) -> bool:
    """Whether a function turns q and k as ours does, to the bit, in every dtype."""
    if not inspect.isfunction(function):
        return False
    for dtype in DTYPES:
        steps = torch.arange(2 * 4 * 16, device="cpu").float()
        q, k = torch.cos(steps).view(2, 4, 1, 16).to(dtype), torch.sin(steps[:64]).view(2, 2, 1, 16).to(dtype)
        cos, sin = (f(steps[:32] / 7).view(2, 1, 16).to(dtype) for f in (torch.cos, torch.sin))
        try:
            with torch.no_grad():
                found = function(q, k, cos, sin)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False
        wanted = _C.rotate(q, cos, sin), _C.rotate(k, cos, sin)
        if not isinstance(found, tuple) or len(found) != 2:
            return False
        if not all(f.dtype is dtype and torch.equal(f, w) for f, w in zip(found, wanted, strict=True)):
            return False
    return True


# What sdpa_attention_forward would heed; a call in which one of them is given is its own.
HEEDED = ("softcap", "output_attentions", "position_bias", "cache", "s_aux")


def is_given(value: Any) -> bool:
    return value is not None and value is not False


def _one_token(original: Any) -> Any:
    def attention(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        **more: Any,
    ) -> Any:
        if (
            attention_mask is None
            and dropout == 0
            and not any(is_given(more.get(name)) for name in HEEDED)
            and can_attend(module, query, key, value)
        ):
            return _C.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
        return original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)

    return attention


def can_attend(module: Any, query: Any, key: Any, value: Any) -> bool:
    if (
        type(query) is not Tensor
        or query.dim() != 4
        or query.shape[2] != 1
        or not are_plain(query, key, value)
        or not have_rows(query, key, value)
    ):
        return False
    if key.dim() != 4 or key.shape != value.shape:
        return False
    batch, heads, _, depth = query.shape
    shared = getattr(module, "num_key_value_groups", 1)
    fits = key.shape[0] == batch and key.shape[1] * shared == heads and key.shape[3] == depth
    return fits and key.numel() > 0 and depth <= MAX_DEPTH


class _Table:
    """transformers' table of attention functions, whose sdpa is ours for one token."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def get_interface(self, *arguments: Any, **more: Any) -> Any:
        return _attention(self.original.get_interface(*arguments, **more))

    def __getitem__(self, name: str) -> Any:
        return _attention(self.original[name])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


@cache
def _attention(function: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return _one_token(function) if function is sdpa_attention_forward else function


@cache
def attention_forward(cls: type[nn.Module]) -> Any:
    """The class's forward pass with ours in place of transformers' functions; None if it uses neither."""
    forward = cls.__dict__.get("forward")
    if not inspect.isfunction(forward) or not cls.__module__.startswith("transformers."):
        return None
    names, scope = forward.__code__.co_names, forward.__globals__
    ours: dict[str, Any] = {}
    if TABLE in names and hasattr(scope.get(TABLE), "get_interface"):
        ours[TABLE] = _Table(scope[TABLE])
    if _ROTARY in names and _rotates(scope.get(_ROTARY)):
        ours[_ROTARY] = _rotary(scope[_ROTARY])
    if not ours:
        return None
    result = FunctionType(
        forward.__code__, _Globals(scope, ours), forward.__name__, forward.__defaults__, forward.__closure__
    )
    result.__kwdefaults__ = forward.__kwdefaults__
    return result
