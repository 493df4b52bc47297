"""`Params4bit`: a parameter that is quantized to 4 bits when it reaches a device.

Life of a weight: created from a float tensor (any device, or meta) -> `.to(device)`, `.cuda()`, `.cpu()`
quantize it, also when it is on that device already -> from then on `data` holds the packed bytes
`[n, 1]` in the storage dtype, `quant_state` the statistics, and moves keep both together.

The attributes in `__dict__` are exactly the constructor's keywords, because transformers, accelerate, PEFT
and diffusers rebuild a parameter with `Params4bit(value, requires_grad=..., **old.__dict__)`.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.torch.functional import quantize_4bit
from halfbyte.torch.quant_state import QuantState

if TYPE_CHECKING:
    from torch import nn

_PIECES = (torch.chunk, torch.split, Tensor.chunk, Tensor.split)
_ATTRIBUTES = (
    "blocksize",
    "compress_statistics",
    "quant_type",
    "quant_state",
    "quant_storage",
    "bnb_quantized",
    "module",
)


class Params4bit(torch.nn.Parameter):
    """A weight in 4 bits.

    Parameters
    ----------
    data
        The float weight, or with `bnb_quantized` the packed codes.
    requires_grad
        Packed codes have no gradient; True only makes sense before quantization.
    quant_state
        Statistics of packed codes. A float weight gets its own when it is quantized.
    blocksize
        Elements per scale, default 64.
    compress_statistics
        Double quantization of the scales.
    quant_type
        "nf4" or "fp4".
    quant_storage
        dtype of the packed tensor: uint8, bfloat16, float16 or float32 (the same bytes).
    module
        The layer that owns the parameter; its `quant_state` is kept in step.
    bnb_quantized
        Whether `data` is packed already.
    **kwargs
        Ignored: marks that other libraries leave in a parameter's `__dict__`.
    """

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: "nn.Module | None" = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> "Params4bit":
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        if bnb_quantized and quant_state is not None and _is_whole(self, quant_state):
            # Some merges in PEFT (RandLora, PVeRA) pass a float weight with all attributes of the packed one.
            bnb_quantized = False
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # everything happens in __new__; object.__init__ would refuse the arguments

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        module: "nn.Module | None" = None,
        **kwargs: Any,
    ) -> "Params4bit":
        """A parameter from the entries of a state dict.

        Parameters
        ----------
        data
            The packed tensor.
        quantized_stats
            The other entries, with any dotted prefix (see `QuantState.from_dict`); changed by the call.
        device
            Where data and statistics go.
        module
            The layer whose `quant_state` is set.
        """
        state = QuantState.from_dict(quantized_stats, device=device)
        self = cls(
            data.to(device),
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )
        if module is not None:
            module.quant_state = state
        return self

    # ---- copies and pickles ----

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        requires_grad = state.pop("requires_grad")
        self.data = state.pop("data")
        self.requires_grad = requires_grad
        self.__dict__.update(state)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The state apart from the arguments, because it may lead back here: weight.module.weight is weight.
        return _empty, (type(self),), self.__getstate__()

    def __copy__(self) -> "Params4bit":
        new = _empty(type(self))
        new.__setstate__(self.__getstate__())
        return new

    def __deepcopy__(self, memo: dict) -> "Params4bit":
        new = _empty(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    # ---- moving and quantizing ----

    def _quantize(self, device: torch.device | str | int) -> "Params4bit":
        """Bring the float data to `device` and replace them by their packed codes."""
        weight = self.data.to(device).contiguous()
        packed, state = quantize_4bit(
            weight,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
            keep=True,
        )
        self.requires_grad = False  # codes have none, and torch refuses it for uint8
        self.data = packed
        self.quant_state = state
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = state
        return self

    def to(self, *args: Any, **kwargs: Any) -> "Params4bit":
        """Move; the first move of a float weight to a device that is not meta quantizes it.

        A dtype argument is ignored once the parameter is quantized: its bytes are codes.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self.bnb_quantized and device is not None and device.type != "meta":
            return self._quantize(device)
        state = self.quant_state
        if self.bnb_quantized:
            dtype = None
            if state is not None and device is not None and state.absmax.device != device:
                state = copy.copy(state)
                state.state2 = copy.copy(state.state2)
                state.to(device)
        data = self.data.to(device=device, dtype=dtype, non_blocking=non_blocking)
        attributes = {name: getattr(self, name) for name in _ATTRIBUTES if name != "module"}
        return type(self)(data, self.requires_grad, **{**attributes, "quant_state": state})

    def follow(self) -> None:
        """Bring the statistics to the device of the data; for modules, after their parameters were moved."""
        if self.quant_state is not None and self.quant_state.absmax.device != self.device:
            self.quant_state.to(self.device)

    def cpu(self) -> "Params4bit":
        return self.to("cpu")

    def cuda(
        self, device: int | torch.device | str | None = None, non_blocking: bool = False
    ) -> "Params4bit":
        return self.to(device_argument("cuda", device), non_blocking=non_blocking)

    def xpu(self, device: int | torch.device | str | None = None, non_blocking: bool = False) -> "Params4bit":
        return self.to(device_argument("xpu", device), non_blocking=non_blocking)

    def _cast(self, dtype: torch.dtype) -> "Params4bit | Tensor":
        return self if self.bnb_quantized else self.to(dtype)

    # A float storage dtype looks like float data to `module.half()` and friends; the bytes must stay.
    def half(self, *args: Any, **kwargs: Any) -> "Params4bit | Tensor":
        return self._cast(torch.float16)

    def bfloat16(self, *args: Any, **kwargs: Any) -> "Params4bit | Tensor":
        return self._cast(torch.bfloat16)

    def float(self, *args: Any, **kwargs: Any) -> "Params4bit | Tensor":
        return self._cast(torch.float32)

    def double(self, *args: Any, **kwargs: Any) -> "Params4bit | Tensor":
        return self._cast(torch.float64)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # FSDP2 cuts parameters with chunk and split and needs the pieces to be what the whole was.
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func not in _PIECES or not isinstance(args[0], Params4bit):
            return result
        whole = args[0]
        attributes = {name: getattr(whole, name) for name in _ATTRIBUTES}
        return tuple(cls(piece, requires_grad=whole.requires_grad, **attributes) for piece in result)

    # ---- the statistics under the names a state dict gives them (FSDP walks these names) ----
    # Properties, not __getattr__: torch.compile cannot trace through the latter.

    def _statistics(self, name: str, nested: bool = False) -> QuantState:
        state = self.quant_state
        if state is None or (nested and not state.nested):
            missing = "no quant_state" if state is None else "no double quantization"
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r} ({missing})")
        return state

    @property
    def absmax(self) -> Tensor:
        return self._statistics("absmax").absmax

    @property
    def code(self) -> Tensor:
        return self._statistics("code").code

    @property
    def quant_map(self) -> Tensor:
        return self._statistics("quant_map").code

    @property
    def offset(self) -> Tensor:
        return self._statistics("offset", nested=True).offset

    @property
    def state2(self) -> QuantState:
        return self._statistics("state2", nested=True).state2

    @property
    def nested_absmax(self) -> Tensor:
        return self._statistics("nested_absmax", nested=True).state2.absmax

    @property
    def nested_blocksize(self) -> int:
        return self._statistics("nested_blocksize", nested=True).state2.blocksize

    @property
    def nested_quant_map(self) -> Tensor:
        return self._statistics("nested_quant_map", nested=True).state2.code

    @property
    def nested_dtype(self) -> torch.dtype:
        return self._statistics("nested_dtype", nested=True).state2.dtype

    @property
    def nested_offset(self) -> Tensor:
        return self._statistics("nested_offset", nested=True).offset


def device_argument(kind: str, device: int | torch.device | str | None) -> torch.device:
    """The argument of `.cuda(device)` and its kin as a device: None is the current one of its kind."""
    return (
        torch.device(kind, device)
        if isinstance(device, int)
        else torch.device(kind if device is None else device)
    )


def _is_whole(data: Tensor, state: QuantState) -> bool:
    """Whether data are the float weight itself, which has more elements than its packed codes can have."""
    return (
        data.dim() == len(state.shape)
        and data.shape == state.shape
        and data.shape[-1] > 1
        and data.is_floating_point()
    )


def _empty(cls: type[Params4bit]) -> Params4bit:
    return cls.__new__(cls)


def repair_quant_state(module: Any) -> QuantState:
    """The statistics of a layer's weight, given back to it after a wrapper (FSDP) replaced the parameter.

    Raises
    ------
    RuntimeError
        The layer was never quantized.
    """
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return state
    state = module.quant_state
    if state is None:
        raise RuntimeError(
            f"{type(module).__name__}: the weight is not quantized yet; move the layer to its device first, "
            "e.g. layer.to('cpu') or layer.cuda()"
        )
    if type(weight) is torch.nn.Parameter:  # and no fake tensor that stands for one while torch.export traces
        module.weight = Params4bit(
            weight.data,
            quant_storage=module.quant_storage,
            quant_type=state.quant_type,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            bnb_quantized=True,
            module=module,
        )
    if isinstance(module.weight, Params4bit):
        module.weight.quant_state = state
    return state
