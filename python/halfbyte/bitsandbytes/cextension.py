"""What callers ask the native library of bitsandbytes about. halfbyte's is `halfbyte._C`; it has no HIP."""

from halfbyte.torch.symbols import NativeLibrary as BNBNativeLibrary
from halfbyte.torch.symbols import lib

from .consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR
from .cuda_specs import CUDASpecs, get_cuda_specs, get_cuda_version_tuple, get_rocm_gpu_arch

__all__ = [
    "BNB_BACKEND",
    "COMPILED_WITH_CUDA",
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
COMPILED_WITH_CUDA = lib.compiled_with_cuda
BNB_BACKEND = "CUDA" if COMPILED_WITH_CUDA else "CPU"
ROCM_GPU_ARCH = "unknown"


def get_native_library() -> BNBNativeLibrary:
    """`lib`: there is only one, whatever the machine has."""
    return lib
