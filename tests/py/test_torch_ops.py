"""torch.ops.halfbyte.*: schemas, fakes and gradients (opcheck), gradients against autograd of the definition."""

import pytest
import torch

from halfbyte.torch import functional as F

OPS = torch.ops.halfbyte
ROWS, DEPTH = 12, 64


def weight4(nested: bool, storage: torch.dtype = torch.uint8) -> tuple[tuple, torch.Tensor]:
    """(arguments between x and bias + nested arguments, the dequantized weight)."""
    torch.manual_seed(0)
    w = torch.randn(ROWS, DEPTH)
    packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    arguments = (packed, state.absmax, "nf4", 64, [ROWS, DEPTH])
    return (arguments, F.nested_tensors(state)), F.dequantize_4bit(packed, state)


def weight8() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    codes, scale, _ = F.int8_vectorwise_quant(torch.randn(ROWS, DEPTH))
    return codes, scale, F.int8_vectorwise_dequant(codes, scale)


@pytest.mark.parametrize("shape", [(4, 64), (3, 5, 7)])
@pytest.mark.parametrize("scales", ["absmax", "search"])
def test_quantize_4bit(shape, scales):
    torch.library.opcheck(OPS.quantize_4bit.default, (torch.randn(shape), "nf4", 32, scales))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_dequantize_4bit(nested, storage):
    (arguments, extra), _ = weight4(nested, storage)
    torch.library.opcheck(OPS.dequantize_4bit.default, (*arguments, torch.float16, *extra))


def test_nest_absmax():
    torch.library.opcheck(OPS.nest_absmax.default, (torch.rand(600), 256))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("x_grad", "bias"), [(False, None), (True, False), (True, True)])
@pytest.mark.parametrize("leading", [(3,), (2, 3), ()])
def test_linear_4bit(nested, x_grad, bias, leading):
    (arguments, extra), _ = weight4(nested)
    x = torch.randn(*leading, DEPTH, requires_grad=x_grad)
    b = None if bias is None else torch.randn(ROWS, requires_grad=bias)
    torch.library.opcheck(OPS.linear_4bit.default, (x, *arguments, b, "float32", *extra))
    dy = torch.randn(*leading, ROWS, requires_grad=x_grad)
    torch.library.opcheck(OPS.linear_4bit_grad_input.default, (dy, *arguments, "float32", *extra))


@pytest.mark.parametrize("blocksize", [7, 64])
def test_blockwise(blocksize):
    code = F.create_dynamic_map()
    x = torch.randn(3, 50)
    torch.library.opcheck(OPS.quantize_8bit.default, (x, code, blocksize))
    codes, absmax = OPS.quantize_8bit(x, code, blocksize)
    torch.library.opcheck(OPS.dequantize_8bit.default, (codes, absmax, code, blocksize, torch.bfloat16))


@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_rows_int8(threshold, shape):
    x = torch.randn(shape)
    torch.library.opcheck(OPS.quantize_rows_int8.default, (x, threshold))
    codes, scale, _ = OPS.quantize_rows_int8(x, threshold)
    torch.library.opcheck(OPS.dequantize_rows_int8.default, (codes, scale, torch.float32))
    torch.library.opcheck(OPS.matmul_int8.default, (codes, codes.view(-1, 8)))


@pytest.mark.parametrize("mode", ["dynamic", "exact"])
@pytest.mark.parametrize(("x_grad", "bias"), [(False, None), (True, True)])
def test_linear_8bit(mode, x_grad, bias):
    codes, scale, _ = weight8()
    x = torch.randn(2, 3, DEPTH, requires_grad=x_grad)
    b = None if bias is None else torch.randn(ROWS, requires_grad=bias)
    # Several rows at once are quantized by their own scale: nothing depends on the batch.
    torch.library.opcheck(OPS.linear_8bit.default, (x, codes, scale, b, 2.0, mode))
    dy = torch.randn(2, 3, ROWS, requires_grad=x_grad)
    torch.library.opcheck(OPS.linear_8bit_grad_input.default, (dy, codes, scale))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("leading", [(3,), (2, 5), (), (0,)])
def test_gradients_of_linear_4bit(nested, leading):
    (arguments, extra), w = weight4(nested)
    x = torch.randn(*leading, DEPTH, requires_grad=True)
    bias = torch.randn(ROWS, requires_grad=True)
    dy = torch.randn(*leading, ROWS, requires_grad=True)

    def first_and_second(y):
        dx, dbias = torch.autograd.grad(y, (x, bias), dy, create_graph=True)
        (ddy,) = torch.autograd.grad(dx.square().sum(), dy)
        return y, dx, dbias, ddy

    ours = first_and_second(OPS.linear_4bit(x, *arguments, bias, "float32", *extra))
    exact = first_and_second(torch.nn.functional.linear(x, w, bias))
    for a, b, terms in zip(ours, exact, (DEPTH, ROWS, (leading and leading[0]) or 1, DEPTH), strict=True):
        # Two float32 sums of the same products differ by at most 2 n u sum|terms|, here below 2^-23 n * 100.
        torch.testing.assert_close(a, b, rtol=0, atol=(terms + 2) * 2**-23 * 100)


def test_gradients_of_linear_8bit():
    codes, scale, w = weight8()
    x = torch.randn(4, DEPTH, requires_grad=True)
    bias = torch.randn(ROWS, requires_grad=True)
    dy = torch.randn(4, ROWS, requires_grad=True)
    for mode in ("exact", "dynamic"):
        y = OPS.linear_8bit(x, codes, scale, bias, 0.0, mode)
        dx, dbias = torch.autograd.grad(y, (x, bias), dy, create_graph=True)
        torch.testing.assert_close(dx, dy @ w, rtol=0, atol=ROWS * 2**-23 * 100)
        torch.testing.assert_close(dbias, dy.sum(0))
        (ddy,) = torch.autograd.grad(dx.sum(), dy)
        torch.testing.assert_close(ddy, w.sum(1).expand(4, ROWS), rtol=0, atol=DEPTH * 2**-23 * 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_gradient_has_the_dtype_of_the_bias(dtype):
    (arguments, extra), _ = weight4(False)
    bias = torch.zeros(ROWS, dtype=torch.float32, requires_grad=True)
    OPS.linear_4bit(torch.randn(3, DEPTH, dtype=dtype), *arguments, bias, "float32", *extra).sum().backward()
    assert bias.grad.dtype == torch.float32 and bias.grad.tolist() == [3.0] * ROWS


def test_fakes_refuse_what_the_kernels_refuse():
    (arguments, _), _ = weight4(False)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match="depth 63"):
        OPS.linear_4bit(torch.empty(2, 63, device="meta"), *meta)
    with pytest.raises(RuntimeError, match="2 columns"):
        OPS.linear_4bit_grad_input(torch.empty(2, device="meta"), *meta)
    with pytest.raises(ValueError, match="63"):
        OPS.linear_4bit(torch.empty(2, 63), *arguments)


def test_other_devices_get_torchs_own_error():
    op = OPS.quantize_4bit.default
    kinds = {"CPU": True, "CUDA": True, "XPU": False}
    for kind, has in kinds.items():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), kind) == has


def test_every_operator_has_a_fake_and_a_kernel():
    names = {
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("halfbyte::")
    }
    assert names == {
        "quantize_4bit", "dequantize_4bit", "nest_absmax", "linear_4bit", "linear_4bit_grad_input", "quantize_8bit",
        "dequantize_8bit", "quantize_rows_int8", "dequantize_rows_int8", "matmul_int8", "linear_8bit",
        "linear_8bit_grad_input", "grouped_linear_4bit", "grouped_linear_8bit",
        "embedding_4bit",
    }  # fmt: skip
