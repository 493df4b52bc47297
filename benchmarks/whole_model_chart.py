"""The picture of whole_model.py's large model. It draws one again:

python -m benchmarks.whole_model_chart RESULT.json OUTPUT.svg
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from halfbyte.bench.chart import COLORS

BAR, GAP, LEFT, PANEL, TOP = 18, 6, 290, 150, 84
COLUMNS = (
    ("tokens_per_second", "tokens a second", ".1f", 1.0),
    ("prefill_seconds", "prompt of {prompt} tokens, s", ".2f", 1.0),
    ("ready_seconds", "load to first token, s", ".1f", 1.0),
    ("peak_bytes", "peak memory, GB", ".1f", 1e9),
)


def draw(content: dict[str, Any]) -> str:
    """An SVG: a row for each contestant, a panel for each figure; beside decoding a line where its floor is."""
    described, random = content["environment"], content["models"]["random"]
    results = random["results"]
    step = PANEL + 56
    width, height = LEFT + len(COLUMNS) * step, TOP + len(results) * (BAR + GAP) + 14
    size, prompt = random["model"]["parameters"] / 1e9, content["prompt_tokens"]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="24" font-size="16">A Llama of {size:.2f}B parameters, batch 1, '
        f"{described['threads']} threads, in transformers and in llama.cpp</text>",
        f'<text x="12" y="44" fill="#5f6368">{escape(described["cpu"])}, {described["isa"]}; the mark beside tokens a '
        f"second: reading every weight once at {content['read_gb_per_s']:.0f} GB/s</text>",
    ]
    for column, (key, title, form, unit) in enumerate(COLUMNS):
        left = LEFT + column * step
        lines.append(
            f'<text x="{left}" y="{TOP - 10}" font-weight="bold">{title.format(prompt=prompt)}</text>'
        )
        longest = max(r[key] for r in results) / unit
        if key == "tokens_per_second":
            longest = max(longest, *(1 / r["floor_seconds"] for r in results))
        for i, r in enumerate(results):
            y, value = TOP + i * (BAR + GAP), r[key] / unit
            length = max(1.0, value / longest * PANEL)
            color = COLORS.get(r["name"].split()[0], COLORS["torch"])
            if column == 0:
                lines.append(
                    f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(r["name"])}</text>'
                )
            lines.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}"/>')
            end = length
            if key == "tokens_per_second":
                mark = left + 1 / r["floor_seconds"] / longest * PANEL
                end = max(end, mark - left)
                lines.append(f'<path d="M{mark:.1f} {y - 1}v{BAR + 2}" stroke="#202124" stroke-width="2"/>')
            lines.append(f'<text x="{left + end + 5:.1f}" y="{y + 14}">{value:{form}}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> int:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m benchmarks.whole_model_chart RESULT.json OUTPUT.svg")
    Path(sys.argv[2]).write_text(draw(json.loads(Path(sys.argv[1]).read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
