"""Adam."""

from halfbyte.torch.optim import Optimizer2State  # noqa: F401  (of bitsandbytes' module)

from ._named import named

Adam = named("Adam", __name__)
Adam8bit = named("Adam8bit", __name__)
Adam32bit = named("Adam32bit", __name__)
PagedAdam = named("PagedAdam", __name__)
PagedAdam8bit = named("PagedAdam8bit", __name__)
PagedAdam32bit = named("PagedAdam32bit", __name__)
