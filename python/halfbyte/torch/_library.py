"""How an operator of the namespace `halfbyte` is made: one call that states schema, kernel, fake, gradient.

The kernels are opaque to torch (DLPack), therefore each needs a fake with the exact output shapes.
Kernels are registered for the CPU and for CUDA; another device gives torch's own "not implemented for" error.
A kernel for CUDA starts work on the current stream and asks the device nothing: no `.item()`, no branch on a value,
no copy from the host. Then every operator can be captured into a CUDA graph.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

LIBRARY = torch.library.Library("halfbyte", "DEF")


def define(
    schema: str,
    kernel: Callable,
    *,
    cuda: Callable | None = None,
    fake: Callable,
    save: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Define `halfbyte::<schema>`.

    Parameters
    ----------
    schema
        Name and signature in torch's schema language, without the namespace.
    kernel
        Gets plain tensors. The dispatcher leaves out arguments that have their default value, so kernels and
        fake must state the schema's defaults.
    cuda
        The kernel for CUDA tensors where it is another.
    fake
        Same arguments, returns empty tensors of the right shape and dtype.
    save, backward
        setup_context and backward of `torch.library.register_autograd`; none: not differentiable.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, kernel if cuda is None else cuda, "CUDA")
    torch.library.register_fake(f"halfbyte::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"halfbyte::{name}", backward, setup_context=save, lib=LIBRARY)


def blocks(n: int, blocksize: int) -> int:
    """ceil(n / blocksize), also for symbolic n."""
    return (n + blocksize - 1) // blocksize


def flat_bytes(packed: Tensor) -> Tensor:
    """Packed codes as one contiguous row, whatever shape and strides they come in (`[n, 1]`, `.t()`)."""
    return packed.reshape(-1)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast multiplies a CUDA tensor in; None where autocast is off."""
    if not x.is_cuda or not torch.is_autocast_enabled("cuda"):
        return None
    return torch.get_autocast_dtype("cuda")


@contextmanager
def _no_autocast() -> Iterator[None]:
    with torch.autocast("cuda", enabled=False):
        yield


def as_it_is(x: Tensor) -> AbstractContextManager[None]:
    """Operations of torch in the dtypes of their arguments, also where the caller's autocast is on."""
    return nullcontext() if autocast_dtype(x) is None else _no_autocast()
