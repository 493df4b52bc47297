"""What callers ask the native library of bitsandbytes about. halfbyte's is `halfbyte._C`; it has no HIP.

`COMPILED_WITH_CUDA` and `BNB_BACKEND` are found out when they are asked for: importing this touches no GPU.
"""

from typing import Any

from halfbyte.torch.symbols import NativeLibrary as BNBNativeLibrary
from halfbyte.torch.symbols import lib

from .consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR
from .cuda_specs import CUDASpecs, get_cuda_specs, get_cuda_version_tuple, get_rocm_gpu_arch

__all__ = [
    "BNB_BACKEND",  # noqa: F822
    "COMPILED_WITH_CUDA",  # noqa: F822
    "DYNAMIC_LIBRARY_SUFFIX",
    "HIP_ENVIRONMENT",
    "PACKAGE_DIR",
    "ROCM_GPU_ARCH",
    "BNBNativeLibrary",
    "CUDASpecs",
    "get_cuda_specs",
    "get_cuda_version_tuple",
    "get_native_library",
    "get_rocm_gpu_arch",
    "lib",
]

HIP_ENVIRONMENT = False
ROCM_GPU_ARCH = "unknown"


def __getattr__(name: str) -> Any:
    if name == "COMPILED_WITH_CUDA":
        return lib.compiled_with_cuda
    if name == "BNB_BACKEND":
        return "CUDA" if lib.compiled_with_cuda else "CPU"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_native_library() -> BNBNativeLibrary:
    """`lib`: there is only one, whatever the machine has."""
    return lib
