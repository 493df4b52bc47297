"""Every operation on the GPU beside the same on the CPU: equal bits where the arithmetic is exact, else a bound.

Codecs (quantize, dequantize, nested scales, int8 rows, gather) must give the bits of the CPU's kernels, which
tests/c proves right. Products are held to float64 of the decoded weights: with u the unit roundoff of x's dtype, the
codebook's entries or the weights are rounded to it (2 u of every product, which covers the dense path too), sums are
float32 (at most depth / 16 + 40 roundings of 2^-24), and y is rounded once. Optimizer steps: the CPU's bits.
"""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu_checks import SIZES, Check, Comparison
from benchmarks.gpu_device import Device


class Cases(Comparison):
    """All checks of one device, by name."""

    # ---- codecs ---------------------------------------------------------------------------------

    def codecs(self) -> Iterator[tuple[str, Check]]:
        C, sizes = self.C, self.sizes
        for n, dtype, kind in itertools.product(sizes.lengths, self.dtypes, ("nf4", "fp4")):
            for blocksize in sizes.blocksizes:
                x = self.data(n, dtype=dtype, wild=True)
                name = f"{kind} {dtype} {n} blocks of {blocksize}"
                yield (
                    f"quantize_4bit {name}",
                    lambda x=x, k=kind, b=blocksize: self.on_both(C.quantize_4bit, x, k, b),
                )
                packed, absmax = C.quantize_4bit(x, kind, blocksize)
                yield (
                    f"dequantize_4bit {name}",
                    lambda p=packed, a=absmax, k=kind, b=blocksize, n=n, d=dtype: self.on_both(
                        C.dequantize_4bit, p, a, k, b, (n,), d
                    ),
                )
        for n in sizes.lengths:
            absmax = self.data(n).abs()
            yield f"nest_absmax {n}", lambda a=absmax: self.nest(a)
            x = self.data(n, dtype=self.torch.bfloat16, wild=True)
            for name in ("dynamic", "dynamic_unsigned", "linear"):
                table = self.torch.as_tensor(C.map8(name))
                yield (
                    f"quantize_8bit {name} {n}",
                    lambda x=x, t=table: self.on_both(C.quantize_8bit, x, t, 256),
                )
                codes, scale = C.quantize_8bit(x, table, 256)
                yield (
                    f"dequantize_8bit {name} {n}",
                    lambda c=codes, s=scale, t=table: self.on_both(
                        C.dequantize_8bit, c, s, t, 256, self.torch.bfloat16
                    ),
                )
        for (rows, depth), dtype in itertools.product(sizes.matrices, self.dtypes):
            x = self.data(rows, depth, dtype=dtype)
            for threshold in (0.0, 2.5):
                yield (
                    f"quantize_rows_int8 {rows} x {depth} {dtype} threshold {threshold}",
                    lambda x=x, t=threshold: self.on_both(C.quantize_rows_int8, x, t),
                )
            codes, scale, _ = C.quantize_rows_int8(x)
            yield (
                f"dequantize_rows_int8 {rows} x {depth} {dtype}",
                lambda c=codes, s=scale, d=dtype: self.on_both(C.dequantize_rows_int8, c, s, d),
            )
        for rows, depth in sizes.matrices:
            x = self.data(rows, depth)
            yield (
                f"search {rows} x {depth}",
                lambda x=x: self.on_both(C.quantize_4bit, x, "nf4", 64, "search"),
            )
            yield f"strided {rows} x {depth}", lambda x=x: self.strided(x)
        if sizes.huge:
            yield "dequantize_4bit behind 2^31 elements", self.huge

    def nest(self, absmax: Any) -> float:
        ours, theirs = self.C.nest_absmax(absmax.cuda()), self.C.nest_absmax(absmax)
        offset = ours[2] if isinstance(ours[2], float) else float(ours[2])
        return max(self.equal(ours[:2], theirs[:2]), self.equal(offset, float(theirs[2])))

    def strided(self, x: Any) -> float:
        """A transposed view, every second row, and a view that begins off any alignment."""
        C, there = self.C, x.cuda()
        views = (lambda t: t.t(), lambda t: t[::2], lambda t: t.view(-1)[1:])
        return max(
            self.equal(
                C.quantize_4bit(view(there), "nf4", 64), C.quantize_4bit(view(x).contiguous(), "nf4", 64)
            )
            for view in views
        )

    def huge(self) -> float:
        torch, n = self.torch, (1 << 31) + 4096
        packed = torch.zeros(n // 2, dtype=torch.uint8, device="cuda")
        absmax = torch.ones(n // 64, device="cuda")
        packed[-2048:] = torch.arange(2048, device="cuda").to(torch.uint8)
        absmax[-64:] = torch.arange(64, device="cuda") + 1.0
        ours = self.C.dequantize_4bit(packed, absmax, "nf4", 64, (4096,), torch.float32, start=n - 4096)
        tail = packed[-2048:].cpu(), absmax[-64:].cpu()
        return self.equal(ours, self.C.dequantize_4bit(*tail, "nf4", 64, (4096,), torch.float32))

    # ---- products -------------------------------------------------------------------------------

    def weight4(self, rows: int, depth: int, nested: bool) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Codes and scales on the GPU, keywords of the nested ones, and the decoded weight on the CPU."""
        C, torch = self.C, self.torch
        packed, absmax = C.quantize_4bit(self.data(rows, depth), "nf4", 64)
        keywords: dict[str, Any] = {}
        if nested:
            absmax, outer, offset = C.nest_absmax(absmax)
            keywords = {"nested_absmax": outer, "nested_offset": float(offset)}
            keywords["nested_map"] = torch.as_tensor(C.map8("dynamic"))
        decoded = C.dequantize_4bit(packed, absmax, "nf4", 64, (rows, depth), torch.float32, **keywords)
        there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        return (packed.cuda(), absmax.cuda()), there, decoded

    def products(self) -> Iterator[tuple[str, Check]]:
        for (rows, depth), nested in itertools.product(self.sizes.matrices, (False, True)):
            weight = self.weight4(rows, depth, nested)
            for m, dtype in itertools.product(self.sizes.rows, self.dtypes):
                name = f"{m} of {rows} x {depth} {dtype}{' nested' if nested else ''}"
                yield f"linear_4bit {name}", lambda w=weight, m=m, d=dtype: self.linear4(w, m, d)
                yield f"linear_4bit_grad_input {name}", lambda w=weight, m=m, d=dtype: self.grad4(w, m, d)
        for (rows, depth), m in itertools.product(self.sizes.matrices, self.sizes.rows):
            yield f"matmul_int8 {m} of {rows} x {depth}", lambda r=rows, d=depth, m=m: self.matmul8(r, d, m)
            for dtype in self.dtypes:
                name = f"{m} of {rows} x {depth} {dtype}"
                yield (
                    f"linear_8bit_grad_input {name}",
                    lambda r=rows, d=depth, m=m, t=dtype: self.grad8(r, d, m, t),
                )
            for dtype, threshold in itertools.product(self.dtypes, (0.0, 2.5)):
                name = f"{m} of {rows} x {depth} {dtype}"
                yield (
                    f"linear_8bit {name} threshold {threshold}",
                    lambda r=rows, d=depth, m=m, t=dtype, h=threshold: self.linear8(r, d, m, t, h),
                )

        yield from self.only_cuda()

    def only_cuda(self) -> Iterator[tuple[str, Check]]:
        """Experts, tables and slices, which on the CPU are put together from other calls."""
        for rows, depth in self.sizes.matrices[:2]:
            for m, nested in itertools.product(self.sizes.rows, (False, True)):
                name = f"{m} of 3 x {rows} x {depth}{' nested' if nested else ''}"
                yield (
                    f"grouped_linear_4bit {name}",
                    lambda r=rows, d=depth, m=m, n=nested: self.grouped4(r, d, m, n),
                )
                yield f"grouped_linear_8bit {name}", lambda r=rows, d=depth, m=m: self.grouped8(r, d, m)
            for nested in (False, True):
                name = f"{rows} x {depth}{' nested' if nested else ''}"
                yield f"gather_4bit {name}", lambda r=rows, d=depth, n=nested: self.gather(r, d, n)
        yield "slices of rows", self.slices

    def grouped4(self, rows: int, depth: int, m: int, nested: bool) -> float:
        """Three experts, of which the second gets no row and the third those behind the middle."""
        torch = self.torch
        parts, keywords, decoded = self.weight4(3 * rows, depth, nested)
        weights = decoded.view(3, rows, depth)
        ends = [m // 2, m // 2, m]
        offsets = torch.tensor(ends, dtype=torch.int32).cuda()
        worst = 0.0
        for transposed, dtype in itertools.product((False, True), self.dtypes):
            x = self.data(m, rows if transposed else depth, dtype=dtype)
            y = self.C.grouped_linear_4bit(
                x.cuda(), offsets, *parts, "nf4", 64, (3, rows, depth), transposed, **keywords
            )
            for expert, begin, end in ((0, 0, ends[0]), (2, ends[1], m)):
                w = weights[expert].t() if transposed else weights[expert]
                worst = max(worst, self.within(y[begin:end], x[begin:end], w, dtype))
        return worst

    def grouped8(self, rows: int, depth: int, m: int) -> float:
        """Beside one expert's product at a time."""
        torch, C = self.torch, self.C
        codes, scale, _ = (
            t if t is None else t.cuda() for t in C.quantize_rows_int8(self.data(3 * rows, depth))
        )
        x = self.data(m, depth, dtype=torch.bfloat16).cuda()
        codes, scale, half = codes.view(3, rows, depth), scale.view(3, rows), m // 2
        y = C.grouped_linear_8bit(x, torch.tensor([half, half, m]).cuda(), codes, scale)
        expected = [C.linear_8bit(x[:half], codes[0], scale[0]), C.linear_8bit(x[half:], codes[2], scale[2])]
        return self.equal(y, torch.cat(expected).cpu())

    def gather(self, rows: int, depth: int, nested: bool) -> float:
        torch = self.torch
        parts, keywords, decoded = self.weight4(rows, depth, nested)
        index = torch.tensor([[0, rows - 1, 1], [-1, -rows, rows // 2]])
        out = self.C.gather_4bit(index.cuda(), *parts, "nf4", 64, (rows, depth), torch.float32, **keywords)
        outside = self.C.gather_4bit(
            torch.tensor([rows, -rows - 1]).cuda(), *parts, "nf4", 64, (rows, depth), **keywords
        )
        wrong = 0.0 if bool(torch.isnan(outside).all()) else math.inf
        return max(self.equal(out, decoded[index]), wrong)

    def slices(self) -> float:
        """Rows cut out of an object with nested scales, from inside a nested block."""
        x = self.data(40, 512)
        theirs = self.C.Params4bit.quantize(x, double_quant=True)
        ours = self.C.Params4bit.quantize(x.cuda(), double_quant=True)
        pairs = ((0, 40), (3, 11), (33, 40))
        return max(
            self.equal(ours[a:b].dequantize(), self.torch.as_tensor(theirs[a:b].dequantize()))
            for a, b in pairs
        )

    def linear4(self, weight: Any, m: int, dtype: Any) -> float:
        parts, nested, decoded = weight
        rows, depth = decoded.shape
        x, bias = self.data(m, depth, dtype=dtype), self.data(rows, dtype=dtype)
        y = self.C.linear_4bit(x.cuda(), *parts, "nf4", 64, (rows, depth), bias.cuda(), **nested)
        return self.within(y, x, decoded, dtype, bias)

    def grad4(self, weight: Any, m: int, dtype: Any) -> float:
        parts, nested, decoded = weight
        rows, depth = decoded.shape
        dy = self.data(m, rows, dtype=dtype)
        dx = self.C.linear_4bit_grad_input(dy.cuda(), *parts, "nf4", 64, (rows, depth), **nested)
        return self.within(dx, dy, decoded.t(), dtype)

    def matmul8(self, rows: int, depth: int, m: int) -> float:
        codes = [self.C.quantize_rows_int8(self.data(n, depth))[0] for n in (m, rows)]
        return self.on_both(self.C.matmul_int8, *codes)

    def grad8(self, rows: int, depth: int, m: int, dtype: Any) -> float:
        codes, scale, _ = self.C.quantize_rows_int8(self.data(rows, depth))
        dy = self.data(m, rows, dtype=dtype)
        dx = self.C.linear_8bit_grad_input(dy.cuda(), codes.cuda(), scale.cuda())
        weight = codes.to(self.torch.float64) * scale.to(self.torch.float64)[:, None] / 127
        return self.within(dx, dy, weight.t(), dtype)

    def linear8(self, rows: int, depth: int, m: int, dtype: Any, threshold: float) -> float:
        """Beside the CPU's, whose integers are the same: what remains are float32 sums and the rounding of y."""
        torch, C = self.torch, self.C
        codes, scale, _ = C.quantize_rows_int8(self.data(rows, depth))
        x = self.data(m, depth, dtype=dtype)
        y = C.linear_8bit(x.cuda(), codes.cuda(), scale.cuda(), None, threshold)
        expected = C.linear_8bit(x, codes, scale, None, threshold).to(torch.float64)
        weight = codes.to(torch.float64) * scale.to(torch.float64)[:, None] / 127
        size = x.to(torch.float64).abs() @ weight.abs().t()
        bound = size * (depth / 16 + 40) * 2.0**-24 + expected.abs() * 2.02 * self.unit[dtype] + 1e-45
        return float(((y.cpu().to(torch.float64) - expected).abs() / bound).nan_to_num(math.inf).max())

    # ---- optimizers -----------------------------------------------------------------------------

    def optimizers(self) -> Iterator[tuple[str, Check]]:
        for optimizer, bits in itertools.product(
            ("adam", "ademamix", "momentum", "lion", "rmsprop", "adagrad"), (8, 32)
        ):
            for dtype in self.dtypes:
                yield (
                    f"{optimizer} {bits} bits {dtype}",
                    lambda o=optimizer, b=bits, d=dtype: self.step(o, b, d),
                )

    def step(self, optimizer: str, bits: int, dtype: Any) -> float:
        """Two steps of several tensors in one call."""
        torch = self.torch
        settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "beta3": 0.9999, "alpha": 5.0, "eps": 1e-8}
        settings["weight_decay"] = 0.01
        results = []
        maps = {"map1": "dynamic", "map2": "dynamic_unsigned"} if bits == 8 else {}
        for place in ("cpu", "cuda"):
            tensors = []
            for n in self.sizes.lengths[:4]:
                p, g = (self.data(n, dtype=dtype).to(place) for _ in range(2))
                kind = torch.uint8 if bits == 8 else torch.float32
                blocks = -(-n // 256) if bits == 8 else 0
                # AdEMAMix's first state is a fast and a slow moment.
                shapes = ((2, n) if optimizer == "ademamix" else (n,), (n,))
                empty = 127 if bits == 8 else 0
                states = [torch.full(shape, empty, dtype=kind, device=place) for shape in shapes]
                scales = [
                    torch.zeros(*shape[:-1], blocks, device=place) if bits == 8 else None for shape in shapes
                ]
                second = optimizer in ("adam", "ademamix")
                tensors.append([p, g, states[0], states[1] if second else None, scales[0],
                                scales[1] if second else None, None])  # fmt: skip
            for step in (1, 2):
                self.C.optimizer_step(optimizer, [(*t, step) for t in tensors], **settings, **maps)
            results.append([t for each in tensors for t in each if t is not None])
        self.device.synchronize()
        return self.equal(results[1], results[0])

    def groups(self) -> dict[str, Callable[[], Iterator[tuple[str, Check]]]]:
        return {"codecs": self.codecs, "products": self.products, "optimizers": self.optimizers}


def run(device: Device, size: str, remaining: Callable[[], float], only: str = "") -> dict[str, Any]:
    """All cases whose name contains `only`; the result counts them and lists those that failed or were left out."""
    worst: dict[str, float] = {}
    failed: dict[str, str] = {}
    done = left_out = 0
    for group, cases in Cases(device, SIZES[size]).groups().items():
        for name, check in cases():
            if only not in name:
                continue
            if remaining() <= 0:
                left_out += 1
                continue
            try:
                error = check()
                worst[group] = max(worst.get(group, 0.0), error)
                if not error <= 1:
                    failed[name] = f"{error:.3g} times the bound"
            except Exception as problem:  # a report of all cases is worth more than the first problem
                failed[name] = f"{type(problem).__name__}: {problem}"
                if not isinstance(problem, (RuntimeError, TypeError, ValueError, NotImplementedError)):
                    traceback.print_exc()
            done += 1
        device.free()
        print(
            f"{group}: worst {worst.get(group, 0.0):.3g} of the bound, {len(failed)} failed so far",
            flush=True,
        )
    for name, why in list(failed.items())[:40]:
        print(f"FAIL {name}: {why}")
    return {"done": done, "left_out": left_out, "failed": failed, "worst": worst}
