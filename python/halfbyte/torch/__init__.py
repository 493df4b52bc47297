"""halfbyte for PyTorch.

`functional`  quantize, dequantize and multiply tensors
`nn`          layers and parameters
`ops`         the operators `torch.ops.halfbyte.*` behind both, with fakes and gradients
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("halfbyte.torch needs torch: pip install torch", name="torch") from None

from halfbyte.torch import functional, nn, ops

__all__ = ["functional", "nn", "ops"]
