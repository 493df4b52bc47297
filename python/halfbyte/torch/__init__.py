"""halfbyte for PyTorch.

`functional`  quantize, dequantize and multiply tensors
`nn`          layers and parameters
`ops`         the operators `torch.ops.halfbyte.*` behind both, with fakes and gradients
"""

from halfbyte.torch import functional, nn, ops

__all__ = ["functional", "nn", "ops"]
