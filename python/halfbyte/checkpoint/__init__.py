"""Checkpoints: quantize a model folder, look into one, verify one. Needs numpy, never torch.

layers.py     which weights are quantized        inspect.py    what is in a checkpoint
plan.py       every file and byte, beforehand    verify.py     whether it is what was written
output.py     OUT.partial, its lock, the rename  footprint.py  what a model takes in memory
run.py        one pass by tiles
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.output import check_output
from halfbyte.checkpoint.plan import Options, make_plan, source_name
from halfbyte.checkpoint.run import Progress, default_threads, write_plan
from halfbyte.errors import CheckpointError
from halfbyte.formats.folder import open_model

__all__ = ["CheckpointError", "QuantizeReport", "quantize"]


@dataclass
class QuantizeReport:
    """What was written, or would be.

    Attributes
    ----------
    document : dict
        The JSON document of the command line, schema "halfbyte.quantize/1": sizes in bytes for every file,
        counts of parameters, options, notes, and SHA-256 and seconds where something was written.
    """

    document: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, int]:
        """Bytes of each file."""
        return {entry["name"]: entry["bytes"] for entry in self.document["files"]}

    @property
    def total_bytes(self) -> int:
        return self.document["total_bytes"]

    @property
    def bits_per_parameter(self) -> float:
        """Of the quantized weights, scales and maps included."""
        return self.document["quantized"]["bits_per_parameter"]

    def rows(self) -> list[tuple[str, str]]:
        d = self.document
        q, dense = d["quantized"], d["dense"]
        rows = [
            ("source", f"{d['source']}  {d['source_bytes']:,} bytes"),
            (
                "output",
                f"{d['output'] or 'none yet'}  {d['total_bytes']:,} bytes ({d['total_bytes'] / d['source_bytes']:.1%})",
            ),
            (
                f"{d['options']['to']}",
                f"{q['tensors']} tensors, {q['parameters']:,} parameters, "
                f"{q['source_bytes']:,} -> {q['bytes']:,} bytes, {q['bits_per_parameter']:.3f} bits each",
            ),
            (
                "dense",
                f"{dense['tensors']} tensors, {dense['parameters']:,} parameters, {dense['bytes']:,} bytes",
            ),
        ]
        if d["dry_run"]:
            rows.append(("memory", f"{d['peak_ram_bytes']:,} bytes at most (estimate)"))
        else:
            rows.append(("time", f"{d['seconds']:.1f} s"))
        return rows + [("note", note) for note in d["notes"]]

    def __str__(self) -> str:
        width = max(len(entry["name"]) for entry in self.document["files"])
        lines = [f"{label:<8}{text}" for label, text in self.rows()]
        lines += [f"  {entry['name']:<{width}}  {entry['bytes']:>16,}" for entry in self.document["files"]]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<QuantizeReport {self.document['output']}: {self.total_bytes:,} bytes>"

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in self.rows())
        return f"<table>{cells}</table>"


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    to: str = "nf4",
    *,
    double_quant: bool = False,
    blocksize: int = 64,
    scales: str = "absmax",
    skip: Sequence[str] = (),
    compute_dtype: str | None = None,
    max_shard_size: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write a quantized copy of a model, in the bitsandbytes checkpoint layout.

    Reads safetensors tile by tile in one pass; memory does not grow with the model. The linear layers are
    quantized that transformers' bitsandbytes integration would choose; everything else is copied. `out`
    appears only when it is complete.

    Parameters
    ----------
    source : path
        Model folder, .safetensors file in one, or ORG/NAME in the local Hugging Face cache.
    out : path
        Folder to make. May be None for a dry run.
    to : {"nf4", "fp4", "int8"}
        int8 is LLM.int8(): one scale a row, weights rounded to float16 first.
    double_quant : bool
        Store the scales of nf4 and fp4 in 8 bits.
    blocksize : int
        Weights that share a scale: 32, 64, ..., 4096.
    scales : {"absmax", "search"}
        "absmax" gives what bitsandbytes gives; "search" takes the scale with the least squared error.
    skip : sequence of str
        Globs over module names ("*.down_proj", "model.layers.0.*") that stay dense.
    compute_dtype : str, optional
        `bnb_4bit_compute_dtype` of the config; the source's dtype if None.
    max_shard_size : int, optional
        Split the output into files of at most so many bytes of tensors (a tensor is never cut); if None the
        output has the files of the source.
    threads : int, optional
        The result does not depend on it.
    overwrite : bool
        Replace an existing model folder, after success.
    dry_run : bool
        Write nothing; report the size of every file to the byte.
    progress : callable, optional
        Called with (source bytes done, source bytes in all, name of the current tensor).

    Returns
    -------
    QuantizeReport

    Raises
    ------
    CheckpointError
        With file, tensor and cause; `out` is then what it was before.
    """
    began = time.monotonic()
    options = Options(to, double_quant, blocksize, scales, tuple(skip), compute_dtype, max_shard_size)
    n_threads = default_threads() if threads is None else threads
    if n_threads < 1:
        raise CheckpointError("E203", f"quantize: threads must be at least 1, got {threads}")
    if out is None and not dry_run:
        raise CheckpointError("E203", "quantize: out is missing", fix="-o FOLDER, or --dry-run")
    target = None if out is None else Path(os.path.abspath(out))
    with open_model(source) as model:
        plan = make_plan(model, options)
        document: dict[str, Any] = {
            "schema": "halfbyte.quantize/1",
            "dry_run": dry_run,
            "source": source_name(model),
            "output": None if out is None else os.fspath(out),
            "options": plan.manifest["options"] | {"skip": list(options.skip)},
            **plan.summary(),
            "peak_ram_bytes": plan.peak_ram(n_threads),
        }
        if target is not None:
            check_output(plan, target, overwrite)
        if not dry_run and target is not None:
            hashes = write_plan(plan, target, n_threads, overwrite, progress)
            for entry in document["files"]:
                entry["sha256"] = hashes[entry["name"]]
            document["seconds"] = round(time.monotonic() - began, 3)
    return QuantizeReport(document)
