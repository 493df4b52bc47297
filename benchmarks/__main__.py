"""Every kernel and operation beside the machine's limits, measured in one run.

    python -m benchmarks                                          all three below, about a quarter of an hour
    python -m benchmarks OP|kernels [--kernels] [--ms N] [--json FILE]
    python -m benchmarks peers [PART] ...                         see peers.py
    python -m benchmarks never-slower [--part 1/4] ...            see never_slower.py

OP restricts to benchmarks whose name contains it ("linear_4bit nf4 1 rows", "quantize", ...); "kernels" is all
of them. The rulers (DRAM read, copy, multiply-add peak) are measured before and after. `of read` is a
benchmark's GB/s over the DRAM read bandwidth of as many threads, `of peak` its GFLOP/s over the peak of as many
threads: float32 multiply-adds, or dot products of int8 or bfloat16 for that arithmetic, where the processor has
them. Times are the 10th percentile and the median of repeated calls. --kernels adds the single kernels of every
instruction set, in the cache, on one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from halfbyte.bench import environment

from .output import ROOT, write_json

sys.path.insert(0, str(ROOT / "tests" / "c"))
import build

Row = dict[str, Any]
OPERATIONS = ("ops_4bit", "ops_8bit", "ops_dense", "ops_optim")  # groups of bench_ops.c
SKIPPED = 77  # exit status of the program when nothing matches


def run(program: Path, *options: str) -> list[Row]:
    """Results of one run of the C program."""
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as file:
        done = subprocess.run([str(program), *options, f"--json={file.name}"], stdout=subprocess.DEVNULL)
        if done.returncode not in (0, SKIPPED):
            command = " ".join([program.name, *options])
            raise SystemExit(f"benchmarks: {command} failed with status {done.returncode}")
        rows = [json.loads(line) for line in Path(file.name).read_text().splitlines()]
    for row in rows:
        row["group"], row["isa"] = row["group"].split()
    return rows


def best_rates(rulers: list[Row]) -> dict[tuple[str, int], float]:
    """Best rate of each ruler and thread count: bytes or operations per nanosecond."""
    best: dict[tuple[str, int], float] = {}
    for row in rulers:
        rate = (row["bytes"] or row["operations"]) / (row["p10_us"] * 1e3)
        key = row["name"].removeprefix("machine "), row["threads"]
        best[key] = max(best.get(key, 0.0), rate)
    return best


def add_rates(row: Row, limits: dict[tuple[str, int], float]) -> Row:
    """Adds GB/s, GFLOP/s and their shares of the limits, where they mean something."""
    nanoseconds = row["p10_us"] * 1e3
    name: str = row["name"]
    int8 = "matmul_int8" in name or ("linear_8bit" in name and "exact" not in name and "grad" not in name)
    peak = limits.get(("fma f32", row["threads"]))
    if int8 or "bfloat16" in name:
        peak = limits.get(("dot int8" if int8 else "dot bf16", row["threads"]), peak)
    read = limits.get(("read DRAM", row["threads"]))
    if row["bytes"]:
        row["gb_per_s"] = row["bytes"] / nanoseconds
        if read and "cold" in name:
            row["of_read"] = row["gb_per_s"] / read
    if row["operations"]:
        row["gflop_per_s"] = row["operations"] / nanoseconds
        if peak:
            row["of_peak"] = row["gflop_per_s"] / peak
    return row


def print_table(rows: list[Row], width: int) -> None:
    columns = {"gb_per_s": ".1f", "of_read": ".2f", "gflop_per_s": ".0f", "of_peak": ".2f"}
    heads = ["GB/s", "of read", "GFLOP/s", "of peak"]
    head = f"{'':{width}} {'T':>2} {'p10 us':>11} {'median us':>11}" + "".join(f"{h:>9}" for h in heads)
    print(head + "\n" + "-" * len(head))
    for row in rows:
        cells = "".join(f"{format(row[c], f) if c in row else '':>9}" for c, f in columns.items())
        label = (
            f"{row['isa']:<11} {row['name']}" if row["group"] not in ("machine", *OPERATIONS) else row["name"]
        )
        print(f"{label:{width}} {row['threads']:>2} {row['p10_us']:>11.2f} {row['median_us']:>11.2f}{cells}")


def measure(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="?", default="", metavar="OP")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: build/benchmarks/kernels.json")
    parser.add_argument("--kernels", action="store_true", help="single kernels of every instruction set too")
    parser.add_argument("--ms", type=int, default=200, metavar="N", help="milliseconds for each benchmark")
    options = parser.parse_args(arguments)
    try:
        program = build.build("native")
    except (build.Unavailable, RuntimeError) as error:
        raise SystemExit(f"benchmarks: {error}") from None
    how = (f"--bench={options.op}", f"--bench-ms={options.ms}")
    ruler = ("--group=machine", "--bench", f"--bench-ms={options.ms}")
    rulers = run(program, *ruler)
    rows = [row for group in OPERATIONS for row in run(program, f"--group={group}", *how)]
    if options.kernels:
        rows += [row for row in run(program, *how) if row["group"] not in ("machine", *OPERATIONS)]
    rulers += run(program, *ruler)
    limits = best_rates(rulers)
    rulers = [add_rates(row, {}) for row in rulers]
    rows = [add_rates(row, limits) for row in rows]
    description = environment.describe() | {
        "isa": rulers[0]["isa"],
        "threads": sorted({row["threads"] for row in rows}),
    }
    print("\n".join(environment.lines_of(description)), flush=True)
    print_table(
        rulers + rows, max(len(row["name"]) for row in rulers + rows) + (12 if options.kernels else 0)
    )
    result = {"environment": description, "rulers": rulers, "rows": rows}
    print(f"written: {write_json(options.json, 'kernels', result)}")
    if not rows:
        print(f"benchmarks: no benchmark's name contains {options.op!r}", file=sys.stderr)
    return 0 if rows else 1


def main() -> int:
    from . import never_slower, peers

    programs = {"kernels": measure, "peers": peers.main, "never-slower": never_slower.main}
    name, *arguments = sys.argv[1:] or [""]
    if name:
        program = programs.get(name)
        return measure([name, *arguments]) if program is None else program(arguments)
    return max(program([]) for program in programs.values())


if __name__ == "__main__":
    sys.exit(main())
