"""Layers and parameters with quantized weights, by `halfbyte.torch.nn`."""

from halfbyte.torch.functional import (
    QuantState,
    _convert_weight_packed_for_cpu,
    _convert_weight_packed_for_cpu_inverse,
    has_avx512bf16,
)
from halfbyte.torch.nn import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    OutlierAwareLinear,
    Params4bit,
    StableEmbedding,
)
from halfbyte.torch.nn.linear8bit import maybe_rearrange_weight
from halfbyte.torch.nn.outliers import OutlierTracer
from halfbyte.torch.nn.params4bit import repair_quant_state as fix_4bit_weight_quant_state_from_module
from halfbyte.torch.optim import GlobalOptimManager

from ..utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "GlobalOptimManager",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "OutlierTracer",
    "Params4bit",
    "QuantState",
    "StableEmbedding",
    "_convert_weight_packed_for_cpu",
    "_convert_weight_packed_for_cpu_inverse",
    "fix_4bit_weight_quant_state_from_module",
    "has_avx512bf16",
    "maybe_rearrange_weight",
]
