"""PEFT and layers that HalfbyteConfig quantized: a merge that PEFT would get wrong is refused.

PEFT recognises quantized layers by the classes of a module called bitsandbytes. Ours are those while the stand-in is
installed. Otherwise they are `nn.Linear` to PEFT: adapters train, but a merge adds numbers to the stored codes, which
fails on shapes (4 bits) or, with `safe_merge` or DoRA, turns an int8 weight into noise without a word.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from halfbyte.torch.nn import Linear4bit, Linear8bitLt

_MODULE = "peft.tuners.tuners_utils"


def guard_merging() -> None:
    """Let PEFT's check whether a merge is allowed ask `check_merge` as well, now or once PEFT is imported."""
    if _MODULE in sys.modules:
        _guard(sys.modules[_MODULE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def check_merge(model: Any, tuner_layer: type) -> None:
    """ValueError for the first adapter on a layer of ours that PEFT does not know to be quantized.

    Parameters
    ----------
    model
        The model with the adapters in it.
    tuner_layer
        PEFT's BaseTunerLayer.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, tuner_layer) or _knows_quantized(layer):
            continue
        base = layer.get_base_layer()
        if isinstance(base, Linear4bit | Linear8bitLt):
            raise ValueError(
                f"merge: {name}, expected a layer that PEFT can quantize again, got {type(base).__name__} inside "
                f"{type(layer).__module__}.{type(layer).__name__}. For LoRA, call halfbyte.install() before "
                "transformers and peft are imported; or merge into the dense model, and quantize that"
            )


def _knows_quantized(layer: Any) -> bool:
    """Whether PEFT made this layer for a quantized one: in its modules bnb.py, or with a backend (PEFT 0.21)."""
    return (
        type(layer).__module__.rpartition(".")[2] == "bnb"
        or getattr(layer, "quantization_backend", None) is not None
    )


def _guard(module: ModuleType) -> None:
    tuner, layer = module.BaseTuner, module.BaseTunerLayer
    allowed = tuner._check_merge_allowed
    if getattr(allowed, "asks_halfbyte", False):
        return

    def _check_merge_allowed(self: Any) -> None:
        check_merge(self.model, layer)
        allowed(self)

    _check_merge_allowed.asks_halfbyte = True
    tuner._check_merge_allowed = _check_merge_allowed


class _WhenImported:
    """A meta path finder that guards PEFT's module when it has been executed, and is gone then."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _guard(module)

            spec.loader.exec_module = exec_module
        return spec
