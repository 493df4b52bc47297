"""Draws results: bars of times, curves of relative times over the rows of x.

python -m halfbyte.bench.chart RESULT.json OUTPUT.svg      one row of peers.json, or never-slower.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

BAR, GAP, LEFT, WIDTH, TOP = 18, 6, 260, 420, 64
LONGEST = 20  # bars more than that many times as long as the shortest are cut off, or it could not be seen
COLORS = {
    "read": "#9aa0a6",
    "halfbyte": "#1a73e8",
    "numpy": "#e8710a",
    "torch": "#e8710a",
    "bitsandbytes": "#b5651d",
    "ggml": "#188038",
    "llama.cpp": "#188038",
}


def bars(result: dict[str, Any], titles: Sequence[str] = ("one row",)) -> str | None:
    """An SVG with one bar per entry of the tables called `titles`, at the largest number of threads; its length is the
    time, the longest of each table alike, and bars more than LONGEST times the shortest are broken. None when nothing
    of it was measured, as below."""
    described = result["environment"]
    threads = max(described["threads"])
    lines: list[str] = []
    y = TOP
    for title in titles:
        rows = [r for r in result["rows"] if r["title"] == title and r["threads"] == threads]
        rows = [r for r in rows if not r["name"].startswith("multiply-add peak")]  # no competitor's work
        if not rows:
            continue
        if len(titles) > 1:
            lines.append(f'<text x="12" y="{y + 8}" font-size="14">{escape(title)}</text>')
            y += 18
        rows.sort(key=lambda row: float(row["p10_us"]))
        limit = LONGEST * rows[0]["p10_us"]
        longest = max(row["p10_us"] for row in rows if row["p10_us"] <= limit)
        for row in rows:
            length = min(max(1.0, row["p10_us"] / longest * WIDTH), WIDTH)
            color = COLORS.get(row["name"].split()[0], "#5f6368")
            lines += [
                f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(row["name"])}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}"/>',
                f'<text x="{LEFT + length + 6:.1f}" y="{y + 14}">{row["p10_us"]:,.0f}</text>',
            ]
            if row["p10_us"] > limit:
                gap = f"M{LEFT + WIDTH - 40} {y + BAR + 1} l8 -{BAR + 2}"
                lines.append(f'<path d="{gap}" stroke="white" stroke-width="4"/>')
            y += BAR + GAP
        y += 12
    if not lines:
        return None
    size = " x ".join(map(str, described["size"]))
    what = "One row through a layer" if titles == ("one row",) else "Layers"
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 120}" height="{y}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="24" font-size="16">{what} of {size}, {threads} threads, weights from DRAM</text>',
        f'<text x="12" y="44" fill="#5f6368">microseconds, 10th percentile; shorter is better; '
        f"{escape(described['cpu'])}, {described['isa']}</text>",
    ]
    return "\n".join([*head, *lines, "</svg>"]) + "\n"


Curve = dict[int, float]  # relative time by rows of x
PANEL, PANEL_HEIGHT, HIGHEST = 380, 260, 1.4
SHADES = ("#1a73e8", "#e8710a", "#188038", "#a142f4", "#b5651d", "#5f6368")


def panel(left: float, title: str, curves: dict[str, Curve], limit: str) -> list[str]:
    """One coordinate system: rows of x to the right, relative time upwards, cut off at HIGHEST."""
    top, bottom = TOP + 20, TOP + 20 + PANEL_HEIGHT
    columns = sorted({rows for curve in curves.values() for rows in curve})

    def x(rows: int) -> float:
        return left + columns.index(rows) / max(1, len(columns) - 1) * PANEL

    def y(value: float) -> float:
        return bottom - min(value, HIGHEST) / HIGHEST * PANEL_HEIGHT

    lines = [f'<text x="{left}" y="{top - 12}" font-size="14">{escape(title)}</text>']
    for i in range(8):
        value = i / 5
        stroke = 'stroke="#d93025" stroke-width="1.5"' if value == 1 else 'stroke="#e8eaed"'
        lines += [
            f'<line x1="{left}" x2="{left + PANEL}" y1="{y(value):.1f}" y2="{y(value):.1f}" {stroke}/>',
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#5f6368">{value:.1f}</text>',
        ]
    lines.append(
        f'<text x="{left + PANEL}" y="{y(1) - 5:.1f}" text-anchor="end" fill="#d93025">{escape(limit)}</text>'
    )
    for rows in columns:
        lines.append(
            f'<text x="{x(rows):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#5f6368">{rows}</text>'
        )
    for i, (name, curve) in enumerate(curves.items()):
        color = SHADES[i % len(SHADES)]
        points = " ".join(f"{x(rows):.1f},{y(value):.1f}" for rows, value in sorted(curve.items()))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        for rows, value in curve.items():
            lines.append(f'<circle cx="{x(rows):.1f}" cy="{y(value):.1f}" r="3" fill="{color}"/>')
        at = bottom + 38 + 18 * i
        lines.append(f'<rect x="{left}" y="{at - 10}" width="14" height="10" fill="{color}"/>')
        lines.append(f'<text x="{left + 20}" y="{at}">{escape(name)}</text>')
    return lines


def panels(title: str, described: dict[str, Any], parts: dict[str, dict[str, Curve]], limit: str) -> str:
    """Coordinate systems side by side, by their titles."""
    height = TOP + 20 + PANEL_HEIGHT + 44 + 18 * max((len(curves) for curves in parts.values()), default=0)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{60 + len(parts) * (PANEL + 60)}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="24" font-size="16">{escape(title)}</text>',
        f'<text x="12" y="44" fill="#5f6368">time of a halfbyte NF4 layer over the other\'s, by rows of x; below 1 '
        f"it is faster; {escape(described['cpu'])}, {described['isa']}</text>",
    ]
    for i, (name, curves) in enumerate(parts.items()):
        lines += panel(50 + i * (PANEL + 60), name, curves, limit)
    return "\n".join([*lines, "</svg>"]) + "\n"


def never_slower(result: dict[str, Any]) -> str:
    """An SVG of never-slower.json at its largest number of threads."""
    threads = max((row["threads"] for row in result["rows"]), default=0)
    parts: dict[str, dict[str, Curve]] = {}
    for row in result["rows"]:
        if row["threads"] == threads:
            curves = parts.setdefault(row["direction"], {})
            curves.setdefault(f"{row['size']} x {row['depth']}, {row['dtype']}", {})[row["rows"]] = row[
                "ratio"
            ]
    return panels(
        f"NF4 layers beside dense ones, {threads} threads", result["environment"], parts, "dense torch"
    )


def many_rows(result: dict[str, Any]) -> str | None:
    """An SVG of the contest "rows" of peers.json at the largest number of threads: every peer's curve."""
    threads = max(result["environment"]["threads"])
    found = [r for r in result["rows"] if r["threads"] == threads and re.fullmatch(r"\d+ rows", r["title"])]
    if not found:
        return None
    parts: dict[str, dict[str, Curve]] = {"float32 x": {}, "bfloat16 x": {}}
    times = {(row["title"], row["name"]): row["p10_us"] for row in found}
    for row in found:
        name = row["name"]
        dtype = "bfloat16" if "bfloat16" in name else "float32"
        own = times.get((row["title"], f"halfbyte nf4 {dtype}"))
        if own is not None and not name.startswith(("halfbyte", "multiply-add", "read")):
            curve = parts[f"{dtype} x"].setdefault(name, {})
            curve[int(row["title"].split()[0])] = own / row["p10_us"]
    size = " x ".join(map(str, result["environment"]["size"]))
    return panels(f"{size}, {threads} threads", result["environment"], parts, "the other library")


def main() -> int:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m halfbyte.bench.chart RESULT.json OUTPUT.svg")
    result = json.loads(Path(sys.argv[1]).read_text())
    draw = never_slower if result["rows"] and "direction" in result["rows"][0] else bars
    drawn = draw(result)
    if drawn is None:
        raise SystemExit(f"chart: {sys.argv[1]} has no contest of one row")
    Path(sys.argv[2]).write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
