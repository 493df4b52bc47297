"""The promise: a 4-bit layer takes at most the time of the dense layer it replaces, at any number of rows.

    python -m benchmarks never-slower [--threads 2] [--rows 1,2,...] [--depth 4096,14336] [--dtype float32,bfloat16]
                                      [--pass forward,dx] [--part I/N] [--seconds S] [--size N] [--json FILE]

NF4 with blocks of 64 against torch in the same dtype: F.linear, and for dx (the backward of a frozen layer) dy @ W;
4096 outputs, weights from DRAM, calls in turns. The last column is our time over torch's, so that 1 or
less is the promise kept; with 512 and more rows of float32 the goal is 1.1. All of it takes some minutes: --part 2/4
measures the second of four parts of about the same length. Results of one machine gather in the JSON file, of a
repeated cell the last one, each with its revision; the picture beside it is drawn of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte import _C
from halfbyte.bench import chart, environment

from .output import DEFAULT_JSON, ROOT, write_json

ROWS = "1,2,4,8,16,32,64,128,512,2048"
CALLS = 12  # of each competitor that a long cell takes, roughly
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One comparison."""

    direction: str  # "forward" or "dx"
    dtype: str
    depth: int
    rows: int

    @property
    def goal(self) -> float:
        return 1.1 if self.rows >= 512 and self.dtype == "float32" else 1.0

    def cost(self, size: int, seconds: float) -> float:
        """Seconds it will take, on two cores of today."""
        rate = 4e11 if self.dtype == "bfloat16" else 2e11
        return max(seconds, CALLS * 2 * size * self.depth * self.rows / rate)

    def belongs_to(self, row: Row) -> bool:
        return (self.direction, self.dtype, self.depth, self.rows) == (
            row["direction"],
            row["dtype"],
            row["depth"],
            row["rows"],
        )


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """What was asked for, weights of the same depth and dtype together."""
    return [
        Cell(direction, dtype, int(depth), int(rows))
        for depth in options.depth.split(",")
        for dtype in options.dtype.split(",")
        for direction in getattr(options, "pass").split(",")
        for rows in options.rows.split(",")
    ]


def part_of(cells: list[Cell], part: str, cost: Callable[[Cell], float]) -> list[Cell]:
    """The I-th of N runs of cells of about the same cost, for part "I/N"."""
    i, n = (int(number) for number in part.split("/"))
    if not 1 <= i <= n:
        raise ValueError(f"--part: expected I/N with 1 <= I <= N, got {part!r}")
    total, spent, chosen = sum(map(cost, cells)), 0.0, []
    for cell in cells:
        middle = spent + cost(cell) / 2
        if min(int(middle / total * n), n - 1) == i - 1:
            chosen.append(cell)
        spent += cost(cell)
    return chosen


def measure_cells(cells: Iterable[Cell], options: argparse.Namespace, threads: int) -> Iterable[Row]:
    """In a process with as many threads: a row for each cell."""
    import torch

    from halfbyte.bench.compare import Options
    from halfbyte.bench.contests import Bench
    from halfbyte.bench.turns import Entry, measure

    torch.set_num_threads(threads)
    made: dict[tuple, Any] = {}
    for cell in cells:
        if (cell.depth, cell.dtype) not in made:
            made.clear()
            shape = Options((), options.size, cell.depth, options.seconds)
            bench = Bench(shape, threads)
            dtype = getattr(torch, cell.dtype)
            made[cell.depth, cell.dtype] = (
                bench.halfbyte_4bit(compute=cell.dtype)[0],
                bench.dense_weight(dtype),
                dtype,
            )
        own, dense, dtype = made[cell.depth, cell.dtype]
        x = torch.randn(cell.rows, cell.depth if cell.direction == "forward" else options.size).to(dtype)
        if cell.direction == "forward":
            ours = Entry("halfbyte", lambda i, x=x, own=own: own(i)(x))
            torchs = Entry("torch", lambda i, x=x, w=dense: torch.nn.functional.linear(x, w(i)))
        else:
            ours = Entry("halfbyte", lambda i, x=x, own=own: own(i).grad_input(x))
            torchs = Entry("torch", lambda i, x=x, w=dense: x @ w(i))
        with torch.no_grad():
            measure([ours, torchs], options.seconds)
        yield {
            "direction": cell.direction,
            "dtype": cell.dtype,
            "depth": cell.depth,
            "size": options.size,
            "rows": cell.rows,
            "threads": threads,
            "p10_us": round(ours.p10, 1),
            "median_us": round(ours.percentile(0.5), 1),
            "dense_p10_us": round(torchs.p10, 1),
            "dense_median_us": round(torchs.percentile(0.5), 1),
            "samples": min(len(ours.samples), len(torchs.samples)),
            "ratio": round(ours.p10 / torchs.p10, 3),
            "ratio_of_medians": round(ours.percentile(0.5) / torchs.percentile(0.5), 3),
            "goal": cell.goal,
        }


def print_row(row: Row) -> None:
    print(
        f"{row['direction']:8}{row['dtype']:9}{row['depth']:6}{row['rows']:6}{row['threads']:3}"
        f"{row['p10_us']:12,.0f}{row['dense_p10_us']:12,.0f}{row['ratio_of_medians']:9.2f}{row['ratio']:8.2f}"
        + ("" if row["ratio"] <= row["goal"] else f"  above {row['goal']}"),
        flush=True,
    )


def gather(path: Path, description: Row, fresh: Row | None) -> Row:
    """The document at `path`, if it is of this machine, with the row added; written."""
    try:
        document = json.loads(path.read_text())
        same = all(document["environment"][key] == description[key] for key in ("cpu", "cpus", "isa"))
    except (OSError, ValueError, KeyError):
        same = False
    if not same:
        document = {"environment": description, "rows": []}
    if fresh is not None:
        keys = ("direction", "dtype", "depth", "size", "rows", "threads")
        rows = [row for row in document["rows"] if any(row[key] != fresh[key] for key in keys)]
        document["rows"] = [*rows, fresh | {key: description[key] for key in ("revision", "time")}]
    write_json(path, "", document)
    return document


def run_here(options: argparse.Namespace, path: Path, description: Row) -> None:
    """Measures in this process; every row is written at once, so that nothing is lost."""
    cells = cells_of(options)
    if options.part:
        cells = part_of(cells, options.part, lambda cell: cell.cost(options.size, options.seconds))
    for row in measure_cells(cells, options, options.threads):
        print_row(row)
        gather(path, description, row)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks never-slower",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--depth", default="4096,14336")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--pass", default="forward,dx")
    parser.add_argument("--part", help="I/N: the I-th of N parts")
    parser.add_argument("--seconds", type=float, default=0.6, help="for a cell of short calls (default 0.6)")
    parser.add_argument("--size", type=int, default=4096, help="outputs of the layers (default 4096)")
    parser.add_argument("--json", type=Path, help="default: build/benchmarks/never-slower.json")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    path = options.json or DEFAULT_JSON / "never-slower.json"
    description = environment.describe() | {"isa": _C.cpu_info()["used"]}
    if options.here:
        run_here(options, path, description)
        return 0
    print("\n".join(environment.lines_of(description)), flush=True)
    print(
        f"{'':8}{'':9}{'depth':>6}{'rows':>6}{'T':>3}{'nf4 us':>12}{'dense us':>12}{'medians':>9}{'ratio':>8}"
    )
    environ = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "HALFBYTE_NUM_THREADS": str(options.threads),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "never-slower", *arguments, "--here"],
        env=environ,
        cwd=ROOT,
    )
    if done.returncode:
        raise SystemExit(f"benchmarks: never-slower failed with status {done.returncode}")
    document = gather(path, description, None)
    picture = path.with_suffix(".svg")
    picture.write_text(chart.never_slower(document))
    late = [row for row in document["rows"] if row["ratio"] > row["goal"]]
    print(f"{len(document['rows'])} measured, {len(late)} above the goal")
    print(f"written: {path}\nwritten: {picture}")
    return 0
