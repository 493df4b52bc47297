"""Lion."""

from halfbyte.torch.optim import Optimizer1State  # noqa: F401  (of bitsandbytes' module)

from ._named import named

Lion = named("Lion", __name__)
Lion8bit = named("Lion8bit", __name__)
Lion32bit = named("Lion32bit", __name__)
PagedLion = named("PagedLion", __name__)
PagedLion8bit = named("PagedLion8bit", __name__)
PagedLion32bit = named("PagedLion32bit", __name__)
