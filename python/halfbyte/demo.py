"""A model in 4 and 8 bits, beside itself: sizes, quality, speed, and a few words from each.

Each recipe goes the way that a user would go: the checkpoint tool writes a folder, transformers loads it
(with halfbyte in the place of bitsandbytes), and `halfbyte.evaluation` compares the loaded model with the
original on the same text, in float32. One more model is broken on purpose, NF4 with swapped half-bytes: if that
one does not fail loudly, the measurement is worth nothing.

torch, transformers and matplotlib are imported by the functions that need them.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from halfbyte.evaluation import compare, generate, generation_speed, load_float32, token_windows

# name in the table -> arguments of halfbyte.quantize
RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"to": "int8"},
    "nf4": {"to": "nf4"},
    "nf4, nested scales": {"to": "nf4", "double_quant": True},
    "nf4, searched scales": {"to": "nf4", "scales": "search"},
    "fp4": {"to": "fp4"},
}
CONTROL = "control: nf4 with swapped half-bytes"


@dataclass(frozen=True)
class Check:
    """A statement about the results that must be true."""

    text: str
    value: float
    ok: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.text}: {self.value:.4g}"


class Remembered:
    """The original model, which reads each batch once however often it is compared."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen: dict[bytes, Any] = {}

    def __call__(self, input_ids: Any) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = self.model(input_ids=input_ids).logits
        return SimpleNamespace(logits=self.seen[key])


def run(
    model: str | Path,
    text: str,
    *,
    window: int = 256,
    max_tokens: int | None = None,
    prompt: str = "The file is read",
    new_tokens: int = 40,
    work: str | Path | None = None,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Quantize a checkpoint by every recipe, and measure each result against the original.

    Must run before transformers is imported: it calls `halfbyte.install()`.

    Parameters
    ----------
    model
        Folder of a checkpoint that transformers' AutoModelForCausalLM loads.
    text
        What the models read.
    window, max_tokens
        See `halfbyte.evaluation.token_windows`.
    prompt, new_tokens
        What the models continue, and by how many tokens.
    work
        Where the quantized checkpoints go; a temporary folder if None.
    log
        Called with a line of progress now and then.

    Returns
    -------
    dict
        JSON document, schema "halfbyte.demo/1": `rows` (one per model: bytes, bits_per_parameter, and the fields
        of `Comparison`), `checks`, `machine`.
    """
    import halfbyte

    halfbyte.install()
    from transformers import AutoTokenizer

    model = Path(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = sys.maxsize  # the text is cut into windows afterwards
    ids = token_windows(tokenizer, text, window=window, max_tokens=max_tokens)
    prompt_ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]

    def measure(name: str, folder: Path, bits: float | None) -> dict[str, Any]:
        log(f"measuring {name}")
        loaded = load_float32(folder)
        row = {"name": name, "bytes": weight_bytes(folder), "bits_per_parameter": bits}
        row |= compare(original, loaded, ids).to_dict()
        row["generated_tokens_per_second"] = generation_speed(loaded, prompt_ids)
        row["generated"] = tokenizer.decode(generate(loaded, prompt_ids, tokens=new_tokens))
        return row

    log(f"loading {model}")
    original = Remembered(load_float32(model))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if work is None else work)
        rows = [measure("original", model, None)]
        for name, options in RECIPES.items():
            out = folder / "".join(c if c.isalnum() else "-" for c in name)
            report = halfbyte.quantize(model, out, **options, compute_dtype="float32", overwrite=True)
            rows.append(measure(name, out, report.bits_per_parameter))
        broken = folder / "control"
        swap_half_bytes(folder / "nf4", broken)
        control = measure(CONTROL, broken, None)
    return {
        "schema": "halfbyte.demo/1",
        "model": model.name,
        "predicted_tokens": control["tokens"],
        "window": window,
        "prompt": prompt,
        "rows": rows,
        "control": control,
        "checks": [check.__dict__ for check in checks(rows, control)],
        "machine": machine(),
    }


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def swap_half_bytes(source: Path, out: Path) -> None:
    """Copy a 4-bit checkpoint with the two codes of every byte exchanged: a model that must be nonsense."""
    import numpy as np

    shutil.copytree(source, out, dirs_exist_ok=True)
    for path in out.glob("*.safetensors"):
        data = np.memmap(path, dtype=np.uint8, mode="r+")
        body = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(bytes(data[8:body]))
        for name in [key.removesuffix(".absmax") for key in header if key.endswith(".weight.absmax")]:
            begin, end = (body + offset for offset in header[name]["data_offsets"])
            data[begin:end] = (data[begin:end] >> 4) | (data[begin:end] << 4)
        data.flush()


def checks(rows: list[dict[str, Any]], control: dict[str, Any]) -> list[Check]:
    """What the bundled model must show. The bounds leave room for another text of the same length."""
    kl = {row["name"]: row["kl"] for row in rows}
    found = [
        ("KL of int8 (expected under 0.001)", kl["int8"], kl["int8"] < 0.001),
        ("KL of fp4 / KL of nf4 (at least 1.4)", kl["fp4"] / kl["nf4"], kl["fp4"] >= 1.4 * kl["nf4"]),
        (
            "KL of nf4 with searched scales / KL of nf4 (at most 0.92)",
            kl["nf4, searched scales"] / kl["nf4"],
            kl["nf4, searched scales"] <= 0.92 * kl["nf4"],
        ),
        ("KL of the broken control (at least 1)", control["kl"], control["kl"] >= 1.0),
    ]
    return [Check(*item) for item in found]


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    import halfbyte

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": halfbyte.cpu_info(),
        "build": halfbyte.build_info(),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    heads = (
        "model",
        "file bytes",
        "bits/weight",
        "KL per token",
        "NLL change",
        "same top",
        "tok/s read",
        "tok/s write",
    )
    lines = []
    for row in [*report["rows"], report["control"]]:
        original = row["name"] == "original"
        lines.append(
            (
                row["name"],
                f"{row['bytes']:,}",
                f"{row['bits_per_parameter']:.3f}" if row["bits_per_parameter"] else "16" if original else "",
                "" if original else f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
                f"(NLL {row['nll']:.4f})"
                if original
                else f"{row['nll_change']:+.4f} ± {row['nll_change_se']:.4f}",
                "" if original else f"{row['top1']:.1%}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['generated_tokens_per_second']:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    text = []
    for line in (heads, *lines):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    text.insert(1, "-" * len(text[0]))
    text.insert(-1, "-" * len(text[1]))
    note = (
        "KL divergence from the original and change of the negative log likelihood, in nats per token, "
        "mean ± standard\n"
        f"error over windows of {report['window']} tokens; {report['predicted_tokens']:,} predicted tokens, float32 "
        f"arithmetic. bits/weight: of the\nquantized layers, scales and tables included. tok/s: reading whole windows, "
        f"and writing one text (greedy)."
    )
    return "\n".join([*text, "", note])


def samples(report: dict[str, Any]) -> str:
    """What each model made of the prompt."""
    lines = [f'The prompt: "{report["prompt"]}"']
    for row in [*report["rows"], report["control"]]:
        lines.append(
            f"  {row['name']}:{' ' * (len(CONTROL) - len(row['name']))}  {' '.join(row['generated'].split())}"
        )
    return "\n".join(lines)


def picture(report: dict[str, Any], path: str | Path) -> None:
    """Draw the report: quality against size, and the divergences side by side. PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["name"] != "original"]
    colours = dict(
        zip(
            [row["name"] for row in rows],
            ("#4477aa", "#228833", "#66ccee", "#aa3377", "#ee6677"),
            strict=False,
        )
    )
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), gridspec_kw={"width_ratios": [1, 1.15]})

    for row in rows:
        left.errorbar(
            row["bits_per_parameter"],
            row["kl"],
            yerr=row["kl_se"],
            fmt="o",
            color=colours[row["name"]],
            capsize=3,
        )
        left.annotate(
            row["name"],
            (row["bits_per_parameter"], row["kl"]),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    left.set_yscale("log")
    left.set_xlim(3.5, 10)
    left.set_xlabel("bits per quantized weight")
    left.set_ylabel("KL divergence from the original (nats per token)")
    left.set_title("Smaller and farther from the original")
    left.grid(True, which="major", alpha=0.3)

    bars = [*rows, report["control"]]
    places = range(len(bars))
    right.barh(
        places,
        [row["kl"] for row in bars],
        xerr=[row["kl_se"] for row in bars],
        color=[*(colours[row["name"]] for row in rows), "#bbbbbb"],
        capsize=3,
    )
    right.set_yticks(
        places, ["control: half-bytes\nswapped" if row is bars[-1] else row["name"] for row in bars]
    )
    right.invert_yaxis()
    right.set_xscale("log")
    right.set_xlim(right.get_xlim()[0] / 2, max(row["kl"] for row in bars) * 6)
    for place, row in zip(places, bars, strict=True):
        right.annotate(
            f"{row['kl']:.4f}" if row["kl"] < 1 else f"{row['kl']:.1f}",
            (row["kl"] + row["kl_se"], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    right.set_xlabel("KL divergence (nats per token, logarithmic)")
    right.set_title(f"{report['model']}, {report['predicted_tokens']:,} tokens, ± standard error")
    right.grid(True, axis="x", which="major", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


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
