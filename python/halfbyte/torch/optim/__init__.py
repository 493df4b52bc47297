"""Optimizers with 8-bit and 32-bit states, by the C core: the names of `bitsandbytes.optim`."""

from . import algorithms
from .algorithms import *  # noqa: F403
from .base import QuantizedOptimizer
from .general import Optimizer1State, Optimizer2State
from .manager import GlobalOptimManager
from .reference import PytorchLARS, ReferenceAdEMAMix

__all__ = [
    *algorithms.__all__,
    "GlobalOptimManager",
    "Optimizer1State",
    "Optimizer2State",
    "PytorchLARS",
    "QuantizedOptimizer",
    "ReferenceAdEMAMix",
]
