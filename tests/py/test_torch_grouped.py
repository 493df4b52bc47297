"""`torch.ops.halfbyte.grouped_linear_*`: against one product an expert, with gradients, for every layout."""

import pytest

torch = pytest.importorskip("torch")

from halfbyte.torch import functional as F  # noqa: E402
from halfbyte.torch.nn import Int8Params, Params4bit  # noqa: E402
from halfbyte.torch.nn.experts import grouped_linear, int8_experts  # noqa: E402

OPS = torch.ops.halfbyte
# rows, depth of a matrix: block and nested block of its own; block only; neither
SHAPES = [(128, 128), (24, 64), (5, 30)]
OFFSETS = [[3, 3, 4, 9], [0, 0, 0, 0], [1, 2, 3, 11], [0, 11, 11, 11], [2, 4, 6, 8]]


def stack(shape, seed=0):
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def quantized(weight, kind, nested=False):
    if kind == "int8":
        return int8_experts(weight)
    packed, state = F.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    return Params4bit(packed, quant_state=state, bnb_quantized=True)


def dense(weight):
    if isinstance(weight, Int8Params):
        return weight.data.double() * weight.SCB.double()[..., None] / 127
    return F.dequantize_4bit(weight.data, weight.quant_state).double()


def reference(x, offsets, weight, transposed):
    """(y, bound) in float64: n + 8 float32 roundings of a sum of n products, whatever its order."""
    w = dense(weight)
    w = w if transposed else w.mT
    y = torch.zeros(x.shape[0], w.shape[2], dtype=torch.float64)
    magnitude = torch.zeros_like(y)
    start = 0
    for e, end in enumerate(offsets):
        y[start:end] = x[start:end].double() @ w[e]
        magnitude[start:end] = x[start:end].double().abs() @ w[e].abs()
        start = end
    return y, (x.shape[1] + 8) * 2.0**-24 * magnitude


def inputs(shape, transposed, dtype=torch.float32):
    x = torch.randn(11, shape[0] if transposed else shape[1], generator=torch.Generator().manual_seed(1))
    return x.to(dtype)


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("fp4", True), ("nf4", True), ("int8", False)])
def test_each_row_meets_its_expert(kind, nested, shape, transposed, offsets):
    weight = quantized(stack(shape), kind, nested)
    x = inputs(shape, transposed)
    y = grouped_linear(x, torch.tensor(offsets), weight, transposed, mode="exact")
    expected, bound = reference(x, offsets, weight, transposed)
    assert ((y.double() - expected).abs() <= bound).all()
    assert not y[offsets[-1] :].any()  # nobody's rows
    assert expected[: offsets[-1]].any() or not offsets[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    weight = quantized(stack((24, 64)), "nf4")
    x = inputs((24, 64), False, dtype)
    y = grouped_linear(x, torch.tensor(OFFSETS[0]), weight)
    expected, bound = reference(x, OFFSETS[0], weight, False)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= bound + unit * (expected.abs() + bound)).all()


def test_dynamic_int8_is_the_layer_of_each_expert():
    weight = int8_experts(stack((24, 64)))
    x = inputs((24, 64), False)
    x[4, 3] = 20.0
    y = grouped_linear(x, torch.tensor(OFFSETS[0]), weight, threshold=6.0)
    start = 0
    for e, end in enumerate(OFFSETS[0]):
        alone = OPS.linear_8bit(x[start:end], weight.data[e], weight.SCB[e], None, 6.0, "dynamic")
        assert torch.equal(y[start:end], alone)
        start = end


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradient_is_the_other_direction(kind, transposed):
    shape = (24, 64)
    weight = quantized(stack(shape), kind)
    offsets = torch.tensor(OFFSETS[0])
    x = inputs(shape, transposed).requires_grad_()
    y = grouped_linear(x, offsets, weight, transposed, mode="exact")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    expected, bound = reference(dy, OFFSETS[0], weight, not transposed)
    assert ((dx.double() - expected).abs() <= bound).all()
    assert torch.equal(dx, grouped_linear(dy, offsets, weight, not transposed, mode="exact"))


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck_4bit(nested):
    weight = quantized(stack((128, 128)), "nf4", nested)
    state = weight.quant_state
    x = inputs((128, 128), False).requires_grad_()
    arguments = (x, torch.tensor(OFFSETS[0]), weight.data, state.absmax, "nf4", 64, list(state.shape))
    extra = F.nested_tensors(state) if nested else ()
    torch.library.opcheck(OPS.grouped_linear_4bit.default, (*arguments, False, "float32", *extra))


def test_opcheck_8bit():
    weight = int8_experts(stack((24, 64)))
    x = inputs((24, 64), False).requires_grad_()
    arguments = (x, torch.tensor(OFFSETS[0]), weight.data, weight.SCB, False, 0.0, "exact")
    torch.library.opcheck(OPS.grouped_linear_8bit.default, arguments)


def test_refuses_what_does_not_fit():
    weight = quantized(stack((24, 64)), "nf4")
    x = inputs((24, 64), False)
    with pytest.raises(ValueError, match="offsets must have 4 entries, got 3"):
        grouped_linear(x, torch.tensor([1, 2, 3]), weight)
    for wrong in ([2, 1, 3, 4], [0, 0, 0, 12], [-1, 0, 0, 0]):
        with pytest.raises(ValueError, match="offsets must ascend from 0 to at most 11"):
            grouped_linear(x, torch.tensor(wrong), weight)
    with pytest.raises(RuntimeError, match="x has depth 64, weight has 24"):
        grouped_linear(x, torch.tensor(OFFSETS[0]), weight, transposed=True)
    with pytest.raises(RuntimeError, match="x must have 2 dimensions, got 3"):
        grouped_linear(x[None], torch.tensor(OFFSETS[0]), weight)
    packed, state = F.quantize_4bit(torch.randn(8, 64))
    with pytest.raises(RuntimeError, match="shape must have 3 dimensions, got 2"):
        OPS.grouped_linear_4bit(x, torch.tensor([1]), packed, state.absmax, "fp4", 64, [8, 64])
