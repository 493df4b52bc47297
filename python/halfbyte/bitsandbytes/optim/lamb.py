"""LAMB."""

from halfbyte.torch.optim import Optimizer2State  # noqa: F401  (of bitsandbytes' module)

from ._named import named

LAMB = named("LAMB", __name__)
LAMB8bit = named("LAMB8bit", __name__)
LAMB32bit = named("LAMB32bit", __name__)
