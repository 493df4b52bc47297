"""QuantState and the packed blob (python/halfbyte/torch/quant_state.py)."""

import copy
import json
import pickle

import pytest
import torch

from halfbyte.torch import functional as F
from halfbyte.torch.quant_state import QuantState, pack_dict_to_tensor, unpack_tensor_to_dict


def quantized(nested: bool, quant_type: str = "nf4", dtype: torch.dtype = torch.float16) -> QuantState:
    torch.manual_seed(0)
    return F.quantize_4bit(
        torch.randn(64, 64, dtype=dtype), quant_type=quant_type, compress_statistics=nested
    )[1]


def test_blob_is_byte_for_byte_what_bitsandbytes_writes():
    state = quantized(nested=True)
    blob = bytes(state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"].tolist()).decode()
    offset = json.loads(blob)["nested_offset"]
    assert blob == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [64, 64], '
        f'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {offset!r}}}'
    )
    plain = bytes(quantized(nested=False).as_dict(packed=True)["quant_state.bitsandbytes__nf4"].tolist())
    assert plain == b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [64, 64]}'


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_round_trip(nested, packed, quant_type):
    state = quantized(nested, quant_type)
    entries = {f"model.fc.weight.{key}": value for key, value in state.as_dict(packed=packed).items()}
    again = QuantState.from_dict(dict(entries), device="cpu")
    assert again == state
    assert again.shape == state.shape and isinstance(again.shape, torch.Size)
    if nested:
        assert again.offset.dtype == torch.float32 and torch.equal(again.offset, state.offset)


def test_any_json_spacing_and_order_is_read():
    entries = quantized(nested=False).as_dict(packed=True)
    text = '{"shape":[64,64],\n "dtype":"bfloat16","blocksize":64,"quant_type":"nf4"}'
    entries["quant_state.bitsandbytes__nf4"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    state = QuantState.from_dict(entries, device="cpu")
    assert (state.dtype, state.shape) == (torch.bfloat16, torch.Size([64, 64]))


def test_offset_of_another_dtype_becomes_float32():
    entries = quantized(nested=True).as_dict()
    entries["nested_offset"] = torch.tensor(2.5, dtype=torch.bfloat16)
    assert QuantState.from_dict(entries, device="cpu").offset.dtype == torch.float32


def _without(key):
    def change(entries):
        del entries[key]

    return change


def _with(**more):
    return lambda entries: entries.update(more)


BLOB = "quant_state.bitsandbytes__nf4"
BAD_DTYPE = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "nn",
    "nested_blocksize": 256,
    "nested_offset": 1.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(BLOB), "no quant_state entry"),
        (
            _with(**{"x.quant_state.bitsandbytes__fp4": torch.zeros(2, dtype=torch.uint8)}),
            "expected one quant_state",
        ),
        (_with(**{BLOB: torch.tensor([1, 2], dtype=torch.uint8)}), "not JSON"),
        (_with(**{BLOB: pack_dict_to_tensor([1])}), "JSON object"),
        (_with(**{BLOB: pack_dict_to_tensor({"quant_type": "nf4", "evil": 1})}), "unknown keys"),
        (_without("absmax"), "missing keys"),
        (_without("nested_quant_map"), "missing keys"),
        (_with(**{BLOB: pack_dict_to_tensor(BAD_DTYPE)}), "dtype"),
    ],
)
def test_bad_entries_are_refused(change, message):
    entries = quantized(nested=True).as_dict(packed=True)
    change(entries)
    with pytest.raises(ValueError, match=message):
        QuantState.from_dict(entries, device="cpu")


def test_blob_round_trip_keeps_non_ascii():
    source = {"a": [1, 2.5, None], "ü": "ß"}
    assert unpack_tensor_to_dict(pack_dict_to_tensor(source)) == source


def test_list_view_equality_and_attributes():
    state = quantized(nested=True)
    assert state[5] == "nf4" and state[4][1] is state.state2 and state[0] is state.absmax
    other = copy.deepcopy(state)
    assert other == state and other.absmax is not state.absmax
    other.state2.absmax = other.state2.absmax + 1
    assert other != state
    assert state != 3
    assert torch.equal(state.bitsandbytes__nf4, state.as_dict(packed=True)[BLOB])
    for absent in ("bitsandbytes__fp4", "nonsense"):
        with pytest.raises(AttributeError, match=absent):
            getattr(state, absent)
    assert pickle.loads(pickle.dumps(state)) == state


def test_eight_bit_states_have_no_packed_form():
    _, state = F.quantize_blockwise(torch.randn(300), blocksize=64, nested=True)
    entries = state.as_dict(packed=True)
    assert entries["quant_type"] is None and entries["shape"] == (300,)
    assert QuantState.from_dict(entries, device="cpu") == state
