"""Gives the optimizers of `halfbyte.torch.optim` the module name under which they are looked for.

transformers' Trainer recognises the optimizers of bitsandbytes by the text of their class, "bitsandbytes"
in it; so each is a subclass that lives in a module of that name.
"""

from typing import Any

import halfbyte.torch.optim as optimizers


def named(name: str, module: str) -> Any:
    """A subclass of `halfbyte.torch.optim.<name>` of the same name that belongs to `module`."""
    base = getattr(optimizers, name)
    return type(name, (base,), {"__module__": module, "__doc__": base.__doc__})
