"""Params4bit built from the attributes of another one, as merges do."""

import pytest

torch = pytest.importorskip("torch")

from halfbyte.torch.nn import Params4bit  # noqa: E402


def quantized(weight):
    return Params4bit(weight.clone(), quant_type="nf4").to("cpu")


def test_a_float_weight_with_the_attributes_of_a_packed_one_is_quantized():
    """PEFT's RandLora and PVeRA merge so, without resetting bnb_quantized; bitsandbytes keeps floats as codes."""
    generator = torch.Generator().manual_seed(0)
    old = quantized(torch.randn(64, 48, generator=generator))
    weight = torch.randn(64, 48, generator=generator)
    new = Params4bit(weight.clone(), requires_grad=False, **old.__dict__).to("cpu")
    expected = quantized(weight)
    assert torch.equal(new.data, expected.data)
    assert torch.equal(new.quant_state.absmax, expected.quant_state.absmax)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (8, 1), (8, 8)])
def test_packed_data_with_their_attributes_stay(storage, shape):
    if storage == torch.float32 and shape != (8, 8):
        pytest.skip("too few elements for this storage")
    old = Params4bit(torch.randn(shape), quant_storage=storage).to("cpu")
    new = Params4bit(old.data.clone(), requires_grad=False, **old.__dict__).to("cpu")
    assert new.bnb_quantized and torch.equal(new.data, old.data)
