"""LARS."""

from halfbyte.torch.optim import Optimizer1State  # noqa: F401  (of bitsandbytes' module)

from ._named import named

LARS = named("LARS", __name__)
LARS8bit = named("LARS8bit", __name__)
LARS32bit = named("LARS32bit", __name__)
PytorchLARS = named("PytorchLARS", __name__)
