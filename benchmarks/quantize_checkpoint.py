"""How fast a checkpoint becomes NF4, against reading it and writing the result.

    python -m benchmarks.quantize_checkpoint [--bytes 3GB] [--folder DIR] [--to nf4] [--rounds 3] [--json]

Makes a Llama-shaped bfloat16 checkpoint of random weights, then measures, in one run and interleaved:

    read    the bytes of the source, by preads of 2 MiB over the same threads
    write   as many bytes as the result has, by pwrites into a preallocated file, with fsync
    copy    memory to memory, the bytes of source and result: what memory traffic alone costs
    tool    halfbyte.quantize

warm: the source is in the page cache. cold: it was dropped from it before each step (posix_fadvise), where
the disk below may still have a cache of its own. The goal is tool <= 2 * max(read + write, copy).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import halfbyte
from halfbyte.cli.arguments import positive, size
from halfbyte.formats.safetensors import Slot, layout, write_at

STEP = 2 << 20
HIDDEN, MLP, VOCABULARY = 4096, 14336, 32000
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (1024, HIDDEN),
    "self_attn.v_proj": (1024, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}


def make_checkpoint(folder: Path, nbytes: int) -> int:
    """A bfloat16 Llama of about `nbytes` in one file; returns its size. Memory use is one tile."""
    folder.mkdir(parents=True)
    slots = [Slot("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN))]
    layers = 0
    while sum(s.nbytes for s in slots) < nbytes:
        prefix = f"model.layers.{layers}"
        slots += [Slot(f"{prefix}.{name}.weight", "BF16", shape) for name, shape in LAYER.items()]
        slots.append(Slot(f"{prefix}.input_layernorm.weight", "BF16", (HIDDEN,)))
        slots.append(Slot(f"{prefix}.post_attention_layernorm.weight", "BF16", (HIDDEN,)))
        layers += 1
    header, _, total = layout(slots, {"format": "pt"})
    normal = np.random.default_rng(0).standard_normal(STEP // 2 + 4097, dtype=np.float32) * np.float32(0.02)
    tile = (normal.view(np.uint32) >> 16).astype(np.uint16)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        left = total - len(header)
        turn = 0
        while left:  # another rotation of the same numbers each time
            n = min(STEP, left)
            file.write(tile[turn % 4096 :][: n // 2].tobytes())
            left -= n
            turn += 61
        file.flush()
        os.fsync(file.fileno())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def in_threads(threads: int, steps: int, do: Callable[[np.ndarray, int], object]) -> float:
    """Seconds for do(buffer, i), i < steps, spread over threads in order."""
    lock, numbers = threading.Lock(), iter(range(steps))

    def work() -> None:
        buffer = np.zeros(STEP, np.uint8)
        while True:
            with lock:
                i = next(numbers, None)
            if i is None:
                return
            do(buffer, i)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


def read_seconds(path: Path, threads: int) -> float:
    fd = os.open(path, os.O_RDONLY)
    try:
        steps = -(-os.fstat(fd).st_size // STEP)
        return in_threads(threads, steps, lambda buffer, i: os.preadv(fd, [buffer], i * STEP))
    finally:
        os.close(fd)


def write_seconds(path: Path, nbytes: int, threads: int) -> float:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        began = time.perf_counter()
        os.posix_fallocate(fd, 0, nbytes)
        in_threads(threads, nbytes // STEP, lambda buffer, i: write_at(fd, buffer, i * STEP))
        os.fsync(fd)
        return time.perf_counter() - began
    finally:
        os.close(fd)
        path.unlink()


def copy_seconds(nbytes: int, threads: int) -> float:
    source = np.ones(256 << 20, np.uint8)
    places = len(source) // STEP

    def one(buffer: np.ndarray, i: int) -> None:
        buffer[:] = source[i % places * STEP :][:STEP]

    return in_threads(threads, nbytes // STEP, one)


def drop_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    source = work / "source"
    print("making the checkpoint", file=sys.stderr)
    source_bytes = make_checkpoint(source, args.bytes)
    weights = source / "model.safetensors"
    options = {"double_quant": args.double_quant, "threads": args.threads}
    result_bytes = halfbyte.quantize(source, None, args.to, dry_run=True, **options).total_bytes
    results: dict[str, Any] = {"source_bytes": source_bytes, "result_bytes": result_bytes}
    for state in ("warm", "cold"):
        times: dict[str, list[float]] = {"read": [], "write": [], "copy": [], "tool": []}
        for _ in range(args.rounds):
            prepare = drop_cache if state == "cold" else (lambda path: read_seconds(path, args.threads))
            prepare(weights)
            times["read"].append(read_seconds(weights, args.threads))
            times["write"].append(write_seconds(work / "probe", result_bytes, args.threads))
            times["copy"].append(copy_seconds(source_bytes + result_bytes, args.threads))
            prepare(weights)
            began = time.perf_counter()
            halfbyte.quantize(source, work / "out", args.to, **options)
            times["tool"].append(time.perf_counter() - began)
            shutil.rmtree(work / "out")
        best = {name: min(values) for name, values in times.items()}
        best["ratio"] = best["tool"] / max(best["read"] + best["write"], best["copy"])
        results[state] = best | {"all": times}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=size, default=3 * 10**9)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--to", default="nf4", choices=("nf4", "fp4", "int8"))
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--threads", type=positive, default=halfbyte.get_num_threads())
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="halfbyte-bench-", dir=args.folder))
    try:
        results = measure(work, args)
    finally:
        shutil.rmtree(work)
    if args.json:
        print(json.dumps(results, indent=2))
        return 0
    print(
        f"{results['source_bytes']:,} -> {results['result_bytes']:,} bytes, {args.to},"
        f" {args.threads} threads, {halfbyte.cpu_info()['used']}, best of {args.rounds}"
    )
    for state in ("warm", "cold"):
        s = results[state]
        print(
            f"{state}  read {s['read']:.2f} s  write {s['write']:.2f} s  copy {s['copy']:.2f} s"
            f"  tool {s['tool']:.2f} s  tool / max(read + write, copy) = {s['ratio']:.2f}  (goal: <= 2)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
