"""`QuantState`: what must be known beside the packed codes, and how a checkpoint stores it.

In a state dict the statistics of a tensor `P` are the tensors `P.absmax`, `P.quant_map`, with double
quantization `P.nested_absmax` and `P.nested_quant_map`, and `P.quant_state.bitsandbytes__<quant_type>`:
the UTF-8 bytes of a JSON object with everything that is no tensor, in the key order of `_JSON_KEYS`.
`nested_offset` is written as a double, so the float32 survives exactly.

Source: the layout bitsandbytes 0.39 and later write and read.
"""

import json
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.weak import WeakTensorKeyDictionary

_PACKED_PREFIX = "bitsandbytes__"
_JSON_KEYS = (
    "quant_type",
    "blocksize",
    "dtype",
    "shape",
    "nested_blocksize",
    "nested_dtype",
    "nested_offset",
)
_TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """The JSON of `source_dict` as a uint8 vector."""
    return torch.frombuffer(bytearray(json.dumps(source_dict).encode()), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """The inverse of `pack_dict_to_tensor`. Raises ValueError when the bytes are no JSON object."""
    try:
        content = json.loads(bytes(tensor_data.cpu().to(torch.uint8).tolist()))
    except ValueError as error:
        raise ValueError(f"quant_state: the packed blob is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"quant_state: the packed blob must be a JSON object, got {type(content).__name__}")
    return content


def _dtype_from_name(name: Any) -> torch.dtype:
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"quant_state: dtype must name a torch dtype, got {name!r}")
    return dtype


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The format of codebooks on GPUs that were looked at, with the version of the tensor.
_formats: Any = WeakTensorKeyDictionary()
# Every state that was made, by its id: the codebooks whose format is known.
_states: weakref.WeakValueDictionary[int, "QuantState"] = weakref.WeakValueDictionary()


def format_of_codebook(code: Tensor) -> str:
    """ "nf4" or "fp4" for the 16 values of a format: 0 is the first of FP4 and the middle one of NF4.

    Operators that bitsandbytes defines name no format but its codebook. On a GPU the first look at a tensor waits
    for the device; from then on its format is remembered.
    """
    if code.is_cpu:
        return "fp4" if float(code[0]) == 0.0 else "nf4"
    version, name = _formats.get(code, (None, ""))
    if version != code._version:
        name = "fp4" if float(code[0]) == 0.0 else "nf4"
        _formats[code] = code._version, name
    return name


def format_at(address: int) -> str | None:
    """The format of the state whose codebook lies at an address of a GPU's; None: of no state that lives."""
    for state in list(_states.values()):
        code = state.code
        if (
            state.quant_type is not None
            and type(code) is Tensor
            and code.is_cuda
            and code.data_ptr() == address
        ):
            return state.quant_type
    return None


class QuantState:
    """Statistics of a quantized tensor.

    Parameters
    ----------
    absmax
        Scale of each block: float32 `[n_blocks]`, or uint8 codes when `state2` is given.
    shape, dtype
        Of the tensor before quantization.
    code
        The codebook: float32 `[16]` for 4 bits, `[256]` for 8 bits.
    blocksize
        Elements per scale.
    quant_type
        "nf4", "fp4", or None for 8-bit block-wise data.
    offset, state2
        Double quantization: absmax = dequantize(absmax, state2) + offset; offset is a 0-d float32 tensor.
    """

    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys = tuple(_PACKED_PREFIX + t for t in valid_quant_types)
    valid_qs_keys = ("quant_state", *_JSON_KEYS, *_TENSOR_KEYS)

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: "QuantState | None" = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None
        if not is_compiling():
            _states[id(self)] = self

    def __getattr__(self, name: str) -> Tensor:
        # FSDP walks the dotted names of a state dict with getattr, also "quant_state.bitsandbytes__nf4".
        if name.startswith(_PACKED_PREFIX) and name == f"{_PACKED_PREFIX}{self.__dict__.get('quant_type')}":
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, idx: int | slice) -> Any:
        """As old code expects: [absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type]."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][idx]

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device) -> "QuantState":
        """Rebuild a state from the entries of a state dict that belong to one tensor.

        Parameters
        ----------
        qs_dict
            Keys with any dotted prefix, e.g. "model.fc.weight.absmax"; either one packed
            "...quant_state.bitsandbytes__nf4|fp4" tensor or its entries unpacked. The packed one is removed.
        device
            Where the statistics go.

        Raises
        ------
        ValueError
            No or several packed entries, an unknown or a missing key, a malformed blob.
        """
        packed = [key for key, value in qs_dict.items() if "quant_state" in key and isinstance(value, Tensor)]
        if not packed and "quant_type" not in {key.rpartition(".")[2] for key in qs_dict}:
            raise ValueError(
                f"QuantState.from_dict: no quant_state entry, packed or unpacked, in {sorted(qs_dict)}"
            )
        if packed and (len(packed) > 1 or packed[0].rpartition(".")[2] not in cls.valid_qs_type_keys):
            raise ValueError(
                f"QuantState.from_dict: expected one quant_state entry that ends in "
                f"{' or '.join(cls.valid_qs_type_keys)}, got {packed}"
            )
        blob = unpack_tensor_to_dict(qs_dict.pop(packed[0])) if packed else {}
        items = {key.rpartition(".")[2]: value for key, value in {**qs_dict, **blob}.items()}
        if unknown := set(items) - set(cls.valid_qs_keys):
            raise ValueError(f"QuantState.from_dict: unknown keys {sorted(unknown)}")
        if missing := {"absmax", "quant_map", "blocksize", "dtype"} - set(items):
            raise ValueError(f"QuantState.from_dict: missing keys {sorted(missing)}")

        offset = state2 = None
        if "nested_absmax" in items:
            if missing := {"nested_quant_map", "nested_offset", "nested_blocksize"} - set(items):
                raise ValueError(f"QuantState.from_dict: missing keys {sorted(missing)}")
            offset = torch.as_tensor(items["nested_offset"], dtype=torch.float32, device=device)
            state2 = cls(
                absmax=items["nested_absmax"].to(device),
                shape=items["absmax"].shape,
                blocksize=items["nested_blocksize"],
                code=items["nested_quant_map"].to(device),
                dtype=_dtype_from_name(items.get("nested_dtype", "float32")),
            )
        return cls(
            absmax=items["absmax"].to(device),
            shape=torch.Size(items["shape"]) if items.get("shape") is not None else None,
            code=items["quant_map"].to(device),
            blocksize=items["blocksize"],
            quant_type=items.get("quant_type"),
            dtype=_dtype_from_name(items["dtype"]),
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The entries of a state dict; `packed` puts all that is no tensor into one uint8 tensor.

        An 8-bit state (quant_type None) has no packed form and is returned unpacked.
        """
        items = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": _dtype_name(self.dtype),
            "shape": tuple(self.shape) if self.shape is not None else None,
        }
        if self.nested:
            items |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                # A copy: the map is one tensor shared by all states, which safetensors refuses to save.
                "nested_quant_map": self.state2.code.clone(),
                "nested_dtype": _dtype_name(self.state2.dtype),
                "nested_offset": self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return items
        tensors = {key: items[key] for key in _TENSOR_KEYS if key in items}
        blob = pack_dict_to_tensor({key: items[key] for key in _JSON_KEYS if key in items})
        return {**tensors, f"quant_state.{_PACKED_PREFIX}{self.quant_type}": blob.to(self.absmax.device)}

    def to(self, device: torch.device | str | int | None) -> None:
        """Move all tensors, in place."""
        self.absmax = self.absmax.to(device)
        if self.code is not None:
            self.code = self.code.to(device)
        if self.nested:
            self.offset = self.offset.to(device)
            self.state2.to(device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        if (self.shape, self.dtype, self.blocksize, self.quant_type, self.nested) != (
            other.shape,
            other.dtype,
            other.blocksize,
            other.quant_type,
            other.nested,
        ):
            return False
        same = _close(self.absmax, other.absmax) and _close(self.code, other.code)
        return same and (
            not self.nested or (_close(self.offset, other.offset) and self.state2 == other.state2)
        )

    __hash__ = None


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-6)
