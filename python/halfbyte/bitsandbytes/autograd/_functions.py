"""`matmul`, `matmul_4bit` and the state of an int8 layer."""

from halfbyte.torch.matmul import MatmulLtState, matmul, matmul_4bit

__all__ = ["MatmulLtState", "matmul", "matmul_4bit"]
