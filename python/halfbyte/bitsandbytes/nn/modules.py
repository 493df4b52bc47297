"""Layers and parameters with quantized weights, by `halfbyte.torch.nn`."""

from halfbyte.torch.nn import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
)
from halfbyte.torch.nn.linear8bit import maybe_rearrange_weight
from halfbyte.torch.nn.params4bit import repair_quant_state as fix_4bit_weight_quant_state_from_module

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "fix_4bit_weight_quant_state_from_module",
    "maybe_rearrange_weight",
]
