"""RMSprop."""

from halfbyte.torch.optim import Optimizer1State  # noqa: F401  (of bitsandbytes' module)

from ._named import named

RMSprop = named("RMSprop", __name__)
RMSprop8bit = named("RMSprop8bit", __name__)
RMSprop32bit = named("RMSprop32bit", __name__)
