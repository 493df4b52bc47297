"""What the hardware allows, and what must be reached of it: the table that gpu.py judges by, and its report.

    floor = max(bytes / bandwidth, operations / peak)       each byte of weights, scales, x and y moved once

Bandwidth and peak are measured in the same run (copy of 1 GB; product of 8192 x 8192 matrices), because no kernel
reaches the data sheet. `must` is stated for an H200 and cold weights: a fraction of the floor, or a multiple of the
time of torch's own bfloat16 product. On other GPUs the same numbers are printed as orientation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

Row = dict[str, Any]


class Shape(NamedTuple):
    rows: int  # of the weight: outputs
    depth: int


SHAPES = (Shape(4096, 4096), Shape(4096, 14336), Shape(8192, 8192), Shape(8192, 28672))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

# By kind and rows of x: one number for each of SHAPES. "floor": time <= floor / number. "torch": time <= number * the
# time of torch.mm. Rows that are not named are measured and not judged.
MUST: dict[str, dict[int, tuple[str, tuple[float, float, float, float]]]] = {
    "nf4": {
        **{m: ("floor", (0.40, 0.62, 0.65, 0.80)) for m in (1, 2, 4, 8)},
        16: ("floor", (0.36, 0.58, 0.62, 0.75)),
        64: ("floor", (0.30, 0.45, 0.50, 0.60)),
        256: ("torch", (1.20, 1.20, 1.20, 1.20)),
        2048: ("torch", (1.14, 1.12, 1.12, 1.12)),
    },
    "nf4 grad_input": {2048: ("torch", (1.15, 1.13, 1.13, 1.12))},
    "int8": {1: ("floor", (0.45, 0.65, 0.70, 0.82)), 2048: ("floor", (0.56, 0.62, 0.65, 0.68))},
    "dequantize": {0: ("floor", (0.80, 0.90, 0.90, 0.92))},
    "quantize": {0: ("floor", (0.70, 0.80, 0.80, 0.82))},
}
NESTED_WITHIN = 1.03  # of the time with float32 scales
ADAM8_MUST = 0.75  # of the floor, from 16 M parameters on
HOST_MUST = 2e-6  # seconds of a call in C


class Ceilings(NamedTuple):
    """Measured in this run; bytes and operations a second."""

    bandwidth: float
    bf16: float
    int8: float


def weight_bytes(kind: str, shape: Shape) -> float:
    """Bytes of a weight with its scales (blocks of 64, nested blocks of 256)."""
    n = shape.rows * shape.depth
    return {
        "bf16": 2.0 * n,
        "nf4": n / 2 + n / 64 * 4,
        "nf4 nested": n / 2 + n / 64 + n / 64 / 256 * 4,
        "int8": n + 4.0 * shape.rows,
    }[kind]


def product_floor(kind: str, shape: Shape, m: int, ceilings: Ceilings) -> float:
    """Seconds that y [m, rows] = x [m, depth] W^T takes at least; its gradient takes the same."""
    moved = weight_bytes(kind, shape) + 2.0 * m * (shape.rows + shape.depth)
    operations = 2.0 * m * shape.rows * shape.depth
    return max(moved / ceilings.bandwidth, operations / (ceilings.int8 if kind == "int8" else ceilings.bf16))


def codec_floor(shape: Shape, ceilings: Ceilings) -> float:
    """Seconds to read a bfloat16 matrix and write it in nf4, or the other way."""
    return (weight_bytes("nf4", shape) + weight_bytes("bf16", shape)) / ceilings.bandwidth


ADAM8_BYTES = (
    10.0 + 4 * 4 / 256
)  # p and g in bfloat16, two states and their scales: read; p, states, scales: written


def judge(row: Row, shapes: Iterable[Shape] = SHAPES) -> Row:
    """Adds `must` and `verdict` to a row with kind, shape, rows, seconds and floor or torch_seconds."""
    must = MUST.get(row["kind"], {}).get(row.get("rows", -1))
    known = [tuple(s) for s in shapes]
    if must is None or tuple(row["shape"]) not in known:
        return row
    if "seconds" not in row:
        row["verdict"] = "FAIL"
        return row
    against, numbers = must
    number = numbers[known.index(tuple(row["shape"])) % len(numbers)]
    if against == "floor":
        row["must"], good = f"floor / {number:.2f}", row["floor"] / row["seconds"] >= number
    elif row.get("torch_seconds"):
        row["must"], good = f"torch * {number:.2f}", row["seconds"] <= number * row["torch_seconds"]
    else:
        return row
    row["verdict"] = "PASS" if good else "FAIL"
    return row


def print_rows(rows: Iterable[Row]) -> None:
    head = f"{'':28} {'rows x depth':>14} {'of x':>5} {'us':>10} {'floor us':>9} {'of floor':>8} {'torch bf16':>10}"
    print(f"{head} {'bitsandbytes':>12} {'must':>12}")
    for row in rows:
        shape = "{} x {}".format(*row["shape"]) if "shape" in row else ""
        cells = [
            f"{row['kind']:28} {shape:>14} {row.get('rows') or '':>5}",
            _cell(row.get("seconds"), 1e6, 10, 2),
            _cell(row.get("floor"), 1e6, 9, 2),
            _cell(
                row["floor"] / row["seconds"] if row.get("floor") and row.get("seconds") else None, 1, 8, 2
            ),
            _cell(row.get("torch_seconds"), 1e6, 10, 2),
            _cell(row.get("bitsandbytes_seconds"), 1e6, 12, 2),
            f"{row.get('must', ''):>12} {row.get('verdict', '')} {row.get('error', '')}",
        ]
        print(" ".join(cells).rstrip())


def _cell(value: float | None, scale: float, width: int, digits: int) -> str:
    return f"{'' if value is None else format(value * scale, f'.{digits}f'):>{width}}"


def propose_entries(rows: Iterable[Row], capability: tuple[int, int], source: str) -> list[str]:
    """Lines for the table of halfbyte.torch.cuda_table: up to how many rows of x the fused kernel is the faster.

    The ratio of a row is the median over the shapes; the answer is the last number of rows before dense wins for
    good.
    """
    ratios: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        if "operator" in row and "fused_seconds" in row and "dense_seconds" in row:
            by_rows = ratios.setdefault((row["operator"], row["dtype"]), {})
            by_rows.setdefault(row["rows"], []).append(row["fused_seconds"] / row["dense_seconds"])
    lines = []
    for (operator, dtype), by_rows in sorted(ratios.items()):
        middle = {m: sorted(values)[len(values) // 2] for m, values in by_rows.items()}
        faster = [m for m, ratio in middle.items() if ratio <= 1.0]
        lines.append(
            f'    Entry("{operator}", {capability}, "{dtype}", {max(faster, default=0)}, "{source}"),'
        )
    return lines
