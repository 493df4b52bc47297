"""Importing this module makes `torch.ops.halfbyte.*` exist; see `ops_4bit`, `ops_8bit` and `ops_grouped`."""

from halfbyte.torch import ops_4bit, ops_8bit, ops_grouped

__all__ = ["ops_4bit", "ops_8bit", "ops_grouped"]
