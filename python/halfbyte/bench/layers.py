"""What needs no torch: the rulers, and the contest "layers" against NumPy, for where torch is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from halfbyte import _C
from halfbyte.bench import turns
from halfbyte.bench.compare import Options
from halfbyte.bench.turns import Entry, Row, measure, rows

PIECE = 1 << 18  # the ruler reads whole ones
MULTIPLY_CALLS = 512
MOST_COPIES = 256  # of a weight: enough for 1024 x 1024 in 4 bits; smaller ones may stay in the cache


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:])
        if unit and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes) or 32 << 20


def read_of(room: np.ndarray, nbytes: int) -> Entry:
    """The ruler: reads about as many bytes of `room` (at least a PIECE), never the same ones soon."""
    nbytes = max(PIECE, min(nbytes, len(room)) // PIECE * PIECE)
    places = len(room) // nbytes
    return Entry("read", lambda i: _C.read_memory(room[i % places * nbytes :][:nbytes]), bytes=nbytes)


def peak_of(kind: str) -> Entry | None:
    """The ruler of arithmetic: "float32", "bfloat16" or "int8"; bfloat16 without its instructions is float32."""
    operations = _C.multiply_adds(kind, MULTIPLY_CALLS)
    if operations == 0:
        return peak_of("float32") if kind == "bfloat16" else None
    return Entry(
        f"multiply-add peak {kind}", lambda i: _C.multiply_adds(kind, MULTIPLY_CALLS), operations=operations
    )


def layers(options: Options) -> list[Row]:
    """4-bit layers against NumPy's dense product, for each number of rows of x."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((options.size, options.depth)) * 0.02).astype(np.float32)
    own_bytes = w.size // 2 + w.size // 64 * 4

    def copies(nbytes: int) -> int:
        return min(MOST_COPIES, max(2, -(-4 * cache_bytes() // nbytes)))

    room = np.ones(max(4 * cache_bytes(), 1 << 24), np.uint8)
    dense = [w.copy() for _ in range(copies(w.nbytes))]
    own = {
        compute: [_C.Linear4bit.from_float(w, compute=compute) for _ in range(copies(own_bytes))]
        for compute in ("float32", "bfloat16")
    }
    table: list[Row] = []
    for m in options.rows:
        x = rng.standard_normal((m, options.depth)).astype(np.float32)
        few, operations = m <= 4, 2 * w.size * m
        entries = [
            Entry(
                f"halfbyte nf4 {compute}",
                lambda i, made=made, x=x: made[i % len(made)](x),
                bytes=own_bytes if few else 0,
                operations=operations,
            )
            for compute, made in own.items()
        ]
        entries.append(
            Entry(
                "numpy matmul float32",
                lambda i, x=x: x @ dense[i % len(dense)].T,
                bytes=w.nbytes if few else 0,
                operations=operations,
            )
        )
        rulers = [read_of(room, own_bytes), *filter(None, [peak_of("float32")])]
        measure([*entries, *rulers], options.seconds)
        limits = {"of_read": rulers[0]}
        table += rows(f"{m} rows", entries, "numpy matmul float32", **limits)
        table += rows(f"{m} rows", rulers)
    return table


def run(options: Options, threads: int) -> list[Row]:
    """The contests that need no torch, with the threads of this process."""
    turns.pin = options.pin
    return [{"threads": threads, **row} for row in layers(options)]


def main(arguments: Sequence[str]) -> None:
    """A process of compare.py: options as JSON, number of threads, file for the rows."""
    found = run(Options(**json.loads(arguments[0])), int(arguments[1]))
    Path(arguments[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
