"""How a module with one 4-bit weight is saved and loaded: the weight and, beside it, its statistics.

    <prefix>weight                                   packed codes
    <prefix>weight.absmax, <prefix>weight.quant_map, ... , <prefix>weight.quant_state.bitsandbytes__nf4

the layout of bitsandbytes (see quant_state.py).
"""

from types import SimpleNamespace

import torch
from torch import nn

from halfbyte.torch.nn.params4bit import Params4bit
from halfbyte.torch.quant_state import QuantState


class Saves4bit(nn.Module):
    """Mixin for a module whose `weight` is a `Params4bit`; `_weight_shape` is that of the float weight."""

    weight: Params4bit

    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def __setstate__(self, state: dict) -> None:
        # A pickle made by bitsandbytes holds its parameter as an nn.Parameter with the attributes of Params4bit.
        super().__setstate__(state)
        weight = self._parameters.get("weight")
        if type(weight) is nn.Parameter and "bnb_quantized" in weight.__dict__:
            self.weight = Params4bit(weight.data, weight.requires_grad, **weight.__dict__)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self._state_of_weight()
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _state_of_weight(self) -> QuantState | None:
        """The weight's statistics, also while FSDP2 has put a sharded tensor of packed codes in its place."""
        weight = self.weight
        state = getattr(weight, "quant_state", None)
        if state is not None or isinstance(weight, Params4bit):
            return state
        packed = weight.dim() == 2 and weight.shape[1] == 1 and weight.shape != self._weight_shape()
        return getattr(self, "quant_state", None) if packed else None

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint, which follows each dotted name of a state dict to its object.

        A name that is found here is looked up in the attribute it stands for: FSDP2's sharded weight has no
        `absmax` and the like, so `weight` is looked up in `_weight_with_statistics`.
        """
        sharded = not isinstance(self.weight, Params4bit) and self._state_of_weight() is not None
        return {"weight": "_weight_with_statistics"} if sharded else {}

    @property
    def _weight_with_statistics(self) -> SimpleNamespace:
        return SimpleNamespace(weight=Params4bit(quant_state=self._state_of_weight(), bnb_quantized=True))

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
        # bitsandbytes has no such thing: there load_state_dict refuses the keys that state_dict has written.
        statistics = {key: value for key, value in state_dict.items() if key.startswith(f"{prefix}weight.")}
        packed = state_dict.get(f"{prefix}weight")
        if packed is None or not any(".quant_state." in key for key in statistics):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        own = (f"{prefix}weight", *statistics)
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if f"{prefix}weight" in missing_keys:
            missing_keys.remove(f"{prefix}weight")
        device = packed.device if self.weight.device.type == "meta" else self.weight.device
        state = QuantState.from_dict(dict(statistics), device=device)
        if tuple(state.shape) != self._weight_shape():
            error_msgs.append(
                f"size mismatch for {prefix}weight: the checkpoint's quantized weight stands for "
                f"{list(state.shape)}, the layer has {list(self._weight_shape())}"
            )
            return
        self.weight = Params4bit.from_prequantized(
            packed.detach().clone(), {k: v.clone() for k, v in statistics.items()}, device=device, module=self
        )
        self.quant_storage: torch.dtype = packed.dtype
