"""What is in a checkpoint: the weights by format, their bytes and bits per parameter. Reads headers only."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

from halfbyte.checkpoint.plan import source_name
from halfbyte.errors import CheckpointError
from halfbyte.formats.folder import ModelFolder, open_model
from halfbyte.formats.safetensors import TensorInfo

_BLOB = ".quant_state.bitsandbytes__"
_MAX_BLOB_BYTES = 4096


@dataclass(frozen=True)
class Weight:
    """One weight of the model with all its stored parts. `bytes` counts the parts."""

    name: str
    format: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def weights_of(model: ModelFolder) -> list[Weight]:
    """The weights of a checkpoint, dense or in the bitsandbytes layout, in name order.

    Raises CheckpointError E434 when the parts of a quantized weight do not fit together.
    """
    weights, parts = [], set()
    for name in sorted(model.tensors):
        base, found, quant_type = name.partition(_BLOB)
        if found:
            weight, used = _four_bit(model, base, name, quant_type)
        elif name.endswith(".SCB"):
            weight, used = _eight_bit(model, name)
        else:
            continue
        weights.append(weight)
        parts |= used
    for name, tensor in model.tensors.items():
        if name not in parts:
            weights.append(Weight(name, tensor.dtype.lower(), tensor.shape, tensor.nbytes))
    return sorted(weights, key=lambda w: w.name)


def read_blob(tensor: TensorInfo) -> dict[str, Any]:
    """The JSON of a quant_state tensor."""
    if tensor.dtype != "U8" or tensor.nbytes > _MAX_BLOB_BYTES:
        raise _mismatch(
            tensor, f"is {tensor.dtype} with {tensor.nbytes:,} bytes, expected U8 with a few hundred"
        )
    try:
        state = json.loads(tensor.file.read(tensor).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _mismatch(tensor, f"is not JSON: {error}") from error
    ok = isinstance(state, dict) and isinstance(state.get("blocksize"), int) and state["blocksize"] > 0
    shape = state.get("shape") if ok else None
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise _mismatch(tensor, "lacks a usable blocksize or shape")
    return state


def _mismatch(tensor: TensorInfo, cause: str) -> CheckpointError:
    return CheckpointError("E434", f"'{tensor.name}' in '{tensor.file.name}' {cause}")


def _part(model: ModelFolder, name: str, owner: TensorInfo) -> TensorInfo:
    tensor = model.tensors.get(name)
    if tensor is None:
        raise CheckpointError("E434", f"'{owner.name}' in '{owner.file.name}' has no '{name}' beside it")
    return tensor


def _expect(tensor: TensorInfo, dtype: str, numel: int) -> None:
    if tensor.dtype != dtype or tensor.numel != numel:
        raise _mismatch(
            tensor, f"is {tensor.dtype} {list(tensor.shape)}, expected {dtype} with {numel:,} elements"
        )


def _four_bit(model: ModelFolder, base: str, blob_name: str, quant_type: str) -> tuple[Weight, set[str]]:
    blob = model.tensors[blob_name]
    state = read_blob(blob)
    numel = math.prod(state["shape"])
    n_blocks = -(-numel // state["blocksize"])
    nested = "nested_blocksize" in state
    weight, absmax = _part(model, base, blob), _part(model, base + ".absmax", blob)
    quant_map = _part(model, base + ".quant_map", blob)
    if weight.nbytes != (numel + 1) // 2:
        raise _mismatch(weight, f"has {weight.nbytes:,} bytes, expected {(numel + 1) // 2:,}")
    _expect(absmax, "U8" if nested else "F32", n_blocks)
    _expect(quant_map, "F32", 16)
    used = [blob, weight, absmax, quant_map]
    if nested:
        if not isinstance(state["nested_blocksize"], int) or state["nested_blocksize"] < 1:
            raise _mismatch(blob, "lacks a usable nested_blocksize")
        nested_absmax = _part(model, base + ".nested_absmax", blob)
        nested_map = _part(model, base + ".nested_quant_map", blob)
        _expect(nested_absmax, "F32", -(-n_blocks // state["nested_blocksize"]))
        _expect(nested_map, "F32", 256)
        used += [nested_absmax, nested_map]
    label = f"{quant_type} block {state['blocksize']}" + (" nested" if nested else "")
    return Weight(base, label, tuple(state["shape"]), sum(t.nbytes for t in used)), {t.name for t in used}


def _eight_bit(model: ModelFolder, scale_name: str) -> tuple[Weight, set[str]]:
    scale = model.tensors[scale_name]
    weight = _part(model, scale_name.removesuffix("SCB") + "weight", scale)
    if weight.dtype != "I8" or len(weight.shape) != 2:
        raise _mismatch(weight, f"is {weight.dtype} {list(weight.shape)}, expected an I8 matrix")
    _expect(scale, "F32", weight.shape[0])
    used = [scale, weight]
    layout = model.tensors.get(scale_name.removesuffix("SCB") + "weight_format")
    if layout is not None:
        if layout.dtype != "U8" or layout.nbytes != 1 or layout.file.read(layout) != b"\0":
            raise _mismatch(layout, "is not 0: only row-major int8 weights can be read")
        used.append(layout)
    return Weight(weight.name, "int8", weight.shape, sum(t.nbytes for t in used)), {t.name for t in used}


def inspect(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The document of `halfbyte inspect --json`, schema "halfbyte.inspect/1"."""
    with open_model(source) as model:
        weights = weights_of(model)
        groups: dict[str, dict[str, int]] = {}
        for weight in weights:
            group = groups.setdefault(weight.format, {"tensors": 0, "parameters": 0, "bytes": 0})
            group["tensors"] += 1
            group["parameters"] += weight.parameters
            group["bytes"] += weight.bytes
        total = sum(w.bytes for w in weights)
        parameters = sum(w.parameters for w in weights)
        config = model.config or {}
        return {
            "schema": "halfbyte.inspect/1",
            "source": source_name(model),
            "model_type": config.get("model_type"),
            "architectures": config.get("architectures"),
            "quantization_config": config.get("quantization_config"),
            "files": [{"name": f.name, "bytes": f.size, "tensors": len(f.tensors)} for f in model.files],
            "formats": [
                {"format": name, **group, "bits_per_parameter": _bits(group["bytes"], group["parameters"])}
                for name, group in sorted(groups.items(), key=lambda item: -item[1]["bytes"])
            ],
            "parameters": parameters,
            "bytes": total,
            "bits_per_parameter": _bits(total, parameters),
            "tensors": [
                {
                    "name": w.name,
                    "format": w.format,
                    "shape": list(w.shape),
                    "bytes": w.bytes,
                    "bits_per_parameter": _bits(w.bytes, w.parameters),
                }
                for w in weights
            ],
        }


def _bits(nbytes: int, parameters: int) -> float:
    return round(8 * nbytes / parameters, 4) if parameters else 0.0
