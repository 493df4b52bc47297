"""`HalfbyteConfig`: halfbyte as a quantizer of transformers' own, without the name bitsandbytes.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=HalfbyteConfig("nf4", blocksize=128))

What it does that `BitsAndBytesConfig` cannot: the fused experts of a mixture are quantized too, every block size,
searched scales, globs for what to leave alone, the model's own dtype for computing, int8 without a detour over the CPU,
and models that count as compilable.

How it fits in. transformers builds the model on the meta device; `HalfbyteQuantizer` replaces its linear layers and
takes over its experts; then each tensor of the checkpoint passes through `Quantize` (a dense checkpoint) or
`Deserialize` (one that is quantized already). Importing this module registers both under the method "halfbyte".

What is saved. Where all quantized weights belong to linear layers, `config.json` says `quant_method: bitsandbytes` in
that library's terms, and the files can be read by plain transformers with bitsandbytes. With quantized experts
no such description exists: then it says `quant_method: halfbyte`, and only this module can read the folder.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

try:
    from transformers.core_model_loading import WeightConverter
except ModuleNotFoundError as error:
    import transformers

    raise ImportError(
        f"HalfbyteConfig needs transformers 5 or newer, got {transformers.__version__}; with older versions call "
        "halfbyte.install() and use BitsAndBytesConfig"
    ) from error
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.checkpoint.layers import skipped_by
from halfbyte.integrations.conversion import Deserialize, Quantize
from halfbyte.integrations.peft import guard_merging
from halfbyte.torch.functional import (
    BLOCKSIZES_4BIT,
    dequantize_4bit,
    int8_vectorwise_dequant,
    quantize_4bit,
)
from halfbyte.torch.matmul import quantize_int8_weight
from halfbyte.torch.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from halfbyte.torch.nn.experts import (
    QuantizedExperts,
    dense_experts,
    from_statistics,
    has_experts_interface,
    int8_experts,
    quantized_experts,
)
from halfbyte.torch.nn.fused import use_fused_kernels
from halfbyte.torch.nn.linear import Linear, use_dense_kernels
from halfbyte.torch.nn.parametrize import Bnb4bitParametrization, register_quantized

__all__ = ["HalfbyteConfig", "HalfbyteQuantizer", "native_config"]

METHOD = "halfbyte"
_FORMATS = ("nf4", "fp4", "int8")
_STATISTICS_4BIT = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)


def _dtype(name: str, value: Any) -> torch.dtype | None:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if value is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"HalfbyteConfig: {name} must be a torch dtype or its name, got {value!r}")
    return dtype


@register_quantization_config(METHOD)
class HalfbyteConfig(QuantizationConfigMixin):
    """How a model is quantized while transformers loads it. Pass it as `quantization_config`.

    Parameters
    ----------
    format : {"nf4", "fp4", "int8"}
        4 bits in blocks, or LLM.int8().
    blocksize : int
        Weights per scale: 32, 64, ..., 4096 (4 bits).
    double_quant : bool
        Store the scales themselves in 8 bits (4 bits): 0.37 bits a weight less at block size 64.
    scales : {"absmax", "search"}
        "absmax": what bitsandbytes computes. "search": the scale of least squared error; same format (4 bits).
    skip : sequence of str
        Globs (`fnmatch`) over names of modules or parameters that stay as they are, besides what always does:
        the head, tied weights, and modules that the model keeps in float32. One that matches nothing is refused.
    compute_dtype : torch.dtype, str or None
        How products are formed, see `halfbyte.torch.nn.Linear4bit`. None: the dtype of the model.
    quant_storage : torch.dtype or str
        dtype that holds the packed bytes of linear layers (4 bits): uint8, or a float dtype for FSDP.
    threshold : float
        Outlier threshold of LLM.int8().
    experts : bool
        Quantize fused experts (3-d parameters), too.
    dense_kernels : bool
        Let linear layers that stay dense, such as the head, multiply few rows with halfbyte's kernels on the CPU
        (`halfbyte.torch.nn.use_dense_kernels`). Nothing about it is saved with the model.
    fused_kernels : bool
        Let norms, gates and attention of one token run in halfbyte's kernels on the CPU
        (`halfbyte.torch.nn.use_fused_kernels`). Nothing about it is saved with the model.

    Raises
    ------
    ValueError, TypeError
        A setting that does not exist, or that the format cannot have.
    """

    def __init__(
        self,
        format: Literal["nf4", "fp4", "int8"] = "nf4",
        *,
        blocksize: int = 64,
        double_quant: bool = False,
        scales: Literal["absmax", "search"] = "absmax",
        skip: list[str] | tuple[str, ...] = (),
        compute_dtype: torch.dtype | str | None = None,
        quant_storage: torch.dtype | str = torch.uint8,
        threshold: float = 6.0,
        experts: bool = True,
        dense_kernels: bool = True,
        fused_kernels: bool = True,
        **saved: Any,
    ) -> None:
        self.quant_method = METHOD
        if format not in _FORMATS:
            raise ValueError(f"HalfbyteConfig: format must be one of {_FORMATS}, got {format!r}")
        if blocksize not in BLOCKSIZES_4BIT:
            raise ValueError(f"HalfbyteConfig: blocksize must be one of {BLOCKSIZES_4BIT}, got {blocksize!r}")
        if scales not in ("absmax", "search"):
            raise ValueError(f"HalfbyteConfig: scales must be 'absmax' or 'search', got {scales!r}")
        if isinstance(skip, str):
            raise TypeError(f"HalfbyteConfig: skip must be a list of globs, got the string {skip!r}")
        self.format = format
        self.blocksize = blocksize
        self.double_quant = bool(double_quant)
        self.scales = scales
        self.skip = list(skip)
        self.compute_dtype = _dtype("compute_dtype", compute_dtype)
        self.quant_storage = _dtype("quant_storage", quant_storage) or torch.uint8
        self.threshold = float(threshold)
        self.experts = bool(experts)
        self.dense_kernels = bool(dense_kernels)
        self.fused_kernels = bool(fused_kernels)
        if format == "int8":
            for name, value, default in (
                ("blocksize", blocksize, 64),
                ("double_quant", self.double_quant, False),
                ("scales", scales, "absmax"),
                ("quant_storage", self.quant_storage, torch.uint8),
            ):
                if value != default:
                    raise ValueError(
                        f"HalfbyteConfig: {name}={value!r} is for nf4 and fp4, got format='int8'"
                    )
        # What a saved model tells beside its settings: the parameters that are quantized, or, in a folder that
        # describes itself in bitsandbytes' terms, the patterns of modules that are not.
        self.quantized: list[str] | None = saved.pop("quantized", None)
        self.dense_patterns: list[str] | None = saved.pop("dense_patterns", None)
        saved.pop("quant_method", None)
        if saved:
            raise TypeError(f"HalfbyteConfig: unexpected argument {sorted(saved)[0]!r}")
        # Set by the quantizer for a loaded model that bitsandbytes could read: its modules that stayed dense.
        self._readable_dense: list[str] | None = None

    @property
    def bits(self) -> int:
        return 8 if self.format == "int8" else 4

    @property
    def readable_by_bitsandbytes(self) -> bool:
        """Whether a model that was loaded with this can be read by bitsandbytes once saved."""
        return self._readable_dense is not None

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        compute, storage = self.compute_dtype, self.quant_storage
        return {
            "format": self.format,
            "blocksize": self.blocksize,
            "double_quant": self.double_quant,
            "scales": self.scales,
            "skip": list(self.skip),
            "compute_dtype": None if compute is None else str(compute).removeprefix("torch."),
            "quant_storage": str(storage).removeprefix("torch."),
            "threshold": self.threshold,
            "experts": self.experts,
        }

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json."""
        if self._readable_dense is None:
            result = {"quant_method": METHOD, **self.settings()}
            if self.quantized is not None:
                result["quantized"] = list(self.quantized)
            return result
        settings = self.settings()
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": self.bits == 4,
            "load_in_8bit": self.bits == 8,
            "llm_int8_threshold": self.threshold,
            "llm_int8_skip_modules": list(self._readable_dense),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "bnb_4bit_compute_dtype": settings["compute_dtype"] or "float32",
            "bnb_4bit_quant_type": self.format if self.bits == 4 else "fp4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_quant_storage": settings["quant_storage"],
            METHOD: settings,
        }

    def __repr__(self) -> str:
        return f"HalfbyteConfig({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    @classmethod
    def from_bitsandbytes(cls, saved: Mapping[str, Any]) -> HalfbyteConfig:
        """The configuration of a folder whose `quantization_config` is in bitsandbytes' terms.

        Raises
        ------
        ValueError
            It is of another method.
        """
        if not (saved.get("load_in_4bit") or saved.get("load_in_8bit")):
            raise ValueError(f"HalfbyteConfig: not quantized by bitsandbytes: {saved.get('quant_method')!r}")
        if METHOD in saved:
            result = cls(**saved[METHOD])
        elif saved.get("load_in_8bit"):
            result = cls("int8", threshold=saved.get("llm_int8_threshold", 6.0))
        else:
            result = cls(
                saved.get("bnb_4bit_quant_type", "fp4"),
                double_quant=saved.get("bnb_4bit_use_double_quant", False),
                compute_dtype=saved.get("bnb_4bit_compute_dtype"),
                quant_storage=saved.get("bnb_4bit_quant_storage", "uint8"),
            )
        result.experts = False
        result.dense_patterns = saved.get("llm_int8_skip_modules")
        return result


def native_config(path: Any, **kwargs: Any) -> Any:
    """transformers' config of a folder, changed so that halfbyte loads it even if it speaks of bitsandbytes.

        from_pretrained(path, config=native_config(path))

    `kwargs` are for `AutoConfig.from_pretrained`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, **kwargs)
    saved = getattr(config, "quantization_config", None)
    if isinstance(saved, Mapping) and (saved.get("load_in_4bit") or saved.get("load_in_8bit")):
        found = HalfbyteConfig.from_bitsandbytes(saved)
        config.quantization_config = {
            "quant_method": METHOD,
            **found.settings(),
            "dense_patterns": found.dense_patterns,
        }
    return config


@register_quantizer(METHOD)
class HalfbyteQuantizer(HfQuantizer):
    """Carries a `HalfbyteConfig` out. transformers makes it; there is no need to call it."""

    requires_calibration = False
    quantization_config: HalfbyteConfig

    def __init__(self, quantization_config: HalfbyteConfig, **kwargs: Any) -> None:
        # A copy: what is learnt about one model must not follow the user's object to the next.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        # Full names of the quantized parameters. No modules: transformers copies what its converters refer to.
        self.targets: list[str] = []

    # ---- what transformers asks ----

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("HalfbyteConfig: quantized weights cannot be offloaded to the disk")

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def quantized_element_size(self) -> float:
        return self.quantization_config.bits / 8

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        return {key: value * 0.9 for key, value in max_memory.items()}  # room for the tensor being quantized

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.targets

    # ---- before the weights: which modules, and their replacements ----

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.compute_dtype is None:
            config.compute_dtype = model.dtype
        names = None
        if self.pre_quantized and config.quantized is not None:
            names = set(config.quantized)
        modules = dict(model.named_modules())
        linears = {n: m for n, m in modules.items() if type(m) in (nn.Linear, Linear, Conv1D)}
        stacks = {n: found for n, m in modules.items() if (found := _stacked_experts(m, config.bits))}
        if names is None:
            dense = self._dense(model, linears, stacks)
        else:
            dense = {n for n in linears if f"{n}.weight" not in names}
            dense |= {n for n in stacks if f"{n}.{stacks[n][0]}" not in names}
        for name, module in linears.items():
            if name not in dense:
                new = self._linear(module)
                model.set_submodule(name, new)
                self.targets.append(f"{name}.weight")
        for name, parameters in stacks.items():
            if name not in dense:
                module = modules[name]
                if has_experts_interface(module):
                    quantized_experts(module, parameters, config.compute_dtype, config.threshold)
                self.targets += [f"{name}.{parameter}" for parameter in parameters]
        if not self.targets:
            raise ValueError("HalfbyteConfig: the model has no layer that can be quantized")
        stacked = sorted({name.rpartition(".")[2] for name in self.targets} - {"weight"})
        if config.bits == 8:
            self.serialized_names = {name: [name, f"{name}.SCB"] for name in stacked}
            self.serialized_names["weight"] = ["weight", "SCB", "weight_format"]
        else:
            self.serialized_names = {
                name: [name, *(f"{name}.{s}" for s in _STATISTICS_4BIT)] for name in [*stacked, "weight"]
            }

    def _dense(self, model: Any, linears: dict[str, Any], stacks: dict[str, tuple[str, ...]]) -> set[str]:
        """Names among `linears` and `stacks` that stay as they are."""
        config = self.quantization_config
        everything = [*linears, *stacks]
        dense = set() if config.experts else set(stacks)
        if self.pre_quantized and config.dense_patterns is not None:
            return dense | {name for name in everything if skipped_by(name, config.dense_patterns)}
        keep = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        dense |= {
            name
            for name in everything
            if any(name == k or name.startswith(f"{k}.") or name.endswith(f".{k}") for k in keep)
        }
        for glob in config.skip:
            matching = {
                name
                for name in everything
                if fnmatchcase(name, glob)
                or any(fnmatchcase(f"{name}.{p}", glob) for p in stacks.get(name, ("weight",)))
            }
            if not matching and not self.pre_quantized:
                raise ValueError(f"HalfbyteConfig: skip: {glob!r} matches no linear layer and no experts")
            dense |= matching
        return dense

    def _linear(self, module: nn.Module) -> Linear4bit | Linear8bitLt:
        """The layer that takes the place of a dense one, on the meta device."""
        config = self.quantization_config
        depth, rows = (
            module.weight.shape if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        )
        bias = module.bias is not None
        with torch.device("meta"):
            if config.bits == 8:
                new: Any = Linear8bitLt(depth, rows, bias, has_fp16_weights=False, threshold=config.threshold)
                storage = torch.int8
            else:
                new = Linear4bit(
                    depth,
                    rows,
                    bias,
                    config.compute_dtype,
                    compress_statistics=config.double_quant,
                    quant_type=config.format,
                    quant_storage=config.quant_storage,
                )
                new.weight.blocksize = config.blocksize
                storage = config.quant_storage
            if self.pre_quantized:
                new.weight.data = new.weight.data.to(storage)
        new.source_cls = type(module)
        new.training = module.training
        return new.requires_grad_(False)

    # ---- the weights ----

    def quantize(self, module: nn.Module, value: Tensor) -> nn.Parameter:
        """A quantized parameter of `module`, from its value in a dense checkpoint; on the value's device."""
        config = self.quantization_config
        layer = isinstance(module, Linear4bit | Linear8bitLt)
        if layer and issubclass(module.source_cls, Conv1D):
            value = value.T
        if config.bits == 8:
            if not layer:
                return int8_experts(value)
            codes, scale = quantize_int8_weight(value)
            return Int8Params(codes, requires_grad=False, CB=codes, SCB=scale)
        packed, state = quantize_4bit(
            value.contiguous(),
            blocksize=config.blocksize,
            compress_statistics=config.double_quant,
            quant_type=config.format,
            quant_storage=config.quant_storage if layer else torch.uint8,
            scales=config.scales,
            keep=True,
        )
        if layer:
            module.quant_state = state
        return Params4bit(
            packed,
            quant_state=state,
            blocksize=config.blocksize,
            compress_statistics=config.double_quant,
            quant_type=config.format,
            quant_storage=packed.dtype,
            module=module if layer else None,
            bnb_quantized=True,
        )

    def deserialize(self, module: nn.Module, name: str, tensors: dict[str, Tensor]) -> nn.Parameter:
        """The quantized parameter `name` from its entries in a checkpoint; keys are relative to it, "" is the codes."""
        codes = tensors.pop("", None)
        needed = "SCB" if self.quantization_config.bits == 8 else "absmax"
        if codes is None or needed not in tensors:
            raise ValueError(
                f"{name}: the checkpoint lacks {f'{name}.{needed}' if codes is not None else name}"
            )
        new = from_statistics(codes, {key: t for key, t in tensors.items() if key != "weight_format"})
        if isinstance(module, Linear4bit) and isinstance(new, Params4bit):
            new.module, module.quant_state = module, new.quant_state
        return new

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        # `$`: a fused parameter `gate_up_proj` is not the layer of the same name that others have.
        return [
            WeightConverter(
                names if parameter == "weight" else [f"{names[0]}$", *names[1:]],
                parameter,
                [Deserialize(self)],
            )
            for parameter, names in self.serialized_names.items()
        ]

    # ---- after the weights ----

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        holders = set()
        for name in self.targets:
            module, parameter = get_module_from_name(model, name)
            holders.add(type(module))
            value = module._parameters[parameter]
            if value.is_floating_point() and getattr(value, "quant_state", None) is None:
                # Not in the checkpoint: transformers has initialised it, and warned.
                value = self.quantize(module, value.data)
                module._parameters[parameter] = value
            if not isinstance(module, Linear4bit | Linear8bitLt | QuantizedExperts):
                register_quantized(module, parameter, value.data, value.quant_state)
        config.quantized = list(self.targets)
        if holders <= {Linear4bit, Linear8bitLt}:
            config._readable_dense = [
                name for name, m in model.named_modules() if type(m) in (nn.Linear, Linear, Conv1D)
            ]
        if config.dense_kernels:
            use_dense_kernels(model)
        if config.fused_kernels:
            use_fused_kernels(model)
        self._keep_reversible_conversions(model)
        guard_merging()
        if importlib.util.find_spec("bitsandbytes") is not None:
            # PEFT and accelerate take these for "prepare me for k-bit training", and then import bitsandbytes.
            setattr(model, f"is_loaded_in_{config.bits}bit", True)
        return model

    def _keep_reversible_conversions(self, model: Any) -> None:
        """When saving, transformers undoes what it did while loading; it could not undo our part, nor needs to."""

        def touches(conversion: Any) -> bool:
            if not isinstance(conversion, WeightConverter):
                return False
            if any(isinstance(op, Deserialize) for op in conversion.operations):
                return True
            targets = [t.replace("\\", "").strip("^$") for t in conversion._original_target_patterns]
            return any(target in name for target in targets for name in self.targets)

        if getattr(model, "_weight_conversions", None):
            model._weight_conversions = [c for c in model._weight_conversions if not touches(c)]

    # ---- back ----

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = _dtype("dtype", dtype)  # a model that was saved knows its dtype by name only
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit | Linear8bitLt):
                model.set_submodule(name, _dense_linear(module, dtype))
            elif isinstance(module, QuantizedExperts):
                dense_experts(module, dtype)
            elif parametrize.is_parametrized(module):
                for parameter in list(module.parametrizations):
                    if any(isinstance(p, Bnb4bitParametrization) for p in module.parametrizations[parameter]):
                        value = getattr(module, parameter).detach()
                        parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)
                        delattr(module, parameter)
                        setattr(module, parameter, nn.Parameter(value if dtype is None else value.to(dtype)))
        use_dense_kernels(model, False)
        use_fused_kernels(model, False)
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            if flag in model.__dict__:
                delattr(model, flag)
        return model


def _stacked_experts(module: nn.Module, bits: int) -> tuple[str, ...]:
    """The 3-d weights of a module of experts that can be quantized; () for any other module.

    Experts that compute in a way of their own are only known in 4 bits, where they see a dequantized tensor.
    """
    known = has_experts_interface(module) or (bits == 4 and "expert" in type(module).__name__.lower())
    if not known or isinstance(module, QuantizedExperts):
        return ()
    return tuple(
        n for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.is_floating_point()
    )


def _dense_linear(module: Linear4bit | Linear8bitLt, dtype: torch.dtype | None) -> nn.Linear:
    if isinstance(module, Linear4bit):
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
    else:
        scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        weight = int8_vectorwise_dequant(module.weight.data, scale)
    with torch.device("meta"):
        new = nn.Linear(module.in_features, module.out_features, bias=False)
    new.weight = nn.Parameter(weight if dtype is None else weight.to(dtype))
    new.bias = module.bias
    new.training = module.training
    return new
