"""The 256-entry maps of 8-bit block-wise quantization, and the 16-entry codebooks, as tensors.

A map is ascending and padded with zeros to 256 entries when it has fewer bits. The maps `_C.map8` knows
are these with default arguments; the general forms exist for callers who ask for other widths.

Sources: dynamic: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 2.1;
normal: Dettmers et al. 2023, "QLoRA", section 3; values as bitsandbytes makes them.
"""

import itertools

import torch
from torch import Tensor
from torch.compiler import is_compiling

from halfbyte import _C

_ENTRIES = 256
_DYNAMIC = tuple(_C.map8("dynamic").tolist())


def is_watched() -> bool:
    """Whether tensors made now may be a tracer's, which nobody else should get."""
    return is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def dynamic_map() -> Tensor:
    """The signed dynamic map, a tensor of its own."""
    return torch.tensor(_DYNAMIC, dtype=torch.float32)


def _padded(values: list[float]) -> Tensor:
    return torch.tensor(sorted(values + [0.0] * (_ENTRIES - len(values))), dtype=torch.float32)


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Equally spaced values in [-1, 1] (or [0, 1]); float32 `[256]`.

    A signed map with `add_zero` has an odd number of values, so that 0 is one of them.
    """
    n = 2**total_bits
    if signed and (add_zero or total_bits < 8):
        n -= 1
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, n)
    middle, zeros = n // 2, torch.zeros(_ENTRIES - n)
    return torch.cat([values[:middle], zeros, values[middle:]])


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """Dynamic exponent: decade i holds twice as many values as decade i - 1; float32 `[256]`.

    Within a decade [10^e / 10, 10^e] the interval is cut evenly and the middles of the pieces are taken.
    Two codes are spent on 0 and 1, so the signed map has no -1.
    """
    data: list[float] = []
    spare_bits = total_bits - 1 - max_exponent_bits
    for i in range(max_exponent_bits):
        pieces = int(2 ** (i + spare_bits + (0 if signed else 1)) + 1) - 1
        data += _decade(pieces, i - max_exponent_bits + 1, signed)
    if spare_bits > 0:
        data += _decade(2**spare_bits - 1, 0, signed)
    data += [0.0, 1.0]
    if len(data) != 2**total_bits:
        raise ValueError(
            f"create_dynamic_map: {max_exponent_bits} exponent bits in {total_bits} bits "
            f"(signed={signed}) give {len(data)} values, expected {2**total_bits}"
        )
    return _padded(data)


def _decade(pieces: int, exponent: int, signed: bool) -> list[float]:
    edges = torch.linspace(0.1, 1, pieces + 1, dtype=torch.float32)
    middles = (10.0**exponent * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    return middles + [-v for v in middles] if signed else middles


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> Tensor:
    """All values of a small float format (subnormals, no Inf or NaN), scaled to maximum 1; `[256]`."""
    if exponent_bits + precision_bits + int(signed) != total_bits:
        raise ValueError(
            f"create_fp8_map: {exponent_bits} exponent, {precision_bits} precision and {int(signed)} sign "
            f"bits are not total_bits = {total_bits}"
        )
    bias = 2 ** (exponent_bits - 1)
    data: list[float] = []
    for exponent, bits in itertools.product(
        range(2**exponent_bits), itertools.product((0, 1), repeat=precision_bits)
    ):
        fraction = sum(bit * 2.0 ** -(i + 1) for i, bit in enumerate(bits))
        value = fraction * 2.0**-bias if exponent == 0 else (1 + fraction) * 2.0 ** -(exponent - bias - 1)
        data += [value, -value] if signed else [value]
    code = _padded(data)
    return code / code.max()


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution (the idea behind NF4), scaled to maximum 1; float32 `[256]`.

    8 positive quantiles (7 without `use_extra_value`), 7 negative ones, and 0.
    """

    def quantiles(n: int) -> list[float]:
        return torch.special.ndtri(torch.linspace(offset, 0.5, n + 1)[:-1].double()).tolist()

    values = _padded(quantiles(8 if use_extra_value else 7) + [-v for v in quantiles(7)])
    return values / values.max()


_CODEBOOKS = {name: tuple(_C.codebook(name).tolist()) for name in ("nf4", "fp4")}
_INT4 = (7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7)
# AbnormalFloat 4 for block size 64: Yoshida 2023, arXiv 2306.06965.
_AF4_64 = (
    1.0, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164,
    0.0, -0.04934812, -0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1.0,
)  # fmt: skip


_on_gpu: dict[tuple[str, torch.device], Tensor] = {}


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The 16 values of a 4-bit type in code order, scaled to largest magnitude 1; float32 `[16]`.

    Parameters
    ----------
    typename
        "nf4", "fp4", "int4", or "af4" (block size 64 only).
    device
        Where the tensor goes; default the current accelerator if there is one, else the CPU.

    Raises
    ------
    NotImplementedError
        Unknown type, or af4 with another block size.
    """
    if typename in ("nf4", "fp4"):
        values = torch.tensor(_CODEBOOKS[typename], dtype=torch.float32)
    elif typename == "int4":
        values = torch.tensor(_INT4, dtype=torch.float32)
    elif typename == "af4" and blocksize == 64:
        values = torch.tensor(_AF4_64, dtype=torch.float32)
    else:
        raise NotImplementedError(f"get_4bit_type: no 4-bit type {typename!r} with block size {blocksize}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    values = values / values.abs().max()
    if device.type != "cuda" or is_watched():
        return values.to(device)
    # A copy of what is on the GPU already: the host would wait for one from its memory.
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (typename, device)
    if key not in _on_gpu:
        with torch.inference_mode(False):
            _on_gpu[key] = values.to(device)
    return _on_gpu[key].clone()
