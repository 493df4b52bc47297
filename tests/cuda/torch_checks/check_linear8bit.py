"""`Linear8bitLt`, int8 embeddings and the 8-bit operators on CUDA tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch_side import CUDA, FLOATS, UNIT, assert_product, tensor

from halfbyte.torch import cuda_table
from halfbyte.torch import functional as F
from halfbyte.torch.matmul import MatmulLtState, matmul, quantize_int8_weight
from halfbyte.torch.nn import Embedding8bit, Linear8bitLt

ROWS, DEPTH = 48, 128


def layers(threshold=0.0, fp16_weights=False):
    torch.manual_seed(3)
    layer = Linear8bitLt(DEPTH, ROWS, has_fp16_weights=fp16_weights, threshold=threshold)
    cuda = copy.deepcopy(layer).to("cuda")
    return layer.to("cpu"), cuda


def outliers(*shape, dtype=torch.float32):
    x = tensor(*shape, dtype=dtype)
    x[..., 5] *= 20
    x[0, ..., 77] = 11.0
    return x


def test_quantized_as_on_the_cpu(fake):
    cpu, cuda = layers()
    assert cuda.weight.device == cuda.weight.SCB.device == cuda.weight.CB.device == CUDA
    assert torch.equal(cuda.weight.data.cpu(), cpu.weight.data)
    assert torch.equal(cuda.weight.SCB.cpu(), cpu.weight.SCB)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("large", [False, True])
def test_weights_that_float16_cannot_hold(fake, dtype, large):
    w = tensor(ROWS, DEPTH, dtype=dtype)
    if large and dtype != torch.float16:
        w[3, 7] = 1e5
    codes, scale = quantize_int8_weight(w)
    on_cuda = w.to("cuda")
    with fake.no_synchronisation():
        ours = quantize_int8_weight(on_cuda)
    assert torch.equal(ours[0].cpu(), codes) and torch.equal(ours[1].cpu(), scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_inference(fake, dtype, threshold, rows):
    cpu, cuda = layers(threshold)
    cpu.eval(), cuda.eval()
    x = outliers(rows, DEPTH, dtype=dtype)
    expected = cpu(x)
    on_cuda = x.to("cuda")
    cuda(on_cuda)
    with fake.no_synchronisation():
        y = cuda(on_cuda)
    assert y.device == CUDA and y.dtype == dtype
    # int32 sums are the same; the order of float32 operations after them may differ
    w = F.int8_vectorwise_dequant(cpu.weight.data, cpu.state.SCB)
    sizes = (x.float().abs() @ w.abs().T + cpu.bias.float().abs()).double()
    error = (y.cpu().double() - expected.double()).abs()
    assert (error <= sizes * (DEPTH * 2.0**-24) + expected.double().abs() * 2 * UNIT[dtype]).all()


@pytest.mark.parametrize("path", ["fused", "dense"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_training(fake, monkeypatch, path, dtype):
    monkeypatch.setattr(cuda_table, "forced", path)
    cpu, cuda = layers(6.0)
    w = F.int8_vectorwise_dequant(cpu.weight.data, cpu.weight.SCB)
    x = outliers(4, DEPTH, dtype=dtype).to("cuda").requires_grad_()
    dy = tensor(4, ROWS, dtype=dtype, seed=1).to("cuda")
    cuda(x)
    with fake.no_synchronisation():
        y = cuda(x)
        y.backward(dy)
    rounding = 0.0 if dtype == torch.float32 else 2 * UNIT[dtype]
    assert_product(x.grad, dy, w.T, rounding)
    bias = cuda.bias.detach().cpu().double()
    assert_product((y.detach().cpu().double() - bias).float(), x.detach(), w, rounding + 3 * UNIT[dtype])


def test_float_weights_are_quantized_at_each_call_without_waiting(fake):
    _, cuda = layers(6.0, fp16_weights=True)
    x = tensor(4, DEPTH).to("cuda").requires_grad_()
    cuda(x).sum().backward()
    with fake.no_synchronisation():
        cuda(x).sum().backward()
    assert cuda.weight.grad.device == CUDA


def test_autocast(fake, monkeypatch):
    monkeypatch.setattr(cuda_table, "forced", "dense")
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *rest: seen.append(x.dtype) or linear(x, *rest)
    )
    _, cuda = layers()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = cuda(tensor(2, DEPTH).to("cuda"))
        z = cuda(tensor(2, DEPTH).to("cuda").requires_grad_())
    assert y.dtype == z.dtype == torch.float32 and seen == [torch.bfloat16] * 2


def test_matmul_with_a_state_as_vllm_makes_it(fake):
    w = tensor(ROWS, DEPTH).to("cuda")
    state = MatmulLtState()
    state.CB, state.SCB = quantize_int8_weight(w)
    state.threshold, state.has_fp16_weights, state.is_training = 6.0, False, False
    x = outliers(3, DEPTH, dtype=torch.float16).to("cuda")
    out = torch.empty(3, ROWS, dtype=torch.float16, device="cuda")
    with fake.no_synchronisation():
        matmul(x, w, out=out, state=state)
    cpu = matmul(x.cpu(), w.cpu(), state=copy_to_cpu(state))
    torch.testing.assert_close(out.cpu(), cpu, rtol=2**-9, atol=2**-9)


def copy_to_cpu(state):
    new = copy.copy(state)
    new.CB, new.SCB = state.CB.cpu(), state.SCB.cpu()
    return new


def test_state_dict_across_devices(fake):
    cpu, cuda = layers()
    saved = {key: value.cpu() for key, value in cuda.state_dict().items()}
    assert all(torch.equal(value, cpu.state_dict()[key]) for key, value in saved.items())
    cuda(tensor(2, DEPTH).to("cuda"))
    back = cuda.to("cpu")
    assert back.state.CB.device.type == back.state.SCB.device.type == "cpu"
    again = back.to("cuda")
    assert again.state.SCB.device == CUDA and torch.equal(again.state.CB.cpu(), cpu.weight.data)


def test_compiled_in_one_graph(fake):
    _, cuda = layers(6.0)
    cuda.eval()
    x = outliers(3, DEPTH).to("cuda")
    eager = cuda(x)
    y = torch.compile(cuda, fullgraph=True, backend="aot_eager")(x)
    assert y.device == CUDA and torch.equal(y.cpu(), eager.cpu())


def test_embedding(fake):
    torch.manual_seed(1)
    table = Embedding8bit(30, 64)
    cuda = copy.deepcopy(table).to("cuda")
    table = table.to("cpu")
    rows = torch.tensor([[3, 0, 29], [3, 3, 7]])
    index = rows.to("cuda")
    with fake.no_synchronisation():
        found = cuda(index)
    assert found.device == CUDA and torch.equal(found.cpu(), table(rows))


def test_functional_names(fake):
    x = outliers(6, DEPTH, dtype=torch.float16)
    for ours, theirs in zip(
        F.int8_vectorwise_quant(x.to("cuda"), 6.0), F.int8_vectorwise_quant(x, 6.0), strict=True
    ):
        assert ours.device == CUDA and torch.equal(ours.cpu(), theirs)
    for ours, theirs in zip(
        F.int8_double_quant(x.to("cuda"), threshold=6.0), F.int8_double_quant(x, threshold=6.0), strict=True
    ):
        assert ours.device == CUDA and torch.equal(ours.cpu(), theirs)
    a = torch.randint(-127, 128, (2, 3, DEPTH), dtype=torch.int8)
    b = torch.randint(-127, 128, (ROWS, DEPTH), dtype=torch.int8)
    product = F.int8_linear_matmul(a.to("cuda"), b.to("cuda"))
    assert product.device == CUDA and torch.equal(product.cpu(), F.int8_linear_matmul(a, b))
    rows, columns = torch.rand(6), torch.rand(ROWS)
    y = F.int8_mm_dequant(product, rows.to("cuda"), columns.to("cuda"))
    assert torch.equal(y.cpu(), F.int8_mm_dequant(product.cpu(), rows, columns))
    scale = torch.rand(ROWS)
    assert torch.equal(
        F.int8_vectorwise_dequant(b.to("cuda"), scale.to("cuda")).cpu(), F.int8_vectorwise_dequant(b, scale)
    )
