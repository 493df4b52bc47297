"""Importing this module makes `torch.ops.bitsandbytes.*` exist."""

from halfbyte.torch import _bitsandbytes_ops

__all__ = ["_bitsandbytes_ops"]
