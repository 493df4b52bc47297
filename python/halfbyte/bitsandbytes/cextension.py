"""What callers ask the native library of bitsandbytes about. halfbyte's is `halfbyte._C`; it has no HIP."""

import torch

HIP_ENVIRONMENT = False
BNB_BACKEND = "CUDA" if torch.version.cuda else "CPU"
ROCM_GPU_ARCH = "unknown"
