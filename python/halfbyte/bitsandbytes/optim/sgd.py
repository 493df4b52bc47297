"""SGD."""

from halfbyte.torch.optim import Optimizer1State  # noqa: F401  (of bitsandbytes' module)

from ._named import named

SGD = named("SGD", __name__)
SGD8bit = named("SGD8bit", __name__)
SGD32bit = named("SGD32bit", __name__)
