"""Streams, graphs and waiting: every operation works on the caller's current stream, and the host never waits.

Each check prepares work so that a launch on the wrong stream, or without its place in the order, gives other numbers:
milliseconds of other work stand before the producer of an input on the same stream.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_device import Device

ROWS, DEPTH, M = 96, 256, 5


class Streams:
    def __init__(self, device: Device, scale: int = 1) -> None:
        import torch

        from halfbyte import _C

        self.torch, self.C, self.device = torch, _C, device
        self.rows, self.depth = ROWS * scale, DEPTH * scale
        self.w = torch.randn(self.rows, self.depth, generator=torch.Generator().manual_seed(1))
        self.x = torch.randn(M, self.depth, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)

    def operations(self) -> dict[str, Callable[[Any], Any]]:
        """Functions of one matrix [rows, depth] on the device; results depend on each of its elements."""
        torch, C = self.torch, self.C
        packed, absmax = (t.cuda() for t in C.quantize_4bit(self.w, "nf4", 64))
        codes, scale = (t.cuda() for t in C.quantize_rows_int8(self.w)[:2])
        table = torch.as_tensor(C.map8("dynamic")).cuda()
        shape = (self.rows, self.depth)

        def step(x: Any) -> Any:
            p, state = torch.zeros_like(x), torch.full(x.shape, 127, dtype=torch.uint8, device=x.device)
            scale = torch.zeros(-(-x.numel() // 256), device=x.device)
            C.optimizer_step(
                "momentum", [(p, x, state, None, scale, None, None, 1)], lr=0.1, beta1=0.9, map1=table
            )
            return p

        return {
            "quantize_4bit": lambda x: C.quantize_4bit(x, "nf4", 64),
            "dequantize_4bit": lambda x: C.dequantize_4bit(packed, x.abs().view(-1)[: absmax.numel()].contiguous(),
                                                           "nf4", 64, shape, torch.bfloat16),
            "linear_4bit": lambda x: C.linear_4bit(x[:M].to(torch.bfloat16), packed, absmax, "nf4", 64, shape),
            "linear_4bit 40 rows": lambda x: C.linear_4bit(x[:40].to(torch.bfloat16), packed, absmax, "nf4", 64, shape),
            "quantize_8bit": lambda x: C.quantize_8bit(x, table, 256),
            "quantize_rows_int8": lambda x: C.quantize_rows_int8(x)[:2],
            "linear_8bit": lambda x: C.linear_8bit(x[:M].to(torch.bfloat16), codes, scale, None, 1.0),
            "nest_absmax": lambda x: C.nest_absmax(x.abs().view(-1))[:2],
            "optimizer_step": step,
            "quantize_4bit of a view": lambda x: C.quantize_4bit(x.t(), "nf4", 64),
        }  # fmt: skip

    def same(self, a: Any, b: Any) -> bool:
        if isinstance(a, (tuple, list)):
            return all(self.same(x, y) for x, y in zip(a, b, strict=True))
        return bool(self.torch.equal(a.cpu(), b.cpu()))

    # ---- checks: each returns None or what is wrong ---------------------------------------------

    def own_stream(self, operation: Callable[[Any], Any]) -> str | None:
        """The input is made on a new stream, late; the operation, called at once on that stream, must see it."""
        old, new = self.w.cuda(), (self.w * 3 + 1).cuda()
        expected = operation(new)
        x = old.clone()
        self.device.join()
        with self.device.stream():
            self.device.busy()
            x.copy_(new)
            result = operation(x)
        self.device.join()
        return None if self.same(result, expected) else "it did not wait for its own stream's earlier work"

    def two_streams(self, operation: Callable[[Any], Any]) -> str | None:
        """Two streams at once, with different data: no shared scratch memory."""
        inputs = [(self.w * k).cuda() for k in (1.0, -2.0)]
        expected = [operation(x) for x in inputs]
        self.device.join()
        results: list[list[Any]] = [[], []]
        for _ in range(2 if self.device.emulated else 20):
            for k in range(2):
                with self.device.stream():
                    results[k].append(operation(inputs[k]))
        self.device.join()
        good = all(self.same(r, expected[k]) for k in range(2) for r in results[k])
        return None if good else "two streams disturb each other"

    def captured(self, operation: Callable[[Any], Any]) -> str | None:
        """A graph of the operation, replayed after its input has changed, gives the result of the new input."""
        x = self.w.cuda()
        held: list[Any] = []

        def call() -> None:
            held[:] = [operation(x)]

        replay = self.device.capture([call])
        x.copy_((self.w * -0.5 + 2).cuda())
        replay()
        self.device.join()
        result = held[0]
        return (
            None if self.same(result, operation(x)) else "a replayed graph gives another result than the call"
        )

    def waits(self, operation: Callable[[Any], Any]) -> str | None:
        x = self.w.cuda()
        operation(x)
        self.device.join()
        try:
            with self.device.no_synchronisation():
                operation(x)
        except (RuntimeError, AssertionError) as problem:
            return f"the host waits for the device: {problem}"
        return None

    def repeats(self, operation: Callable[[Any], Any]) -> str | None:
        x = self.w.cuda()
        first = operation(x)
        for _ in range(2 if self.device.emulated else 30):
            if not self.same(operation(x), first):
                return "not deterministic"
        return None

    def second_device(self, operation: Callable[[Any], Any]) -> str | None:
        """Tensors of cuda:1 while cuda:0 is current; skipped by the caller where there is one device only."""
        torch = self.torch
        x = self.w.to("cuda:1")
        expected = self.C.quantize_4bit(self.w, "nf4", 64)
        result = self.C.quantize_4bit(x, "nf4", 64)
        if any(t.device != torch.device("cuda", 1) for t in result) or torch.cuda.current_device() != 0:
            return "outputs on another device, or the current device has changed"
        return None if self.same(result, expected) else "wrong numbers on a second device"

    def alive(self) -> str | None:
        """After all that a product still is what the CPU says (a sticky error would show here)."""
        C = self.C
        parts = C.quantize_4bit(self.w, "nf4", 64)
        y = (
            C.linear_4bit(self.x.cuda(), *(p.cuda() for p in parts), "nf4", 64, (self.rows, self.depth))
            .cpu()
            .double()
        )
        expected = C.linear_4bit(self.x, *parts, "nf4", 64, (self.rows, self.depth)).double()
        error = float((y - expected).abs().max() / expected.abs().max())
        return None if math.isfinite(error) and error < 0.02 else f"relative error {error}"


def run(device: Device, remaining: Callable[[], float]) -> dict[str, Any]:
    streams = Streams(device, 1 if device.emulated else 8)
    checks = {
        "own stream": streams.own_stream,
        "two streams": streams.two_streams,
        "graph": streams.captured,
        "no waiting": streams.waits,
        "deterministic": streams.repeats,
    }
    failed: dict[str, str] = {}
    done = 0
    operations = streams.operations()
    for name, operation in operations.items():
        for kind, check in checks.items():
            if remaining() <= 0:
                failed[f"{name}, {kind}"] = "left out: no time"
                continue
            try:
                problem = check(operation)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                if isinstance(error, NameError | AttributeError):
                    traceback.print_exc()
            done += 1
            if problem:
                failed[f"{name}, {kind}"] = problem
    extra: list[tuple[str, Callable[[], str | None]]] = [("alive", streams.alive)]
    if device.torch.cuda.device_count() > 1:
        extra.insert(0, ("second device", lambda: streams.second_device(operations["quantize_4bit"])))
    for name, last in extra:
        try:
            problem = last()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        done += 1
        if problem:
            failed[name] = problem
    for name, why in failed.items():
        print(f"FAIL {name}: {why}")
    print(f"streams: {done} checks, {len(failed)} failed", flush=True)
    return {"done": done, "failed": failed}
