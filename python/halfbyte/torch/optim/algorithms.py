"""The algorithms. Signatures, defaults and refusals are those of `bitsandbytes.optim`.

`XYZ8bit`, `XYZ32bit`, `PagedXYZ...` are XYZ with the bits, or paging, fixed. Weight decay is decoupled for
Adam (as in bitsandbytes: `Adam` with weight decay is AdamW), AdEMAMix and Lion, and part of the gradient for
SGD, RMSprop, Adagrad and LARS.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from .base import QuantizedOptimizer
from .general import Optimizer1State, Optimizer2State

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
]

Betas = tuple[float, float]


def _parse_betas(betas: Any) -> Any:
    """Betas may come as text, "(0.9, 0.999)", from configuration files."""
    return tuple(float(b) for b in betas.strip().strip("()").split(",")) if isinstance(betas, str) else betas


class Adam(Optimizer2State):
    """Adam (arXiv:1412.6980) with decoupled weight decay."""

    algorithm = "adam"
    has_second_state = True
    _bits: int | None = None
    _paged: bool | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        if self._bits == 8 and amsgrad:
            raise ValueError(f"{type(self).__name__} does not support amsgrad=True")
        if self._bits == 8 and optim_bits != 32:
            raise ValueError(
                f"{type(self).__name__} only supports optim_bits=32 (default value for compatibility)"
            )
        _init_two_states(
            self, params, lr, betas, eps, weight_decay, optim_bits, args, min_8bit_size, is_paged
        )


def _init_two_states(
    self: Any,
    params: Iterable[Any],
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
    optim_bits: int,
    args: Any,
    min_8bit_size: int,
    is_paged: bool,
    **more: Any,
) -> None:
    defaults = {
        "lr": lr,
        "betas": _parse_betas(betas),
        "eps": eps,
        "weight_decay": weight_decay,
        "alpha": more.pop("alpha", 0.0),
        "t_alpha": more.pop("t_alpha", None),
        "t_beta3": more.pop("t_beta3", None),
    }
    QuantizedOptimizer.__init__(
        self,
        params,
        defaults,
        optim_bits=self._bits or optim_bits,
        args=args,
        min_8bit_size=min_8bit_size,
        is_paged=is_paged if self._paged is None else self._paged,
        **more,
    )


class Adam8bit(Adam):
    _bits = 8


class Adam32bit(Adam):
    _bits = 32


class PagedAdam(Adam):
    _paged = True


class PagedAdam8bit(Adam):
    _bits, _paged = 8, True


class PagedAdam32bit(Adam):
    _bits, _paged = 32, True


class AdamW(Adam):
    """AdamW (arXiv:1711.05101)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged
        )


class AdamW8bit(AdamW):
    _bits = 8


class AdamW32bit(AdamW):
    _bits = 32


class PagedAdamW(AdamW):
    _paged = True


class PagedAdamW8bit(AdamW):
    _bits, _paged = 8, True


class PagedAdamW32bit(AdamW):
    _bits, _paged = 32, True


class AdEMAMix(Optimizer2State):
    """AdEMAMix (arXiv:2409.03137): Adam with a second, slower momentum.

    `t_alpha` and `t_beta3`: steps over which alpha and betas[2] rise to their values (None: at once).
    """

    algorithm = "ademamix"
    has_second_state = True
    _bits: int | None = None
    _paged: bool | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        _init_two_states(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            None,
            min_8bit_size,
            is_paged,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
        )

    def first_state(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._buffer(p, (2, *p.shape), dtype)

    def schedule(self, config: dict[str, Any], step: int) -> dict[str, float]:
        scalars = super().schedule(config, step)
        beta1, _, beta3 = config["betas"]
        alpha, t_alpha, t_beta3 = config["alpha"], config["t_alpha"], config["t_beta3"]
        scalars["alpha"] = min(step * alpha / t_alpha, alpha) if t_alpha else alpha
        scalars["beta3"] = beta3
        if t_beta3 and step < t_beta3:
            # The half-life of the slow momentum rises linearly (appendix A.1 of the paper).
            done, log1, log3 = step / t_beta3, math.log(beta1), math.log(beta3)
            scalars["beta3"] = min(math.exp(log1 * log3 / ((1 - done) * log3 + done * log1)), beta3)
        return scalars


class AdEMAMix8bit(AdEMAMix):
    _bits = 8


class AdEMAMix32bit(AdEMAMix):
    _bits = 32


class PagedAdEMAMix(AdEMAMix):
    _paged = True


class PagedAdEMAMix8bit(AdEMAMix):
    _bits, _paged = 8, True


class PagedAdEMAMix32bit(AdEMAMix):
    _bits, _paged = 32, True


class LAMB(Optimizer2State):
    """LAMB (arXiv:1904.00962): Adam whose update's norm is at most max_unorm times the parameter's."""

    algorithm = "adam"
    has_second_state = True
    _bits: int | None = None
    _paged: bool | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
    ) -> None:
        if self._bits == 8 and amsgrad:
            raise ValueError("LAMB8bit does not support amsgrad=True")
        if self._bits == 8 and max_unorm != 1.0:
            raise ValueError("LAMB8bit only supports max_unorm=1.0 (default value for compatibility)")
        _init_two_states(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            False,
            max_unorm=max_unorm,
        )


class LAMB8bit(LAMB):
    _bits = 8


class LAMB32bit(LAMB):
    _bits = 32


class _OneState(Optimizer1State):
    _bits: int | None = None
    _paged: bool | None = None

    def _init(
        self,
        params: Iterable[Any],
        lr: float,
        betas: Any,
        eps: float,
        weight_decay: float,
        optim_bits: int,
        args: Any,
        min_8bit_size: int,
        is_paged: bool = False,
        max_unorm: float = 0.0,
    ) -> None:
        QuantizedOptimizer.__init__(
            self,
            params,
            {"lr": lr, "betas": _parse_betas(betas), "eps": eps, "weight_decay": weight_decay},
            optim_bits=self._bits or optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged if self._paged is None else self._paged,
            max_unorm=max_unorm,
        )


class Lion(_OneState):
    """Lion (arXiv:2302.06675)."""

    algorithm = "lion"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        self._init(params, lr, betas, 0.0, weight_decay, optim_bits, args, min_8bit_size, is_paged)


class Lion8bit(Lion):
    _bits = 8


class Lion32bit(Lion):
    _bits = 32


class PagedLion(Lion):
    _paged = True


class PagedLion8bit(Lion):
    _bits, _paged = 8, True


class PagedLion32bit(Lion):
    _bits, _paged = 32, True


class SGD(_OneState):
    """SGD with momentum; `dampening` and `nesterov` are accepted and have no effect, as upstream."""

    algorithm = "momentum"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        if momentum == 0:
            raise NotImplementedError("SGD without momentum is not supported!")
        self._init(params, lr, (momentum, dampening), 0.0, weight_decay, optim_bits, args, min_8bit_size)


class SGD8bit(SGD):
    _bits = 8


class SGD32bit(SGD):
    _bits = 32


class LARS(_OneState):
    """LARS (arXiv:1708.03888): momentum whose step is at most max_unorm times the parameter's norm."""

    algorithm = "momentum"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
    ) -> None:
        if momentum == 0:
            raise NotImplementedError("LARS without momentum is not supported!")
        self._init(
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
        )


class LARS8bit(LARS):
    _bits = 8


class LARS32bit(LARS):
    _bits = 32


class RMSprop(_OneState):
    """RMSprop; `momentum` is accepted and has no effect, as upstream."""

    algorithm = "rmsprop"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        if alpha == 0:
            raise NotImplementedError("RMSprop with alpha==0.0 is not supported!")
        if centered:
            raise NotImplementedError("Centered RMSprop is not supported!")
        self._init(params, lr, (alpha, momentum), eps, weight_decay, optim_bits, args, min_8bit_size)


class RMSprop8bit(RMSprop):
    _bits = 8


class RMSprop32bit(RMSprop):
    _bits = 32


class Adagrad(_OneState):
    """Adagrad (JMLR 12, 2011)."""

    algorithm = "adagrad"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        if initial_accumulator_value != 0.0:
            raise ValueError("Initial accumulator value != 0.0 not supported!")
        if lr_decay != 0.0:
            raise ValueError("Lr Decay != 0.0 not supported!")
        self._init(params, lr, (0.0, 0.0), eps, weight_decay, optim_bits, args, min_8bit_size)


class Adagrad8bit(Adagrad):
    _bits = 8

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 8,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        if optim_bits != 8:
            raise ValueError("Adagrad8bit only supports optim_bits=8 (default value for compatibility)")
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            optim_bits,
            args,
            min_8bit_size,
        )


class Adagrad32bit(Adagrad):
    _bits = 32
