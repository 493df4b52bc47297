"""halfbyte: large language models in 4 and 8 bits.

Names are loaded at first use, so that `import halfbyte` costs next to nothing: it imports neither
numpy nor torch nor the extension module. `halfbyte.install()` lets transformers, PEFT and accelerate
find halfbyte where they look for bitsandbytes.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

__version__ = "0.1.0"

if _TYPE_CHECKING:
    from halfbyte._C import CudaError as CudaError
    from halfbyte._C import Int8Params as Int8Params
    from halfbyte._C import Linear4bit as Linear4bit
    from halfbyte._C import Linear8bit as Linear8bit
    from halfbyte._C import Params4bit as Params4bit
    from halfbyte._C import Params8bit as Params8bit
    from halfbyte._C import build_info as build_info
    from halfbyte._C import cpu_info as cpu_info
    from halfbyte._C import get_num_threads as get_num_threads
    from halfbyte._C import set_num_threads as set_num_threads
    from halfbyte.checkpoint import quantize as quantize
    from halfbyte.integrations.transformers import HalfbyteConfig as HalfbyteConfig
    from halfbyte.loading import load as load
    from halfbyte.shim import install as install
    from halfbyte.shim import uninstall as uninstall

_FROM_C = ("Params4bit", "Linear4bit", "Int8Params", "Linear8bit", "Params8bit", "CudaError",
           "build_info", "cpu_info", "set_num_threads", "get_num_threads")  # fmt: skip
# public name -> "module:attribute"
_EXPORTS = {name: f"halfbyte._C:{name}" for name in _FROM_C} | {
    "quantize_4bit": "halfbyte._C:Params4bit.quantize",
    "quantize_8bit": "halfbyte._C:Params8bit.quantize",
    "quantize_int8": "halfbyte._C:Int8Params.quantize",
    "install": "halfbyte.shim:install",
    "uninstall": "halfbyte.shim:uninstall",
    "load": "halfbyte.loading:load",
    "HalfbyteConfig": "halfbyte.integrations.transformers:HalfbyteConfig",
    "quantize": "halfbyte.checkpoint:quantize",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> _Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    module, _, path = _EXPORTS[name].partition(":")
    value: _Any = _import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
