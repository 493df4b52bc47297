"""The parts of `bitsandbytes.functional` below its quantizers: pointers, pages, integer products, one update.

Other packages call some of them (Unsloth takes `get_ptr` and `lib`), most are there for old code. Paged
memory is memory that moves between the GPU and the host page by page, as it is used: CUDA's managed memory, in a
tensor of the GPU's with two marks on it. On the CPU all memory is paged, by the operating system, so there a paged
tensor is any tensor with the marks, and prefetching it does nothing.
"""

import ctypes
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfbyte import _C

FIRST_CUDA_DEVICE = torch.device("cuda", index=0)


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """Address of a tensor's first element as ctypes passes it; None for None."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def is_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    """True when all tensors that are given and not paged are on one device (the CPU too).

    Raises
    ------
    RuntimeError
        They are on several.
    """
    given = [t for t in tensors if t is not None and not getattr(t, "is_paged", False)]
    if len({t.device for t in given}) > 1:
        places = [(list(t.shape), str(t.device)) for t in given]
        raise RuntimeError(f"Input tensors need to be on the same device, got (shape, device): {places}")
    return True


# ---- pages ---------------------------------------------------------------------------------------


class _PagedTensors:
    """A list of tensors that it does not keep alive."""

    def __init__(self) -> None:
        self._references: list[weakref.ref[Tensor]] = []

    def append(self, tensor: Tensor) -> None:
        self._references = [r for r in self._references if r() is not None]
        self._references.append(weakref.ref(tensor))

    def __iter__(self) -> Iterator[Tensor]:
        return iter([tensor for r in self._references if (tensor := r()) is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)


class GlobalPageManager:
    """The paged tensors of the process that live: `get_instance()`."""

    _instance: "GlobalPageManager | None" = None
    paged_tensors: _PagedTensors

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    @classmethod
    def get_instance(cls) -> "GlobalPageManager":
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        self.paged_tensors = _PagedTensors()

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """Prefetch every paged tensor, the one that was added first last."""
        for tensor in reversed(list(self.paged_tensors)):
            prefetch_tensor(tensor, to_cpu)


def get_paged(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device = FIRST_CUDA_DEVICE
) -> Tensor:
    """A zeroed tensor in memory that can be swapped, with attributes `is_paged` and `page_deviceid`.

    `device` says whose it shall be. On a GPU the tensor is in CUDA's managed memory and of that device (bitsandbytes
    makes it one of the CPU's, over the same memory); without one the memory is the host's whatever it says.

    Raises
    ------
    halfbyte.CudaError
        A GPU is there, and the memory cannot be had.
    """
    device = torch.device(device)
    index = device.index
    if device.type == "cuda" and cuda_is_ready():
        index = torch.cuda.current_device() if index is None else index
        size = math.prod(shape) * dtype.itemsize
        memory = torch.utils.dlpack.from_dlpack(_C.cuda_managed_memory(index, max(size, 1)))
        out = memory[:size].view(dtype).view(shape).zero_()
    else:
        out = torch.zeros(shape, dtype=dtype)
    out.is_paged = True
    out.page_deviceid = index
    return out


def cuda_is_ready() -> bool:
    """Whether there is a GPU that torch uses and halfbyte has kernels for. Initialises no CUDA context."""
    return torch.cuda.is_available() and _cuda_library_works()


@cache
def _cuda_library_works() -> bool:
    return bool(_C.cuda_info()["available"])


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Bring a paged tensor's memory to its GPU, in the order of the current stream.

    It does nothing for host memory, and nothing with `to_cpu`: pages move to the host when they are used there.

    Raises
    ------
    ValueError
        A is not from `get_paged`.
    """
    if not getattr(A, "is_paged", False):
        raise ValueError("prefetch_tensor: A must be a paged tensor (from get_paged), got another")
    if A.is_cuda and not to_cpu:
        _C.cuda_prefetch(A)


def elementwise_func(
    func_name: str, A: Tensor, B: Tensor | None, value: float, prefetch: bool = True
) -> None:
    """A = value ("fill", float32 or uint8) or A = A * B ("_mul", float32), in place.

    Raises
    ------
    NotImplementedError
        Another function or dtype.
    """
    if func_name == "fill" and A.dtype in (torch.float32, torch.uint8):
        A.fill_(value)
    elif func_name == "_mul" and A.dtype == torch.float32 and B is not None:
        A.mul_(B)
    else:
        raise NotImplementedError(f"elementwise_func: no {func_name!r} for {A.dtype}")


def fill(A: Tensor, value: float, device: Any = None, prefetch: bool = True) -> None:
    """A = value, in place."""
    elementwise_func("fill", A, None, value)


def _mul(A: Tensor, B: Tensor, device: Any = None) -> None:
    elementwise_func("_mul", A, B, 0)


# ---- integer products (deprecated in bitsandbytes) -----------------------------------------------


def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:
    """Shape of A B, each transposed in its last two dimensions if so said; the shape of `out` if given.

    Raises
    ------
    TypeError
        A or B is not of the expected type.
    ValueError
        The shapes do not fit.
    """
    if A.dtype != expected_type or B.dtype != expected_type:
        raise TypeError(f"check_matmul: A and B must be {expected_type}, got {A.dtype} and {B.dtype}")
    if (A.dim(), B.dim()) not in ((2, 2), (3, 2), (3, 3)):
        raise ValueError(f"check_matmul: A and B must have 2 or 3 dimensions, got {A.dim()} and {B.dim()}")
    a, b = list(A.shape), list(B.shape)
    contraction = len(a) == len(b) == 3 and a[:2] == b[:2]
    if out is not None and contraction and list(out.shape) == [a[2], b[2]]:
        return tuple(out.shape)
    if transposed_A:
        a[-2:] = a[:-3:-1]
    if transposed_B:
        b[-2:] = b[:-3:-1]
    if a[-1] != b[-2] or (len(b) == 3 and a[0] != b[0]):
        raise ValueError(
            f"Tensor dimensions incorrect for matrix multiplication: A x B: {list(A.shape)} x {list(B.shape)} "
            f"with transpose for A x B: {transposed_A} x {transposed_B}"
        )
    return (*a[:-1], b[-1])


def igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """A B of int8 tensors as int32, exact.

    A `[m, k]` or `[batch, m, k]`, B `[k, n]` or `[batch, k, n]`; with `out` `[i, o]` and A `[b, s, i]`,
    B `[b, s, o]` the sum over b and s (the gradient of a weight).
    """
    warnings.warn("igemm is deprecated; use int8_linear_matmul", FutureWarning, stacklevel=2)
    return _integer_product(A, B, out, transposed_A, transposed_B)


def batched_igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """`igemm` of A `[batch, m, k]` and B `[batch, k, n]`."""
    warnings.warn("batched_igemm is deprecated; use int8_linear_matmul", FutureWarning, stacklevel=2)
    if A.dim() != 3 or B.dim() != 3:
        raise ValueError(f"batched_igemm: A and B must have 3 dimensions, got {A.dim()} and {B.dim()}")
    return _integer_product(A, B, out, transposed_A, transposed_B)


def _integer_product(A: Tensor, B: Tensor, out: Tensor | None, tA: bool, tB: bool) -> Tensor:
    shape = check_matmul(A, B, out, tA, tB)
    if out is not None and A.dim() == B.dim() == 3 and len(shape) == 2:
        A, B, tA, tB = A.flatten(0, 1), B.flatten(0, 1), True, False
    a = (A.mT if tA else A).contiguous()
    b = (B if tB else B.mT).contiguous()  # matmul_int8 takes rows of B
    if b.dim() == 2:
        y = torch.ops.halfbyte.matmul_int8(a, b)
    else:
        y = torch.stack(
            [torch.ops.halfbyte.matmul_int8(x, w) for x, w in zip(a, b, strict=True)]
        ) if len(a) else a.new_empty(shape, dtype=torch.int32)  # fmt: skip
    return y.view(shape) if out is None else out.copy_(y.view(shape))


# ---- one update of one parameter -----------------------------------------------------------------

# name in bitsandbytes -> name in _C.optimizer_step
_OPTIMIZERS = {
    "adam": "adam",
    "ademamix": "ademamix",
    "lamb": "adam",
    "momentum": "momentum",
    "lars": "momentum",
    "lion": "lion",
    "rmsprop": "rmsprop",
    "adagrad": "adagrad",
}


def _update(name: str, p: Tensor, entry: tuple, **scalars: Any) -> None:
    if name not in _OPTIMIZERS:
        raise ValueError(f"optimizer_update: optimizer_name must be one of {list(_OPTIMIZERS)}, got {name!r}")
    stepped = p.detach().contiguous()
    with torch.no_grad():
        _C.optimizer_step(_OPTIMIZERS[name], [(stepped, *entry)], **scalars)
        if stepped.data_ptr() != p.data_ptr():
            p.copy_(stepped)


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One step of one parameter with float32 states, in place.

    Parameters
    ----------
    optimizer_name
        "adam", "ademamix", "lamb", "momentum", "lars", "lion", "rmsprop", "adagrad".
    g, p
        Gradient and parameter, float32, bfloat16 or float16.
    state1, state2
        Of p's shape; AdEMAMix's state1 is `[2, *shape]`.
    step
        Counted from 1.
    gnorm_scale
        Factor on the gradient.
    unorm_vec, max_unorm
        With max_unorm > 0: `[1]` float32 that receives the update's squared norm, and its bound relative to
        the norm of p.
    """
    _update(
        optimizer_name, p, (g, state1, state2, None, None, unorm_vec, step),
        lr=lr, beta1=beta1, beta2=beta2, beta3=beta3, alpha=alpha, eps=eps, weight_decay=weight_decay,
        gnorm_scale=gnorm_scale, max_unorm=max_unorm, skip_zeros=skip_zeros,
    )  # fmt: skip


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """One step of one parameter with 8-bit states, in place: uint8 codes into qmap1 and qmap2, one float32
    scale per 256 elements in absmax1 and absmax2. Otherwise as `optimizer_update_32bit`.
    """
    _update(
        optimizer_name, p, (g, state1, state2, absmax1, absmax2, None, step),
        lr=lr, beta1=beta1, beta2=beta2, beta3=beta3, alpha=alpha, eps=eps, weight_decay=weight_decay,
        gnorm_scale=gnorm_scale, skip_zeros=skip_zeros, map1=qmap1, map2=qmap2,
    )  # fmt: skip
