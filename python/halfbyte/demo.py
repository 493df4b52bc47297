"""A model in 4 and 8 bits, beside itself: sizes, quality, speed, and a few words from each.

Each recipe goes the way that a user would go: the checkpoint tool writes a folder, transformers loads it
(with halfbyte in the place of bitsandbytes), and `halfbyte.evaluation` compares the loaded model with the
original on the same text, in float32. One more model is broken on purpose, NF4 with swapped half-bytes: if that
one does not fail loudly, the measurement is worth nothing.

torch and transformers are imported by the functions that need them. How the report looks is in demo_report.py.
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

from halfbyte.errors import CheckpointError
from halfbyte.evaluation import compare, generate, generation_speed, load_float32, token_windows

# name in the table -> arguments of halfbyte.quantize
RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"to": "int8"},
    "nf4": {"to": "nf4"},
    "nf4, nested scales": {"to": "nf4", "double_quant": True},
    "nf4, searched scales": {"to": "nf4", "scales": "search"},
    "fp4": {"to": "fp4"},
}
CONTROL = "control: swapped half-bytes"


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
    prompt: str = "The function returns the",
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
        JSON document, schema "halfbyte.demo/1": `rows` (one per model: bytes of the files, linear_bytes and
        bits_per_parameter of the quantized layers, the fields of `Comparison`, generated text and speed),
        `control`, `checks`, `machine`.
    """
    import halfbyte

    halfbyte.install()
    from transformers import AutoTokenizer

    model = Path(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = sys.maxsize  # the text is cut into windows afterwards
    ids = token_windows(tokenizer, text, window=window, max_tokens=max_tokens)
    if len(ids) < 2:
        raise CheckpointError(
            "E403",
            f"the text has one window of {window} tokens, expected two or more: a standard error needs them",
            fix="give a longer text, or a smaller --window",
        )
    prompt_ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]

    def measure(name: str, folder: Path, linear_bytes: int) -> dict[str, Any]:
        log(f"measuring {name}")
        loaded = load_float32(folder)
        row = {"name": name, "bytes": weight_bytes(folder), "linear_bytes": linear_bytes}
        row["bits_per_parameter"] = 8 * linear_bytes / linear["parameters"]
        row |= compare(original, loaded, ids).to_dict()
        row["generated_tokens_per_second"] = generation_speed(loaded, prompt_ids, tokens=new_tokens)
        # A small model that always takes its favourite word goes round in circles; three words do not recur.
        words = generate(loaded, prompt_ids, tokens=new_tokens, no_repeat_ngram_size=3)
        row["generated"] = tokenizer.decode(words)
        return row

    log(f"loading {model}")
    original = Remembered(load_float32(model))
    linear = halfbyte.quantize(model, None, to="int8", dry_run=True).document["quantized"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if work is None else work)
        rows = [measure("original", model, linear["source_bytes"])]
        for name, options in RECIPES.items():
            out = folder / "".join(c if c.isalnum() else "-" for c in name)
            report = halfbyte.quantize(model, out, **options, compute_dtype="float32", overwrite=True)
            rows.append(measure(name, out, report.document["quantized"]["bytes"]))
        broken = folder / "control"
        swap_half_bytes(folder / "nf4", broken)
        control = measure(CONTROL, broken, next(r["linear_bytes"] for r in rows if r["name"] == "nf4"))
    return {
        "schema": "halfbyte.demo/1",
        "model": model.name,
        "parameters": {"linear": linear["parameters"], "all": original.model.num_parameters()},
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
    import torch

    import halfbyte

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "threads": {"halfbyte": halfbyte.get_num_threads(), "torch": torch.get_num_threads()},
        "cpu": halfbyte.cpu_info(),
        "build": halfbyte.build_info(),
    }


def processor_name() -> str:
    """What the processor calls itself, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()
