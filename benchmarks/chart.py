"""Draws what peers.py measured for one row of x: `python -m benchmarks.chart RESULT.json OUTPUT.svg`."""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

BAR, GAP, LEFT, WIDTH, TOP = 18, 6, 260, 420, 64
COLORS = {
    "read": "#9aa0a6",
    "halfbyte": "#1a73e8",
    "torch": "#e8710a",
    "bitsandbytes": "#b5651d",
    "ggml": "#188038",
}


def bars(result: dict[str, Any]) -> str:
    """An SVG with one bar per entry of "one row" at the largest number of threads; its length is the time."""
    described = result["environment"]
    threads = max(described["threads"])
    rows = [r for r in result["rows"] if r["title"] == "one row" and r["threads"] == threads]
    rows.sort(key=lambda row: float(row["p10_us"]))
    longest = max(row["p10_us"] for row in rows)
    height = TOP + len(rows) * (BAR + GAP) + 12
    size = " x ".join(map(str, described["size"]))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 120}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="24" font-size="16">One row through a layer of {size}, {threads} threads, weights from '
        "DRAM</text>",
        f'<text x="12" y="44" fill="#5f6368">microseconds, 10th percentile; shorter is better; '
        f"{escape(described['cpu'])}, {described['isa']}</text>",
    ]
    for i, row in enumerate(rows):
        y = TOP + i * (BAR + GAP)
        length = max(1.0, row["p10_us"] / longest * WIDTH)
        color = COLORS.get(row["name"].split()[0], "#5f6368")
        lines += [
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(row["name"])}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}"/>',
            f'<text x="{LEFT + length + 6:.1f}" y="{y + 14}">{row["p10_us"]:,.0f}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> int:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m benchmarks.chart RESULT.json OUTPUT.svg")
    Path(sys.argv[2]).write_text(bars(json.loads(Path(sys.argv[1]).read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
