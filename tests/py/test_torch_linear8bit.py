"""Int8Params, Linear8bitLt, matmul and matmul_4bit (halfbyte.torch): values, state, saving, training."""

import copy
import io
import pickle

import pytest
import torch

from halfbyte.torch import functional as F
from halfbyte.torch import nn
from halfbyte.torch.matmul import MatmulLtState, matmul, matmul_4bit, quantize_int8_weight
from halfbyte.torch.nn.linear8bit import maybe_rearrange_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def layer(rows=24, depth=40, training=False, **kwargs) -> nn.Linear8bitLt:
    torch.manual_seed(0)
    return nn.Linear8bitLt(depth, rows, has_fp16_weights=False, **kwargs).to("cpu").train(training)


def dequantized(lin: nn.Linear8bitLt) -> torch.Tensor:
    scale = lin.state.SCB if lin.weight.SCB is None else lin.weight.SCB
    return F.int8_vectorwise_dequant(lin.weight.data, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("leading", [(1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("grad", [False, True])
def test_inference_is_llm_int8(dtype, bias, threshold, leading, grad):
    """y = int32 product * scales + outlier columns in float32: each within float32 rounding of float64."""
    lin = layer(bias=bias, threshold=threshold)
    x = torch.randn(*leading, 40, dtype=dtype)
    if x.shape[0]:
        x[..., 3] = 7.0
    y = lin(x.requires_grad_(grad))
    assert (y.dtype, y.shape, y.requires_grad) == (dtype, (*leading, 24), grad or bias)
    rows = x.detach().reshape(-1, 40)
    codes, scale, columns = F.int8_vectorwise_quant(rows, threshold=threshold)
    w = dequantized(lin).double()
    exact = (codes.double() * scale.double().unsqueeze(1) / 127) @ w.t()
    size = (codes.double() * scale.double().unsqueeze(1) / 127).abs() @ w.abs().t()
    if threshold:
        exact += rows[:, columns].double() @ w[:, columns].t()
        size += rows[:, columns].double().abs() @ w[:, columns].abs().t()
    if bias:
        exact += lin.bias.double()
        size += lin.bias.double().abs()
    limit = size * 48 * 2.0**-23
    limit += (exact.abs() + limit) * ROUNDING[dtype] + 2.0**-25
    assert ((y.detach().reshape(-1, 24).double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_uses_the_dequantized_weight(dtype):
    lin = layer(training=True, threshold=2.0)
    x = torch.randn(6, 40, dtype=dtype, requires_grad=True)
    y = lin(x)
    w = dequantized(lin).double()
    exact = x.detach().double() @ w.t() + lin.bias.double()
    limit = (x.detach().double().abs() @ w.abs().t() + lin.bias.abs().double()) * 48 * 2.0**-23
    limit = limit + exact.abs() * ROUNDING[dtype] * 1.01
    assert ((y.double() - exact).abs() <= limit).all()
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = dy.double() @ w
    limit = dy.double().abs() @ w.abs() * 32 * 2.0**-23 + exact.abs() * ROUNDING[dtype] * 1.01
    assert dx.dtype == dtype and ((dx.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_overflow_through_float16(dtype):
    lin = layer(bias=False)
    x = torch.full((1, 40), 1e6, dtype=dtype)
    y = lin(x)
    assert y.isfinite().all() and y.abs().max() > 65504
    big = nn.Int8Params(torch.full((2, 4), 1e5), requires_grad=False).to("cpu")
    assert big.SCB.tolist() == [1e5, 1e5] and big.data.eq(127).all()


def test_weight_is_rounded_to_float16_first():
    w = torch.randn(8, 40)
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        codes, scale = quantize_int8_weight(w.to(kind))
        expected = F.int8_vectorwise_quant(w.to(kind).half())
        assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])


def test_state_goes_from_parameter_to_state_at_the_first_call():
    lin = layer()
    assert lin.weight.CB is not None and lin.state.CB is None
    codes, scale = lin.weight.CB, lin.weight.SCB
    lin(torch.randn(1, 40))
    assert lin.weight.CB is None and lin.weight.SCB is None
    assert lin.state.CB is codes and lin.state.SCB is scale
    assert lin.weight.data_ptr() == codes.data_ptr()


@pytest.mark.parametrize("called", [False, True])
def test_moving_a_parent_moves_the_state(called):
    lin = layer()
    if called:
        lin(torch.randn(1, 40))
    parent = torch.nn.Sequential(lin)
    before = parent(torch.ones(1, 40)) if called else None
    parent._apply(lambda t: t.clone())
    assert (lin.state.CB if called else lin.weight.CB).data_ptr() == lin.weight.data_ptr()
    if called:
        assert torch.equal(parent(torch.ones(1, 40)), before)
    parent.half()
    assert lin.weight.dtype == torch.int8


@pytest.mark.parametrize("called", [False, True])
def test_state_dict_round_trip(called):
    lin = layer()
    x = torch.randn(3, 40)
    expected = layer()(x)
    if called:
        lin(x)
    state = lin.state_dict()
    assert sorted(state) == ["SCB", "bias", "weight", "weight_format"]
    assert state["weight_format"].dtype == torch.uint8 and state["weight_format"] == 0
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    for first_call in (False, True):
        new = nn.Linear8bitLt(40, 24, has_fp16_weights=False).to("cpu").eval()
        if first_call:
            new(x)
        assert new.load_state_dict(dict(state)) == ([], [])
        assert torch.equal(new(x), expected)
    with pytest.raises(RuntimeError, match="Loading a quantized checkpoint into non-quantized Linear8bitLt"):
        nn.Linear8bitLt(40, 24, has_fp16_weights=False).load_state_dict(dict(state))


def test_only_row_major_weights_are_read():
    for value in ("row", torch.tensor(0, dtype=torch.uint8), 0):
        state = {"a.weight": 1, "a.weight_format": value}
        maybe_rearrange_weight(state, "a.", {}, True, [], [], [])
        assert state == {"a.weight": 1}
    for value in ("col32", torch.tensor(2, dtype=torch.uint8), 9):
        with pytest.raises(ValueError, match="only row-major"):
            maybe_rearrange_weight({"weight": 1, "weight_format": value}, "", {}, True, [], [], [])


@pytest.mark.parametrize("make", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
@pytest.mark.parametrize("called", [False, True])
def test_copies(make, called):
    lin, x = layer(threshold=6.0), torch.randn(2, 40)
    if called:
        lin(x)
    new = make(lin)
    assert type(new.weight) is nn.Int8Params and new.weight.data_ptr() != lin.weight.data_ptr()
    assert new.state == lin.state
    assert torch.equal(new(x), lin(x))


def test_rebuilding_from_its_dict():
    old = layer().weight
    w = torch.randn(24, 40)
    kwargs = {k: v for k, v in old.__dict__.items() if k != "SCB"}
    kwargs["_is_hf_initialized"] = True
    new = nn.Int8Params(w, requires_grad=False, **kwargs).to("cpu")
    assert (torch.equal(new.data, quantize_int8_weight(w)[0]) and new.CB is new.data) or torch.equal(
        new.CB, new.data
    )
    kept = nn.Int8Params(old.data, requires_grad=False, **old.__dict__).to("cpu")
    assert torch.equal(kept.CB, old.data) and torch.equal(kept.SCB, old.SCB)


def test_not_quantized_yet_is_said():
    with pytest.raises(RuntimeError, match="not quantized yet"):
        nn.Linear8bitLt(40, 24, has_fp16_weights=False)(torch.randn(1, 40))


def test_meta_passes_through():
    lin = nn.Linear8bitLt(40, 24, has_fp16_weights=False, device="meta")
    lin.weight.data = lin.weight.data.to(torch.int8)
    lin.requires_grad_(False)
    assert lin.weight.to("meta").is_meta


@pytest.mark.parametrize("training", [False, True])
def test_float_weights_are_trained_through_the_rounding(training):
    torch.manual_seed(1)
    lin = nn.Linear8bitLt(40, 24, has_fp16_weights=True).to("cpu").train(training)
    assert lin.weight.dtype == torch.float32 and lin.weight.requires_grad
    x = torch.randn(6, 40, requires_grad=True)
    y = lin(x)
    w = F.int8_vectorwise_dequant(*quantize_int8_weight(lin.weight))
    dy = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, lin.weight, lin.bias), dy)
    torch.testing.assert_close(dx, dy @ w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, dy.t() @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(db, dy.sum(0))
    with torch.no_grad():
        before = lin(x)
        lin.weight.mul_(2)
        torch.testing.assert_close(
            lin(x) - lin.bias, 2 * (before - lin.bias)
        )  # the next call sees the new weight


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_to_one_graph(bias, threshold, mode):
    torch.compiler.reset()
    net = torch.nn.Sequential(*[layer(40, bias=bias, threshold=threshold) for _ in range(2)])
    net.train(mode == "train")
    x = torch.randn(5, 40, dtype=torch.float16)
    expected = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    gradients = []
    for function in (net, compiled):
        x = x.detach().requires_grad_()
        function(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_compiles_once_for_all_batches():
    torch.compiler.reset()
    lin = layer(40, threshold=2.0)
    lin(torch.randn(1, lin.in_features))  # the first call settles dtype and state
    compiled = torch.compile(lin, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(3, 5, 40))
        with torch.compiler.set_stance("fail_on_recompile"):
            for shape in ((2, 7, 40), (9, 3, 40)):
                x = torch.randn(shape)
                assert torch.equal(compiled(x), lin(x))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_with_inductor(mode):
    torch.compiler.reset()
    net = torch.nn.Sequential(layer(40, threshold=2.0), torch.nn.ReLU(), layer(40)).train(mode == "train")
    x = torch.randn(3, 40, requires_grad=True)
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(found, expected)


# ---- functions ----


def test_matmul_state():
    state = MatmulLtState()
    state.threshold = 6.0
    state.idx = torch.tensor([1])
    assert state == copy.deepcopy(state) and state != MatmulLtState() and state != 1
    for removed in ("CxB", "CxBt", "formatB", "_tile_indices"):
        with pytest.warns(FutureWarning, match=removed):
            assert getattr(state, removed) is None
        setattr(state, removed, None)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = state.nonsense
    state.CB = state.SCB = torch.ones(1)
    state.reset_grads()
    assert state.CB is None and state.SCB is None


def test_matmul_quantizes_once_and_writes_out():
    torch.manual_seed(2)
    a, b = torch.randn(3, 40), torch.randn(24, 40)
    state = MatmulLtState(has_fp16_weights=False, is_training=False)
    y = matmul(a, b, state=state, threshold=2.0)
    codes = state.CB
    out = torch.empty_like(y)
    assert matmul(a, torch.zeros(0), out=out, state=state) is out
    assert state.CB is codes and state.threshold == 2.0 and torch.equal(out, y)
    torch.testing.assert_close(matmul(a, b), a @ b.t(), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("nested", [False, True])
def test_matmul_4bit(nested):
    torch.manual_seed(3)
    w = torch.randn(24, 64)
    packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    x, bias = torch.randn(2, 3, 64, requires_grad=True), torch.randn(24)
    y = matmul_4bit(x, packed, state, bias=bias)
    assert torch.equal(matmul_4bit(x, packed.t(), state, bias=bias), y)
    out = torch.empty_like(y)
    assert matmul_4bit(x, packed, state, out=out.detach(), bias=bias).data_ptr() == out.data_ptr()
    y.sum().backward()
    torch.testing.assert_close(x.grad[0, 0], F.dequantize_4bit(packed, state).sum(0))
    assert matmul_4bit(torch.empty(0, 64), packed, state).shape == (0, 24)
    z = torch.randn(5, 24, requires_grad=True)
    with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):
        y = matmul_4bit(z, packed, state, bias=torch.ones(64))
    torch.testing.assert_close(y, z @ F.dequantize_4bit(packed, state) + 1)
    y.sum().backward()
    torch.testing.assert_close(z.grad[0], F.dequantize_4bit(packed, state).sum(1))
    with pytest.raises(ValueError, match="quant_state"):
        matmul_4bit(x, packed, None)
    with pytest.raises(ValueError, match="depth 7"):
        matmul_4bit(torch.randn(7), packed, state)
    cube, state3 = F.quantize_4bit(torch.randn(2, 4, 8), quant_type="nf4")
    with pytest.raises(ValueError, match="matrix"):
        matmul_4bit(x, cube, state3)


def test_matmul_4bit_of_rows_cut_out_of_a_weight():
    """As vLLM does: a view of some rows of the packed weight, not at the start of its storage, and its transpose."""
    w, x = torch.randn(48, 64), torch.randn(3, 64)
    packed, state = F.quantize_4bit(w, quant_type="nf4")
    for first, last in ((0, 16), (16, 48), (47, 48)):
        rows = packed[first * 32 : last * 32]
        part = F.QuantState(
            state.absmax[first:last], torch.Size((last - first, 64)), state.code, 64, "nf4", state.dtype
        )
        expected = x @ F.dequantize_4bit(packed, state)[first:last].t()
        for view in (rows, rows.t()):
            assert view.data_ptr() == packed.data_ptr() + first * 32
            torch.testing.assert_close(matmul_4bit(x, view, part), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant):
    from torch.utils.checkpoint import checkpoint

    lin = layer(training=True)
    x = torch.randn(5, 40, requires_grad=True)
    (expected,) = torch.autograd.grad(lin(x).square().sum(), x)
    checkpoint(lin, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)
