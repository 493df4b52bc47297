"""The contests that need torch, by name. compare.py runs them in a process of their own, OMP_NUM_THREADS set before."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import halfbyte.torch as ht
from halfbyte import _C, shim
from halfbyte.bench import ggml, turns
from halfbyte.bench.compare import Options
from halfbyte.bench.layers import cache_bytes, peak_of, read_of
from halfbyte.bench.turns import Entry, Row, measure, rows
from halfbyte.torch import optim
from halfbyte.torch.weight_memory import empty_weight

BLOCKSIZE = 64
ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
DENSE_ROWS = (1, 2, 4, 8, 16)
OPTIMIZER_ELEMENTS = 4_194_304
F32, BF16 = torch.float32, torch.bfloat16


def bitsandbytes() -> Any:
    """The real package, or None."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    module = importlib.import_module("bitsandbytes")
    return None if shim.is_ours(module) else module


def laid(part: torch.Tensor) -> torch.Tensor:
    """A copy of a part of a weight, in the memory where our layers keep theirs."""
    return empty_weight(part.numel(), part.dtype).view(part.shape).copy_(part)


class Bench:
    """What all contests share: sizes, weights, the ruler."""

    def __init__(self, options: Options, threads: int) -> None:
        self.rows, self.depth, self.seconds = options.size, options.depth, options.seconds
        self.cold_bytes = 4 * cache_bytes() if self.rows * self.depth >= 1 << 22 else 0
        self.options, self.threads = options, threads
        self.room = np.ones(max(self.cold_bytes, 1 << 24), np.uint8)
        torch.manual_seed(0)
        self.weight = torch.randn(self.rows, self.depth) * 0.02
        self.multiply_adds = 2 * self.rows * self.depth

    def copies(self, make: Callable[[], Any], nbytes: int) -> Callable[[int], Any]:
        """`made(i)`: one of so many results of make() that they do not fit in the cache."""
        made = [make() for _ in range(self.cold_bytes // nbytes + 1)]
        return lambda i: made[i % len(made)]

    def read(self, nbytes: int) -> Entry:
        """The ruler: reads as many bytes, never the same ones soon."""
        return read_of(self.room, nbytes)

    # ---- layers, each a function i -> f(x) with DRAM-cold weights -------------------------------------

    def halfbyte_4bit(self, quant_type: str = "nf4", compute: str = "float32", nested: bool = False) -> tuple:
        packed, absmax = (
            torch.from_dlpack(torch.as_tensor(part))
            for part in _C.quantize_4bit(self.weight, quant_type, BLOCKSIZE)
        )
        nesting: dict[str, Any] = {}
        if nested:
            absmax, nested_absmax, offset = _C.nest_absmax(absmax)
            nesting = {
                "nested_absmax": nested_absmax,
                "nested_map": _C.map8("dynamic"),
                "nested_offset": offset,
            }
        nbytes = packed.nbytes + absmax.nbytes

        def make() -> Any:
            weight = _C.Params4bit.from_parts(
                laid(packed),
                laid(absmax),
                quant_type=quant_type,
                blocksize=BLOCKSIZE,
                shape=(self.rows, self.depth),
                **nesting,
            )
            return _C.Linear4bit(weight, compute=compute)

        return self.copies(make, nbytes), nbytes

    def halfbyte_int8(self, mode: str) -> tuple:
        parts = _C.Int8Params.quantize(self.weight).parts()
        codes, scale = torch.as_tensor(parts["codes"]), torch.as_tensor(parts["scale"])

        def make() -> Any:
            return _C.Linear8bit(_C.Int8Params.from_parts(codes.clone(), scale.clone()), mode=mode)

        return self.copies(make, codes.nbytes), codes.nbytes

    def dense_weight(self, dtype: torch.dtype) -> Callable[[int], torch.Tensor]:
        weight = self.weight.to(dtype)
        return self.copies(weight.clone, weight.nbytes)

    def dense(self, dtype: torch.dtype) -> tuple:
        take = self.dense_weight(dtype)
        return (lambda i: lambda x: F.linear(x, take(i))), take(0).nbytes

    def numpy_dense(self) -> tuple:
        take = self.dense_weight(F32)
        return (lambda i: lambda x: x.numpy() @ take(i).numpy().T), take(0).nbytes

    def int4pack(self) -> tuple:
        codes = torch.randint(0, 16, (self.rows, self.depth), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.ones(self.depth // BLOCKSIZE, self.rows, 2, dtype=BF16)
        take = self.copies(lambda: (packed.clone(), scales.clone()), packed.nbytes + scales.nbytes)

        def layer(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
            weight, scale = take(i)
            return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, BLOCKSIZE, scale)

        return layer, packed.nbytes + scales.nbytes

    def bitsandbytes_4bit(
        self, bnb: Any, dtype: torch.dtype, quant_type: str = "nf4", *, fused: bool = True
    ) -> tuple:
        """Its layer; not `fused`: as on a processor without AVX-512 BF16, where it dequantizes the whole weight."""
        layer = bnb.nn.Linear4bit(
            self.depth, self.rows, False, dtype, compress_statistics=False, quant_type=quant_type
        )
        layer.weight = bnb.nn.Params4bit(
            self.weight.clone(), requires_grad=False, compress_statistics=False, quant_type=quant_type
        )
        layer = layer.to("cpu").eval()
        if not fused:
            layer.support_avx512bf16_for_cpu = False
        nbytes = layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes

        def make() -> Any:
            made = copy.deepcopy(layer)
            with torch.no_grad():  # the first call converts the weights
                made(torch.zeros(1, self.depth, dtype=dtype))
            return made

        return self.copies(make, nbytes), nbytes

    def bitsandbytes_int8(self, bnb: Any) -> tuple:
        layer = bnb.nn.Linear8bitLt(self.depth, self.rows, False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(self.weight.clone(), requires_grad=False, has_fp16_weights=False)
        layer = layer.to("cpu").eval()
        nbytes = self.rows * self.depth
        return self.copies(lambda: copy.deepcopy(layer), nbytes), nbytes

    def ggml_4bit(self, counts: tuple[int, ...]) -> Callable[[int], Entry] | None:
        """`made(m)`: an entry with m rows of x, each of `counts`; None without llama-cpp-python."""
        if ggml.installed() is None or self.depth % ggml.Q4_BLOCK:
            return None
        library = ggml.Ggml(self.threads)
        packed = library.quantize(self.weight.numpy())
        x = {m: np.random.default_rng(m).standard_normal((m, self.depth), np.float32) for m in counts}

        def make() -> ggml.Layer:
            layer = library.layer(packed)
            for rows_of_x in x.values():
                layer.prepare(rows_of_x)
            return layer

        take = self.copies(make, packed.nbytes)
        kind = " repack" if take(0).buffer == "CPU_REPACK" else ""

        def made(m: int) -> Entry:
            entry = Entry(f"ggml q4_0{kind}, int8 x", lambda i: take(i).run(m))
            entry.bytes = packed.nbytes if m <= 4 else 0
            return entry

        return made


def entry(name: str, layer: tuple, x: torch.Tensor, bench: Bench, operations: bool = False) -> Entry:
    take, nbytes = layer
    return Entry(
        name,
        lambda i: take(i)(x),
        bytes=nbytes if len(x) <= 4 else 0,
        operations=bench.multiply_adds * len(x) if operations else 0,
    )


def one_row(bench: Bench, bnb: Any, title: str = "one row") -> list[Row]:
    x, half = torch.randn(1, bench.depth), torch.randn(1, bench.depth).to(BF16)
    nf4 = bench.halfbyte_4bit()
    entries = [
        bench.read(nf4[1]),
        entry("halfbyte nf4 float32", nf4, x, bench),
        entry("halfbyte nf4 bfloat16", bench.halfbyte_4bit(compute="bfloat16"), half, bench),
        entry("halfbyte nf4 int16", bench.halfbyte_4bit(compute="int16"), x, bench),
        entry("halfbyte nf4 int8", bench.halfbyte_4bit(compute="int8"), x, bench),
        entry("halfbyte nf4 float32, nested scales", bench.halfbyte_4bit(nested=True), x, bench),
        entry("halfbyte fp4 float32", bench.halfbyte_4bit("fp4"), x, bench),
        entry("halfbyte int8 dynamic", bench.halfbyte_int8("dynamic"), x, bench),
        entry("halfbyte int8 exact", bench.halfbyte_int8("exact"), x, bench),
        entry("torch F.linear float32", bench.dense(F32), x, bench),
        entry("torch F.linear bfloat16", bench.dense(BF16), half, bench),
        entry("torch int4pack bfloat16", bench.int4pack(), half, bench),
        entry("numpy matmul float32", bench.numpy_dense(), x, bench),
    ]
    after = entry("halfbyte nf4 float32, right after torch", nf4, x, bench)
    busy = torch.randn(1 << 20)
    after.before = lambda: busy.add_(1.0)  # leaves torch's threads spinning
    entries.append(after)
    if bnb is not None:
        entries += [
            entry("bitsandbytes nf4 float32", bench.bitsandbytes_4bit(bnb, F32), x, bench),
            entry("bitsandbytes nf4 bfloat16", bench.bitsandbytes_4bit(bnb, BF16), half, bench),
            entry("bitsandbytes fp4 bfloat16", bench.bitsandbytes_4bit(bnb, BF16, "fp4"), half, bench),
            entry("bitsandbytes int8", bench.bitsandbytes_int8(bnb), x.half(), bench),
        ]
        for name, dtype, of_x in (("float32", F32, x), ("bfloat16", BF16, half)):
            layer = bench.bitsandbytes_4bit(bnb, dtype, fused=False)
            entries.append(entry(f"bitsandbytes nf4 {name}, not fused", layer, of_x, bench))
    q4_0 = bench.ggml_4bit((1,))
    if q4_0 is not None:
        entries.append(q4_0(1))
    with torch.no_grad():
        measure(entries, bench.seconds * 3)
    return rows(title, entries, "read", of_read=entries[0])


def many_rows(
    bench: Bench, bnb: Any, counts: Iterable[int] = ROW_COUNTS, title: str = "{} rows"
) -> list[Row]:
    nf4, nf4_bf16 = bench.halfbyte_4bit(), bench.halfbyte_4bit(compute="bfloat16")
    nf4_int16, nf4_int8 = bench.halfbyte_4bit(compute="int16"), bench.halfbyte_4bit(compute="int8")
    dense, dense_bf16, int4pack = bench.dense(F32), bench.dense(BF16), bench.int4pack()
    fused = None if bnb is None else bench.bitsandbytes_4bit(bnb, BF16)
    numpy_dense = bench.numpy_dense()
    q4_0 = bench.ggml_4bit(tuple(counts))
    table: list[Row] = []
    for m in counts:
        x = torch.randn(m, bench.depth)
        half = x.to(BF16)
        exact = [
            entry("halfbyte nf4 float32", nf4, x, bench, True),
            entry("halfbyte nf4 int16", nf4_int16, x, bench),  # no share of a peak of other arithmetic
            entry("halfbyte nf4 int8", nf4_int8, x, bench),
            entry("torch F.linear float32", dense, x, bench, True),
            entry("numpy matmul float32", numpy_dense, x, bench, True),
        ]
        if q4_0 is not None:
            exact.append(q4_0(m))
        rounded = [
            entry("halfbyte nf4 bfloat16", nf4_bf16, half, bench, True),
            entry("torch F.linear bfloat16", dense_bf16, half, bench, True),
            entry("torch int4pack bfloat16", int4pack, half, bench, True),
        ]
        if fused is not None:
            rounded.append(entry("bitsandbytes nf4 bfloat16", fused, half, bench, True))
        read, peak, half_peak = bench.read(nf4[1]), peak_of("float32"), peak_of("bfloat16")
        rulers = [read, *(ruler for ruler in (peak, half_peak) if ruler is not None)]
        with torch.no_grad():
            measure([*exact, *rounded, *rulers], bench.seconds)
        name = title.format(m)
        table += rows(name, exact, "torch F.linear float32", of_peak=peak, of_read=read)
        table += rows(name, rounded, "torch F.linear bfloat16", of_peak=half_peak, of_read=read)
        table += rows(name, rulers)
    return table


def cached(bench: Bench, bnb: Any) -> list[Row]:
    """The same with one copy of each weight, which stays in the cache if it fits."""
    cold, bench.cold_bytes = bench.cold_bytes, 0
    try:
        table = one_row(bench, bnb, "one row, cached")
        return table + many_rows(bench, bnb, (1, 8, 64), "{} rows, cached")
    finally:
        bench.cold_bytes = cold


def dense(bench: Bench, bnb: Any) -> list[Row]:
    """Few rows times a plain weight, as the head of a model is; its bytes count at any number of rows."""
    dtypes = {"float32": F32, "bfloat16": BF16, "float16": torch.float16}
    return [row for name, dtype in dtypes.items() for row in dense_of(bench, dtype, name)]


def dense_of(bench: Bench, dtype: torch.dtype, name: str) -> list[Row]:
    take = bench.dense_weight(dtype)
    table: list[Row] = []
    for m in DENSE_ROWS:
        x = torch.randn(m, bench.depth).to(dtype)
        read = bench.read(take(0).nbytes)
        entries = [
            Entry(f"halfbyte dense {name}", lambda i, x=x: _C.linear_dense(x, take(i))),
            Entry(f"torch F.linear {name}", lambda i, x=x: F.linear(x, take(i))),
        ]
        if dtype == F32:
            entries.append(Entry("numpy matmul float32", lambda i, x=x: x.numpy() @ take(i).numpy().T))
        for made in entries:
            made.bytes = take(0).nbytes
        with torch.no_grad():
            measure([*entries, read], bench.seconds)
        table += rows(f"dense, {m} rows", [*entries, read], f"torch F.linear {name}", of_read=read)
    return table


def grad_input(bench: Bench, bnb: Any) -> list[Row]:
    """dx = dy W, the backward of a frozen layer."""
    return grad_of(bench, F32, "float32") + grad_of(bench, BF16, "bfloat16")


def grad_of(bench: Bench, dtype: torch.dtype, name: str) -> list[Row]:
    own, _ = bench.halfbyte_4bit(compute=name)
    dense = bench.dense_weight(dtype)
    table: list[Row] = []
    for m in ROW_COUNTS:
        peak = peak_of(name)
        dy = torch.randn(m, bench.rows).to(dtype)
        work = bench.multiply_adds * m
        entries = [
            Entry(f"halfbyte nf4 {name}", lambda i, dy=dy: own(i).grad_input(dy), operations=work),
            Entry(f"torch matmul {name}", lambda i, dy=dy: dy @ dense(i), operations=work),
        ]
        with torch.no_grad():
            measure([*entries, peak] if peak is not None else entries, bench.seconds / 2)
        table += rows(f"grad of {m} rows", entries, f"torch matmul {name}", of_peak=peak)
    return table


def quantize(bench: Bench, bnb: Any) -> list[Row]:
    return quantize_from(bench, bnb, F32, "float32") + quantize_from(bench, bnb, BF16, "bfloat16")


def quantize_from(bench: Bench, bnb: Any, dtype: torch.dtype, name: str) -> list[Row]:
    weight = bench.weight.to(dtype)
    take = bench.copies(weight.clone, weight.nbytes)
    n = weight.numel()
    four_bytes = weight.nbytes + n // 2 + n // BLOCKSIZE * 4
    eight_bytes = weight.nbytes + n + n // 256 * 4
    source, target = (torch.ones(four_bytes // 2, dtype=torch.uint8) for _ in range(2))

    def of(library: str, f: Any) -> dict[str, Entry]:
        packed, state = f.quantize_4bit(weight, quant_type="nf4")
        codes, state8 = f.quantize_blockwise(weight)
        nf4, dynamic = f"{library} nf4", f"{library} 8-bit dynamic"
        return {
            "quantize 4-bit": Entry(nf4, lambda i: f.quantize_4bit(take(i), quant_type="nf4"), four_bytes),
            "dequantize 4-bit": Entry(nf4, lambda i: f.dequantize_4bit(packed, state), four_bytes),
            "quantize 8-bit": Entry(dynamic, lambda i: f.quantize_blockwise(take(i)), eight_bytes),
            "dequantize 8-bit": Entry(dynamic, lambda i: f.dequantize_blockwise(codes, state8), eight_bytes),
        }

    own = of("halfbyte", ht.functional)
    peer = {} if bnb is None else of("bitsandbytes", bnb.functional)
    table: list[Row] = []
    for what, entry in own.items():
        ruler = Entry("copy, as many bytes as 4-bit", lambda i: target.copy_(source), four_bytes)
        entries = [entry, ruler]
        if what in peer:
            entries.append(peer[what])
        measure(entries, bench.seconds)
        table += rows(f"{what} {name}", entries, peer[what].name if what in peer else None, of_copy=ruler)
    return table


def optimizers(bench: Bench, bnb: Any) -> list[Row]:
    n = min(OPTIMIZER_ELEMENTS, bench.rows * bench.depth)

    def stepping(name: str, make: Callable[[list], Any], nbytes: int = 0) -> Entry:
        parameter = torch.nn.Parameter(torch.randn(n))
        parameter.grad = torch.randn(n) * 0.01
        optimizer = make([parameter])
        return Entry(name, lambda i: optimizer.step(), bytes=nbytes)

    eight, full = n * 16 + n // 64, n * 28  # p and state read and written, g read
    entries = [
        stepping("halfbyte AdamW8bit", lambda p: optim.AdamW8bit(p, lr=1e-3), eight),
        stepping("halfbyte AdamW", lambda p: optim.AdamW(p, lr=1e-3), full),
        stepping("torch AdamW fused", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), full),
        stepping("torch AdamW foreach", lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True), full),
    ]
    if bnb is not None:
        entries += [
            stepping("bitsandbytes AdamW8bit", lambda p: bnb.optim.AdamW8bit(p, lr=1e-3), eight),
            stepping("bitsandbytes AdamW", lambda p: bnb.optim.AdamW(p, lr=1e-3), full),
        ]
    source, target = torch.empty(full // 8), torch.empty(full // 8)
    ruler = Entry("copy of as many bytes as AdamW moves", lambda i: target.copy_(source), full)
    entries.append(ruler)
    measure(entries, bench.seconds * 2)
    return rows(f"optimizer step, {n} float32", entries, "torch AdamW fused", of_copy=ruler)


def steps(bench: Bench, bnb: Any) -> list[Row]:
    """Each optimizer beside a copy of as many bytes as its step must move; bitsandbytes does not take part.

    LAMB and LARS must read everything twice, unless it fits in a cache.
    """
    del bnb
    n = min(OPTIMIZER_ELEMENTS, bench.rows * bench.depth)
    # How many states, and what makes the step as large as in training (SGD, LARS: with momentum).
    states = {
        "AdamW": 2,
        "AdEMAMix": 3,
        "Lion": 1,
        "SGD": 1,
        "RMSprop": 1,
        "Adagrad": 1,
        "LAMB": 2,
        "LARS": 1,
    }
    table: list[Row] = []
    for name, count in states.items():
        options = {"momentum": 0.9} if name in ("SGD", "LARS") else {}
        for suffix, width in (("8bit", 1), ("32bit", 4)):
            parameter = torch.nn.Parameter(torch.randn(n) * 0.02)
            parameter.grad = torch.randn(n) * 0.01
            optimizer = getattr(optim, name + suffix)([parameter], lr=1e-5, **options)
            nbytes = n * (12 + 2 * width * count)  # p and states read and written, g read
            if name in ("LAMB", "LARS"):  # and everything read before, for a norm over the whole tensor
                nbytes += n * (8 + width * count)
            source, target = torch.zeros(nbytes // 8), torch.zeros(nbytes // 8)
            ruler = Entry("copy of as many bytes", lambda i, s=source, t=target: t.copy_(s), nbytes)
            entry = Entry(f"halfbyte {name}{suffix}", lambda i, o=optimizer: o.step(), nbytes)
            measure([entry, ruler], bench.seconds / 2)
            table += rows(f"{name}{suffix} step, {n} float32", [entry, ruler], ruler.name, of_copy=ruler)
    return table


def int8(bench: Bench, bnb: Any) -> list[Row]:
    dynamic, exact = bench.halfbyte_int8("dynamic"), bench.halfbyte_int8("exact")
    dense = bench.dense(F32)
    other = None if bnb is None else bench.bitsandbytes_int8(bnb)
    codes = torch.randint(-127, 128, (bench.rows, bench.depth), dtype=torch.int8)
    take = bench.copies(codes.clone, codes.nbytes)
    table: list[Row] = []
    for m in (1, 8, 64, 512):
        peak = peak_of("int8")
        x = torch.randn(m, bench.depth)
        q = torch.randint(-127, 128, (m, bench.depth), dtype=torch.int8)
        operations = bench.multiply_adds * m
        entries = [
            entry("halfbyte int8 layer, dynamic", dynamic, x, bench, True),
            entry("halfbyte int8 layer, exact", exact, x, bench, True),
            Entry("halfbyte matmul_int8", lambda i, q=q: _C.matmul_int8(q, take(i)), operations=operations),
            Entry("torch _int_mm", lambda i, q=q: torch._int_mm(q, take(i).t()), operations=operations),
            entry("torch F.linear float32", dense, x, bench, True),
        ]
        if other is not None:
            entries.append(entry("bitsandbytes int8 layer", other, x.half(), bench, True))
        with torch.no_grad():
            measure([*entries, peak] if peak is not None else entries, bench.seconds)
        table += rows(f"int8, {m} rows", entries, "torch _int_mm", of_peak=peak)
    return table


def calls(bench: Bench, bnb: Any) -> list[Row]:
    """What a call costs where there is next to nothing to compute: layers of 64 x 64, one row."""
    weight, x = torch.randn(64, 64), torch.randn(1, 64)
    own = _C.Linear4bit.from_float(weight)
    out, array = torch.empty(1, 64), x.numpy()
    repeat = 200
    layer = ht.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=False).to("cpu").eval()
    nested = ht.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=True).to("cpu").eval()
    dense = torch.nn.Linear(64, 64).eval()
    entries = [
        Entry("halfbyte._C.Linear4bit(x, out)", lambda i: own(x, out), repeat=repeat),
        Entry("halfbyte._C.Linear4bit(x)", lambda i: own(x), repeat=repeat),
        Entry("halfbyte._C.Linear4bit(numpy)", lambda i: own(array), repeat=repeat),
        Entry("halfbyte.torch.nn.Linear4bit", lambda i: layer(x), repeat=repeat),
        Entry("halfbyte.torch.nn.Linear4bit, nested scales", lambda i: nested(x), repeat=repeat),
        Entry("torch.nn.Linear", lambda i: dense(x), repeat=repeat),
    ]
    if bnb is not None:
        other = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=False).to("cpu").eval()
        entries.append(Entry("bitsandbytes.nn.Linear4bit", lambda i: other(x), repeat=20))
    with torch.no_grad():
        measure(entries, bench.seconds)
    return rows("call of a 64 x 64 layer", entries, "torch.nn.Linear")


def imports(bench: Bench, bnb: Any) -> list[Row]:
    """Seconds of a fresh interpreter."""

    def importing(what: str) -> Entry:
        command = [sys.executable, "-c", f"import {what}"]
        return Entry(what, lambda i: subprocess.run(command, check=True), warm=False)

    entries = [importing("numpy"), importing("numpy, halfbyte")]
    measure(entries, min(bench.seconds * 2, 20))
    return rows("import", entries, "numpy")


def layers(bench: Bench, bnb: Any) -> list[Row]:
    """The short form of "rows": as many rows of x as the options say, the exact layers and their closest peers."""
    return many_rows(bench, bnb, bench.options.rows)


CONTESTS: dict[str, Callable[[Bench, Any], list[Row]]] = {
    "layers": layers,
    "one row": one_row,
    "rows": many_rows,
    "cached": cached,
    "dense": dense,
    "grad": grad_input,
    "quantize": quantize,
    "optimizers": optimizers,
    "steps": steps,
    "int8": int8,
    "calls": calls,
    "import": imports,
}


def run(options: Options, threads: int) -> list[Row]:
    """The chosen contests with the threads of this process."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    turns.pin = options.pin
    bench, bnb = Bench(options, threads), bitsandbytes()
    table: list[Row] = []
    for name in options.contests:
        print(f"{threads} threads: {name}", file=sys.stderr, flush=True)
        table += [{"threads": threads, **row} for row in CONTESTS[name](bench, bnb)]
    return table


if __name__ == "__main__":
    found = run(Options(**json.loads(sys.argv[1])), int(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(found))
