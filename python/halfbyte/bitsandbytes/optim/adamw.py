"""AdamW."""

from halfbyte.torch.optim import Optimizer2State  # noqa: F401  (of bitsandbytes' module)

from ._named import named

AdamW = named("AdamW", __name__)
AdamW8bit = named("AdamW8bit", __name__)
AdamW32bit = named("AdamW32bit", __name__)
PagedAdamW = named("PagedAdamW", __name__)
PagedAdamW8bit = named("PagedAdamW8bit", __name__)
PagedAdamW32bit = named("PagedAdamW32bit", __name__)
