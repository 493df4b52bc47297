"""LARS and AdEMAMix in torch operations, to compare the core with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["PytorchLARS", "ReferenceAdEMAMix"]


class PytorchLARS(torch.optim.Optimizer):
    """SGD with momentum, dampening and Nesterov whose step is at most max_unorm times the parameter's norm."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        for name, value in (("learning rate", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0.0:
                raise ValueError(f"Invalid {name}{'' if name == 'learning rate' else ' value'}: {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "max_unorm": max_unorm,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group)
        return loss

    def _step_one(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        update = p.grad.add(p, alpha=group["weight_decay"])
        if group["momentum"] != 0:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = update.clone()
            else:
                state["momentum_buffer"].mul_(group["momentum"]).add_(update, alpha=1 - group["dampening"])
            buffer = state["momentum_buffer"]
            update = update.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        scale = 1.0
        if group["max_unorm"] > 0.0:
            limit = group["max_unorm"] * torch.linalg.vector_norm(p, dtype=torch.float32)
            norm = torch.linalg.vector_norm(update, dtype=torch.float32)
            scale = float(limit / norm) if norm > limit else 1.0
        p.add_(update, alpha=-group["lr"] * scale)


class ReferenceAdEMAMix(torch.optim.Optimizer):
    """AdEMAMix (arXiv:2409.03137), algorithm 1, in the parameter's dtype."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: int | None = None,
        t_alpha: int | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "alpha": alpha,
                "eps": eps,
                "weight_decay": weight_decay,
                "t_beta3": t_beta3,
                "t_alpha": t_alpha,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group)
        return loss

    def _step_one(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state, step = self.state[p], group["step"]
        if not state:
            state["m1_m2"] = torch.zeros((2, *p.shape), dtype=p.dtype, device=p.device)
            state["nu"] = torch.zeros_like(p)
        beta1, beta2, beta3 = group["betas"]
        alpha = group["alpha"]
        if group["t_alpha"]:
            alpha = min(step * alpha / group["t_alpha"], alpha)
        if group["t_beta3"] and step < group["t_beta3"]:
            done, log1, log3 = step / group["t_beta3"], math.log(beta1), math.log(beta3)
            beta3 = min(math.exp(log1 * log3 / ((1 - done) * log3 + done * log1)), beta3)
        fast, slow = state["m1_m2"]
        fast.lerp_(p.grad, 1 - beta1)
        slow.lerp_(p.grad, 1 - beta3)
        state["nu"].lerp_(p.grad.square(), 1 - beta2)
        corrected = fast / (1 - beta1**step)
        scale = state["nu"].sqrt() / math.sqrt(1 - beta2**step)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_((corrected + alpha * slow) / (scale + group["eps"]), alpha=-group["lr"])
