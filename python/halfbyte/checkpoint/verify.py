"""Checking a finished checkpoint: the manifest's hashes and sizes, the headers, the parts of each weight."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.inspect import weights_of
from halfbyte.checkpoint.plan import MANIFEST_NAME, source_name
from halfbyte.errors import CheckpointError
from halfbyte.formats.folder import open_model, read_json, safe_join
from halfbyte.formats.safetensors import open_regular

_READ_BYTES = 1 << 20


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The document of `halfbyte verify --json`, schema "halfbyte.verify/1".

    `problems` is a list of sentences, empty when all is well. A folder without manifest is checked for its
    headers and parts only, and `manifest` is false. Raises CheckpointError E401 when there is no such folder.
    """
    if not os.path.exists(folder):
        raise CheckpointError(
            "E401", f"'{os.fspath(folder)}' does not exist", fix="give the checkpoint's folder"
        )
    problems: list[str] = []
    weights = []
    name = os.path.basename(os.path.abspath(folder))
    checked: dict[str, int] = {}
    root = Path(folder).resolve()
    try:
        with open_model(folder) as model:
            root, name = model.root, source_name(model)
            weights = weights_of(model)
            problems += _config_problems(model.config, [w.format for w in weights])
    except CheckpointError as error:
        problems.append(error.what)
    has_manifest = root.is_dir() and (root / MANIFEST_NAME).exists()
    if has_manifest:
        try:
            problems += _check_manifest(root, checked)
        except CheckpointError as error:
            problems.append(error.what)
    elif root.is_dir() and not problems and not weights:
        problems.append(f"'{name}' holds no weights")
    quantized = [w for w in weights if w.format.split()[0] in ("nf4", "fp4", "int8")]
    return {
        "schema": "halfbyte.verify/1",
        "source": name,
        "ok": not problems,
        "manifest": has_manifest,
        "files_checked": checked,
        "weights": len(weights),
        "quantized_weights": len(quantized),
        "problems": problems,
    }


def _config_problems(config: dict[str, Any] | None, formats: list[str]) -> list[str]:
    kinds = {f.split()[0] for f in formats} & {"nf4", "fp4", "int8"}
    quantization = (config or {}).get("quantization_config")
    if not kinds:
        return []
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "bitsandbytes":
        return ["the weights are quantized, but config.json has no quantization_config of bitsandbytes"]
    eight = bool(quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"))
    expected = {"int8"} if eight else {quantization.get("bnb_4bit_quant_type", "fp4")}
    if kinds != expected:
        return [f"config.json says {sorted(expected)}, the weights are {sorted(kinds)}"]
    return []


def _check_manifest(root: Path, checked: dict[str, int]) -> list[str]:
    manifest = read_json(root, MANIFEST_NAME)
    files = manifest.get("files")
    if not isinstance(files, dict):
        return [f"'{MANIFEST_NAME}' lists no files"]
    problems = []
    for name, entry in sorted(files.items()):
        try:
            size, digest = _hash(safe_join(root, name), name)
        except CheckpointError as error:
            problems.append(error.what)
            continue
        expected = entry if isinstance(entry, dict) else {}
        if size != expected.get("bytes"):
            problems.append(f"'{name}' has {size:,} bytes, the manifest says {expected.get('bytes')}")
        elif digest != expected.get("sha256"):
            problems.append(f"'{name}' is not what was written: its SHA-256 differs")
        checked[name] = size
    extra = {e.name for e in os.scandir(root) if e.name.endswith(".safetensors")} - files.keys()
    return problems + [f"'{name}' is not in the manifest" for name in sorted(extra)]


def _hash(path: str, name: str) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    with os.fdopen(open_regular(path, name), "rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
