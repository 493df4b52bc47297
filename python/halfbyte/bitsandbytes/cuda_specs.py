"""What torch says about the GPUs of this machine. Nothing here initialises CUDA before it is called."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class CUDASpecs:
    """Compute capability (major, minor) of the best GPU; CUDA version as "128" and (12, 8)."""

    highest_compute_capability: tuple[int, int]
    cuda_version_string: str
    cuda_version_tuple: tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether there are int8 tensor cores."""
        return bool(torch.version.hip) or self.highest_compute_capability >= (7, 5)


def get_compute_capabilities() -> list[tuple[int, int]]:
    """Of all GPUs, ascending."""
    return sorted(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def get_cuda_version_tuple() -> tuple[int, int] | None:
    """(major, minor) of the CUDA or HIP that torch was built with, if any."""
    version = torch.version.cuda or torch.version.hip
    parts = (version or "").split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) >= 2 else None


def get_cuda_version_string() -> str | None:
    """ "128" for 12.8."""
    version = get_cuda_version_tuple()
    return None if version is None else f"{version[0]}{version[1]}"


def get_cuda_specs() -> CUDASpecs | None:
    """None without a GPU that torch can use."""
    version, text = get_cuda_version_tuple(), get_cuda_version_string()
    if version is None or text is None or not torch.cuda.is_available():
        return None
    capabilities = get_compute_capabilities()
    return CUDASpecs(capabilities[-1], text, version) if capabilities else None


def get_rocm_gpu_arch() -> str:
    """halfbyte has no ROCm code and does not look for its devices."""
    return "unknown"
