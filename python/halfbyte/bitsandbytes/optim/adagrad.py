"""Adagrad."""

from halfbyte.torch.optim import Optimizer1State  # noqa: F401  (of bitsandbytes' module)

from ._named import named

Adagrad = named("Adagrad", __name__)
Adagrad8bit = named("Adagrad8bit", __name__)
Adagrad32bit = named("Adagrad32bit", __name__)
