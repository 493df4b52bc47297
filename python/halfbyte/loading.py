"""`halfbyte.load`: a transformers model in 4 or 8 bits, after asking whether it fits.

The model is loaded by transformers itself, with halfbyte in the place of bitsandbytes, or, when a HalfbyteConfig is
given or the folder was saved with one, as a quantizer of its own. Before that the bytes it will take are computed from
the headers of the checkpoint and compared with the memory that is available.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from halfbyte.checkpoint.footprint import (
    ELEMENT_BYTES,
    QUANTIZED_ALREADY,
    expert_savings,
    plan_of,
    route_name,
    widening,
)
from halfbyte.errors import CheckpointError
from halfbyte.formats.folder import ModelFolder, open_model
from halfbyte.memory import MemoryPlanError, available_memory
from halfbyte.shim import install

__all__ = ["MemoryPlanError", "load"]

_SHORTCUTS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK_BYTES = 1 << 20
_DEFAULT_MAXIMUM_BYTES = 32 << 20


def load(
    path: str | os.PathLike[str],
    quantization_config: Any = None,
    device_map: Any = None,
    *,
    context: int = 2048,
    check_memory: bool = True,
    auto_class: Any = None,
    **kwargs: Any,
) -> Any:
    """Load a model through transformers, quantized, if it fits in memory.

    Parameters
    ----------
    path : path
        Model folder, or ORG/NAME in the local Hugging Face cache; dense or already quantized.
    quantization_config : BitsAndBytesConfig, HalfbyteConfig, dict, "nf4", "fp4", "int8" or None
        As for `from_pretrained`; a dict holds the arguments of BitsAndBytesConfig. None: as the checkpoint is.
        With a HalfbyteConfig nothing stands in for bitsandbytes, and a folder that is quantized already is loaded by
        halfbyte's own quantizer, with the folder's settings.
    device_map : optional
        As for `from_pretrained`. Memory is checked where all of the model goes to the CPU.
    context : int
        Tokens that keys and values are counted for.
    check_memory : bool
        False loads without asking.
    auto_class : optional
        AutoModelForCausalLM if None.
    **kwargs
        Passed to `from_pretrained`.

    Returns
    -------
    transformers.PreTrainedModel
        Linear layers that stay dense are `halfbyte.torch.nn.Linear`, which multiplies few rows faster on the CPU, as
        `use_dense_kernels` makes them, and norms and attention of one token are
        halfbyte's there, as `use_fused_kernels` makes them;
        `HalfbyteConfig(dense_kernels=False, fused_kernels=False)` leaves both alone.

    Raises
    ------
    MemoryPlanError
        Before anything is loaded. Says how many bytes are missing and which formats would fit; a MemoryError.
    CheckpointError
        The checkpoint is missing or broken.
    ValueError
        An unknown name as quantization_config.
    TypeError
        A quantization_config of another kind.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "halfbyte.load needs transformers: pip install torch transformers accelerate", name="transformers"
        )
    with open_model(path) as model:
        if model.config is None:
            raise CheckpointError("E401", f"'config.json' is missing in {model.root}")
        config = _configure(quantization_config, model.config)
        if check_memory and _on_cpu(device_map):
            _require(model, config, context, _dtype_name(kwargs.get("dtype", kwargs.get("torch_dtype"))))
        folder = os.fspath(model.root)
        if _is_native(config) and model.config.get("quantization_config"):
            from halfbyte.integrations.transformers import native_config

            kwargs["config"] = native_config(folder)
            config = None
    import transformers

    if config is not None:
        kwargs["quantization_config"] = config
    if device_map is not None:
        kwargs["device_map"] = device_map
    loader = auto_class or transformers.AutoModelForCausalLM
    with _large_blocks_returned():
        loaded = loader.from_pretrained(folder, **kwargs)
    if not _is_native(quantization_config):  # whose own setting decides
        from halfbyte.torch.nn import use_dense_kernels, use_fused_kernels

        made = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info
        use_dense_kernels(made)
        use_fused_kernels(made)
    return loaded


def _is_native(config: Any) -> bool:
    """Whether a configuration is a HalfbyteConfig; asked before anything may import transformers."""
    module = sys.modules.get("halfbyte.integrations.transformers")
    return module is not None and isinstance(config, module.HalfbyteConfig)


def _configure(value: Any, folder: Mapping[str, Any]) -> Any:
    """The configuration to load with; afterwards transformers finds all it needs for it."""
    if _is_native(value):
        return value
    saved = folder.get("quantization_config")
    if isinstance(saved, Mapping) and saved.get("quant_method") == "halfbyte":
        from halfbyte.integrations import transformers as _registered  # noqa: F401

        if value is not None:
            raise ValueError("load: quantization_config must be None for a model that halfbyte has quantized")
        return None
    install()
    return _bits_and_bytes_config(value)


def _bits_and_bytes_config(value: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if isinstance(value, str):
        if value not in _SHORTCUTS:
            raise ValueError(
                f"load: quantization_config must be one of {', '.join(_SHORTCUTS)}, got {value!r}"
            )
        value = _SHORTCUTS[value]
    if isinstance(value, Mapping):
        return BitsAndBytesConfig(**value)
    if value is None or isinstance(value, BitsAndBytesConfig):
        return value
    raise TypeError(
        "load: quantization_config must be a BitsAndBytesConfig, a HalfbyteConfig, a dict, 'nf4', 'fp4', "
        f"'int8' or None, got {type(value).__name__}"
    )


def _on_cpu(device_map: Any) -> bool:
    if device_map in (None, "auto"):
        import torch

        return not torch.cuda.is_available()
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return all(str(device) == "cpu" for device in devices)


def _dtype_name(dtype: Any) -> str | None:
    """ "float32" for torch.float32 or its name; None for what the checkpoint says."""
    name = str(dtype).removeprefix("torch.")
    return name if name in ELEMENT_BYTES else None


def _require(model: ModelFolder, config: Any, context: int, dtype: str | None) -> None:
    """Raise MemoryPlanError unless the model fits, loaded as `config` and `dtype` say."""
    available = available_memory()
    plan = plan_of(model, context, 1, available)
    if QUANTIZED_ALREADY in plan.notes:  # then neither config nor dtype changes what is stored
        plan.require(plan.routes[0].name)
        return
    if dtype is not None:
        model = replace(model, config={**(model.config or {}), "dtype": dtype})
        plan = plan_of(model, context, 1, available)
    name = _route_name(config)
    if name not in [route.name for route in plan.routes]:
        return  # transformers makes the layers of this family while loading: their sizes are not known before
    native = _is_native(config) and config.experts
    savings = expert_savings(model, config.format, config.double_quant) if native else 0
    plan.routes = [
        replace(
            route, weights=route.weights + widening(model, route.name, dtype) - savings * (route.name == name)
        )
        for route in plan.routes
    ]
    plan.require(name)


def _route_name(config: Any) -> str:
    """The plan's name for what a dense checkpoint becomes."""
    if config is None:
        return "dense"
    if _is_native(config):
        return route_name(config.format, config.double_quant)
    if config.load_in_8bit:
        return "int8"
    return route_name("nf4", config.bnb_4bit_use_double_quant) if config.load_in_4bit else "dense"


@contextlib.contextmanager
def _large_blocks_returned() -> Iterator[None]:
    """glibc gives blocks of 1 MiB and more back to the kernel as soon as they are free.

    By itself it learns from the first large tensor to keep up to 32 MiB a block on the heap, which then breaks
    into pieces: loading int8 took 2.5 times the memory of the result.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # not glibc
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _DEFAULT_MAXIMUM_BYTES)
        malloc_trim(0)
