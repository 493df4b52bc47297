"""What optimizers are made of."""

from typing import Any

from halfbyte.torch.optim import GlobalOptimManager, Optimizer1State, Optimizer2State
from halfbyte.torch.optim import QuantizedOptimizer as Optimizer8bit

from ..utils import sync_gpu

__all__ = [
    "GlobalOptimManager",
    "MockArgs",
    "Optimizer1State",
    "Optimizer2State",
    "Optimizer8bit",
    "sync_gpu",
]


class MockArgs:
    """The items of a dict as attributes; what an optimizer takes as `args`."""

    def __init__(self, initial_data: dict[str, Any]) -> None:
        vars(self).update(initial_data)
