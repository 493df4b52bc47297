"""Small helpers of bitsandbytes that other packages call."""

import shlex
import subprocess

import torch
from torch import Tensor

from halfbyte.torch.nn.linear8bit import WEIGHT_FORMATS
from halfbyte.torch.nn.outliers import OutlierTracer, find_outlier_dims, outlier_hook
from halfbyte.torch.quant_state import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "OutlierTracer",
    "execute_and_return",
    "find_outlier_dims",
    "outlier_hook",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = dict(WEIGHT_FORMATS)
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {number: name for name, number in WEIGHT_FORMATS.items()}


def sync_gpu(t: Tensor) -> None:
    """Wait until the device of `t` has done what was asked of it."""
    if t.is_cuda:
        torch.cuda.synchronize(t.device)


def execute_and_return(command_string: str) -> tuple[str, str]:
    """(stdout, stderr) of a command, which is split as a shell would and not given to one."""
    done = subprocess.run(shlex.split(command_string), capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr.strip()


def replace_linear(
    model: torch.nn.Module,
    linear_replacement: type[torch.nn.Module],
    skip_modules: tuple[str, ...] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> torch.nn.Module:
    """Replace every nn.Linear below `model` whose own name is not in `skip_modules`, in place.

    Parameters
    ----------
    linear_replacement
        Called with (in_features, out_features, has_bias).
    copy_weights
        Give the new layer the parameters of the old one.
    post_processing_function
        Name of a method to call on each new layer, if it has one.
    """
    for name, child in model.named_children():
        if not isinstance(child, torch.nn.Linear) or name in skip_modules:
            replace_linear(child, linear_replacement, skip_modules, copy_weights, post_processing_function)
            continue
        new = linear_replacement(child.in_features, child.out_features, child.bias is not None)
        if copy_weights:
            new.weight = child.weight
            new.bias = child.bias
        if post_processing_function is not None and hasattr(new, post_processing_function):
            getattr(new, post_processing_function)(new)
        setattr(model, name, new)
    return model
