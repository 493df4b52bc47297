"""The benchmark of gpu.py: kernels beside their floors, torch's bfloat16 products and bitsandbytes.

Weights rotate: each call of a graph takes another copy, and all copies together are at least 512 MB, ten times the
L2 cache of an H200, so every weight comes from memory. Contestants of a row take turns. `seconds` is the median.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import gpu_floors
from benchmarks.gpu_device import Call, Device, median
from benchmarks.gpu_floors import Ceilings, Row, Shape

ROTATING_BYTES = 512 << 20


class Speed:
    def __init__(self, device: Device, remaining: Callable[[], float], peers: bool = True) -> None:
        import torch

        from halfbyte import _C

        self.torch, self.C, self.device, self.remaining = torch, _C, device, remaining
        self.rows: list[Row] = []
        if device.emulated:  # two copies of next to nothing
            self.shapes, self.x_rows, self.copies = (Shape(32, 64), Shape(20, 192)), (1, 16), lambda _: 2
        else:
            self.shapes, self.x_rows = gpu_floors.SHAPES, gpu_floors.ROWS
            self.copies = lambda nbytes: min(64, max(2, math.ceil(ROTATING_BYTES / nbytes)))
        self.bitsandbytes = self._bitsandbytes() if peers and not device.emulated else None

    @staticmethod
    def _bitsandbytes() -> Any:
        try:
            import bitsandbytes
        except Exception as why:  # whatever it dies of, it is not our business
            print(f"bitsandbytes: absent ({type(why).__name__}: {why})")
            return None
        return bitsandbytes

    def ceilings(self) -> Ceilings:
        """Bandwidth of a copy and rates of products, measured: what floors are made of."""
        torch = self.torch
        n = 1 << (12 if self.device.emulated else 29)
        source = torch.ones(n, dtype=torch.int16, device="cuda")
        target = torch.empty_like(source)
        copy = median(self.device.seconds([lambda: target.copy_(source)]))
        size = 16 if self.device.emulated else 8192
        a, b = (torch.randn(size, size, device="cuda").to(torch.bfloat16) for _ in range(2))
        product = median(self.device.seconds([lambda: torch.mm(a, b)]))
        rate = 2.0 * size**3
        int8 = 2 * rate / product  # twice that of bfloat16, unless torch can show
        try:
            c, d = ((t * 30).to(torch.int8) for t in (a, b))
            int8 = rate / median(self.device.seconds([lambda: torch._int_mm(c, d.t())]))
        except (RuntimeError, AttributeError) as why:
            print(f"int8 peak: taken as twice the bfloat16 one ({why})")
        return Ceilings(4.0 * n / copy, rate / product, int8)

    # ---- contests -------------------------------------------------------------------------------

    def contest(self, row: Row, contestants: dict[str, Sequence[Call]], eager: Sequence[str] = ()) -> Row:
        """Times everybody in turns, into row["<name>_seconds"]; who fails gets row["<name>_error"]."""
        if self.remaining() <= 0:
            row["error"] = "left out: no time"
            self.rows.append(row)
            return row
        times: dict[str, list[float]] = {}
        for _ in range(2):
            for name, calls in contestants.items():
                if f"{name}_error" in row:
                    continue
                try:
                    times.setdefault(name, []).extend(self.device.seconds(calls, graph=name not in eager))
                except Exception as problem:
                    row[f"{name}_error"] = f"{type(problem).__name__}: {str(problem)[:200]}"
                    row.setdefault("error", f"{name}: {row[f'{name}_error']}")
        for name, found in times.items():
            if f"{name}_error" not in row:
                row[f"{name}_seconds"] = median(found)
        best = [row[f"{name}_seconds"] for name in ("fused", "dense", "ours") if f"{name}_seconds" in row]
        if best:
            row["seconds"] = min(best)
        self.rows.append(gpu_floors.judge(row, self.shapes))
        return row

    def weights(self, shape: Shape) -> dict[str, list[Any]]:
        """Copies of a random weight in each format, different ones."""
        torch, C = self.torch, self.C
        found: dict[str, list[Any]] = {"bf16": [], "nf4": [], "nf4 nested": [], "int8": []}
        table = torch.as_tensor(C.map8("dynamic")).cuda()
        for kind, held in found.items():
            for _ in range(self.copies(gpu_floors.weight_bytes(kind, shape))):
                w = torch.randn(*shape, device="cuda").to(torch.bfloat16) * 0.02
                if kind == "bf16":
                    held.append(w)
                elif kind == "int8":
                    held.append(C.quantize_rows_int8(w)[:2])
                else:
                    packed, absmax = C.quantize_4bit(w, "nf4", 64)
                    nested: dict[str, Any] = {}
                    if kind == "nf4 nested":
                        absmax, outer, offset = C.nest_absmax(absmax)
                        nested = {"nested_absmax": outer, "nested_map": table, "nested_offset": float(offset)}
                    held.append((packed, absmax, nested))
        return found

    def products(self) -> None:
        for shape in self.shapes:
            weights = self.weights(shape)
            theirs = self.theirs(shape)
            for m in self.x_rows:
                self.products_of(shape, m, weights, theirs)
            self.codecs(shape, weights)
            del weights, theirs
            self.device.free()

    def products_of(self, shape: Shape, m: int, weights: dict[str, list[Any]], theirs: Any) -> None:
        torch, C = self.torch, self.C
        x = torch.randn(m, shape.depth, device="cuda").to(torch.bfloat16)
        dy = torch.randn(m, shape.rows, device="cuda").to(torch.bfloat16)

        def decoded(w: Any) -> Any:
            return C.dequantize_4bit(w[0], w[1], "nf4", 64, shape, torch.bfloat16, **w[2])

        def forward(kind: str) -> dict[str, Sequence[Call]]:
            return {
                "fused": [
                    lambda w=w: C.linear_4bit(x, w[0], w[1], "nf4", 64, shape, **w[2]) for w in weights[kind]
                ],
                "dense": [lambda w=w: torch.mm(x, decoded(w).t()) for w in weights[kind]],
            }

        def others(kind: str) -> dict[str, Sequence[Call]]:
            return {"bitsandbytes": theirs[kind](x)} if theirs else {}

        mm = {"torch": [lambda w=w: torch.mm(x, w.t()) for w in weights["bf16"]]}
        base = {"shape": list(shape), "rows": m, "dtype": "bfloat16"}
        plain = self.contest(
            self.row("nf4", base, operator="linear_4bit"), forward("nf4") | mm | others("nf4")
        )
        nested = self.contest(self.row("nf4 nested", base), forward("nf4 nested"))
        if plain.get("seconds") and nested.get("seconds"):
            nested["must"] = f"nf4 * {gpu_floors.NESTED_WITHIN}"
            good = nested["seconds"] <= gpu_floors.NESTED_WITHIN * plain["seconds"]
            nested["verdict"] = "PASS" if good else "FAIL"
        gradient = [lambda w=w: C.linear_4bit_grad_input(dy, w[0], w[1], "nf4", 64, shape, **w[2])
                    for w in weights["nf4"]]  # fmt: skip
        self.contest(
            self.row("nf4 grad_input", base, operator="linear_4bit_grad_input"),
            {"fused": gradient, "dense": [lambda w=w: torch.mm(dy, decoded(w)) for w in weights["nf4"]],
             "torch": [lambda w=w: torch.mm(dy, w) for w in weights["bf16"]]},
        )  # fmt: skip
        int8 = {"ours": [lambda w=w: C.linear_8bit(x, *w) for w in weights["int8"]]}
        self.contest(self.row("int8", base), int8 | mm | others("int8"), eager=("bitsandbytes",))

    def row(self, kind: str, base: Row, **more: Any) -> Row:
        format, shape, m = kind.removesuffix(" grad_input"), Shape(*base["shape"]), base["rows"]
        return {
            "kind": kind,
            "floor": gpu_floors.product_floor(format, shape, m, self.limits),
            **base,
            **more,
        }

    def theirs(self, shape: Shape) -> dict[str, Callable[[Any], list[Call]]] | None:
        """bitsandbytes' products with weights of its own, or None."""
        bnb, torch = self.bitsandbytes, self.torch
        if bnb is None:
            return None
        try:
            nbytes = gpu_floors.weight_bytes("nf4", shape)
            held = []
            for _ in range(self.copies(nbytes)):
                w = torch.randn(*shape, device="cuda").to(torch.bfloat16)
                held.append(bnb.functional.quantize_4bit(w, quant_type="nf4"))
            layers = []
            for _ in range(self.copies(gpu_floors.weight_bytes("int8", shape))):
                layer = bnb.nn.Linear8bitLt(
                    shape.depth, shape.rows, bias=False, has_fp16_weights=False, threshold=0.0
                )
                layers.append(layer.to(torch.float16).cuda())
        except Exception as why:
            print(f"bitsandbytes: cannot quantize ({type(why).__name__}: {why})")
            return None
        return {
            "nf4": lambda x: [lambda q=q, s=s: bnb.matmul_4bit(x, q.t(), quant_state=s) for q, s in held],
            "int8": lambda x: [lambda layer=layer: layer(x.to(torch.float16)) for layer in layers],
        }

    # ---- the rest -------------------------------------------------------------------------------

    def codecs(self, shape: Shape, weights: dict[str, list[Any]]) -> None:
        torch, C, bnb = self.torch, self.C, self.bitsandbytes
        floor = gpu_floors.codec_floor(shape, self.limits)
        base: Row = {"shape": list(shape), "rows": 0, "floor": floor}
        outs = [torch.empty(*shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)]

        def decode(i: int, w: Any) -> Call:
            return lambda: C.dequantize_4bit(
                w[0], w[1], "nf4", 64, shape, torch.bfloat16, out=outs[i % 2], **w[2]
            )

        for kind in ("nf4", "nf4 nested"):
            name = "dequantize" + kind.removeprefix("nf4")
            self.contest(base | {"kind": name}, {"ours": [decode(i, w) for i, w in enumerate(weights[kind])]})
        contestants = {"ours": [lambda w=w: C.quantize_4bit(w, "nf4", 64) for w in weights["bf16"]]}
        if bnb is not None:
            contestants["bitsandbytes"] = [lambda w=w: bnb.functional.quantize_4bit(w, quant_type="nf4")
                                           for w in weights["bf16"]]  # fmt: skip
        self.contest(base | {"kind": "quantize"}, contestants, eager=("bitsandbytes",))

    def optimizers(self) -> None:
        """8-bit Adam of bfloat16 parameters: one large tensor, and the many small ones of adapters."""
        torch, C = self.torch, self.C
        tables = {"map1": torch.as_tensor(C.map8("dynamic")).cuda(),
                  "map2": torch.as_tensor(C.map8("dynamic_unsigned")).cuda()}  # fmt: skip
        big, small, many = (2048, 256, 3) if self.device.emulated else (1 << 27, 1 << 16, 400)
        for name, sizes in (("Adam8, one tensor", [big]), (f"Adam8, {many} tensors", [small] * many)):
            tensors = []
            for n in sizes:
                p, g = (torch.randn(n, device="cuda").to(torch.bfloat16) for _ in range(2))
                states = [torch.full((n,), 127, dtype=torch.uint8, device="cuda") for _ in range(2)]
                scales = [torch.zeros(-(-n // 256), device="cuda") for _ in range(2)]
                tensors.append((p, g, *states, *scales, None, 7))

            def step(tensors: Any = tensors) -> None:
                C.optimizer_step("adam", tensors, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, **tables)

            floor = sum(sizes) * gpu_floors.ADAM8_BYTES / self.limits.bandwidth
            row = self.contest({"kind": name, "floor": floor, "parameters": sum(sizes)}, {"ours": [step]})
            if row.get("seconds") and sum(sizes) >= 1 << 24:
                row["must"] = f"floor / {gpu_floors.ADAM8_MUST}"
                row["verdict"] = "PASS" if floor / row["seconds"] >= gpu_floors.ADAM8_MUST else "FAIL"
        self.device.free()

    def host(self) -> None:
        """What a call costs the caller: a layer so small that the GPU has nothing to do."""
        torch, C = self.torch, self.C
        w = torch.randn(64, 64, device="cuda").to(torch.bfloat16)
        layer, x, out = C.Linear4bit.from_float(w), w[:1].contiguous(), w[:1].clone()
        calls: dict[str, Call] = {
            "_C.Linear4bit, out given": lambda: layer(x, out),
            "_C.Linear4bit": lambda: layer(x),
            "torch.mm": lambda: torch.mm(x, w),
        }
        for name, call in calls.items():
            row: Row = {"kind": f"host: {name}"}
            try:
                row["seconds"] = self.device.host_seconds(call)
            except Exception as problem:
                row["error"] = f"{type(problem).__name__}: {problem}"
            if "seconds" in row and name.endswith("given"):
                row["must"] = f"{gpu_floors.HOST_MUST * 1e6:.0f} us"
                row["verdict"] = "PASS" if row["seconds"] <= gpu_floors.HOST_MUST else "FAIL"
            self.rows.append(row)

    def run(self, only: Sequence[str]) -> dict[str, Any]:
        self.limits = self.ceilings()
        bandwidth, bf16, int8 = (limit / 1e12 for limit in self.limits)
        print(
            f"measured: copy {bandwidth:.2f} TB/s, bfloat16 {bf16:.0f} TFLOP/s, int8 {int8:.0f} TOP/s",
            flush=True,
        )
        for name in only:
            getattr(self, name)()
        gpu_floors.print_rows(self.rows)
        return {"ceilings": self.limits._asdict(), "rows": self.rows}
