"""Importing this module makes `torch.ops.halfbyte.*` exist; see `ops_4bit` and `ops_8bit`."""

from halfbyte.torch import ops_4bit, ops_8bit

__all__ = ["ops_4bit", "ops_8bit"]
