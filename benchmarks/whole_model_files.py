"""A Llama on disk: bfloat16 safetensors for transformers, Q4_0 in a GGUF file for llama.cpp.

Both files are the same model: each weight of a random one is drawn once, and llama.cpp's file is made from the shards,
as it is from the trained model in tests/data. Making one needs 300 MB of memory, whatever its size; 1.2B parameters
take half a minute and 3.2 GB of disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.output import ROOT
from halfbyte.bench import ggml

BUNDLED = ROOT / "tests" / "data" / "tiny-llama"
SHARD_BYTES = 500_000_000
SPREAD = 0.02  # standard deviation of the weights, as transformers initializes a Llama


@dataclass(frozen=True)
class Shape:
    """Of a Llama. The defaults are 1.2B parameters, with the heads of Llama 3.2 1B and the vocabulary of Llama 2."""

    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 24
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32000
    tied: bool = False  # the head is the embedding

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """Of the Llama in `folder`."""
        config = json.loads((folder / "config.json").read_text())
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            vocabulary=config["vocab_size"],
            tied=config["tie_word_embeddings"],
        )

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name -> (outputs, inputs)."""
        kv = self.kv_heads * self.head_size
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def linear_weights(self) -> int:
        """Weights in the blocks' linear layers, those that are quantized."""
        return self.layers * sum(rows * depth for rows, depth in self.linear().values())

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_weights + (2 - self.tied) * self.head_weights + (2 * self.layers + 1) * self.hidden

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": None,  # nothing ends a text early
            "dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for i in range(self.layers):
            for name, shape in self.linear().items():
                yield f"model.layers.{i}.{name}.weight", shape
            yield f"model.layers.{i}.input_layernorm.weight", (self.hidden,)
            yield f"model.layers.{i}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)


def make_model(folder: Path, shape: Shape) -> None:
    """Writes the model to `folder`, unless it is there already (config.json comes last)."""
    config = json.dumps(shape.config(), indent=1)
    if (folder / "config.json").exists():
        if (folder / "config.json").read_text() != config:
            raise SystemExit(f"{folder}: holds another model")
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, size in shape.tensors():
        one = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=random).mul_(SPREAD)
        shard[name] = one.to(torch.bfloat16)
        total += shard[name].nbytes
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))
    (folder / "config.json").write_text(config)


def copy_bundled(folder: Path) -> None:
    """The trained model of tests/data (2.9 million parameters), where files can be laid beside it."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(BUNDLED / name, folder)


def shards(folder: Path) -> dict[str, str]:
    """In which file each tensor is."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return found
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q_proj or k_proj in llama.cpp's order: it rotates neighbours where transformers rotates halves."""
    rows, depth = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, depth).swapaxes(1, 2).reshape(rows, depth)


def make_gguf(folder: Path, shape: Shape) -> Path:
    """model.gguf beside the shards: linear layers in Q4_0, embedding and head in float16, norms in float32."""
    import gguf

    target = folder / "model.gguf"
    if target.exists():
        return target
    library = ggml.Ggml(1)
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama", use_temp_file=False)
    writer.add_block_count(shape.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    index = shards(folder)
    kinds: dict[str, Any] = {}
    for name, size in shape.tensors():
        translated = names.get_name(name, try_suffixes=(".weight",))
        if len(size) == 1:
            kinds[name] = translated, np.dtype(np.float32), None, size
        elif ".layers." in name:
            kinds[name] = translated, np.dtype(np.uint8), gguf.GGMLQuantizationType.Q4_0, size
        else:
            kinds[name] = translated, np.dtype(np.float16), None, size
        _, dtype, raw, (rows, *depth) = kinds[name]
        width = depth[0] // ggml.Q4_BLOCK * ggml.Q4_BLOCK_BYTES if raw is not None else (depth or [None])[0]
        stored = (rows,) if width is None else (rows, width)
        writer.add_tensor_info(translated, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (_, dtype, raw, _) in kinds.items():  # one at a time, in the order announced
        with safe_open(folder / index[name], "pt") as file:
            weight = file.get_tensor(name).float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleave_halves(weight, shape.heads if "q_proj" in name else shape.kv_heads)
        writer.write_tensor_data(library.quantize(weight) if raw is not None else weight.astype(dtype))
    writer.close()
    part.rename(target)
    return target


def describe(shape: Shape) -> dict[str, Any]:
    return {**asdict(shape), "parameters": shape.parameters, "linear_weights": shape.linear_weights}
