"""What the cases of gpu_correct.py share: sizes, data, and how two results are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.gpu_device import Device

Check = Callable[
    [], float
]  # the worst error in units of its bound: 0 equal bits, at most 1 good, inf wrong bits


class Sizes(NamedTuple):
    """How much a run tries: `tiny` on the emulator and under compute-sanitizer, `full` on a GPU."""

    lengths: tuple[int, ...]
    blocksizes: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]  # rows x depth
    rows: tuple[int, ...]  # of x
    huge: bool  # more than 2^31 elements


TINY = Sizes((1, 63, 64, 2049), (64, 256), ((33, 192), (20, 129)), (1, 9, 17), False)
FULL = Sizes((1, 63, 64, 65, 4096, 100_003, 1 << 24), (32, 64, 128, 512, 4096),
             ((33, 192), (20, 129), (1024, 4096), (4096, 4096), (4097, 448), (14336, 4096)),
             (1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 65, 100, 200, 513), True)  # fmt: skip
SIZES = {"tiny": TINY, "full": FULL}


class Comparison:
    """One device, and the CPU beside it."""

    def __init__(self, device: Device, sizes: Sizes) -> None:
        import torch

        from halfbyte import _C

        self.torch, self.C, self.device, self.sizes = torch, _C, device, sizes
        self.unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
        self.dtypes = tuple(self.unit)

    # ---- data and comparison --------------------------------------------------------------------

    def data(self, *shape: int, dtype: Any = None, wild: bool = False) -> Any:
        torch = self.torch
        generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
        x = torch.randn(*shape, generator=generator)
        if wild and x.numel() > 200:  # every magnitude, zeros, a block of zeros, NaN and infinity
            flat = x.view(-1)
            flat *= 10.0 ** torch.randint(-30, 30, flat.shape, generator=generator)
            flat[torch.rand(flat.shape, generator=generator) < 0.2] = 0
            flat[64:200] = 0
            flat[-1], flat[0] = math.nan, -math.inf
        return x.to(dtype or torch.float32)

    def equal(self, ours: Any, theirs: Any) -> float:
        """Two tensors or tuples of them: 0 if bit for bit the same (any NaN is any other), else inf."""
        if isinstance(theirs, (tuple, list)):
            return max(self.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if theirs is None or isinstance(theirs, (int, float)):
            return 0.0 if ours == theirs else math.inf
        torch = self.torch
        a, b = torch.as_tensor(ours).cpu(), torch.as_tensor(theirs)
        if a.dtype != b.dtype or a.shape != b.shape:
            return math.inf
        if not a.is_floating_point():
            return 0.0 if torch.equal(a, b) else math.inf
        bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
        same = (a.contiguous().view(bits) == b.contiguous().view(bits)) | (a.isnan() & b.isnan())
        return 0.0 if bool(same.all()) else math.inf

    def on_both(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> float:
        """The function of tensors on the CPU and of the same on the GPU give the same bits."""
        torch = self.torch

        def there(x: Any) -> Any:
            return x.cuda() if isinstance(x, torch.Tensor) else x

        ours = function(*map(there, arguments), **{k: there(v) for k, v in keywords.items()})
        self.device.synchronize()
        return self.equal(ours, function(*arguments, **keywords))

    def within(self, y: Any, x: Any, weight: Any, dtype: Any, bias: Any = None) -> float:
        """y beside x @ weight.T + bias in float64, in units of the bound above."""
        torch = self.torch
        wide = [t.to(y.device, torch.float64) for t in (x, weight)]
        expected, size = wide[0] @ wide[1].t(), wide[0].abs() @ wide[1].abs().t()
        if bias is not None:
            bias = bias.to(y.device, torch.float64)
            expected, size = expected + bias, size + bias.abs()
        u = self.unit[dtype]
        bound = size * (2 * u * (dtype != torch.float32) + (x.shape[-1] / 16 + 40) * 2.0**-24)
        bound += expected.abs() * u * 1.01 + 1e-45
        ratio = (y.to(torch.float64) - expected).abs() / bound
        return float(ratio.nan_to_num(math.inf).max().cpu()) if ratio.numel() else 0.0
