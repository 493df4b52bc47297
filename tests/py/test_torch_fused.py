"""halfbyte.torch.nn.use_fused_kernels: what is recognised, whose results come out, and who gets the original."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn import functional as F

from halfbyte import _C
from halfbyte.torch import nn
from halfbyte.torch.nn import fused as module

llama = pytest.importorskip("transformers.models.llama.modeling_llama")
Norm = llama.LlamaRMSNorm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions of `_C` that modules have called."""
    found = []

    class Spy:
        def __getattr__(self, name):
            def function(*arguments):
                found.append(name)
                return getattr(_C, name)(*arguments)

            return function

    monkeypatch.setattr(module, "_C", Spy())
    return found


def norm(size=64, dtype=torch.float32, eps=1e-5, seed=0):
    """(torch's, ours) with the same weight."""
    plain = Norm(size, eps)
    with torch.no_grad():
        plain.weight.copy_(1 + 0.3 * torch.randn(size, generator=torch.Generator().manual_seed(seed)))
    ours = copy.deepcopy(plain).to(dtype)
    assert nn.use_fused_kernels(ours) == 1
    return plain.to(dtype), ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 31, 64, 1000, 2048, 5000])
@pytest.mark.parametrize("rows", [(1, 1), (2, 7), (1, 300), ()])
def test_results_are_those_of_transformers(calls, dtype, size, rows):
    plain, ours = norm(size, dtype)
    calls.clear()
    x = 3 * torch.randn(*rows, size).to(dtype)
    with torch.no_grad():
        want, found = plain(x), ours(x)
    assert calls == ["rms_norm"] and found.dtype == want.dtype and found.shape == want.shape
    # torch's float32 sum of n squares has at most n U, half of it after the root; the rest of both is 8 U. A float16
    # or bfloat16 may then fall on the other side of a boundary, once before and once after the weight.
    relative = (size / 2 + 8) * 2.0**-24 + (0 if dtype == torch.float32 else 4 * ROUNDING[dtype])
    least = 2.0**-24 if dtype == torch.float16 else 2.0**-133  # a subnormal step
    assert ((found.double() - want.double()).abs() <= relative * want.double().abs() + least).all()


def test_what_is_recognised():
    def changed(cls, *arguments):
        return nn.use_fused_kernels(cls(*arguments))

    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    assert all(changed(cls, 64) for cls in (Norm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm))
    # 1 + weight; the weight before the rounding; torch's own, which rounds once; and what is no such norm.
    others = (GemmaRMSNorm, Olmo2RMSNorm, torch.nn.RMSNorm, torch.nn.LayerNorm)
    assert not any(changed(cls, 64) for cls in others)
    assert not changed(torch.nn.Linear, 4, 4)


class Odd(Norm):
    """Llama's name and attributes, another result."""

    def __init__(self, change):
        super().__init__(64)
        self.change = change

    def forward(self, hidden_states):
        y = super().forward(hidden_states)
        if self.change == "bias":
            return y + 1e-3
        if self.change == "dtype":
            return y.float() if y.dtype == torch.bfloat16 else y
        if self.change == "eps":
            return self.weight * F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)
        if self.change == "error":
            raise ValueError("not now")
        return y


def test_odd_norms_are_left_alone():
    for change in ("bias", "dtype", "eps", "error"):
        assert nn.use_fused_kernels(Odd(change)) == 0, change
    # The same class with another setting is judged by itself.
    assert nn.use_fused_kernels(torch.nn.ModuleList([Odd("bias"), Odd("none"), Odd("none")])) == 2
    buffered, hooked = Norm(64), Norm(64)
    buffered.register_buffer("mean", torch.zeros(64))
    hooked.forward = lambda x: x  # as accelerate's hooks leave it
    callable_setting = Norm(64)
    callable_setting.after = torch.relu
    assert nn.use_fused_kernels(torch.nn.ModuleList([buffered, hooked, callable_setting])) == 0


def test_on_and_off():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), Norm(64), Norm(64).bfloat16())
    parameters, printed = list(model.parameters()), repr(model)
    assert nn.use_fused_kernels(model) == 2 and nn.use_fused_kernels(model) == 0
    assert isinstance(model[1], Norm) and type(model[1]).__name__ == "FusedLlamaRMSNorm"
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "2.weight"]
    assert nn.use_fused_kernels(model, enabled=False) == 2
    assert type(model[1]) is Norm and repr(model) == printed


def test_random_numbers_are_not_used():
    torch.manual_seed(0)
    nn.use_fused_kernels(Norm(64))
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(0))


def test_copies_and_pickles(calls):
    plain, ours = norm()
    x = torch.randn(3, 64)
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    with torch.no_grad():
        for again in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours)), loaded):
            calls.clear()
            assert type(again) is type(ours)
            torch.testing.assert_close(again(x), plain(x))
            assert calls == ["rms_norm"]


def test_gradients_are_the_originals(calls):
    (plain, ours), (x, z) = norm(), (torch.randn(2, 64, requires_grad=True) for _ in range(2))
    z.data.copy_(x)
    calls.clear()
    plain(x).square().sum().backward()
    ours(z).square().sum().backward()
    assert torch.equal(x.grad, z.grad) and torch.equal(plain.weight.grad, ours.weight.grad) and not calls
    ours.requires_grad_(False)
    assert ours(z).requires_grad and not calls
    assert not ours(z.detach()).requires_grad and calls == [
        "rms_norm"
    ]  # nothing to record: no no_grad needed


def test_hooks_fire(calls):
    _, ours = norm()
    seen = []
    ours.register_forward_hook(lambda m, a, y: seen.append("after"))
    ours.register_forward_pre_hook(lambda m, a: seen.append("before"))
    calls.clear()
    with torch.no_grad():
        ours(torch.randn(1, 64))
    assert seen == ["before", "after"] and calls == ["rms_norm"]


def test_who_gets_the_original(calls):
    plain, ours = norm()
    x = torch.randn(2, 64)
    calls.clear()
    with torch.no_grad():
        assert torch.equal(ours(x.double()), plain(x.double()))
        assert torch.equal(ours(x.bfloat16()), plain(x.bfloat16()))  # two dtypes: float32
        assert torch.equal(ours(hidden_states=x), plain(x))
        assert torch.equal(ours(x.t().contiguous().t()), plain(x))
        assert torch.equal(torch.func.vmap(ours)(x), torch.func.vmap(plain)(x))
        assert copy.deepcopy(ours).to("meta")(x.to("meta")).is_meta
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(x), plain(x))
        with pytest.raises(RuntimeError):
            ours(torch.randn(2, 65))
        traced = torch.jit.trace(ours, x, check_trace=False)
        assert not calls
        assert torch.equal(traced(x), plain(x)) and not calls
        ours(x)
    assert calls == ["rms_norm"]


def test_compiled_and_exported(calls):
    plain, ours = norm()
    x = torch.randn(2, 64)
    calls.clear()
    with torch.no_grad():
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), plain(x))
        assert torch.equal(torch.export.export(ours, (x,)).module()(x), plain(x))
    assert not calls


def test_weights_are_read_anew(calls):
    plain, ours = norm()
    x = torch.randn(1, 64)
    with torch.no_grad():
        for change in (
            lambda m: m.weight.mul_(2),
            lambda m: m.load_state_dict(Norm(64).state_dict()),
            lambda m: setattr(m, "weight", torch.nn.Parameter(torch.linspace(0, 1, 64))),
            lambda m: setattr(m, "variance_epsilon", 1.0),
            lambda m: m.to(torch.bfloat16),
        ):
            change(plain), change(ours)
            torch.testing.assert_close(ours(x.to(ours.weight.dtype)), plain(x.to(plain.weight.dtype)))
    assert calls.count("rms_norm") >= 5
