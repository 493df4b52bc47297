"""`Optimizer1State` and `Optimizer2State`: an optimizer by the name of its algorithm.

Base classes of the algorithms here, and of optimizers that others derive from bitsandbytes' classes of the
same names (GaLore does, with a `step` of its own that calls `init_state`, `prefetch_state`, `update_step`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from .base import QuantizedOptimizer

__all__ = ["Optimizer1State", "Optimizer2State"]


class _Named(QuantizedOptimizer):
    _names: ClassVar[dict[str, str]]  # in bitsandbytes -> of _C.optimizer_step

    def _init_named(
        self, name: str, params: Iterable[Any], defaults: dict[str, Any], **settings: Any
    ) -> None:
        if name not in self._names:
            raise ValueError(
                f"{type(self).__name__}: optimizer_name must be one of {list(self._names)}, got {name!r}"
            )
        self.optimizer_name = name
        self.algorithm = self._names[name]
        super().__init__(params, defaults, **settings)


class Optimizer1State(_Named):
    """One state: "momentum" (SGD), "lars", "lion", "rmsprop" or "adagrad"; parameters as in those classes."""

    _names: ClassVar[dict[str, str]] = {n: n for n in ("momentum", "lion", "rmsprop", "adagrad")} | {
        "lars": "momentum"
    }

    def __init__(
        self,
        optimizer_name: str,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
    ) -> None:
        self._init_named(
            optimizer_name,
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            max_unorm=max_unorm,
            skip_zeros=skip_zeros,
            is_paged=is_paged,
        )


class Optimizer2State(_Named):
    """Two states: "adam" or "lamb"; parameters as in those classes. (For AdEMAMix derive from it.)"""

    _names: ClassVar[dict[str, str]] = {"adam": "adam", "lamb": "adam"}
    has_second_state = True

    def __init__(
        self,
        optimizer_name: str,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
    ) -> None:
        self._init_named(
            optimizer_name,
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "alpha": alpha,
                "t_alpha": t_alpha,
                "t_beta3": t_beta3,
            },
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            max_unorm=max_unorm,
            skip_zeros=skip_zeros,
            is_paged=is_paged,
        )
