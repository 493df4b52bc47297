"""The plan of a quantized checkpoint: every file, every tensor in it, every byte count, before any work.

The plan is made from headers and config alone. `--dry-run` prints it and checkpoint/run.py carries it out,
so the sizes that are predicted are the sizes that are written, the manifest included (a hash has a fixed
length).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import halfbyte
from halfbyte.checkpoint.layers import FLOAT_DTYPES, Selection, select
from halfbyte.errors import CheckpointError
from halfbyte.formats import bitsandbytes as layout_of
from halfbyte.formats.folder import INDEX_NAME, SINGLE_NAME, ModelFolder, read_small
from halfbyte.formats.safetensors import Slot, TensorInfo, layout

MANIFEST_NAME = "halfbyte-manifest.json"
# Elements of a tile: 2 MiB of bfloat16 in, 0.5 MiB of codes out, which stay in a core's own cache.
TILE_ELEMENTS = 1 << 20
# Interpreter, numpy and the extension module, measured; the plan adds the tiles.
_BASE_RAM = 64 << 20


@dataclass(frozen=True)
class Options:
    """What to make. See `halfbyte.quantize` for the meaning of each."""

    to: str
    double_quant: bool = False
    blocksize: int = 64
    scales: str = "absmax"
    skip: tuple[str, ...] = ()
    compute_dtype: str | None = None
    max_shard_size: int | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, expected: str, got: object) -> None:
            if not ok:
                raise CheckpointError("E203", f"quantize: {name} must be {expected}, got {got!r}")

        check(self.to in layout_of.TARGETS, "to", " or ".join(layout_of.TARGETS), self.to)
        check(
            self.blocksize in layout_of.BLOCKSIZES,
            "blocksize",
            "one of " + ", ".join(map(str, layout_of.BLOCKSIZES)),
            self.blocksize,
        )
        check(self.scales in ("absmax", "search"), "scales", "absmax or search", self.scales)
        check(
            self.compute_dtype in (None, *FLOAT_DTYPES.values()),
            "compute_dtype",
            "float32, bfloat16 or float16",
            self.compute_dtype,
        )
        check(
            self.max_shard_size is None or self.max_shard_size > 0,
            "max_shard_size",
            "> 0",
            self.max_shard_size,
        )
        if self.to == "int8":
            check(not self.double_quant, "double_quant", "off for int8", self.double_quant)
            check(
                self.blocksize == 64,
                "blocksize",
                "left out for int8, which has one scale a row",
                self.blocksize,
            )
            check(self.scales == "absmax", "scales", "absmax for int8", self.scales)


@dataclass
class Job:
    """One tensor of the source: `kind` is "copy", "4bit" or "int8"; `slots` are its parts in file `file`.

    `shape` is the shape that is quantized: the transposed one where `transposed`.
    """

    source: TensorInfo
    kind: str
    slots: dict[str, Slot]
    shape: tuple[int, ...]
    transposed: bool = False
    file: int = 0

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots.values())

    def tiles(self, blocksize: int) -> Iterator[tuple[int, int]]:
        """(first element, number of elements) of the units of work; blocks and int8 rows are never cut."""
        numel = math.prod(self.shape)
        step = TILE_ELEMENTS
        if self.kind == "int8" or self.transposed:
            depth = self.shape[1]
            rows = max(1, TILE_ELEMENTS // depth)
            if self.kind == "4bit":  # whole rows and whole blocks
                unit = blocksize // math.gcd(depth, blocksize)
                rows = max(1, rows // unit) * unit
            step = rows * depth
        for start in range(0, numel, step):
            yield start, min(step, numel - start)

    def largest_tile(self, blocksize: int) -> int:
        return next((n for _, n in self.tiles(blocksize)), 0)


@dataclass
class FilePlan:
    """One safetensors file: its header and where each tensor goes."""

    name: str
    header: bytes
    size: int
    jobs: list[Job]


@dataclass
class Plan:
    """Everything that will be written. `small` are whole files; `copies` are (name, bytes)."""

    model: ModelFolder
    options: Options
    selection: Selection
    files: list[FilePlan]
    small: dict[str, bytes]
    copies: dict[str, int]
    manifest: dict[str, Any] = field(default_factory=dict)

    def manifest_bytes(self, hashes: dict[str, str] | None = None) -> bytes:
        """The manifest with the given hashes; without, one of the same length."""
        files = {
            name: {"bytes": size, "sha256": hashes[name] if hashes else "0" * 64}
            for name, size in sorted(self.sizes(manifest=False).items())
        }
        return json_bytes(self.manifest | {"files": files})

    def sizes(self, manifest: bool = True) -> dict[str, int]:
        """Bytes of every file of the output."""
        sizes = {file.name: file.size for file in self.files}
        sizes |= {name: len(content) for name, content in self.small.items()}
        sizes |= self.copies
        if manifest:
            sizes[MANIFEST_NAME] = len(self.manifest_bytes())
        return sizes

    @property
    def jobs(self) -> list[Job]:
        return [job for file in self.files for job in file.jobs]

    def peak_ram(self, threads: int) -> int:
        """Estimate of the resident bytes while the plan is carried out."""
        blocksize = self.options.blocksize
        tile = max((14 * job.largest_tile(blocksize) for job in self.jobs), default=0)
        nested = max(
            (job.slots["absmax"].nbytes for job in self.jobs if "nested_absmax" in job.slots), default=0
        )
        return _BASE_RAM + threads * tile + 6 * nested

    def summary(self) -> dict[str, Any]:
        """Counts and sizes, for reports."""
        jobs = self.jobs
        quantized = [job for job in jobs if job.kind != "copy"]
        dense = [job for job in jobs if job.kind == "copy"]
        parameters = sum(math.prod(job.shape) for job in quantized)
        stored = sum(job.nbytes for job in quantized)
        sizes = self.sizes()
        return {
            "files": [{"name": name, "bytes": sizes[name]} for name in sorted(sizes)],
            "total_bytes": sum(sizes.values()),
            "source_bytes": sum(file.size for file in self.model.files),
            "quantized": {
                "tensors": len(quantized),
                "parameters": parameters,
                "source_bytes": sum(job.source.nbytes for job in quantized),
                "bytes": stored,
                "bits_per_parameter": round(8 * stored / parameters, 4) if parameters else 0.0,
            },
            "dense": {
                "tensors": len(dense),
                "parameters": sum(math.prod(job.shape) for job in dense),
                "bytes": sum(job.nbytes for job in dense),
            },
            "skip_modules": self.selection.skip_modules,
            "notes": self.selection.notes,
        }


def make_plan(model: ModelFolder, options: Options) -> Plan:
    """Plan the quantized copy of `model`. Raises CheckpointError when it cannot be made."""
    if model.config is None:
        raise CheckpointError("E401", f"'config.json' is missing in {model.root}")
    _refuse_quantized(model)
    selection = select(model.tensors.values(), model.config, options.skip)
    jobs = [_job(tensor, selection, options) for file in model.files for tensor in file.tensors.values()]
    quantized = [job for job in jobs if job.kind != "copy"]
    if not quantized:
        raise CheckpointError(
            "E432",
            f"'{model.root.name}' has no linear layer to quantize",
            [f"{len(jobs)} tensors, all of them stay dense ({_reasons(selection)})"],
        )
    files = _files(jobs, options.max_shard_size, [file.name for file in model.files])
    small = {"config.json": _config(model.config, selection, options, quantized)}
    if len(files) > 1:
        small[INDEX_NAME] = _index(files)
    copies = {name: len(read_small(model.root, name)) for name in model.companions}
    taken = {file.name for file in files} | small.keys()
    plan = Plan(model, options, selection, files, small, {n: s for n, s in copies.items() if n not in taken})
    plan.manifest = {
        "schema": "halfbyte.manifest/1",
        "halfbyte": halfbyte.__version__,
        "source": {
            "name": source_name(model),
            "files": {f.name: {"bytes": f.size, "header_sha256": _header_hash(f)} for f in model.files},
        },
        "options": asdict(options),
    }
    return plan


def source_name(model: ModelFolder) -> str:
    """The folder's name; ORG/NAME for a snapshot of the Hugging Face cache."""
    if model.root.parent.name == "snapshots":
        return model.root.parent.parent.name.removeprefix("models--").replace("--", "/")
    return model.root.name


def json_bytes(value: Any) -> bytes:
    """JSON as transformers writes its files."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _header_hash(file: Any) -> str:
    header = bytearray(file.header_bytes)
    file.read_into(header, 0)
    return hashlib.sha256(header).hexdigest()


def _reasons(selection: Selection) -> str:
    counts: dict[str, int] = {}
    for choice in selection.choices.values():
        counts[choice.label] = counts.get(choice.label, 0) + 1
    return ", ".join(f"{n} {label}" for label, n in sorted(counts.items(), key=lambda item: -item[1]))


def _refuse_quantized(model: ModelFolder) -> None:
    quantization = (model.config or {}).get("quantization_config")
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else None
    if method is None:
        for name, tensor in model.tensors.items():
            if tensor.dtype.startswith(("F8", "F4", "F6")) or ".quant_state.bitsandbytes__" in name:
                method = f"{tensor.dtype} in '{name}'"
                break
    if method is not None:
        raise CheckpointError(
            "E431",
            f"'{model.root.name}' is quantized already ({ascii(str(method))[1:-1][:80]})",
            ["quantizing twice loses twice"],
            "give the 16-bit or 32-bit model",
        )


def _job(tensor: TensorInfo, selection: Selection, options: Options) -> Job:
    choice = selection.choices[tensor.name]
    if choice.kind == "dense":
        slot = Slot(tensor.name, tensor.dtype, tensor.shape)
        return Job(tensor, "copy", {"data": slot}, tensor.shape)
    shape = tensor.shape[::-1] if choice.kind == "conv1d" else tensor.shape
    if options.to == "int8":
        slots, kind = layout_of.slots_int8(tensor.name, shape), "int8"
    else:
        dtype = FLOAT_DTYPES[tensor.dtype]
        slots = layout_of.slots_4bit(
            tensor.name, options.to, options.blocksize, dtype, shape, options.double_quant
        )
        kind = "4bit"
    return Job(tensor, kind, slots, shape, choice.kind == "conv1d")


def _files(jobs: list[Job], max_shard_size: int | None, source_names: list[str]) -> list[FilePlan]:
    if max_shard_size is None:
        groups = [[job for job in jobs if job.source.file.name == name] for name in source_names]
    else:
        groups = [[]]
        room = max_shard_size
        for job in jobs:
            if groups[-1] and job.nbytes > room:
                groups.append([])
                room = max_shard_size
            groups[-1].append(job)
            room -= job.nbytes
    files = []
    for number, group in enumerate(groups):
        name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE_NAME
        header, placed, size = layout(
            (slot for job in group for slot in job.slots.values()), {"format": "pt"}
        )
        for job in group:
            job.file = number
            job.slots = {role: placed[slot.name] for role, slot in job.slots.items()}
        files.append(FilePlan(name, header, size, group))
    return files


def _config(
    config: dict[str, Any], selection: Selection, options: Options, quantized: Sequence[Job]
) -> bytes:
    compute = options.compute_dtype
    if compute is None:  # the dtype that most weights have
        dtypes = [FLOAT_DTYPES[job.source.dtype] for job in quantized]
        compute = max(sorted(set(dtypes)), key=dtypes.count)
    quantization = layout_of.quantization_config(
        options.to, options.double_quant, compute, selection.skip_modules
    )
    return json_bytes(config | {"quantization_config": quantization})


def _index(files: list[FilePlan]) -> bytes:
    slots = [(slot, file.name) for file in files for job in file.jobs for slot in job.slots.values()]
    metadata = {
        "total_parameters": sum(math.prod(job.shape) for file in files for job in file.jobs),
        "total_size": sum(slot.nbytes for slot, _ in slots),
    }
    return json_bytes({"metadata": metadata, "weight_map": {slot.name: name for slot, name in slots}})
