"""Params4bit and Linear4bit of halfbyte.torch.nn: values, life of a weight, state dicts, compilation."""

import copy
import io
import logging
import pickle

import pytest
import torch

from halfbyte.torch import functional as F
from halfbyte.torch import nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Unit roundoff of each dtype.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def layer(rows=48, depth=64, **kwargs) -> nn.Linear4bit:
    torch.manual_seed(0)
    return nn.LinearNF4(depth, rows, **kwargs).to("cpu")


def dequantized(lin: nn.Linear4bit) -> torch.Tensor:
    return F.dequantize_4bit(lin.weight.data, lin.weight.quant_state)


def bound(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, dtype: torch.dtype, compute: str
) -> tuple:
    """(exact y in float64, largest allowed error of each element).

    y = sum of depth products: float32 sums err by at most depth * 2^-23 * sum|x w|; bfloat16 operands add
    2 * 2^-8 of each product (x and the codebook entry, each rounded); one rounding to dtype.
    """
    x, w = x.double(), w.double()
    y, size = x @ w.t(), x.abs() @ w.t().abs()
    if b is not None:
        y, size = y + b.double(), size + b.double().abs()
    depth = x.shape[-1] + 2
    limit = size * (depth * 2.0**-23 + (2.0**-7 * 1.01 if compute == "bfloat16" else 0.0))
    return y, limit + (y.abs() + limit) * ROUNDING[dtype] + 2.0**-25


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute_dtype", [None, *DTYPES])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(1,), (5,), (2, 3), (), (0,)])
def test_forward_within_the_derived_bound(dtype, compute_dtype, nested, bias, leading):
    lin = layer(bias=bias, compute_dtype=compute_dtype, compress_statistics=nested)
    x = torch.randn(*leading, 64, dtype=dtype)
    with torch.no_grad():
        y = lin(x)
    assert (y.dtype, y.shape) == (dtype, (*leading, 48))
    effective = compute_dtype or dtype
    compute = "bfloat16" if effective == torch.bfloat16 else "float32"
    exact, limit = bound(x, dequantized(lin), lin.bias, dtype, compute)
    assert ((y.detach().double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_all_ways_through_forward_agree(dtype, nested):
    """Directly to C, by the operator, with gradient, compiled: the same bits."""
    lin = layer(compress_statistics=nested, compute_dtype=dtype)
    x = torch.randn(3, 64, dtype=dtype)
    with torch.no_grad():
        direct = lin(x)
    graded = lin(x.clone().requires_grad_())
    assert graded.requires_grad
    assert torch.equal(direct, graded.detach())
    lin.bias.requires_grad_(False)
    assert not lin(x).requires_grad and torch.equal(lin(x), direct)
    with torch.inference_mode():
        assert torch.equal(lin(x), direct)
    assert torch.equal(F.linear_4bit(x, lin.weight, lin.weight.quant_state, lin.bias), direct)


def test_bias_is_kept_in_the_dtype_of_the_input():
    lin = layer()
    assert lin.bias.dtype == torch.float32
    with torch.no_grad():
        lin(torch.randn(2, 64, dtype=torch.float16))
    assert lin.bias.dtype == torch.float16
    lin(torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True))
    assert lin.bias.dtype == torch.bfloat16


@torch.no_grad()
def test_nothing_is_stale():
    """Every change of the parameters shows in the next call."""
    lin, x = layer(compress_statistics=False), torch.randn(2, 64)
    before = lin(x)

    lin.bias.add_(1)
    torch.testing.assert_close(lin(x), before + 1)
    lin.bias = torch.nn.Parameter(torch.zeros(48))
    assert torch.equal(lin(x), F.linear_4bit(x, lin.weight, lin.weight.quant_state))
    lin.bias = None
    plain = lin(x)

    lin.weight.data.copy_(lin.weight.data.flip(0))  # in place, same storage
    exact, limit = bound(x, dequantized(lin), None, torch.float32, "float32")
    assert ((lin(x) - exact).abs() <= limit).all() and not torch.equal(lin(x), plain)

    packed = lin.weight.data.clone().flip(0)
    lin.weight.data = packed  # another storage
    assert torch.equal(lin(x), plain)
    lin.weight.quant_state.absmax.mul_(2)  # a power of two: the result doubles exactly
    assert torch.equal(lin(x), plain * 2)
    lin.weight.quant_state.absmax = lin.weight.quant_state.absmax / 2
    assert torch.equal(lin(x), plain)

    other = layer(bias=False)
    other.weight = nn.Params4bit(torch.randn(48, 64), quant_type="fp4", blocksize=32).to("cpu")
    lin.weight = other.weight
    assert torch.equal(lin(x), other(x))
    saved = layer(bias=False).state_dict()
    lin.load_state_dict(saved)
    assert torch.equal(lin(x), layer(bias=False)(x))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(nested, storage, assign):
    lin = layer(compress_statistics=nested, quant_storage=storage)
    state = lin.state_dict()
    nested_keys = ["weight.nested_absmax", "weight.nested_quant_map"] if nested else []
    blob = "weight.quant_state.bitsandbytes__nf4"
    assert sorted(state) == sorted(
        ["bias", "weight", "weight.absmax", "weight.quant_map", blob, *nested_keys]
    )
    assert all(type(v) is torch.Tensor for v in state.values())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    x = torch.randn(2, 64)
    for device in ("cpu", "meta"):
        if device == "meta" and not assign:
            continue  # the bias could not be copied into a meta tensor
        new = nn.LinearFP4(64, 48, device=device)
        assert new.load_state_dict(dict(state), assign=assign).missing_keys == []
        assert torch.equal(new(x), lin(x)) and new.weight.quant_state == lin.weight.quant_state
        assert new.quant_state is new.weight.quant_state and new.quant_storage == storage
    with pytest.raises(RuntimeError, match=r"stands for \[48, 64\]"):
        nn.LinearNF4(32, 48).load_state_dict(dict(state))
    del state["weight.absmax"]
    with pytest.raises(ValueError, match="absmax"):
        nn.LinearNF4(64, 48).load_state_dict(dict(state))


def test_float_state_dict_loads_before_quantization():
    source = torch.nn.Linear(64, 48)
    lin = nn.LinearNF4(64, 48)
    lin.load_state_dict(source.state_dict())
    lin.to("cpu")
    packed, _ = F.quantize_4bit(source.weight, quant_type="nf4")
    assert torch.equal(lin.weight.data, packed)


def test_not_quantized_yet_is_said():
    lin = nn.LinearNF4(64, 48)
    for x in (torch.randn(1, 64), torch.randn(1, 64, requires_grad=True)):
        with pytest.raises(RuntimeError, match="not quantized yet"):
            lin(x)


def test_wrong_depth_is_said():
    lin = layer()
    with torch.no_grad(), pytest.raises(ValueError, match="63"):
        lin(torch.randn(2, 63))


def test_repair_after_a_wrapper_replaced_the_parameter():
    lin, x = layer(), torch.randn(2, 64)
    expected = lin(x)
    lin.weight.quant_state = None
    assert torch.equal(lin(x), expected) and lin.weight.quant_state is not None
    lin.weight = torch.nn.Parameter(lin.weight.data, requires_grad=False)
    assert torch.equal(lin(x), expected) and isinstance(lin.weight, nn.Params4bit)


def test_warnings_about_slow_settings(caplog):
    for rows, text in ((1, "slow inference."), (10, "slow inference or training speed.")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            layer()(torch.rand(rows, 64, dtype=torch.float16))
        assert [m for m in caplog.messages if m.endswith(text)]
    caplog.clear()
    layer(compute_dtype=torch.float16)(torch.rand(2, 64, dtype=torch.float16))
    layer()(torch.rand(2, 64))
    assert not caplog.messages


# ---- Params4bit ----


def test_rebuilding_from_its_dict():
    """What transformers, accelerate, PEFT and diffusers do."""
    old = layer().weight
    old.__dict__["_is_hf_initialized"] = True
    w = torch.randn(48, 64)
    kwargs = {**old.__dict__, "bnb_quantized": False}
    new = nn.Params4bit(w, requires_grad=False, **kwargs).to("cpu")
    packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(new.data, packed) and new.quant_state == state
    assert old.module.quant_state is new.quant_state  # the layer is told
    kept = nn.Params4bit(old.data, requires_grad=False, **old.__dict__).to("cpu")
    assert torch.equal(kept.data, old.data) and kept.quant_state == old.quant_state


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies(make):
    lin = layer()
    new = make(lin.weight)
    assert type(new) is nn.Params4bit and new.__dict__.keys() == lin.weight.__dict__.keys()
    assert torch.equal(new.data, lin.weight.data) and new.quant_state == lin.weight.quant_state
    assert (new.quant_state is lin.weight.quant_state) == (make is copy.copy)
    clone = make(lin)
    x = torch.randn(2, 64)
    assert torch.equal(clone(x), lin(x))
    if make is not copy.copy:
        assert clone.weight.module is clone


def test_casts_do_not_touch_the_codes():
    for storage in (torch.uint8, torch.bfloat16, torch.float32):
        lin = layer(quant_storage=storage)
        octets = lin.weight.data.view(torch.uint8).clone()
        for change in (lin.half, lin.bfloat16, lin.float, lin.double, lambda m=lin: m.to(torch.float16)):
            change()
            assert lin.weight.dtype == storage
            assert torch.equal(lin.weight.data.view(torch.uint8), octets)
        assert lin.bias.dtype == torch.float16
        lin.to("cpu")
        assert torch.equal(lin.weight.data.view(torch.uint8), octets)


def test_meta_passes_through():
    lin = nn.LinearNF4(64, 48, device="meta")
    assert lin.weight.is_meta and not lin.weight.bnb_quantized
    assert lin.weight.to("meta").is_meta
    lin.weight.data = lin.weight.data.to(torch.uint8)
    lin.requires_grad_(False)


def test_moving_copies_the_statistics_and_keeps_the_source_whole():
    weight = layer().weight
    moved = weight.to("meta")
    assert moved.is_meta and moved.quant_state.absmax.is_meta and moved.quant_state.state2.absmax.is_meta
    assert not weight.is_meta and not weight.quant_state.absmax.is_meta
    moved.quant_state = weight.quant_state
    moved.follow()  # what a layer does after its parameters were moved
    assert moved.quant_state.absmax.is_meta


def test_chunk_and_split_keep_the_class():
    weight = layer().weight
    pieces = [*torch.chunk(weight, 2), *torch.split(weight, 500), *weight.chunk(3)]
    assert all(type(p) is nn.Params4bit and p.quant_state is weight.quant_state for p in pieces)
    assert type(weight + 0) is torch.Tensor


def test_statistics_under_their_state_dict_names():
    nested, plain = layer().weight, layer(compress_statistics=False).weight
    for key in nested.quant_state.as_dict(packed=True):
        found = nested
        for part in key.split("."):
            found = getattr(found, part)
        assert isinstance(found, torch.Tensor)
    assert nested.nested_blocksize == 256 and nested.nested_dtype == torch.float32
    assert torch.equal(nested.offset, nested.nested_offset) and nested.state2 is nested.quant_state.state2
    for absent in ("offset", "state2", "nested_absmax", "nonsense"):
        with pytest.raises(AttributeError, match=absent):
            getattr(plain, absent)
    with pytest.raises(AttributeError, match="no quant_state"):
        nn.Params4bit(torch.randn(2, 64)).absmax  # noqa: B018


def test_requires_grad_is_off_after_quantization():
    weight = nn.Params4bit(torch.randn(4, 64), requires_grad=True).to("cpu")
    assert not weight.requires_grad


# ---- torch.compile, torch.export, checkpointing ----


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph(nested, dtype):
    torch.compiler.reset()
    net = torch.nn.Sequential(*[layer(64, compress_statistics=nested, compute_dtype=dtype) for _ in range(2)])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(compiled(x), net(x))
    gradients = []
    for function in (net, compiled):
        x = x.detach().requires_grad_()
        function(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    for rows in (1, 5):
        x = torch.randn(rows, 64, dtype=dtype)
        assert torch.equal(compiled(x), net(x))


def test_compiles_once_for_all_batches():
    torch.compiler.reset()
    lin = layer(64)
    lin(torch.randn(1, lin.in_features))  # the first call settles dtype and state
    compiled = torch.compile(lin, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(3, 5, 64))
        with torch.compiler.set_stance("fail_on_recompile"):
            for shape in ((2, 7, 64), (9, 3, 64)):
                x = torch.randn(shape)
                assert torch.equal(compiled(x), lin(x))


def test_checkpointed_and_compiled():
    torch.compiler.reset()
    lin = layer(64)

    def twice(x):
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(lin, x, use_reentrant=False)
        return x

    x = torch.randn(3, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(twice(x).sum(), x)
    (found,) = torch.autograd.grad(torch.compile(twice, fullgraph=True, backend="aot_eager")(x).sum(), x)
    assert torch.equal(found, expected)


def test_exports():
    lin, x = layer(), torch.randn(3, 64)
    program = torch.export.export(lin, (x,))
    assert torch.equal(program.module()(x), lin(x))
    assert "halfbyte.linear_4bit" in program.graph_module.code


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
def test_compiles_with_inductor(nested):
    torch.compiler.reset()
    net = torch.nn.Sequential(layer(64, compress_statistics=nested), torch.nn.ReLU(), layer(64))
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(found, expected)


# ---- gradients without the dispatcher --------------------------------------------------------------------------------


def operator(linear: nn.Linear4bit, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What the layer computes, through `torch.ops`."""
    return F.linear_4bit(x, linear.weight, linear.weight.quant_state, bias, linear._compute(x))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_gradients_have_the_bits_of_the_operator(compute, nested, storage):
    linear = layer(bias=True, compute_dtype=compute, compress_statistics=nested, quant_storage=storage).to(
        "cpu"
    )
    x = torch.randn(3, 5, 64, requires_grad=True)
    for dy in (torch.randn(3, 5, 48), torch.randn(48, 5, 3).transpose(0, 2), torch.ones(1).expand(3, 5, 48)):
        results = []
        for run in (linear, lambda v: operator(linear, v, linear.bias)):
            y = run(x)
            results.append((y, *torch.autograd.grad(y, (x, linear.bias), dy)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_gradient_of_the_gradient():
    linear = layer(bias=False, compute_dtype=torch.float32).to("cpu")
    x = torch.randn(4, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    w = F.dequantize_4bit(linear.weight.data, linear.weight.quant_state).double()
    exact = 2 * torch.ones(4, 64).double() @ w.T @ w
    # Two products of at most 64 terms in float32, each within 80 u of the sum of magnitudes.
    bound = 2 * (torch.ones(4, 64).double() @ w.abs().T @ w.abs()) * 160 * ROUNDING[torch.float32]
    assert ((ddx - exact).abs() <= bound).all()


def test_checkpointed_layers_recompute_the_same_gradient():
    from torch.utils.checkpoint import checkpoint

    linear = layer(bias=False, compute_dtype=torch.bfloat16).to("cpu")
    x = torch.randn(4, 64, requires_grad=True)
    (plain,) = torch.autograd.grad(linear(x.sin()).sum(), x)
    for reentrant in (False, True):
        y = checkpoint(lambda v: linear(v.sin()), x, use_reentrant=reentrant)
        y.sum().backward()
        assert torch.equal(x.grad, plain)
        x.grad = None


def test_a_weight_changed_in_place_before_its_backward_is_noticed():
    linear = layer(bias=False, compute_dtype=torch.float32).to("cpu")
    y = linear(torch.randn(4, 64, requires_grad=True))
    linear.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
