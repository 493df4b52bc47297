"""Settings of single parameters that differ from their optimizer's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["GlobalOptimManager"]


class GlobalOptimManager:
    """One per process: `get_instance()`. Overrides hyperparameters such as `optim_bits` per parameter.

    Two ways: `register_module_override(module, "weight", {"optim_bits": 32})` (what transformers' Trainer
    does for embeddings), or `override_config(parameter, key, value)`, before or after
    `register_parameters(model.parameters())`.
    """

    _instance: GlobalOptimManager | None = None

    pid2config: dict[int, dict[str, Any]]
    index2config: dict[tuple[int, int], dict[str, Any]]
    module_weight_config_triple: list[tuple[torch.nn.Module, str, dict[str, Any]]]
    uses_config_override: bool
    optimizer: Any

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget every override."""
        self.pid2config = {}
        self.index2config = {}
        self.module_weight_config_triple = []
        self.uses_config_override = False
        self.optimizer = None

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Remember the places (group, index) of parameters that have an override."""
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group_index, group in enumerate(groups):
            for index, p in enumerate(group["params"]):
                if id(p) in self.pid2config:
                    self.index2config[group_index, index] = self.pid2config[id(p)]

    def override_config(
        self,
        parameters: torch.Tensor | Iterable[torch.Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Set `key` to `value`, or every item of `key_value_dict`, for the given parameters."""
        if key is not None and value is not None:
            if key_value_dict is not None:
                raise ValueError("override_config: key_value_dict, expected None when key is given")
            key_value_dict = {key: value}
        self.uses_config_override = True
        if key_value_dict is None:
            return
        for p in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
            self.pid2config.setdefault(id(p), {}).update(key_value_dict)

    def register_module_override(
        self, module: torch.nn.Module, param_name: str, config: dict[str, Any]
    ) -> None:
        """Apply `config` to `module`'s parameter `param_name` in optimizers that step later."""
        self.module_weight_config_triple.append((module, param_name, config))
