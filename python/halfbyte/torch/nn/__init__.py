"""Layers and parameters with quantized weights."""

from halfbyte.torch.nn.embedding import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    StableEmbedding,
)
from halfbyte.torch.nn.fused import use_fused_kernels
from halfbyte.torch.nn.int8params import Int8Params
from halfbyte.torch.nn.linear import Linear, use_dense_kernels
from halfbyte.torch.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from halfbyte.torch.nn.linear8bit import Linear8bitLt
from halfbyte.torch.nn.outliers import OutlierAwareLinear
from halfbyte.torch.nn.params4bit import Params4bit

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "StableEmbedding",
    "use_dense_kernels",
    "use_fused_kernels",
]
