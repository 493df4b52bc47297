"""How the demo's report looks: a table, the texts, a picture, and the files that are left behind.

matplotlib is imported by the functions that need it.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

# One colour a model, the same in every panel; distinguishable with any colour vision.
COLOURS = ("#333333", "#4477aa", "#228833", "#66ccee", "#aa3377", "#ee6677", "#bbbbbb")
WIDTH = 110


def table(report: dict[str, Any]) -> str:
    """Sizes, quality and speed of each model, and below it what the columns mean."""
    heads = ("model", "file bytes", "of orig.", "bits/param", "KL per token", "NLL change", "same top",
             "read t/s", "write t/s")  # fmt: skip
    before = report["rows"][0]["bytes"]
    lines = []
    for row in [*report["rows"], report["control"]]:
        original = row is report["rows"][0]
        lines.append(
            (
                row["name"],
                f"{row['bytes']:,}",
                f"{row['bytes'] / before:.1%}",
                f"{row['bits_per_parameter']:.3f}",
                "-" if original else f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
                "-" if original else f"{row['nll_change']:+.4f} ± {row['nll_change_se']:.4f}",
                "-" if original else f"{row['top1']:.1%}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['generated_tokens_per_second']:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    text = []
    for line in (heads, *lines):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    rule = "-" * len(text[0])
    text.insert(1, rule)
    text.insert(-1, rule)
    return "\n".join([heading(report), "", *text, "", notes(report)])


def heading(report: dict[str, Any]) -> str:
    """The model and the text."""
    parameters = report["parameters"]
    return (
        f"{report['model']}: {parameters['all']:,} parameters, {parameters['linear']:,} of them in the linear "
        f"layers that are quantized"
    )


def notes(report: dict[str, Any]) -> str:
    """What the columns mean and where the numbers come from."""
    machine = report["machine"]
    threads = machine["threads"]
    original = report["rows"][0]
    explained = {
        "bits/param": "of the quantized layers, with scales and tables; embeddings and norms stay as they are, "
        "and are in the file bytes",
        "KL, NLL": f"nats per token, mean ± standard error over {original['windows']} windows of "
        f"{report['window']} tokens; {report['predicted_tokens']:,} predictions in float32; the original's NLL "
        f"is {original['nll']:.4f}",
        "t/s": "tokens per second, reading whole windows and writing one text; in a model this small most of the "
        "time is that of transformers itself",
        "machine": f"{machine['processor']}, {machine['cpu']['used']} kernels, {threads['halfbyte']} threads "
        f"(torch: {threads['torch']})",
    }
    return "\n".join(
        textwrap.fill(text, WIDTH, initial_indent=name.ljust(12), subsequent_indent=" " * 12)
        for name, text in explained.items()
    )


def samples(report: dict[str, Any]) -> str:
    """What each model made of the prompt."""
    lines = [f'"{report["prompt"]}" goes on (greedy, no three words twice):']
    rows = [*report["rows"], report["control"]]
    width = 2 + max(len(row["name"]) for row in rows)
    for row in rows:
        words = " ".join(row["generated"].split())
        name = f"  {row['name']}".ljust(width + 2)
        lines.append(textwrap.fill(words, WIDTH, initial_indent=name, subsequent_indent=" " * len(name)))
    return "\n".join(lines)


def picture(report: dict[str, Any], path: str | Path) -> None:
    """Draw the report as PNG: size, KL divergence and NLL change of each model, a line each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.axes import Axes

    rows = [*report["rows"], report["control"]]
    colours = dict(zip((row["name"] for row in rows), COLOURS, strict=True))
    quantized = rows[1:-1]
    figure, (sizes, divergence, change) = pyplot.subplots(
        1, 3, figsize=(14, 4.6), sharey=True, gridspec_kw={"width_ratios": [1.1, 1.2, 1]}
    )

    for place, row in enumerate(rows):
        dense = row["bytes"] - row["linear_bytes"]
        sizes.barh(place, dense, color="#dddddd")
        sizes.barh(place, row["linear_bytes"], left=dense, color=colours[row["name"]])
        beside(
            sizes, row["bytes"], place, f"{row['bytes'] / 1e6:.2f} MB, {row['bits_per_parameter']:.2f} bits"
        )
    sizes.set_xlim(0, 1.6 * rows[0]["bytes"])
    sizes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
    sizes.set_xlabel("weight file in MB (grey: embeddings and norms)")
    sizes.set_title("Size, and bits per quantized parameter")
    sizes.set_yticks(range(len(rows)), [row["name"].replace(": ", ":\n") for row in rows])
    sizes.invert_yaxis()

    def dots(axes: Axes, key: str, of: list[dict[str, Any]], form: str) -> None:
        for row in of:
            style = {"fmt": "o", "capsize": 4, "markersize": 7, "color": colours[row["name"]]}
            axes.errorbar(row[key], rows.index(row), xerr=row[key + "_se"], **style)
            beside(axes, row[key] + row[key + "_se"], rows.index(row), form.format(row[key]))
        axes.grid(True, axis="x", alpha=0.3)

    dots(divergence, "kl", rows[1:], "{:.4f}")
    divergence.set_xscale("log")
    divergence.set_xlim(min(row["kl"] for row in quantized) / 3, 12 * report["control"]["kl"])
    divergence.set_xlabel("nats per token, ± standard error (logarithmic)")
    divergence.set_title("KL divergence from the original")

    dots(change, "nll_change", quantized, "{:+.4f}")
    largest = max(row["nll_change"] + row["nll_change_se"] for row in quantized)
    change.axvline(0, color=COLOURS[0], linewidth=1)
    change.set_xlim(min(-0.05 * largest, min(row["nll_change"] for row in quantized)), 1.4 * largest)
    outside = f"{report['control']['nll_change']:+.1f}, far outside"
    beside(change, 0, len(rows) - 1, outside)
    change.set_xlabel("nats per token, ± standard error")
    change.set_title("Change of the NLL")

    figure.suptitle(
        f"{report['model']} on {report['predicted_tokens']:,} tokens it has not seen, float32 arithmetic"
    )
    for axes in (sizes, divergence, change):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def beside(axes: Any, x: float, y: float, text: str) -> None:
    """A label to the right of a bar or a dot."""
    axes.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)


def write(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write quality.json and, when matplotlib is there, quality.png; return what was written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "quality.json"]
    written[0].write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return written
    picture(report, folder / "quality.png")
    return [*written, folder / "quality.png"]
