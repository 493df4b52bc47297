"""`halfbyte bench`: how fast the layers are on this machine, beside what else is installed.

The competitors take turns in random order, so that what the machine does besides meets all of them. A turn begins with
3 ms of calls that are not counted, in which the threads of one library wake and those of the other fall asleep. Each
call takes another copy of the weight, and the copies together are four times as large as the last-level cache, as the
layers of a model are. The 10th percentile is what the machine can do, the median what it did.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte import _C, shim

WARM_SECONDS = 0.003
BURST = 4
LEAST_SAMPLES = 5
MOST_COPIES = 256  # of a weight: enough for 1024 x 1024 in 4 bits; smaller ones may stay in the cache
OWN = "halfbyte"


@dataclass
class Entry:
    """A competitor: `call(i)` uses copy i of its weight and moves about `bytes`."""

    name: str
    bytes: int
    call: Callable[[int], Any]
    seconds: list[float] = field(default_factory=list)
    count: int = 0

    def turn(self) -> None:
        begin = time.perf_counter()
        while True:
            self._once()
            if time.perf_counter() - begin > WARM_SECONDS:
                break
        for _ in range(BURST):
            before = time.perf_counter()
            self._once()
            self.seconds.append(time.perf_counter() - before)
            if self.seconds[-1] > 0.02:
                break

    def _once(self) -> None:
        self.call(self.count)
        self.count += 1

    @property
    def p10(self) -> float:
        return sorted(self.seconds)[(len(self.seconds) - 1) // 10]


def measure(entries: Sequence[Entry], seconds: float) -> None:
    """Turns until `seconds` are over and every entry has some samples."""
    order = list(entries)
    shuffle = random.Random(0).shuffle
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or any(len(e.seconds) < LEAST_SAMPLES for e in entries):
        shuffle(order)
        for entry in order:
            entry.turn()


def cache_bytes() -> int:
    """Size of the last-level cache, 32 MiB where it is not known."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:])
        if unit and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=32 << 20)


def _copies(bytes_of_one: int) -> int:
    return min(MOST_COPIES, max(2, -(-4 * cache_bytes() // bytes_of_one)))


def _of_halfbyte(x: Any, w: np.ndarray, compute: str, label: str) -> Entry:
    layers = [_C.Linear4bit.from_float(w, compute=compute)]
    own_bytes = w.size // 2 + w.size // 64 * 4
    layers += [_C.Linear4bit.from_float(w, compute=compute) for _ in range(_copies(own_bytes) - 1)]
    return Entry(label, own_bytes, lambda i: layers[i % len(layers)](x))


def _of_torch(x: Any, w: np.ndarray, dtype: Any, label: str) -> Entry:
    import torch

    first = torch.from_numpy(w).to(dtype)
    size = first.numel() * first.element_size()
    weights = [first] + [first.clone() for _ in range(_copies(size) - 1)]
    return Entry(label, size, lambda i: torch.nn.functional.linear(x, weights[i % len(weights)]))


def _of_bitsandbytes(x: Any, w: np.ndarray, dtype: Any, label: str) -> Entry | None:
    import bitsandbytes
    import torch

    if shim.is_ours(bitsandbytes):
        return None
    size = w.size // 2 + w.size // 64 * 4
    layers = []
    for _ in range(_copies(size)):
        layer = bitsandbytes.nn.Linear4bit(
            w.shape[1], w.shape[0], bias=False, compute_dtype=dtype, quant_type="nf4",
            compress_statistics=False,
        )  # fmt: skip
        layer.weight = bitsandbytes.nn.Params4bit(
            torch.from_numpy(w), requires_grad=False, quant_type="nf4", compress_statistics=False
        )
        layers.append(layer.to("cpu").eval())
        with torch.no_grad():
            layers[-1](x)  # its first call may bring the weight into another layout
    return Entry(label, size, lambda i: layers[i % len(layers)](x))


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def competitors(rows: int, size: int, depth: int) -> list[Entry]:
    """The entries of one table: y = x W^T, x `[rows, depth]`, W `[size, depth]`."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((size, depth)) * 0.02).astype(np.float32)
    x = rng.standard_normal((rows, depth)).astype(np.float32)
    if not _installed("torch"):
        weights = [w] + [w.copy() for _ in range(_copies(w.nbytes) - 1)]
        return [
            _of_halfbyte(x, w, "float32", f"{OWN} nf4, float32"),
            _of_halfbyte(x, w, "bfloat16", f"{OWN} nf4, bfloat16"),
            Entry("numpy dense, float32", w.nbytes, lambda i: x @ weights[i % len(weights)].T),
        ]
    import torch

    entries: list[Entry | None] = []
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        v = torch.from_numpy(x).to(dtype)
        entries.append(_of_halfbyte(v, w, name, f"{OWN} nf4, {name}"))
        entries.append(_of_torch(v, w, dtype, f"torch dense, {name}"))
        if _installed("bitsandbytes"):
            entries.append(_of_bitsandbytes(v, w, dtype, f"bitsandbytes nf4, {name}"))
    return [entry for entry in entries if entry is not None]


def _without_gradient(work: Callable[[], None]) -> None:
    if not _installed("torch"):
        return work()
    import torch

    with torch.no_grad():
        return work()


def bench(rows: Sequence[int], size: int, depth: int, seconds: float) -> dict[str, Any]:
    """Measure each number of rows for `seconds`.

    Returns
    -------
    dict
        "cpu", "threads", "size", "depth", and "tables": per number of rows the entries with `p10_us`, `median_us`,
        `gb_per_s` (weights read, by the 10th percentile; None for more than 4 rows) and `of_dense`: time relative
        to the dense layer of the same arithmetic, below 1 is faster.
    """
    tables = []
    for m in rows:
        entries = competitors(m, size, depth)
        _without_gradient(lambda entries=entries: measure(entries, seconds))
        dense = {e.name.rpartition(", ")[2]: e.p10 for e in entries if " dense" in e.name}
        table = []
        for entry in entries:
            few = m <= 4  # beyond, reading the weights is not what takes the time
            base = dense.get(entry.name.rpartition(", ")[2])
            table.append(
                {
                    "name": entry.name,
                    "p10_us": round(entry.p10 * 1e6, 1),
                    "median_us": round(statistics.median(entry.seconds) * 1e6, 1),
                    "gb_per_s": round(entry.bytes / entry.p10 / 1e9, 2) if few else None,
                    "of_dense": None if base is None else round(entry.p10 / base, 3),
                }
            )
        tables.append({"rows": m, "entries": table})
    info = _C.cpu_info()
    return {"cpu": info["used"], "threads": info["threads"], "size": size, "depth": depth, "tables": tables}


def text_of(report: dict[str, Any]) -> str:
    """The report as a table to read."""
    lines = [
        f"{report['size']} x {report['depth']} weights, {report['threads']} threads, {report['cpu']}; "
        "10th percentile and median, from DRAM"
    ]
    for table in report["tables"]:
        lines.append("")
        head = f"{table['rows']} row" + ("s" if table["rows"] != 1 else "")
        lines.append(f"{head:30}{'us':>12}{'median us':>12}{'GB/s':>8}{'of dense':>10}")
        for entry in table["entries"]:
            ratio = "" if entry["of_dense"] is None else f"{entry['of_dense']:.2f}"
            rate = "" if entry["gb_per_s"] is None else f"{entry['gb_per_s']:.1f}"
            lines.append(
                f"{entry['name']:30}{entry['p10_us']:>12,.1f}{entry['median_us']:>12,.1f}{rate:>8}{ratio:>10}"
            )
    return "\n".join(lines)


BAR, GAP, LEFT, WIDTH = 18, 6, 230, 420  # of the picture, in its units
COLORS = {OWN: "#1a73e8", "torch": "#e8710a", "numpy": "#e8710a", "bitsandbytes": "#b5651d"}


def svg_of(report: dict[str, Any]) -> str:
    """The report as a picture: for each number of rows a bar per entry, as long as the 10th percentile of its time."""
    lines: list[str] = []
    y = 56
    for table in report["tables"]:
        lines.append(f'<text x="12" y="{y + 6}" font-size="14">{table["rows"]} rows of x</text>')
        y += 18
        longest = max(entry["p10_us"] for entry in table["entries"])
        for entry in table["entries"]:
            length = max(1.0, entry["p10_us"] / longest * WIDTH)
            color = COLORS.get(entry["name"].split()[0], "#5f6368")
            lines += [
                f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(entry["name"])}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}"/>',
                f'<text x="{LEFT + length + 6:.1f}" y="{y + 14}">{entry["p10_us"]:,.0f}</text>',
            ]
            y += BAR + GAP
        y += 16
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 100}" height="{y}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="22" font-size="16">Layers of {report["size"]} x {report["depth"]}, '
        f"{report['threads']} threads, {escape(report['cpu'])}</text>",
        '<text x="12" y="40" fill="#5f6368">microseconds, 10th percentile, weights from DRAM; shorter is better</text>',
    ]
    return "\n".join([*head, *lines, "</svg>"]) + "\n"
