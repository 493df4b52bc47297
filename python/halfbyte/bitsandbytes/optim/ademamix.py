"""AdEMAMix."""

from halfbyte.torch.optim import Optimizer2State  # noqa: F401
from halfbyte.torch.optim import ReferenceAdEMAMix as _ReferenceAdEMAMix  # noqa: F401  (tests import it)

from ._named import named

AdEMAMix = named("AdEMAMix", __name__)
AdEMAMix8bit = named("AdEMAMix8bit", __name__)
AdEMAMix32bit = named("AdEMAMix32bit", __name__)
PagedAdEMAMix = named("PagedAdEMAMix", __name__)
PagedAdEMAMix8bit = named("PagedAdEMAMix8bit", __name__)
PagedAdEMAMix32bit = named("PagedAdEMAMix32bit", __name__)
