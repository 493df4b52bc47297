"""Products with a stack of experts on CUDA tensors: no offset is read by the host."""

from __future__ import annotations

import pytest
import test_torch_grouped as cpu
import torch
from torch_side import CUDA, UNIT

from halfbyte.torch.nn.experts import QuantizedExperts, grouped_linear


def quantized(shape, kind, nested=False):
    """The same stack on the CPU and on CUDA."""
    weight = cpu.quantized(cpu.stack(shape), kind, nested)
    return weight, weight.to("cuda")


@pytest.mark.parametrize("offsets", [[3, 3, 4, 9], [0, 0, 0, 0], [1, 2, 3, 11]], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (24, 64), (5, 30)], ids=str)
@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("fp4", True), ("int8", False)])
def test_each_row_meets_its_expert(fake, kind, nested, shape, transposed, offsets):
    weight, there = quantized(shape, kind, nested)
    x = cpu.inputs(shape, transposed)
    ends = torch.tensor(offsets)
    places = (ends if nested else ends.int()).to("cuda")
    on_cuda = x.to("cuda")
    with fake.no_synchronisation():
        y = grouped_linear(on_cuda, places, there, transposed, mode="exact")
    expected, bound = cpu.reference(x, offsets, weight, transposed)
    assert y.device == CUDA and ((y.cpu().double() - expected).abs() <= bound).all()
    assert not y.cpu()[offsets[-1] :].any()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient(fake, kind, transposed):
    shape = (64, 64)
    weight, there = quantized(shape, kind)
    x = cpu.inputs(shape, transposed).to("cuda").requires_grad_()
    offsets = torch.tensor([3, 3, 4, 9], device="cuda")
    dy = cpu.inputs(shape, not transposed)
    on_cuda = dy.to("cuda")
    with fake.no_synchronisation():
        grouped_linear(x, offsets, there, transposed, mode="exact").backward(on_cuda)
    expected, bound = cpu.reference(dy, [3, 3, 4, 9], weight, not transposed)
    assert ((x.grad.cpu().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(fake, dtype):
    weight, there = quantized((24, 64), "nf4")
    x = cpu.inputs((24, 64), False, dtype)
    compute = str(dtype).removeprefix("torch.")
    y = grouped_linear(x.to("cuda"), torch.tensor(cpu.OFFSETS[0], device="cuda"), there, compute=compute)
    expected, bound = cpu.reference(x, cpu.OFFSETS[0], weight, False)
    sizes = bound / ((64 + 8) * 2.0**-24)  # sum of |x| |w|
    assert y.dtype == dtype
    assert ((y.cpu().double() - expected).abs() <= bound + UNIT[dtype] * (3 * sizes + expected.abs())).all()


def test_dynamic_int8(fake):
    weight, there = quantized((24, 64), "int8")
    x = cpu.inputs((24, 64), False)
    offsets = torch.tensor(cpu.OFFSETS[2])
    y = grouped_linear(x.to("cuda"), offsets.to("cuda"), there)
    torch.testing.assert_close(y.cpu(), grouped_linear(x, offsets, weight), rtol=2**-20, atol=2**-20)


def test_what_is_refused(fake):
    _, there = quantized((24, 64), "nf4")
    x, offsets = torch.ones(5, 64, device="cuda"), torch.tensor([1, 2, 3, 5], device="cuda")
    for bad, places, match in (
        (x[:, :60], offsets, "60"),
        (x[None], offsets, "dimensions"),
        (x, offsets[:3], "offsets"),
        (x, offsets.cpu(), "cpu"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=match):
            grouped_linear(bad, places, there)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_fused_experts_of_transformers(fake, kind):
    pytest.importorskip("transformers", minversion="5")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    from halfbyte.torch.nn.experts import quantized_experts

    sizes = dict(hidden_size=64, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2)
    layer = MixtralExperts(MixtralConfig(**sizes, experts_implementation="eager"))
    for name, shape in (("gate_up_proj", (64, 64)), ("down_proj", (64, 32))):
        layer._parameters[name] = cpu.quantized(cpu.stack(shape), kind)
    names = ("gate_up_proj", "down_proj")
    layer = quantized_experts(layer, names).eval()
    x, index = torch.randn(7, 64), torch.randint(0, 4, (7, 2))
    weights = torch.rand(7, 2)
    expected = layer(x, index, weights)
    layer = layer.to("cuda")
    assert isinstance(layer, QuantizedExperts)
    arguments = [t.to("cuda") for t in (x, index, weights)]
    with fake.no_synchronisation():
        y = layer(*arguments)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
