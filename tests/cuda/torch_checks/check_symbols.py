"""`functional.lib` as Unsloth calls it: device addresses and a stream."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch_side import CUDA, assert_product, tensor

from halfbyte.torch import functional as F

lib, get_ptr, c = F.lib, F.get_ptr, ctypes.c_int
ROWS, DEPTH = 48, 128


@pytest.fixture
def weight():
    w = tensor(ROWS, DEPTH, dtype=torch.bfloat16).to("cuda")
    return F.quantize_4bit(w, quant_type="nf4", compress_statistics=True)


def test_dequantize_as_unsloth(fake, weight):
    packed, state = weight
    absmax = torch.empty(state.absmax.numel(), device="cuda")
    out = torch.empty(ROWS, DEPTH, dtype=torch.bfloat16, device="cuda")
    stream = ctypes.c_void_p(0x3000)
    with fake.no_synchronisation():
        lib.cdequantize_blockwise_fp32(
            get_ptr(state.state2.code), get_ptr(state.absmax), get_ptr(state.state2.absmax), get_ptr(absmax),
            c(state.state2.blocksize), c(absmax.numel()), stream,
        )  # fmt: skip
        absmax += state.offset
        lib.cdequantize_blockwise_bf16_nf4(
            get_ptr(None), get_ptr(packed), get_ptr(absmax), get_ptr(out), c(64), c(out.numel()), stream
        )
    assert torch.equal(out.cpu(), F.dequantize_4bit(packed, state).cpu())
    assert fake.current_stream() == 0


def test_work_goes_to_the_stream_that_is_named(fake, weight, monkeypatch):
    state = weight[1]
    seen = []
    run = torch.ops.halfbyte.dequantize_8bit

    def watch(*args):
        seen.append(fake.current_stream())
        return run(*args)

    monkeypatch.setattr(torch.ops.halfbyte, "dequantize_8bit", watch)
    absmax = torch.empty(state.absmax.numel(), device="cuda")
    arguments = (
        get_ptr(state.state2.code), get_ptr(state.absmax), get_ptr(state.state2.absmax), get_ptr(absmax), c(256),
        c(absmax.numel()),
    )  # fmt: skip
    with fake.stream(0x7000):
        lib.cdequantize_blockwise_fp32(*arguments, ctypes.c_void_p(0x5000))
        lib.cdequantize_blockwise_fp32(*arguments, ctypes.c_void_p(0x7000))
        lib.cdequantize_blockwise_fp32(*arguments)
        lib.cdequantize_blockwise_fp32(*arguments, ctypes.c_void_p(None))
    assert seen[:3] == [0x5000, 0x7000, 0x7000]
    assert seen[3] in (0, 0x7000)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gemv(fake, quant_type):
    w = tensor(ROWS, DEPTH, dtype=torch.float16).to("cuda")
    packed, state = F.quantize_4bit(w, quant_type=quant_type)
    x = tensor(1, DEPTH, dtype=torch.float16).to("cuda")
    out = torch.empty(1, ROWS, dtype=torch.float16, device="cuda")
    with fake.no_synchronisation():  # the codebook is a state's
        lib.cgemm_4bit_inference_naive_fp16(
            c(ROWS), c(1), c(DEPTH), get_ptr(x), get_ptr(packed), get_ptr(state.absmax), get_ptr(state.code),
            get_ptr(out), c(ROWS), c(DEPTH // 2), c(ROWS), c(64), ctypes.c_void_p(0),
        )  # fmt: skip
    assert_product(out, x, F.dequantize_4bit(packed, state), 2**-10)
    code = state.code.clone()  # nobody's: it must be looked at
    lib.cgemm_4bit_inference_naive_fp16(
        ROWS, 1, DEPTH, get_ptr(x), get_ptr(packed), get_ptr(state.absmax), get_ptr(code), get_ptr(out), ROWS,
        DEPTH // 2, ROWS, 64, None,
    )  # fmt: skip
    assert_product(out, x, F.dequantize_4bit(packed, state), 2**-10)


@pytest.mark.parametrize("nested", [False, True])
def test_gemm(fake, nested):
    w = tensor(ROWS, DEPTH).to("cuda")
    packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    x, bias = tensor(3, DEPTH).to("cuda"), tensor(ROWS).to("cuda")
    out = torch.empty(3, ROWS, device="cuda")
    scales = state.state2.absmax if nested else state.absmax
    extra = [state.absmax, state.state2.code, state.offset] if nested else [None] * 3
    for b in (bias, None):
        lib.cgemm_4bit_fp32(
            get_ptr(x), get_ptr(packed), get_ptr(scales), *(get_ptr(t) for t in extra), get_ptr(out), get_ptr(b), 3,
            ROWS, DEPTH, 64, 2, 0,
        )  # fmt: skip
        y = out if b is None else (out.double() - b.double()).float()
        assert_product(y, x, F.dequantize_4bit(packed, state), 0.0 if b is None else 2**-20)


def test_quantize(fake):
    x = tensor(300)
    codes = torch.empty(300, dtype=torch.uint8, device="cuda")
    absmax = torch.empty(2, device="cuda")
    on_cuda, code = x.to("cuda"), F.create_dynamic_map().to("cuda")
    with fake.no_synchronisation():
        lib.cquantize_blockwise_fp32(
            get_ptr(code), get_ptr(on_cuda), get_ptr(absmax), get_ptr(codes), c(256), c(300)
        )
    expected, state = F.quantize_blockwise(x, blocksize=256)
    assert torch.equal(codes.cpu(), expected) and torch.equal(absmax.cpu(), state.absmax)
    packed, scale = torch.empty(150, dtype=torch.uint8, device="cuda"), torch.empty(5, device="cuda")
    lib.cquantize_blockwise_fp32_nf4(None, get_ptr(on_cuda), get_ptr(scale), get_ptr(packed), c(64), c(300))
    expected, state = F.quantize_4bit(x, quant_type="nf4")
    assert torch.equal(packed.cpu(), expected.flatten()) and torch.equal(scale.cpu(), state.absmax)


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_int8_rows(fake, threshold):
    x = tensor(4, DEPTH, dtype=torch.float16) * 2
    on_cuda = x.to("cuda")
    outs = [
        (torch.empty(4, DEPTH, dtype=torch.int8, device=d), torch.empty(4, device=d)) for d in ("cpu", "cuda")
    ]
    for source, (codes, stats) in zip((x, on_cuda), outs, strict=True):
        lib.cint8_vector_quant(
            get_ptr(source), get_ptr(codes), get_ptr(stats), ctypes.c_float(threshold), c(4), c(DEPTH), None
        )
    assert torch.equal(outs[0][0], outs[1][0].cpu()) and torch.equal(outs[0][1], outs[1][1].cpu())


def test_host_memory_still_works(fake):
    x = tensor(64)
    packed, scale = torch.empty(32, dtype=torch.uint8), torch.empty(1)
    lib.cquantize_blockwise_fp32_nf4(None, get_ptr(x), get_ptr(scale), get_ptr(packed), c(64), c(64))
    assert torch.equal(packed, F.quantize_4bit(x, quant_type="nf4")[0].flatten())
    y = torch.empty(64, device="cuda")
    lib.cfill_fp32(get_ptr(y), None, ctypes.c_float(3.0), c(64))
    assert y.device == CUDA and (y.cpu() == 3).all()
