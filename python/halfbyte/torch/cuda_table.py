"""Fused or dense on a GPU: up to how many rows of x a kernel multiplies straight from the codes.

Beyond, the weight is dequantized into memory for a moment and torch multiplies: cuBLAS reaches more of a GPU's peak
than any kernel that decodes on its way, and from some number of rows on that pays for the trip through memory.

    time(fused) = max(bytes of codes / bandwidth, 2 * rows_of_x * weights / peak) / efficiency
    time(dense) = 2.56 bytes * weights / bandwidth + 2 * rows_of_x * weights / peak of cuBLAS

The rows are known when an operator runs, and nothing else decides: the same call takes the same path always, and
under torch.compile the choice is inside the operator.

The table is data. `source` says where a number comes from; "estimate" means that nobody has run it on a GPU.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch

__all__ = ["TABLE", "Entry", "is_fused", "most_rows"]


class Entry(NamedTuple):
    """Holds for GPUs of this compute capability and newer ones, up to the next entry."""

    operator: str
    capability: tuple[int, int]
    dtype: str  # in which x is multiplied
    rows: int  # the most rows of x for the fused kernel
    source: str


# mma.sync is what these GPUs have; a kernel at half its peak wins while dequantizing costs more than that half.
_MMA = "estimate: half of the peak of mma.sync against dequantize + cuBLAS"
# The efficiency a fused kernel must have to win is 0.52, 0.69, 0.81, 0.90 at 256, 512, 1024, 2048 rows.
_WGMMA = "estimate: wgmma at 0.80 of cuBLAS"
_TRANSPOSED = "estimate: mma.sync, weights scaled before they are multiplied"
# No tensor core multiplies float32 exactly: threads do, and a row of x costs them as much as it costs cuBLAS.
_EXACT = "estimate: the weight is decoded again for each row of x"
_TURING = "estimate: threads multiply, as for float32"

TABLE: tuple[Entry, ...] = (
    Entry("linear_4bit", (7, 5), "float32", 8, _EXACT),
    Entry("linear_4bit", (7, 5), "bfloat16", 8, _TURING),
    Entry("linear_4bit", (7, 5), "float16", 8, _TURING),
    Entry("linear_4bit", (8, 0), "bfloat16", 128, _MMA),
    Entry("linear_4bit", (8, 0), "float16", 128, _MMA),
    Entry("linear_4bit", (9, 0), "bfloat16", 1024, _WGMMA),
    Entry("linear_4bit", (9, 0), "float16", 1024, _WGMMA),
    Entry("linear_4bit", (10, 0), "bfloat16", 64, _MMA),
    Entry("linear_4bit", (10, 0), "float16", 64, _MMA),
    Entry("linear_4bit", (12, 0), "bfloat16", 128, _MMA),
    Entry("linear_4bit", (12, 0), "float16", 128, _MMA),
    Entry("linear_4bit_grad_input", (7, 5), "float32", 4, _EXACT),
    Entry("linear_4bit_grad_input", (7, 5), "bfloat16", 4, _TURING),
    Entry("linear_4bit_grad_input", (7, 5), "float16", 4, _TURING),
    Entry("linear_4bit_grad_input", (8, 0), "bfloat16", 64, _TRANSPOSED),
    Entry("linear_4bit_grad_input", (8, 0), "float16", 64, _TRANSPOSED),
    Entry("linear_8bit", (7, 5), "float32", 8, _EXACT),
    Entry("linear_8bit", (7, 5), "bfloat16", 8, _EXACT),
    Entry("linear_8bit", (7, 5), "float16", 8, _EXACT),
    Entry("linear_8bit_grad_input", (7, 5), "float32", 4, _EXACT),
    Entry("linear_8bit_grad_input", (7, 5), "bfloat16", 4, _EXACT),
    Entry("linear_8bit_grad_input", (7, 5), "float16", 4, _EXACT),
)

# "fused" or "dense" overrules the table, for tests and measurements.
forced: str | None = os.environ.get("HALFBYTE_CUDA_PATH") or None
if forced not in (None, "fused", "dense"):
    raise ValueError(f"HALFBYTE_CUDA_PATH must be 'fused' or 'dense', got {forced!r}")


def most_rows(operator: str, capability: tuple[int, int], dtype: torch.dtype) -> int:
    """The number of rows in the table; 0 for a GPU older than all entries.

    Parameters
    ----------
    operator
        "linear_4bit", "linear_4bit_grad_input", "linear_8bit" (mode "exact"; LLM.int8() itself is always fused) or
        "linear_8bit_grad_input".
    capability
        Compute capability of the GPU.
    dtype
        In which x is multiplied.
    """
    name = str(dtype).removeprefix("torch.")
    fitting = [e for e in TABLE if e.operator == operator and e.dtype == name and e.capability <= capability]
    return max(fitting, key=lambda entry: entry.capability).rows if fitting else 0


@cache
def _most_rows_on(operator: str, device: int, dtype: torch.dtype) -> int:
    return most_rows(operator, torch.cuda.get_device_capability(device), dtype)


def is_fused(operator: str, x: torch.Tensor, dtype: torch.dtype, rows: int) -> bool:
    """Whether the operator, with `rows` rows of x on x's device, reads the codes itself."""
    if forced is not None:
        return forced == "fused"
    return rows <= _most_rows_on(operator, x.get_device(), dtype)
