"""The stand-in for bitsandbytes: the same names, by halfbyte.

After `halfbyte.install()` these files are what `import bitsandbytes` finds. They hold names and nothing
else; the classes and functions are those of `halfbyte.torch`. What is missing raises an error that says so.
"""

import importlib
from typing import Any

from . import _ops as _ops
from . import autograd, cextension, consts, functional, nn, utils
from .autograd._functions import MatmulLtState, matmul, matmul_4bit
from .nn import modules

# accelerate reads this: k-bit models may be trained without CUDA.
features = {"multi_backend"}

__version__ = "0.50.2"

__all__ = [
    "COMPILED_WITH_CUDA",
    "MatmulLtState",
    "autograd",
    "cextension",
    "consts",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "modules",
    "nn",
    "supported_torch_devices",
    "utils",
]


def __getattr__(name: str) -> Any:
    if name == "COMPILED_WITH_CUDA":
        return cextension.lib.compiled_with_cuda
    if name == "supported_torch_devices":  # transformers wants one that the machine has
        return {"cpu", "cuda"} if cextension.lib.compiled_with_cuda else {"cpu"}
    if name == "adam":
        return importlib.import_module(".optim.adam", __name__)
    if name in ("optim", "cuda_specs", "backends", "diagnostics", "research"):
        try:
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            raise AttributeError(
                f"bitsandbytes.{name} is not part of this halfbyte, which stands in for bitsandbytes"
            ) from error
    raise AttributeError(
        f"module {__name__!r} (halfbyte, standing in for bitsandbytes) has no attribute {name!r}"
    )
