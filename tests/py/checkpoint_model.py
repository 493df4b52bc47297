"""Small models on disk for the tests of the checkpoint tool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from halfbyte.formats.safetensors import SafetensorsFile, Slot, layout, write_at

NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def to_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as they lie in a file; bfloat16 by truncation, which is one of its valid roundings."""
    array = np.ascontiguousarray(array, np.float32)
    if dtype == "BF16":
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(np.float16) if dtype == "F16" else array


def from_bits(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I8": np.int8}[dtype])


def write_file(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """Write {name: (dtype, float32 array)}."""
    header, placed, size = layout((Slot(n, d, a.shape) for n, (d, a) in tensors.items()), {"format": "pt"})
    with open(path, "wb") as file:
        file.truncate(size)
        write_at(file.fileno(), header, 0)
        for name, (dtype, array) in tensors.items():
            write_at(file.fileno(), to_bits(array, dtype), placed[name].start)


def read_all(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """{name: (dtype, shape, bytes)} of every safetensors file of a folder."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        with SafetensorsFile(path) as file:
            result |= {t.name: (t.dtype, t.shape, file.read(t)) for t in file.tensors.values()}
    return result


def make_llama(
    folder: Path,
    *,
    dtype: str = "BF16",
    layers: int = 2,
    hidden: int = 48,
    mlp: int = 80,
    shards: int = 1,
    seed: int = 0,
    **config: object,
) -> dict[str, np.ndarray]:
    """A Llama of random weights; returns what is stored, as float32. Linear layers: q_proj, down_proj, ..."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, hidden)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, mlp)
        shapes[prefix + "mlp.gate_proj.weight"] = (mlp, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (mlp, hidden)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name in ("k_proj", "o_proj", "q_proj", "v_proj"):
            shapes[prefix + f"self_attn.{name}.weight"] = (hidden, hidden)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (64, hidden)
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) * 0.05 for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    names = list(arrays)
    per_shard = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        part = names[i * per_shard : (i + 1) * per_shard]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        write_file(folder / file, {name: (dtype, arrays[name]) for name in part})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_config(folder, hidden=hidden, mlp=mlp, layers=layers, dtype=NAMES[dtype], **config)
    (folder / "tokenizer.json").write_text('{"kind": "none"}')
    return {
        name: from_bits(to_bits(a, dtype).tobytes(), dtype).reshape(a.shape) for name, a in arrays.items()
    }


def write_config(folder: Path, *, hidden: int, mlp: int, layers: int, dtype: str, **more: object) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config | more))
