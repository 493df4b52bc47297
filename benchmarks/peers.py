"""halfbyte against torch, bitsandbytes and ggml, interleaved in one process, beside what the machine can do.

    python -m benchmarks peers [PART] [--threads 1,2] [--seconds N] [--size N] [--depth N]
                                  [--pin] [--json FILE]

For each number of threads one process is started, with OMP_NUM_THREADS and HALFBYTE_NUM_THREADS set. Weights
are 4096 x 4096 (--size outputs, --depth inputs); every call uses another copy, together more than four times
the last-level cache, so they come from DRAM as a model's layers do. Times are 10th percentile and median of
calls taken in turns (contest.py). `ratio` is the reference's time over the entry's: beside "read" it is the
share of raw read bandwidth, beside another library how many times as fast. A peer that is not installed
is listed as absent; ggml.py says how to install ggml, llama.cpp's kernels. Contests, chosen by PART: one row,
rows, cached (weights that stay in the cache, where they fit), grad, quantize, optimizers, int8, calls, import.
`of_read`, `of_peak` and `of_copy` are shares of rates measured in the same turns: reading, arithmetic of the kind
that the entry uses, copying. Pictures of "one row" and "rows" are drawn beside the JSON file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte import _C

from . import chart, environment

PACKAGES = ("halfbyte", "torch", "bitsandbytes", "llama-cpp-python", "numpy")
PARTS = ("one row", "rows", "cached", "grad", "quantize", "optimizers", "int8", "calls", "import")
SHARES = ("of_read", "of_peak", "of_copy")
Row = dict[str, Any]


def versions() -> dict[str, str | None]:
    """The packages measured; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["halfbyte"] = halfbyte.__version__  # of the one imported, installed or not
    return found


def run_in_process(threads: int, arguments: list[str]) -> list[Row]:
    names = ("OMP_NUM_THREADS", "HALFBYTE_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    # OpenBLAS, which NumPy has, spins 2^26 cycles after a call: it would meet the next in turn.
    environ = os.environ | dict.fromkeys(names, str(threads)) | {"OPENBLAS_THREAD_TIMEOUT": "20"}
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks", "peers", *arguments, "--rows-to", file.name]
        done = subprocess.run(command, env=environ, cwd=environment.ROOT)
        if done.returncode:
            raise SystemExit(f"benchmarks: peers with {threads} threads failed with status {done.returncode}")
        result: list[Row] = json.load(file)
        return result


def print_table(table: list[Row]) -> None:
    title = None
    for row in table:
        if (row["title"], row["threads"]) != title:
            title = row["title"], row["threads"]
            print(f"\n{row['title']}, {row['threads']} threads, ratios to {row.get('reference', '-')}")
        rate = f"{row['gb_per_s']:8.1f} GB/s" if "gb_per_s" in row else " " * 13
        rate += f"{row['gflop_per_s']:9.0f} GFLOP/s" if "gflop_per_s" in row else " " * 17
        ratio = f"{row['ratio']:9.2f}" if "ratio" in row else " " * 9
        shares = "".join(f"  {key} {row[key]:.2f}" for key in SHARES if key in row)
        print(f"  {row['name']:44}{row['p10_us']:12.1f} us {row['median_us']:12.1f}{rate}{ratio}{shares}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", default="", metavar="PART")
    parser.add_argument("--threads", default="1,2", help="how many, one run each (default 1,2)")
    parser.add_argument("--seconds", type=float, default=4.0, help="for a contest, more or less (default 4)")
    parser.add_argument("--size", type=int, default=4096, help="outputs of the layers (default 4096)")
    parser.add_argument("--depth", type=int, help="inputs of the layers (default: as --size)")
    parser.add_argument(
        "--pin", action="store_true", help="keep threads on CPUs of their own (busy machines)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: build/benchmarks/peers.json")
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not any(options.part in name for name in PARTS):
        parser.error(f"PART: expected part of one of {', '.join(PARTS)}, got {options.part!r}")
    if options.rows_to:
        from .contests import run_contests

        options.rows_to.write_text(json.dumps(run_contests(options, int(os.environ["OMP_NUM_THREADS"]))))
        return 0
    threads = [int(n) for n in options.threads.split(",")]
    description = environment.describe() | {
        "isa": _C.cpu_info()["used"],
        "threads": threads,
        "pinned": options.pin,
        "size": [options.size, options.depth or options.size],
        "versions": versions(),
    }
    absent = [name for name, version in description["versions"].items() if version is None]
    environment.print_description(description)
    print("  ".join(f"{name} {version or 'absent'}" for name, version in description["versions"].items()))
    table = [row for n in threads for row in run_in_process(n, arguments)]
    print_table(table)
    result = {"environment": description, "absent": absent, "rows": table}
    path = environment.write_json(options.json, "peers", result)
    print(f"\nwritten: {path}")
    for name, draw in (("one-row", chart.bars), ("rows", chart.many_rows)):
        picture = path.with_name(f"{path.stem}-{name}.svg")
        drawn = draw(result)
        if drawn is not None:
            picture.write_text(drawn)
            print(f"written: {picture}")
    return 0
