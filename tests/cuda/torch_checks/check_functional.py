"""Names of `functional`, the operators of bitsandbytes, embeddings and QuantState on CUDA tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch_side import CUDA, FLOATS, assert_product, tensor

import halfbyte.bitsandbytes as bnb
from halfbyte.torch import functional as F
from halfbyte.torch.nn import Embedding4bit

OPS = torch.ops.bitsandbytes


def same(ours, theirs):
    assert ours.device == CUDA and ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(5, 64), (3, 7, 11), (1,), (0, 64)])
def test_4bit(fake, dtype, quant_type, shape):
    x = tensor(*shape, dtype=dtype)
    packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=True)
    ours, on_cuda = F.quantize_4bit(x.to("cuda"), quant_type=quant_type, compress_statistics=True)
    same(ours, packed)
    same(on_cuda.absmax, state.absmax)
    same(on_cuda.state2.absmax, state.state2.absmax)
    same(on_cuda.offset, state.offset)
    same(on_cuda.code, state.code)
    same(F.dequantize_4bit(ours, on_cuda), F.dequantize_4bit(packed, state))
    assert on_cuda.state2.code.device == CUDA


def test_search_finds_what_the_cpu_finds(fake):
    x = tensor(8, 64)
    packed, state = F.quantize_4bit(x, quant_type="nf4", scales="search")
    ours, on_cuda = F.quantize_4bit(x.to("cuda"), quant_type="nf4", scales="search")
    same(ours, packed)
    same(on_cuda.absmax, state.absmax)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_storage_types_and_outputs(fake, storage):
    x = tensor(16, 64).to("cuda")
    packed, state = F.quantize_4bit(x, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    out = torch.empty(16, 64, dtype=torch.bfloat16, device="cuda")
    assert F.dequantize_4bit(packed, state, out=out) is out
    absmax, target = torch.empty_like(state.absmax), torch.empty_like(packed)
    F.quantize_4bit(x, absmax, target, quant_type="nf4", quant_storage=storage)
    same(absmax, state.absmax.cpu())
    assert torch.equal(target.view(torch.uint8).cpu(), packed.view(torch.uint8).cpu())
    assert_product(F.gemv_4bit(x[:1], packed, state=state), x[:1], F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [False, True])
def test_blockwise(fake, nested):
    x = tensor(3, 300)
    codes, state = F.quantize_blockwise(x, blocksize=256)
    F.quantize_blockwise(x.to("cuda"))  # the map is on the device now
    on_cuda = x.to("cuda")
    with fake.no_synchronisation():
        ours, there = F.quantize_blockwise(on_cuda, blocksize=256, nested=nested)
        back = F.dequantize_blockwise(ours, there)
    same(ours, codes)
    assert there.code.device == CUDA
    if not nested:
        same(back, F.dequantize_blockwise(codes, state))
    other = F.create_linear_map().to("cuda")
    same(F.quantize_blockwise(on_cuda, code=other)[0], F.quantize_blockwise(x, code=other.cpu())[0])


def test_quant_state_moves(fake):
    _, state = F.quantize_4bit(tensor(16, 64), quant_type="nf4", compress_statistics=True)
    old = copy.deepcopy(state)
    state.to("cuda")
    for t in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
        assert t.device == CUDA
    saved = state.as_dict(packed=True)
    assert all(value.device == CUDA for value in saved.values())
    loaded = F.QuantState.from_dict(dict(saved), device=torch.device("cuda"))
    assert loaded.offset.device == CUDA
    loaded.to("cpu")
    assert loaded == old


def test_statistics_left_behind_follow(fake):
    packed, state = F.quantize_4bit(tensor(16, 64), quant_type="nf4")
    expected = F.dequantize_4bit(packed, state)
    same(F.dequantize_4bit(packed.to("cuda"), state), expected)


@pytest.mark.parametrize("depth", [64, 100])
@pytest.mark.parametrize("nested", [False, True])
def test_embedding4bit(fake, depth, nested):
    torch.manual_seed(1)
    table = Embedding4bit(30, depth, quant_type="nf4")
    table.weight.compress_statistics = nested
    cuda = copy.deepcopy(table).to("cuda")
    table = table.to("cpu")
    for rows in (torch.tensor([[3, 0, 29], [3, 3, 7]]), torch.tensor(4), torch.zeros(0, dtype=torch.int64)):
        index = rows.to("cuda")
        with fake.no_synchronisation():
            found = cuda(index)
        same(found, table(rows))
    same(cuda(index.int()), table(rows))
    whole = torch.compile(cuda, fullgraph=True, backend="aot_eager")(torch.arange(5, device="cuda"))
    same(whole, table(torch.arange(5)))


def test_operators_of_bitsandbytes(fake):
    w, x = tensor(48, 64), tensor(3, 64)
    packed, absmax = OPS.quantize_4bit(w.to("cuda"), 64, "nf4", torch.uint8)
    cpu = OPS.quantize_4bit(w, 64, "nf4", torch.uint8)
    same(packed, cpu[0])
    same(absmax, cpu[1])
    dense = OPS.dequantize_4bit(packed, absmax, 64, "nf4", (48, 64), torch.float32)
    same(dense, OPS.dequantize_4bit(*cpu, 64, "nf4", (48, 64), torch.float32))
    assert_product(OPS.gemm_4bit(x.to("cuda"), packed, (48, 64), absmax, 64, "nf4"), x, dense)
    code = F.get_4bit_type("nf4", "cuda")
    y = OPS.gemv_4bit(x[:1].to("cuda"), packed, (48, 64), absmax, code, 64)
    assert_product(y, x[:1], dense)
    on_cuda = x[:1].to("cuda")
    with fake.no_synchronisation():  # the codebook is known now
        OPS.gemv_4bit(on_cuda, packed, (48, 64), absmax, code, 64)
    code.copy_(F.get_4bit_type("fp4", "cuda"))
    assert not torch.equal(OPS.gemv_4bit(on_cuda, packed, (48, 64), absmax, code, 64).cpu(), y.cpu())
    out = torch.empty(48, 64, device="cuda")
    OPS.dequantize_4bit.out(packed, absmax, 64, "nf4", (48, 64), torch.float32, out=out)
    same(out, dense.cpu())


def test_deprecated_integer_products(fake):
    a = torch.randint(-100, 100, (2, 5, 16), dtype=torch.int8)
    b = torch.randint(-100, 100, (2, 16, 7), dtype=torch.int8)
    with pytest.warns(FutureWarning):
        same(F.batched_igemm(a.to("cuda"), b.to("cuda")), F.batched_igemm(a, b))


def test_what_the_stand_in_says_of_the_machine(fake, monkeypatch):
    assert bnb.COMPILED_WITH_CUDA and bnb.supported_torch_devices == {"cpu", "cuda"}
    from halfbyte.bitsandbytes import cextension

    assert cextension.BNB_BACKEND == "CUDA" and F.lib.compiled_with_cuda
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    specs = cextension.get_cuda_specs()
    assert specs.highest_compute_capability == (9, 0) and specs.has_imma
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not bnb.COMPILED_WITH_CUDA and bnb.supported_torch_devices == {"cpu"}
    assert cextension.BNB_BACKEND == "CPU"


def test_pages(fake):
    page = F.get_paged(30, 40, dtype=torch.uint8)
    assert page.is_paged and page.page_deviceid == 0 and page.device == CUDA and page.shape == (30, 40)
    assert page.cpu().sum() == 0
    F.fill(page, 17)
    assert (page.cpu() == 17).all()
    manager = F.GlobalPageManager.get_instance()
    manager.initialize()
    manager.paged_tensors.append(page)
    manager.prefetch_all()
    manager.prefetch_all(to_cpu=True)
    assert len(manager.paged_tensors) == 1
    floats = F.get_paged(4, device=torch.device("cuda"))
    floats += 3
    F._mul(floats, floats)
    assert floats.tolist() == [9.0] * 4
    del page
    assert len(manager.paged_tensors) == 0
    assert F.get_paged(0, 3).shape == (0, 3)
