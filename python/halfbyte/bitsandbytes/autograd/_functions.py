"""`matmul`, `matmul_4bit` and the state of an int8 layer."""

from typing import Any

import torch
from torch import Tensor

from halfbyte.torch.functional import QuantState
from halfbyte.torch.matmul import MatmulLtState, matmul, matmul_4bit

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "matmul",
    "matmul_4bit",
]


class GlobalOutlierPooler:
    """The outlier columns that layers of one depth have seen: `get_instance()`."""

    _instance: "GlobalOutlierPooler | None" = None
    outliers: set[int]
    model_dim: int | None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    @classmethod
    def get_instance(cls) -> "GlobalOutlierPooler":
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        self.outliers = set()
        self.model_dim = None

    def add_outliers(self, outlier_idx: Tensor, feature_dim: int) -> None:
        """Remember columns; those of layers with another depth than the first one's are passed over."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> Tensor:
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)


class _Applied:
    """The gradients belong to the operators, so there is no autograd.Function, only its way to be called."""

    def __init__(self) -> None:
        raise RuntimeError(f"{type(self).__name__}: use {type(self).__name__}.apply(...)")


class MatMul4Bit(_Applied):
    """`MatMul4Bit.apply(...)` is `matmul_4bit`."""

    @staticmethod
    def apply(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        return matmul_4bit(A, B, quant_state, out=out, bias=bias)


class MatMul8bitLt(_Applied):
    """`MatMul8bitLt.apply(...)` is `matmul`."""

    @staticmethod
    def apply(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Any:
        return matmul(A, B, out=out, state=state, bias=bias)


class MatMul8bitFp(MatMul8bitLt):
    """`MatMul8bitFp.apply(...)` is `matmul`, which multiplies by the dequantized weight in training."""
