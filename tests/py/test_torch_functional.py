"""halfbyte.torch.functional: against the definition in float64/float32, over dtypes, block sizes and storages."""

import pytest
import torch

from halfbyte import _C
from halfbyte.torch import functional as F

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def decoded(packed: torch.Tensor, state: F.QuantState) -> torch.Tensor:
    """codebook[code] * absmax in float32, from the bytes, by the layout's definition."""
    octets = packed.contiguous().view(torch.uint8).flatten()
    codes = torch.stack([octets >> 4, octets & 15], 1).flatten()[: state.shape.numel()].long()
    absmax = state.absmax
    if state.nested:
        two = state.state2
        scale = two.absmax.repeat_interleave(two.blocksize)[: absmax.numel()]
        absmax = two.code[absmax.long()] * scale + state.offset
    scale = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (torch.tensor(_C.codebook(state.quant_type))[codes] * scale).view(state.shape)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 64), (7, 63), (3, 5, 33), (1,), (0, 8)])
def test_dequantize_is_the_definition(shape, dtype, quant_type, nested):
    torch.manual_seed(1)
    w = torch.randn(shape, dtype=dtype)
    packed, state = F.quantize_4bit(w, blocksize=32, quant_type=quant_type, compress_statistics=nested)
    assert packed.shape == ((w.numel() + 1) // 2, 1)
    assert (state.shape, state.dtype, state.blocksize, state.nested) == (w.shape, dtype, 32, nested)
    result = F.dequantize_4bit(packed, state)
    assert torch.equal(result, decoded(packed, state).to(dtype))


@pytest.mark.parametrize("blocksize", F.BLOCKSIZES_4BIT)
def test_absmax_is_the_largest_of_each_block(blocksize):
    torch.manual_seed(2)
    w = torch.randn(3, 3001)
    _, state = F.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
    padded = torch.nn.functional.pad(w.flatten().abs(), (0, -w.numel() % blocksize))
    assert torch.equal(state.absmax, padded.view(-1, blocksize).amax(1))


@pytest.mark.parametrize("storage", STORAGES)
def test_storage_is_a_reinterpretation(storage):
    torch.manual_seed(3)
    w = torch.randn(32, 64)
    plain, state = F.quantize_4bit(w, quant_type="nf4")
    packed, _ = F.quantize_4bit(w, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage and packed.shape == (1024 // storage.itemsize, 1)
    assert torch.equal(packed.view(torch.uint8).flatten(), plain.flatten())
    assert torch.equal(F.dequantize_4bit(packed, state), F.dequantize_4bit(plain, state))
    x = torch.randn(3, 64)
    assert torch.equal(F.linear_4bit(x, packed, state), F.linear_4bit(x, plain, state))


def test_strides_of_the_input_are_honoured():
    torch.manual_seed(4)
    w = torch.randn(64, 96)
    for view in (w.t(), w[:, ::2], w[5:, 3:], w.expand(2, 64, 96)):
        ours, state = F.quantize_4bit(view, quant_type="nf4")
        contiguous, state2 = F.quantize_4bit(view.contiguous(), quant_type="nf4")
        assert torch.equal(ours, contiguous) and state == state2


def test_transposed_packed_gives_the_transposed_tensor():
    w = torch.randn(8, 64)
    packed, state = F.quantize_4bit(w, quant_type="nf4")
    assert torch.equal(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())
    tiny, state = F.quantize_4bit(torch.randn(2, 1), quant_type="nf4")
    assert F.dequantize_4bit(tiny, state).shape == (2, 1)  # one byte: [1, 1] is not a transposed view


def test_out_arguments():
    w = torch.randn(16, 64)
    out, absmax = torch.empty(512, 1, dtype=torch.uint8), torch.empty(16)
    packed, state = F.quantize_4bit(w, absmax=absmax, out=out, quant_type="nf4")
    assert packed is out and state.absmax is absmax
    target = torch.empty(16, 64)
    assert F.dequantize_4bit(packed, absmax=absmax, out=target, quant_type="nf4") is target
    assert torch.equal(target, F.dequantize_4bit(packed, state))
    half = torch.empty(16, 64, dtype=torch.float16)
    assert torch.equal(F.dequantize_4bit(packed, state, out=half), target.half())
    with pytest.raises(ValueError, match="out must be"):
        F.quantize_4bit(w, out=torch.empty(3, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="1024 elements"):
        F.dequantize_4bit(packed, state, out=torch.empty(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: F.quantize_4bit(w, quant_type="nf5"), "quant_type"),
        (lambda w: F.quantize_4bit(w, blocksize=100), "blocksize"),
        (lambda w: F.quantize_4bit(w.double()), "float64"),
        (lambda w: F.quantize_4bit(w[:, :1], quant_storage=torch.float32), "item size"),
        (lambda w: F.quantize_4bit(w, scales="best"), "scales"),
        (lambda w: F.dequantize_4bit(w), "quant_state"),
        (lambda w: F.gemv_4bit(w, w), "state is required"),
        (lambda w: F.quantize_blockwise(w, blocksize=0), "blocksize"),
        (lambda w: F.quantize_blockwise(w.long()), "int64"),
        (lambda w: F.dequantize_blockwise(w.to(torch.uint8)), "absmax"),
        (lambda w: F.int8_linear_matmul(w.char(), w.char(), dtype=torch.int64), "int32"),
        (lambda w: F.int8_double_quant(w, row_stats=w), "row_stats must be None"),
        (lambda w: F.create_fp8_map(True, 5, 5), "total_bits"),
        (lambda w: F.create_dynamic_map(False, 3, 8), "expected 256"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(6, 64))


def test_unknown_four_bit_types():
    for name, blocksize in (("nf5", 64), ("af4", 128)):
        with pytest.raises(NotImplementedError, match=name):
            F.get_4bit_type(name, "cpu", blocksize)
    assert F.get_4bit_type("int4", "cpu").abs().max() == 1


def test_searched_scales_lose_less_in_the_same_format():
    torch.manual_seed(5)
    w = torch.randn(128, 256)
    loss = {}
    for scales in ("absmax", "search"):
        packed, state = F.quantize_4bit(w, quant_type="nf4", scales=scales)
        loss[scales] = (F.dequantize_4bit(packed, state) - w).square().mean().item()
    assert loss["search"] < 0.98 * loss["absmax"]


@pytest.mark.parametrize("blocksize", [1, 64, 100, 4096])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_blockwise(dtype, nested, blocksize):
    torch.manual_seed(6)
    w = torch.randn(5, 333, dtype=dtype)
    codes, state = F.quantize_blockwise(w, blocksize=blocksize, nested=nested)
    result = F.dequantize_blockwise(codes, state)
    assert (result.dtype, result.shape, codes.dtype, codes.shape) == (dtype, w.shape, torch.uint8, w.shape)
    absmax = state.absmax
    if nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    scale = absmax.repeat_interleave(blocksize)[: w.numel()].view(w.shape)
    assert torch.equal(result, (state.code[codes.long()] * scale).to(dtype))
    if not nested:
        # Nearest: no entry of the map is closer than the one chosen, beyond the rounding of w / scale.
        distance = (w.float().unsqueeze(-1) / scale.unsqueeze(-1) - state.code).abs()
        chosen = distance.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
        assert (chosen <= distance.amin(-1) + 2**-22).all()


def test_blockwise_zero_is_exact_and_maps_are_accepted():
    w = torch.tensor([0.0, 1.0, -0.5, 0.25])
    codes, state = F.quantize_blockwise(w)
    assert F.dequantize_blockwise(codes, state)[0] == 0
    code = F.create_fp8_map()
    codes, state = F.quantize_blockwise(w, code=code, blocksize=4)
    assert torch.equal(F.dequantize_blockwise(codes, absmax=state.absmax, code=code, blocksize=4), w)
    out = torch.empty(4, dtype=torch.float16)
    assert F.dequantize_blockwise(codes, state, out=out) is out and out[1] == 1


@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 40), (1, 7)])
def test_int8_round_trip(shape):
    torch.manual_seed(7)
    a = torch.randn(shape)
    codes, stats, outliers = F.int8_vectorwise_quant(a)
    assert outliers is None and codes.shape == a.shape and stats.shape == (a.numel() // shape[-1],)
    back = F.int8_vectorwise_dequant(codes.view(-1, shape[-1]), stats).view(shape)
    assert ((back - a).abs() <= a.abs().amax(-1, keepdim=True) / 254 * (1 + 2**-20)).all()


def test_int8_outliers():
    a = torch.tensor([[1.0, -7.0, 2.0, 0.0], [0.5, 0.25, -9.0, 1.0]])
    codes, stats, outliers = F.int8_vectorwise_quant(a, threshold=6.0)
    assert outliers.tolist() == [1, 2] and outliers.dtype == torch.int64
    assert stats.tolist() == [2.0, 1.0]  # of what is below the threshold
    assert codes[:, 1:3].eq(0).all()  # whole columns, for there are two rows
    by_row, by_col, rows, cols, _ = F.int8_double_quant(a)
    assert torch.equal(by_row, F.int8_vectorwise_quant(a)[0]) and rows.tolist() == [7.0, 9.0]
    assert torch.equal(by_col, F.int8_vectorwise_quant(a.t())[0].t()) and cols.tolist() == [
        1.0,
        7.0,
        9.0,
        1.0,
    ]


def test_int8_product_and_its_scaling():
    torch.manual_seed(8)
    a = torch.randint(-128, 128, (2, 5, 33), dtype=torch.int8)
    b = torch.randint(-128, 128, (7, 33), dtype=torch.int8)
    c = F.int8_linear_matmul(a, b)
    assert torch.equal(c, (a.long() @ b.long().t()).int())
    out = torch.empty_like(c)
    assert F.int8_linear_matmul(a, b, out=out) is out and torch.equal(out, c)
    rows, cols, bias = torch.rand(10), torch.rand(7), torch.randn(7)
    y = F.int8_mm_dequant(c, rows, cols, bias=bias, dtype=torch.float32)
    exact = c.double() * rows.view(2, 5, 1) * cols / 127**2 + bias
    torch.testing.assert_close(y.double(), exact, rtol=2**-21, atol=2**-22)
    assert F.int8_mm_dequant(c, rows, cols).dtype == torch.float16


def test_gemv_and_linear_agree():
    torch.manual_seed(9)
    w = torch.randn(48, 64)
    packed, state = F.quantize_4bit(w, quant_type="fp4", compress_statistics=True)
    x = torch.randn(2, 3, 64)
    y = F.linear_4bit(x, packed, state)
    assert torch.equal(F.gemv_4bit(x, packed.t(), state=state), y)
    out = torch.empty_like(y)
    assert F.gemv_4bit(x, packed, out=out, state=state) is out
    exact = x.double() @ F.dequantize_4bit(packed, state).double().t()
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=64 * 2**-23 * 64)


def test_runs_on_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        packed, state = F.quantize_4bit(torch.randn(8, 64), quant_type="nf4", compress_statistics=True)
        assert F.dequantize_4bit(packed, state).shape == (8, 64)
        assert F.linear_4bit(torch.randn(3, 64), packed, state).shape == (3, 8)


def test_quantize_compiled_in_one_graph():
    def both_ways(x):
        packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        codes, other = F.quantize_blockwise(x)
        return F.dequantize_4bit(packed, state), F.dequantize_blockwise(codes, other)

    x = torch.randn(16, 64)
    for ours, eager in zip(
        torch.compile(both_ways, fullgraph=True, backend="aot_eager")(x), both_ways(x), strict=True
    ):
        assert torch.equal(ours, eager)
