"""Which columns of a layer's input are outliers, guessed from weights (bitsandbytes' `OutlierTracer`).

The columns of layer i are those whose standard deviation over the rows of the weight of layer i lies far
above the mean of all columns' (z > 4). For the first layer, whose weight says nothing yet, they are the
input's rows that stand out so (z > 3) together with its columns that hold a value above 6.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> Tensor:
    """Indices whose standard deviation along `reduction_dim` is an outlier.

    Parameters
    ----------
    weight
        A matrix.
    zscore
        How many standard deviations above the mean one must lie.
    topk
        Instead: the `topk` largest.
    rdm
        Instead: `topk` random columns.
    """
    if rdm:
        return torch.randint(0, weight.shape[1], size=(topk,), device=weight.device)
    deviation = weight.std(reduction_dim)
    if topk is not None:
        return deviation.topk(topk).indices
    return ((deviation - deviation.mean()) / deviation.std() > zscore).nonzero().flatten()


class OutlierTracer:
    """Collects outlier columns of all nn.Linear of a model in one forward pass: `get_instance()`."""

    _instance: "OutlierTracer | None" = None
    outliers: list[Tensor]
    hvalues: list[int]
    hvalue2outlier_idx: dict[int, Tensor]
    hooks: list[Any]

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    @classmethod
    def get_instance(cls) -> "OutlierTracer":
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance

    def initialize(self, model: nn.Module) -> None:
        """Watch the next forward pass of `model`."""
        self.last_w = None
        self.current_outlier_dims = None
        self.hvalues = []
        self.outliers = []
        self.hvalue2outlier_idx = {}
        self.initialized = True
        self.hooks = [
            module.register_forward_pre_hook(outlier_hook)
            for module in model.modules()
            if isinstance(module, nn.Linear)
        ]

    def is_initialized(self) -> bool:
        return getattr(self, "initialized", False)

    def get_hvalue(self, weight: Tensor) -> int:
        """The address of a weight's storage, by which it is known here."""
        return weight.data.untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """The columns of the layer with this weight; None before its forward pass."""
        if not self.is_initialized():
            logger.warning("Outlier tracer is not initialized...")
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))


def outlier_hook(module: nn.Linear, input: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of `OutlierTracer`; takes all hooks away once a layer comes by a second time."""
    tracer = OutlierTracer.get_instance()
    key = tracer.get_hvalue(module.weight)
    if key in tracer.hvalue2outlier_idx:
        for hook in tracer.hooks:
            hook.remove()
        return
    columns = find_outlier_dims(module.weight)
    tracer.outliers.append(columns)
    tracer.hvalues.append(key)
    if len(tracer.outliers) == 1:
        x = input[0]
        large = (x.abs() > 6).flatten(0, -2).any(0).nonzero().flatten()
        columns = torch.cat([find_outlier_dims(x.reshape(-1, x.shape[-1]), 1, 3.0), large]).unique()
    tracer.hvalue2outlier_idx[key] = columns


class OutlierAwareLinear(nn.Linear):
    """Base of layers that treat outlier columns apart: override `quantize_weight` and `forward_with_outliers`."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor | None) -> Tensor:
        raise NotImplementedError(
            "Please override the `forward_with_outliers(self, x, outlier_idx)` function"
        )

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor | None) -> Tensor:
        raise NotImplementedError("Please override the `quantize_weights(self, w, outlier_idx)` function")

    def forward(self, x: Tensor) -> Tensor:
        if self.outlier_dim is None:
            tracer = OutlierTracer.get_instance()
            if not tracer.is_initialized():
                logger.warning(
                    "Please use OutlierTracer.initialize(model) before using the OutlierAwareLinear layer"
                )
            self.outlier_dim = tracer.get_outliers(self.weight)
        if not self.is_quantized:
            self.weight.data.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
