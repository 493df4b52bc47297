"""The bytes that a model takes in memory, dense and in each format.

weights   the bytes of the stored tensors, exact: from the headers of the checkpoint, through the same plan
          that `halfbyte quantize` carries out
cache     keys and values: 2 * layers * kv_heads * head_dim * context * batch * bytes of an element
loading   what is alive for a while besides: some of the largest tensors in their old and new form
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from halfbyte.checkpoint.inspect import weights_of
from halfbyte.checkpoint.layers import FLOAT_DTYPES, select
from halfbyte.checkpoint.plan import Options, make_plan, source_name
from halfbyte.errors import CheckpointError
from halfbyte.formats.folder import ModelFolder, open_model
from halfbyte.memory import Available, MemoryPlan, Route, available_memory

# transformers converts up to 4 tensors at a time; each exists as 16-bit copy and as result.
LOADING_TENSORS = 4

_ROUTES = (
    ("dense", None, False),
    ("int8", "int8", False),
    ("nf4", "nf4", False),
    ("nf4 + double quantization", "nf4", True),
)
QUANTIZED_ALREADY = "the checkpoint is quantized already"
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def memory_plan(source: str | os.PathLike[str], context: int = 4096, batch: int = 1) -> MemoryPlan:
    """What a model takes in memory on this machine, from its headers and config.

    Parameters
    ----------
    source : path
        Model folder, .safetensors file in one, or ORG/NAME in the local Hugging Face cache.
    context, batch : int
        Tokens and sequences to keep keys and values for.
    """
    with open_model(source) as model:
        return plan_of(model, context, batch, available_memory())


def plan_of(model: ModelFolder, context: int, batch: int, available: Available) -> MemoryPlan:
    """memory_plan for an open model."""
    notes: list[str] = []
    config = model.config or {}
    cache, note = cache_bytes(config, context, batch)
    if note:
        notes.append(note)
    weights = weights_of(model)
    parameters = sum(w.parameters for w in weights)
    routes = []
    quantized = sorted({w.format.split()[0] for w in weights} & {"nf4", "fp4", "int8"})
    if quantized:
        largest = max(t.nbytes for t in model.tensors.values())
        routes.append(Route(quantized[0], model.weight_bytes, cache, largest))
        notes.append(QUANTIZED_ALREADY)
    else:
        largest = max((t.nbytes for t in model.tensors.values()), default=0)
        for name, to, double_quant in _ROUTES:
            if to is None:
                routes.append(Route(name, model.weight_bytes, cache, largest))
                continue
            try:
                jobs = make_plan(model, Options(to, double_quant)).jobs
            except CheckpointError as error:
                notes.append(f"{name}: {error.what}")
                continue
            alive = sorted(
                (job.source.nbytes + job.nbytes for job in jobs if job.kind != "copy"), reverse=True
            )
            routes.append(Route(name, sum(job.nbytes for job in jobs), cache, sum(alive[:LOADING_TENSORS])))
    return MemoryPlan(source_name(model), parameters, context, batch, available, routes, notes)


def route_name(to: str, double_quant: bool) -> str:
    """The name of a route; fp4 has the sizes of nf4."""
    return "nf4 + double quantization" if double_quant else to.replace("fp4", "nf4")


def widening(model: ModelFolder, route: str, dtype: str | None) -> int:
    """Bytes more (or fewer, negative) when what stays dense on a route is held in `dtype`."""
    if dtype is None:
        return 0
    _, to, double_quant = next(r for r in _ROUTES if r[0] == route)
    if to is None:
        dense = list(model.tensors.values())
    else:
        dense = [j.source for j in make_plan(model, Options(to, double_quant)).jobs if j.kind == "copy"]
    return sum(t.numel * ELEMENT_BYTES[dtype] - t.nbytes for t in dense if t.dtype in FLOAT_DTYPES)


def expert_savings(model: ModelFolder, to: str, double_quant: bool) -> int:
    """Bytes that fused experts lose when halfbyte's own quantizer takes them too."""
    choices = select(model.tensors.values(), model.config or {}).choices
    experts = [t for t in model.tensors.values() if choices[t.name].label == "expert"]
    bits = 8 if to == "int8" else 4.127 if double_quant else 4.5  # bits of a weight with its scale
    return sum(t.nbytes - int(t.numel * bits / 8) for t in experts)


def cache_bytes(config: Mapping[str, Any], context: int, batch: int) -> tuple[int, str | None]:
    """Bytes of keys and values, and a note when they are unknown (then 0) or an upper bound."""
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        text = config

    def first(*names: str) -> int | None:
        value = next((text[n] for n in names if isinstance(text.get(n), int)), None)
        return value if value is not None and value > 0 else None

    layers = first("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = first("num_attention_heads", "n_head", "num_heads", "n_heads")
    kv_heads = first("num_key_value_heads", "multi_query_group_num") or heads
    hidden = first("hidden_size", "n_embd", "d_model", "dim")
    head_dim = first("head_dim", "d_kv") or (hidden // heads if hidden and heads else None)
    if not layers or not kv_heads or not head_dim:
        return 0, "keys and values are not counted: config.json does not give layers, heads and their size"
    dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "float32")
    element = ELEMENT_BYTES.get(dtype, 4)
    per_token = 2 * kv_heads * head_dim
    if first("kv_lora_rank"):  # latent attention keeps whole keys and values in transformers' cache
        key = (first("qk_nope_head_dim") or 0) + (first("qk_rope_head_dim") or 0)
        per_token = (heads or kv_heads) * (key + (first("v_head_dim") or 0))
    total = layers * per_token * context * batch * element
    upper = text.get("sliding_window") or text.get("layer_types")
    return total, "keys and values are an upper bound: some layers keep fewer tokens" if upper else None
