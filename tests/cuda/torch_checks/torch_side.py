"""What the checks share: weights, and how far a product may be from the exact one."""

from __future__ import annotations

import torch

CUDA = torch.device("cuda", 0)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # unit roundoff


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def assert_product(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, rounding: float = 0.0) -> None:
    """y is x w^T up to the rounding of its dtype, of float32 sums, and of what was multiplied.

    Each of the `depth` products and sums has a relative error of 2^-24, `rounding` is that of the factors, and the
    result is rounded to its dtype once.
    """
    x, w = x.double().cpu(), w.double().cpu()
    exact, sizes = x @ w.T, x.abs() @ w.abs().T
    assert y.dtype in UNIT
    bound = sizes * ((x.shape[-1] + 2) * 2.0**-24 + rounding) + exact.abs() * 2 * UNIT[y.dtype] + 1e-30
    error = (y.double().cpu() - exact).abs()
    assert (error <= bound).all(), float((error / bound).max())
