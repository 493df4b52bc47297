"""How an operator of the namespace `halfbyte` is made: one call that states schema, kernel, fake, gradient.

The kernels are opaque to torch (DLPack), therefore each needs a fake with the exact output shapes.
Kernels are registered for the CPU; another device gives torch's own "not implemented for" error.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("halfbyte", "DEF")


def define(
    schema: str,
    *,
    cpu: Callable,
    fake: Callable,
    save: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Define `halfbyte::<schema>`.

    Parameters
    ----------
    schema
        Name and signature in torch's schema language, without the namespace.
    cpu
        The kernel; gets plain CPU tensors. The dispatcher leaves out arguments that have their default value,
        so kernel and fake must state the schema's defaults.
    fake
        Same arguments, returns empty tensors of the right shape and dtype.
    save, backward
        setup_context and backward of `torch.library.register_autograd`; none: not differentiable.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"halfbyte::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"halfbyte::{name}", backward, setup_context=save, lib=LIBRARY)


def blocks(n: int, blocksize: int) -> int:
    """ceil(n / blocksize), also for symbolic n."""
    return (n + blocksize - 1) // blocksize


def flat_bytes(packed: Tensor) -> Tensor:
    """Packed codes as one contiguous row, whatever shape and strides they come in (`[n, 1]`, `.t()`)."""
    return packed.reshape(-1)
