"""The bitsandbytes checkpoint layout: names, dtypes and sizes of the parts of a quantized linear layer.

4 bits, weight W [rows, depth] of layer P, n = rows * depth, nb = ceil(n / blocksize):

    P.weight                                U8  [ceil(n / 2), 1]   two codes a byte, even index high
    P.weight.absmax                         F32 [nb]               or U8 [nb] with double quantization
    P.weight.quant_map                      F32 [16]               the codebook
    P.weight.nested_absmax                  F32 [ceil(nb / 256)]   double quantization only
    P.weight.nested_quant_map               F32 [256]              double quantization only
    P.weight.quant_state.bitsandbytes__nf4  U8  [length]           JSON in UTF-8: see `quant_state_blob`

8 bits (LLM.int8()): w = weight * SCB / 127

    P.weight         I8  [rows, depth]
    P.SCB            F32 [rows]     max |w| of the row, after rounding w to float16
    P.weight_format  U8  []         0: row-major

With double quantization the blob holds a number that is known only after the data were seen, and its digits
vary. So that the size of a file is known before, the blob is filled up with spaces (which JSON allows, and
every reader passes to a JSON parser) to the length of the longest float. Everything else is byte-equal to
what bitsandbytes writes.

Source: bitsandbytes' serialized state of Linear4bit and Linear8bitLt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from halfbyte.formats.safetensors import Slot

FOUR_BIT = ("nf4", "fp4")
TARGETS = (*FOUR_BIT, "int8")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
# repr() of a float32 as a double: at most 17 digits, point, exponent; a mean of magnitudes has no sign.
_OFFSET_CHARACTERS = 24


def quant_state_blob(
    quant_type: str, blocksize: int, dtype: str, shape: Sequence[int], nested_offset: float | None = None
) -> bytes:
    """The JSON that describes a 4-bit weight, padded to the same length for every `nested_offset`."""
    state: dict[str, Any] = {
        "quant_type": quant_type,
        "blocksize": blocksize,
        "dtype": dtype,
        "shape": list(shape),
    }
    if nested_offset is None:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": 0.0}
    length = len(json.dumps(state)) - len("0.0") + _OFFSET_CHARACTERS
    state["nested_offset"] = nested_offset
    return json.dumps(state).ljust(length).encode()


def slots_4bit(
    name: str, quant_type: str, blocksize: int, dtype: str, shape: Sequence[int], double_quant: bool
) -> dict[str, Slot]:
    """The parts of the 4-bit weight called `name` ("P.weight"), by role."""
    numel = shape[0] * shape[1]
    n_blocks = -(-numel // blocksize)
    blob = quant_state_blob(quant_type, blocksize, dtype, shape, 0.0 if double_quant else None)
    slots = {
        "packed": Slot(name, "U8", ((numel + 1) // 2, 1)),
        "absmax": Slot(f"{name}.absmax", "U8" if double_quant else "F32", (n_blocks,)),
        "quant_map": Slot(f"{name}.quant_map", "F32", (16,)),
        "quant_state": Slot(f"{name}.quant_state.bitsandbytes__{quant_type}", "U8", (len(blob),)),
    }
    if double_quant:
        slots["nested_absmax"] = Slot(f"{name}.nested_absmax", "F32", (-(-n_blocks // NESTED_BLOCKSIZE),))
        slots["nested_quant_map"] = Slot(f"{name}.nested_quant_map", "F32", (256,))
    return slots


def slots_int8(name: str, shape: Sequence[int]) -> dict[str, Slot]:
    """The parts of the int8 weight called `name` ("P.weight"), by role."""
    layer = name.removesuffix("weight")
    return {
        "codes": Slot(name, "I8", tuple(shape)),
        "scale": Slot(f"{layer}SCB", "F32", (shape[0],)),
        "format": Slot(f"{layer}weight_format", "U8", ()),
    }


def quantization_config(
    to: str, double_quant: bool, compute_dtype: str, skip_modules: Sequence[str] | None
) -> dict[str, Any]:
    """The `quantization_config` that transformers writes to config.json for such a model."""
    four = to in FOUR_BIT
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": compute_dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": to if four else "fp4",
        "bnb_4bit_use_double_quant": four and double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if skip_modules is None else list(skip_modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }
