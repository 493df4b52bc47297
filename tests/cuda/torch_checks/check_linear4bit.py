"""`Linear4bit` and the 4-bit operators on CUDA tensors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.utils.checkpoint
from torch_side import CUDA, FLOATS, UNIT, assert_product, tensor

from halfbyte import _C
from halfbyte.torch import cuda_table
from halfbyte.torch import functional as F
from halfbyte.torch.nn import Linear4bit

ROWS, DEPTH = 48, 128


@pytest.fixture(params=["fused", "dense"])
def path(request, monkeypatch):
    monkeypatch.setattr(cuda_table, "forced", request.param)
    return request.param


def layers(nested=True, quant_type="nf4", bias=True, compute_dtype=None, rows=ROWS, depth=DEPTH):
    """The same layer on the CPU and on CUDA, and its dequantized weight."""
    torch.manual_seed(7)
    layer = Linear4bit(depth, rows, bias, compute_dtype, nested, quant_type)
    cuda = copy.deepcopy(layer).to("cuda")
    layer = layer.to("cpu")
    weight = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer, cuda, weight


def parts(layer):
    state = layer.weight.quant_state
    found = [layer.weight.data, state.absmax, state.code]
    return found + ([state.offset, state.state2.absmax, state.state2.code] if state.nested else [])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantized_as_on_the_cpu(fake, nested, quant_type):
    cpu, cuda, _ = layers(nested, quant_type)
    assert cuda.weight.device == CUDA and cuda.quant_state is cuda.weight.quant_state
    for ours, theirs in zip(parts(cuda), parts(cpu), strict=True):
        assert ours.device == CUDA and ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs)


def test_quantizing_waits_for_nothing(fake):
    w = tensor(ROWS, DEPTH).to("cuda")
    F.quantize_4bit(w, quant_type="nf4", compress_statistics=True)  # maps and codebooks are on the device now
    with fake.no_synchronisation():
        packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        F.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_forward(fake, path, dtype, nested, rows):
    cpu, cuda, w = layers(nested)
    x = tensor(rows, DEPTH, dtype=dtype)
    on_cuda = x.to("cuda")
    cuda(on_cuda)
    with fake.no_synchronisation():
        y = cuda(on_cuda)
    assert y.device == CUDA and y.dtype == dtype and type(y) is torch.Tensor
    bias = cpu.bias.to(dtype).double()  # as the layer keeps it
    rounding = 0.0 if dtype == torch.float32 else UNIT[dtype] * 2
    assert_product((y.cpu().double() - bias).to(torch.float32), x, w, rounding + 3 * UNIT[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient(fake, path, dtype):
    _, cuda, w = layers()
    x = tensor(2, 5, DEPTH, dtype=dtype).to("cuda").requires_grad_()
    dy = tensor(2, 5, ROWS, dtype=dtype, seed=1).to("cuda")
    cuda(x)
    with fake.no_synchronisation():
        cuda(x).backward(dy)
    assert x.grad.device == CUDA and cuda.weight.grad is None
    rounding = 0.0 if dtype == torch.float32 else UNIT[dtype] * 2
    assert_product(x.grad.reshape(-1, DEPTH), dy.reshape(-1, ROWS), w.T, rounding)
    torch.testing.assert_close(
        cuda.bias.grad.cpu(), dy.cpu().sum((0, 1)), rtol=16 * UNIT[dtype], atol=16 * UNIT[dtype]
    )


def test_dense_is_dequantize_and_torch(fake, monkeypatch):
    monkeypatch.setattr(cuda_table, "forced", "dense")
    cpu, cuda, _ = layers(compute_dtype=torch.bfloat16)
    x = tensor(4, DEPTH, dtype=torch.bfloat16)
    w = F.dequantize_4bit(
        cpu.weight.data, cpu.weight.quant_state, out=torch.empty(ROWS, DEPTH, dtype=torch.bfloat16)
    )
    expected = torch.nn.functional.linear(x, w, cpu.bias.to(torch.bfloat16))
    assert torch.equal(cuda(x.to("cuda")).cpu(), expected)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_compute_dtype_decides_how_products_are_formed(fake, monkeypatch, compute, dtype):
    monkeypatch.setattr(cuda_table, "forced", "dense")
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *rest: seen.append(x.dtype) or linear(x, *rest)
    )
    _, cuda, _ = layers(compute_dtype=compute)
    assert cuda(tensor(2, DEPTH, dtype=dtype).to("cuda")).dtype == dtype
    assert seen == [compute]


def test_no_compute_dtype_means_that_of_x(fake, monkeypatch):
    monkeypatch.setattr(cuda_table, "forced", "dense")
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *rest: seen.append(x.dtype) or linear(x, *rest)
    )
    for dtype in FLOATS:
        layers()[1](tensor(2, DEPTH, dtype=dtype).to("cuda"))
    assert seen == list(FLOATS)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_multiplies_in_its_dtype(fake, monkeypatch, grad):
    monkeypatch.setattr(cuda_table, "forced", "dense")
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *rest: seen.append(x.dtype) or linear(x, *rest)
    )
    x = tensor(2, DEPTH).to("cuda").requires_grad_(grad)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layers(compute_dtype=torch.float32)[1](x)
        z = layers(compute_dtype=torch.float16)[1](x)
    assert y.dtype == z.dtype == torch.float32 and seen == [torch.bfloat16, torch.float16]


def test_table_decides_by_rows(fake, monkeypatch):
    calls: list[str] = []
    _, cuda, _ = layers(compute_dtype=torch.float32)
    for name in ("linear_4bit", "dequantize_4bit"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, n=name, k=kernel, **kw: calls.append(n) or k(*a, **kw))
    most = cuda_table.most_rows("linear_4bit", (9, 0), torch.float32)
    for rows in (most, most + 1):
        cuda(tensor(rows, DEPTH).to("cuda"))
    assert calls == ["linear_4bit", "dequantize_4bit"]


def test_most_rows():
    most = cuda_table.most_rows
    assert most("linear_4bit", (7, 0), torch.float16) == 0
    assert most("linear_4bit", (8, 6), torch.float16) == most("linear_4bit", (8, 0), torch.float16)
    assert most("linear_4bit", (9, 0), torch.bfloat16) > most("linear_4bit", (8, 9), torch.bfloat16)
    assert len({entry[:3] for entry in cuda_table.TABLE}) == len(cuda_table.TABLE)


def test_matmul_4bit_with_a_transposed_weight(fake):
    w = tensor(ROWS, DEPTH).to("cuda")
    packed, state = F.quantize_4bit(w, quant_type="nf4")
    from halfbyte.torch.matmul import matmul_4bit

    x = tensor(3, DEPTH).to("cuda")
    assert_product(matmul_4bit(x, packed.t(), state), x, F.dequantize_4bit(packed, state))
    with pytest.warns(DeprecationWarning):
        y = matmul_4bit(tensor(3, ROWS).to("cuda"), packed, state)
    assert_product(y, tensor(3, ROWS), F.dequantize_4bit(packed, state).T)


def test_compiled_in_one_graph(fake):
    _, cuda, _ = layers()
    x = tensor(3, DEPTH, dtype=torch.bfloat16).to("cuda").requires_grad_()
    eager = cuda(x)
    compiled = torch.compile(cuda, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert y.device == CUDA and torch.equal(y.cpu(), eager.cpu())
    y.sum().backward()
    assert x.grad.device == CUDA


def test_fake_tensors_are_on_the_device(fake):
    from torch._subclasses import FakeTensorMode

    _, cuda, _ = layers()
    state = cuda.weight.quant_state
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.empty(3, DEPTH, device="cuda"))
        assert x.device == CUDA
        assert F.linear_4bit(x, cuda.weight.data, state).device == CUDA
        packed, scale = torch.ops.halfbyte.quantize_4bit(x)
        assert packed.device == scale.device == CUDA


def test_state_dict_across_devices(fake):
    cpu, cuda, _ = layers()
    file = io.BytesIO()
    torch.save(cuda.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    assert all(torch.equal(value, cpu.state_dict()[key]) for key, value in saved.items())
    new = Linear4bit(DEPTH, ROWS, quant_type="nf4").to("cuda")
    new.load_state_dict(saved)
    x = tensor(2, DEPTH).to("cuda")
    assert all(part.device == CUDA for part in parts(new))
    assert torch.equal(new(x).cpu(), cuda(x).cpu())


def test_moves_keep_the_bits(fake):
    cpu, cuda, _ = layers()
    before = [part.cpu() for part in parts(cuda)]
    back = cuda.cpu().cuda()
    assert back.weight.device == CUDA
    for part, old in zip(parts(back), before, strict=True):
        assert part.device == CUDA and torch.equal(part.cpu(), old)
    half = back.to(torch.float16)  # dtypes leave the codes alone
    assert torch.equal(half.weight.data.cpu(), before[0]) and half.bias.dtype == torch.float16
    moved = cpu.weight.to("cuda")
    assert moved.quant_state.absmax.device == CUDA and cpu.weight.quant_state.absmax.device.type == "cpu"


def test_mixed_devices_are_refused(fake):
    _, cuda, _ = layers(nested=False)
    state = cuda.weight.quant_state
    with pytest.raises(ValueError, match="cuda:0"):
        torch.ops.halfbyte.linear_4bit(
            tensor(2, DEPTH).to("cuda"), cuda.weight.data, state.absmax.cpu(), "nf4", 64, (ROWS, DEPTH)
        )
    with pytest.raises(ValueError, match="cuda:1"):
        cuda(tensor(2, DEPTH).to("cuda:1"))
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        cuda(tensor(2, DEPTH))


def test_a_cpu_offset_is_taken_by_value(fake):
    _, cuda, _ = layers()
    state = cuda.weight.quant_state
    x = tensor(2, DEPTH).to("cuda")
    y = cuda(x)
    for offset in (state.offset.cpu(), state.offset.double(), state.offset.reshape(1)):
        changed = copy.copy(state)
        changed.offset = offset
        assert torch.equal(F.linear_4bit(x, cuda.weight.data, changed, cuda.bias).cpu(), y.cpu())


def test_copies_and_pickles(fake):
    _, cuda, _ = layers()
    x = tensor(2, DEPTH).to("cuda")
    y = cuda(x).cpu()
    assert torch.equal(copy.deepcopy(cuda)(x).cpu(), y)
    file = io.BytesIO()
    torch.save(cuda, file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=False)
    assert all(part.device.type == "cpu" for part in parts(loaded))
    assert torch.equal(loaded.to("cuda")(x).cpu(), y)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3, 1), ()])
def test_few_or_no_rows(fake, path, shape):
    _, cuda, w = layers(bias=False)
    x = tensor(*shape, DEPTH).to("cuda")
    y = cuda(x)
    assert y.shape == (*shape, ROWS)
    assert_product(y.reshape(-1, ROWS), x.reshape(-1, DEPTH), w)


def test_gradients_through_checkpoints_and_twice(fake, monkeypatch):
    monkeypatch.setattr(cuda_table, "forced", "dense")
    _, cuda, _ = layers(bias=False)
    x = tensor(3, DEPTH).to("cuda").requires_grad_()
    (expected,) = torch.autograd.grad(cuda(x).sum(), x)
    (found,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(cuda, x, use_reentrant=False).sum(), x)
    assert torch.equal(found.cpu(), expected.cpu())
    (first,) = torch.autograd.grad(cuda(x).pow(2).sum(), x, create_graph=True)
    first.sum().backward()
    assert x.grad.device == CUDA


def test_symbolic_rows_and_export(fake):
    _, cuda, _ = layers()
    cuda.eval()
    compiled = torch.compile(cuda, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5, 9):
        x = tensor(rows, DEPTH).to("cuda")
        assert torch.equal(compiled(x).cpu(), cuda(x).cpu())
    program = torch.export.export(cuda, (x,))
    assert "halfbyte.linear_4bit" in program.graph_module.code
    assert torch.equal(program.module()(x).cpu(), cuda(x).cpu())


def test_quantize_compiled_in_one_graph(fake):
    def both_ways(x):
        packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        return F.dequantize_4bit(packed, state)

    x = tensor(16, 64).to("cuda")
    y = torch.compile(both_ways, fullgraph=True, backend="aot_eager")(x)
    assert y.device == CUDA and torch.equal(y.cpu(), both_ways(x).cpu())


def test_operator_as_torch_wants_it(fake, path):
    _, cuda, _ = layers()
    state = cuda.weight.quant_state
    for dtype in (torch.float32, torch.bfloat16):
        x = tensor(3, DEPTH, dtype=dtype).to("cuda").requires_grad_()
        torch.library.opcheck(
            torch.ops.halfbyte.linear_4bit,
            (
                x,
                cuda.weight.data,
                state.absmax,
                "nf4",
                64,
                state.shape,
                None,
                "bfloat16",
                *F.nested_tensors(state),
            ),
        )
