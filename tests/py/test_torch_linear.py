"""halfbyte.torch.nn.Linear: its product within the bound, and everything else exactly torch's."""

import copy
import io
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from halfbyte import _C
from halfbyte.torch import nn
from halfbyte.torch.nn import linear as module

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FEW = {dtype: _C.linear_dense_rows(str(dtype).removeprefix("torch.")) for dtype in DTYPES}
ours = pytest.mark.skipif(not all(FEW.values()), reason="no measured kernels for this processor")


@pytest.fixture
def calls(monkeypatch):
    """Rows of x of each product that halfbyte has formed."""
    found = []

    class Spy:
        @staticmethod
        def linear_dense_few(x, weight, bias):
            y = _C.linear_dense_few(x, weight, bias)
            if y is not None:
                found.append(x.numel() // x.shape[-1])
            return y

    monkeypatch.setattr(module, "_C", Spy)
    return found


def layer(dtype=torch.float32, bias=True, depth=64, rows=48):
    torch.manual_seed(0)
    return nn.Linear(depth, rows, bias).to(dtype).eval()


def torchs(lin, x):
    return F.linear(x, lin.weight, lin.bias)


@ours
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (2, 3), (8,)])
def test_few_rows_are_ours_and_within_the_bound(calls, dtype, bias, leading):
    lin = layer(dtype, bias)
    x = torch.randn(*leading, 64, dtype=dtype)
    with torch.no_grad():
        y = lin(x)
    assert len(calls) == 1 and (y.dtype, y.shape, y.requires_grad) == (dtype, (*leading, 48), False)
    w = lin.weight.detach().double()
    exact, size = x.double() @ w.T, x.double().abs() @ w.abs().T
    limit = (64 / 8 + 16) * 2.0**-24 * size * (1 + 2.0**-24)
    if bias:
        exact = exact + lin.bias.detach().double()
        limit = limit + 2.0**-24 * exact.abs()
    limit = limit + (exact.abs() + limit) * ROUNDING[dtype] + 2.0**-25 * (dtype == torch.float16)
    assert ((y.double() - exact).abs() <= limit).all()


@ours
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_are_torchs(calls, dtype):
    lin = layer(dtype)
    with torch.no_grad():
        for m in (0, FEW[dtype] + 1, 100):
            x = torch.randn(m, 64, dtype=dtype)
            assert torch.equal(lin(x), torchs(lin, x))
        assert not calls
        lin(torch.randn(FEW[dtype], 64, dtype=dtype))
    assert calls == [FEW[dtype]]


@ours
def test_strided_inputs_and_weights(calls):
    lin = layer()
    wide = torch.randn(48, 100)
    lin.weight = torch.nn.Parameter(wide[:, 20:84])  # contiguous rows of a wider matrix
    x = torch.randn(64, 6).T
    with torch.no_grad():
        torch.testing.assert_close(lin(x), torchs(lin, x))
        torch.testing.assert_close(lin(x[::2]), torchs(lin, x[::2]))
        assert calls == [6, 3]
        lin.weight = torch.nn.Parameter(torch.randn(64, 48).T)  # columns: torch's
        assert torch.equal(lin(x), torchs(lin, x)) and len(calls) == 2


@ours
def test_views_that_are_not_what_is_stored(calls):
    lin = layer()
    x = torch.view_as_complex(torch.randn(3, 64, 2)).conj().imag
    assert x.is_neg()
    with torch.no_grad():
        torch.testing.assert_close(lin(x), torchs(lin, x.clone()))


# ---- when torch's product is used ----------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


class Seen(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), func.__name__]
        return func(*args, **(kwargs or {}))


def of_weight_requiring_grad(lin, x):
    with torch.enable_grad():
        y = lin(x)
        y.sum().backward()
    assert lin.weight.grad is not None and lin.bias.grad is not None
    return y


def of_input_requiring_grad(lin, x):
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y = lin.requires_grad_(False)(x)
        y.sum().backward()
    assert x.grad is not None
    return y


def of_bias_requiring_grad(lin, x):
    lin.weight.requires_grad_(False)
    with torch.enable_grad():
        y = lin(x)
    assert y.requires_grad
    return y


def of_autocast(lin, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lin(x)
        assert torch.equal(y, torchs(lin, x)) and y.dtype == torch.bfloat16
    return torchs(lin, x)


def of_function_mode(lin, x):
    with Seen() as mode:
        y = lin(x)
    assert "linear" in mode.names
    return y


def of_dispatch_mode(lin, x):
    with FlopCounterMode(display=False) as counter:
        y = lin(x)
    assert counter.get_total_flops() > 0
    return y


def of_subclass(lin, x):
    y = lin(x.as_subclass(Subclass))
    assert type(y) is Subclass
    return y.as_subclass(torch.Tensor)


def of_parameter_subclass(lin, x):
    class Mine(torch.nn.Parameter):
        pass

    lin.weight = Mine(lin.weight.data)
    return lin(x)


def of_vmap(lin, x):
    return torch.vmap(lin)(x)


def of_forward_derivative(lin, x):
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(lin(forward_ad.make_dual(x, torch.ones_like(x))))
    assert torch.equal(tangent, F.linear(torch.ones_like(x), lin.weight))
    return y


def of_jvp(lin, x):
    return torch.func.jvp(lin, (x,), (x,))[0]


def of_functional_call(lin, x):
    plain = {n: p.detach() for n, p in lin.named_parameters()}  # tensors in the place of parameters
    return torch.func.functional_call(lin, plain, (x,))


def of_parametrization(lin, x):
    torch.nn.utils.parametrizations.weight_norm(lin)
    return lin(x)


def of_symbolic_trace(lin, x):
    return torch.fx.symbolic_trace(lin)(x)


def of_export(lin, x):
    program = torch.export.export(lin, (x,))
    assert "linear" in str(program.graph)
    return program.module()(x)


def of_compile(lin, x):
    return torch.compile(lin, backend="eager", fullgraph=True)(x)


def of_script(lin, x):
    return torch.jit.script(lin)(x)


def of_trace(lin, x):
    traced = torch.jit.trace(lin, x, check_trace=False)
    assert "linear" in str(traced.graph)
    return traced(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "way",
    [v for n, v in sorted(globals().items()) if n.startswith("of_")],
    ids=lambda way: way.__name__[3:],
)
def test_torch_has_the_product_when_somebody_watches(calls, way):
    lin, x = layer(), torch.randn(3, 64)
    with torch.no_grad():
        y = way(lin, x)
        assert not calls
        if way is not of_vmap:  # whose product of three is another one
            assert torch.equal(y.detach(), torchs(lin, x))
        torch.testing.assert_close(y.detach(), torchs(lin, x))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 64, dtype=torch.float64),
        torch.randn(3, 64).to_sparse(),
        torch.nested.nested_tensor([torch.randn(2, 64), torch.randn(1, 64)]),
        torch.randn(3, 64, device="meta"),
    ],
    ids=["float64", "sparse", "nested", "meta"],
)
def test_other_tensors(calls, x):
    lin = layer().to(x.dtype).to(x.device)
    with torch.no_grad():
        y, want = lin(x), torchs(lin, x)
    assert not calls and y.shape == want.shape if not x.is_nested else y.is_nested
    if x.layout is torch.strided and not x.is_nested and not x.is_meta:
        assert torch.equal(y, want)


@pytest.mark.parametrize("x", [torch.randn(3, 63), torch.randn(3, 64).half(), torch.tensor(1.0)], ids=str)
def test_errors_are_torchs(calls, x):
    lin = layer()
    with torch.no_grad():
        with pytest.raises(RuntimeError) as got:
            lin(x)
        with pytest.raises(RuntimeError) as want:
            torchs(lin, x)
    assert str(got.value) == str(want.value) and not calls


@ours
def test_quantized_layers_say_that_they_have_no_forward_derivative():
    for lin in (nn.LinearNF4(64, 48).to("cpu"), nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")):
        x = torch.randn(3, 64)
        with pytest.raises(NotImplementedError, match="expected no tangent"):
            torch.func.jvp(lin, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="expected no tangent"):
            lin(forward_ad.make_dual(x, x))
        with torch.no_grad():
            torch.testing.assert_close(torch.vmap(LinearOf(lin))(x), LinearOf(lin)(x))


class LinearOf:
    def __init__(self, lin):
        self.lin = lin

    def __call__(self, x):
        return self.lin(x)


# ---- a layer like any other ----------------------------------------------------------------------


def test_state_dict_copies_and_pickles():
    lin = layer(torch.bfloat16)
    plain = torch.nn.Linear(64, 48).to(torch.bfloat16)
    plain.load_state_dict(lin.state_dict())
    assert list(lin.state_dict()) == ["weight", "bias"] and repr(lin) == repr(plain)
    stream = io.BytesIO()
    torch.save(lin, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        y = lin(x)
        for again in (copy.deepcopy(lin), copy.copy(lin), pickle.loads(pickle.dumps(lin)), loaded):
            assert type(again) is nn.Linear and torch.equal(again(x), y)


@ours
def test_nothing_is_remembered_between_calls(calls):
    lin, x = layer(), torch.randn(1, 64)
    with torch.no_grad():
        for change in (
            lambda: lin.weight.mul_(2),
            lambda: lin.load_state_dict(torch.nn.Linear(64, 48).state_dict()),
            lambda: setattr(lin, "weight", torch.nn.Parameter(torch.randn(48, 64))),
            lambda: setattr(lin, "bias", None),
            lambda: lin.weight.data.copy_(torch.randn(48, 64)),
        ):
            change()
            torch.testing.assert_close(lin(x), torchs(lin, x))
        assert len(calls) == 5
        lin.to(torch.float64)
        assert torch.equal(lin(x.double()), torchs(lin, x.double())) and len(calls) == 5
        assert lin.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16 and len(calls) == 6
        with torch.inference_mode():
            assert lin(x.bfloat16()).is_inference()


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(48, 64)
        self.middle = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), nn.LinearNF4(64, 64))
        self.head = torch.nn.Linear(64, 48, bias=False)
        self.head.weight = self.embedding.weight
        self.again = self.head
        self.special = torch.nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)

    def forward(self, ids):
        return self.head(self.middle(self.embedding(ids)))


def test_use_dense_kernels(calls):
    model = Tied().eval()
    ids = torch.tensor([3, 1])
    model.middle[2].to("cpu")
    with torch.no_grad():
        before = model(ids)
        assert nn.use_dense_kernels(model) == 2  # the head once, although it has two names
        assert (
            type(model.head) is type(model.middle[0]) is nn.Linear and type(model.middle[2]) is nn.LinearNF4
        )
        assert type(model.special) is torch.nn.modules.linear.NonDynamicallyQuantizableLinear
        assert model.head.weight is model.embedding.weight
        torch.testing.assert_close(model(ids), before)
        assert calls == ([2, 2] if FEW[torch.float32] >= 2 else [])
        assert nn.use_dense_kernels(model) == 0
        copied = copy.deepcopy(model)
        assert copied.head.weight is copied.embedding.weight and type(copied.head) is nn.Linear
        assert nn.use_dense_kernels(model, enabled=False) == 2
        assert type(model.head) is torch.nn.Linear and torch.equal(model(ids), before)
        assert nn.use_dense_kernels(model.head) == 1  # a layer alone


def test_a_layer_whose_forward_was_replaced_is_left_alone():
    lin = torch.nn.Linear(4, 4)
    lin.forward = lambda x: x
    assert nn.use_dense_kernels(lin) == 0 and type(lin) is torch.nn.Linear


def test_gradients_are_torchs():
    model, plain = layer(), torch.nn.Linear(64, 48)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 64)
    for lin in (model, plain):
        lin(x).square().sum().backward()
    assert torch.equal(model.weight.grad, plain.weight.grad) and torch.equal(model.bias.grad, plain.bias.grad)
