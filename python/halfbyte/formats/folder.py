"""A Hugging Face model folder: config.json, one or several safetensors files, tokenizer files.

    model.safetensors                      or
    model.safetensors.index.json           {"metadata": {...}, "weight_map": {tensor: file name}}
    model-00001-of-00003.safetensors ...
    config.json, generation_config.json, tokenizer.json, ...

Nothing in a folder may make us read outside of it. File names in the index are plain names. A symlink is
followed only when it ends in the same folder, or, in a Hugging Face cache, in the `blobs` folder of the same
repository. FIFOs, devices and folders in place of files are refused. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.errors import CheckpointError, from_os_error
from halfbyte.formats.safetensors import SafetensorsFile, TensorInfo, open_regular

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_JSON_BYTES = 100_000_000

# Copied beside the weights: everything a loader may ask for that holds no weights of its own. Model cards are
# not copied: they describe the source.
_COMPANIONS = re.compile(
    r"(?!config\.json$|.*\.index\.json$|halfbyte-manifest\.json$)"
    r"(.*\.(json|jinja|model|tiktoken|py)|vocab\.txt|merges\.txt|(LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY).*)$"
)


@dataclass
class ModelFolder:
    """An open model.

    Attributes
    ----------
    root : Path
        Resolved folder.
    files : list of SafetensorsFile
        In the order of their names, headers checked.
    tensors : dict of str to TensorInfo
        Of all files.
    config : dict or None
        config.json; None when there is none.
    companions : list of str
        Names of other files that belong to the model (tokenizer, generation config, licence).
    """

    root: Path
    files: list[SafetensorsFile]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    companions: list[str] = field(default_factory=list)

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> ModelFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


def open_model(source: str | os.PathLike[str]) -> ModelFolder:
    """Open a model folder, a single .safetensors file, or ORG/NAME from the local Hugging Face cache.

    Reads headers and config only. Raises CheckpointError (E4xx) with file and cause.
    """
    path = _find(os.fspath(source))
    if path.is_file():
        folder, names = path.parent.resolve(), [path.name]
        weight_map = None
    else:
        folder = path.resolve()
        names, weight_map = _weight_files(folder)
    model = ModelFolder(folder, [])
    try:
        for name in names:
            model.files.append(SafetensorsFile(safe_join(folder, name), name))
        _merge(model, weight_map)
        if (folder / "config.json").exists():
            model.config = read_json(folder, "config.json")
        model.companions = sorted(
            entry.name for entry in os.scandir(folder) if _COMPANIONS.match(entry.name) and entry.is_file()
        )
        for name in model.companions:
            safe_join(folder, name)
    except BaseException:
        model.close()
        raise
    return model


def safe_join(root: Path, name: object) -> str:
    """The resolved path of file `name` in folder `root`, or CheckpointError E421.

    `name` must be one plain component. The result is a path without symlinks; open it with O_NOFOLLOW.
    """

    def refuse(cause: str) -> CheckpointError:
        return CheckpointError("E421", f"unsafe file name {ascii(name)[:120]} in '{root.name}': {cause}")

    if not isinstance(name, str) or not name:
        raise refuse("not a file name")
    if name in (".", "..") or re.search(r"[/\\:]", name):
        raise refuse("only plain names of files in the same folder are accepted")
    if not name.isprintable() or len(name.encode("utf-8", "surrogatepass")) > 255:
        raise refuse("control characters, or longer than 255 bytes")
    path = root / name
    try:
        resolved = path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError("E401", f"'{name}' is missing in {root}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: symlink loop, before Python 3.13
        raise refuse(f"cannot be resolved ({error})") from error
    home = root.resolve()
    # .../models--ORG--NAME/snapshots/REVISION/file -> .../models--ORG--NAME/blobs/HASH
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if resolved.parent != home and (blobs is None or resolved.parent != blobs):
        raise refuse(f"it is a link that leaves the folder, to {resolved}")
    if not resolved.is_file():
        raise refuse("not a regular file")
    return str(resolved)


def read_json(root: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of a model folder."""
    raw = read_small(root, name)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise CheckpointError("E420", f"'{name}' has the same key twice in one object")
        return dict(pairs)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError("E420", f"'{name}' is not JSON", [str(error)]) from error
    if not isinstance(value, dict):
        raise CheckpointError("E420", f"'{name}' is not a JSON object")
    return value


def read_small(root: Path, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a file of a model folder, of at most `limit` bytes."""
    fd = open_regular(safe_join(root, name), name)
    with os.fdopen(fd, "rb") as file:
        raw = file.read(min(os.fstat(fd).st_size, limit) + 1)  # a buffer of what is asked for is made at once
    if len(raw) > limit:
        raise CheckpointError("E420", f"'{name}' is larger than {limit:,} bytes")
    return raw


def _find(source: str) -> Path:
    path = Path(source)
    try:
        if path.exists():
            if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
                return path
            raise CheckpointError(
                "E401",
                f"'{source}' is neither a model folder nor a .safetensors file",
                fix="give the model's folder",
            )
    except OSError as error:
        raise from_os_error(error, f"cannot read '{source}'") from error
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and ".." not in source:
        snapshot = _from_hub_cache(source)
        if snapshot is not None:
            return snapshot
        raise CheckpointError(
            "E401",
            f"'{source}' is neither a folder here nor a model in the local Hugging Face cache",
            fix=f"hf download {source}",
        )
    raise CheckpointError("E401", f"'{source}' does not exist")


def _from_hub_cache(repository: str) -> Path | None:
    """The snapshot of `main` in the local cache; nothing is downloaded."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    folder = cache / ("models--" + repository.replace("/", "--"))
    try:
        revision = (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / revision
    return snapshot if re.fullmatch(r"[0-9a-f]{40}", revision) and snapshot.is_dir() else None


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    # The order of transformers: the single file wins over an index beside it.
    if (folder / SINGLE_NAME).exists():
        return [SINGLE_NAME], None
    if (folder / INDEX_NAME).exists():
        weight_map = read_json(folder, INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("E420", f"'{INDEX_NAME}' has no weight_map")
        for name in weight_map.values():
            if not isinstance(name, str) or not name.endswith(".safetensors"):
                raise CheckpointError(
                    "E421", f"unsafe file name {ascii(name)[:120]} in '{INDEX_NAME}': not a .safetensors file"
                )
        return sorted(set(weight_map.values())), weight_map
    names = sorted(e.name for e in os.scandir(folder) if e.name.endswith(".safetensors"))
    if len(names) == 1:
        return names, None
    pickles = sorted(e.name for e in os.scandir(folder) if re.search(r"\.(bin|pt|pth|ckpt)$", e.name))
    if not names and pickles:
        raise CheckpointError(
            "E440",
            f"'{folder.name}' has its weights only as a pickle ('{pickles[0]}')",
            ["unpickling runs code from the file; halfbyte never does it"],
            "load it with the program that made it and save it as safetensors",
        )
    if names:
        raise CheckpointError(
            "E401", f"'{folder.name}' has {len(names)} .safetensors files and no '{INDEX_NAME}'", names[:5]
        )
    raise CheckpointError("E401", f"'{folder}' has no .safetensors file")


def _merge(model: ModelFolder, weight_map: dict[str, str] | None) -> None:
    for file in model.files:
        for name, tensor in file.tensors.items():
            if name in model.tensors:
                other = model.tensors[name].file.name
                raise CheckpointError("E422", f"tensor '{name}' is in two files: '{other}' and '{file.name}'")
            model.tensors[name] = tensor
    if weight_map is None:
        return
    for name, file_name in weight_map.items():
        tensor = model.tensors.get(name)
        if tensor is None or tensor.file.name != file_name:
            where = f"it is in '{tensor.file.name}'" if tensor else "no file has it"
            raise CheckpointError(
                "E422", f"'{INDEX_NAME}' says that tensor {ascii(name)[:200]} is in '{file_name}'", [where]
            )
    for name, tensor in model.tensors.items():
        if name not in weight_map:
            raise CheckpointError(
                "E422", f"'{tensor.file.name}' has tensor '{name}', which '{INDEX_NAME}' lacks"
            )
