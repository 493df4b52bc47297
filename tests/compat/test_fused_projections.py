"""Fused kernels on models with 4-bit layers: who goes by one call for several layers, and that nobody sees it."""

import contextlib
import copy
import pickle

import pytest
import torch
import transformers
from test_fused_models import IDS, SMALL, count_calls, tokens

from halfbyte.integrations.transformers import HalfbyteConfig
from halfbyte.torch import nn
from halfbyte.torch.nn import fused, fused_attention, fused_projections, use_fused_kernels

TOKENS = 12


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch, fused, fused_attention, fused_projections)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    settings = transformers.LlamaConfig(**SMALL, attention_bias=True)
    transformers.LlamaForCausalLM(settings).save_pretrained(path)
    return path


@pytest.fixture(params=[(torch.float32, False), (torch.bfloat16, True)], ids=["float32", "bfloat16, nested"])
def pair(saved, calls, request):
    """(transformers' forward passes, ours) with the same 4-bit layers."""
    dtype, nested = request.param
    model = transformers.LlamaForCausalLM.from_pretrained(
        saved, dtype=dtype, quantization_config=HalfbyteConfig(double_quant=nested)
    ).eval()
    plain = copy.deepcopy(model)
    use_fused_kernels(plain, enabled=False)
    calls.clear()
    return plain, model


def by_modules(calls):
    """Nothing went by one call for several layers."""
    return not (calls["mlp_4bit"] or calls["qkv_4bit"] or calls["attend_4bit"])


def test_every_token_but_the_prompt(pair, calls):
    plain, ours = pair
    assert torch.equal(tokens(ours, n=TOKENS), tokens(plain, n=TOKENS))
    # Two rows of the prompt have 18 tokens: more than go at once.
    assert calls["mlp_4bit"] == calls["qkv_4bit"] == calls["attend_4bit"] == 2 * (TOKENS - 1)
    assert calls["gate"] == 2 and not calls["attend"]


def test_the_same_bits_as_by_modules(pair, calls, monkeypatch):
    _, ours = pair
    ids = IDS[:, :1]
    with torch.no_grad():
        found = [ours(ids, use_cache=False).logits]
        past = ours(IDS)
        found.append(ours(ids, past_key_values=past.past_key_values).logits)
        assert calls["qkv_4bit"] == calls["attend_4bit"] == 4 and calls["mlp_4bit"] == 4
        calls.clear()
        for module in (fused, fused_projections):
            monkeypatch.setattr(module, "operands", lambda *a: None)
        wanted = [ours(ids, use_cache=False).logits]
        past = ours(IDS)
        wanted.append(ours(ids, past_key_values=past.past_key_values).logits)
        assert by_modules(calls) and calls["attend"] == 4
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "name", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)
def test_hooks_of_a_projection(pair, calls, name):
    plain, ours = pair
    seen = []
    handles = []
    for layer in ours.model.layers:
        part = layer.self_attn if name[0] in "qkvo" else layer.mlp
        handles.append(getattr(part, name).register_forward_hook(lambda m, a, y: seen.append(name)))
    want = tokens(plain, n=4)
    assert torch.equal(tokens(ours, n=4), want) and len(seen) == 8
    (absent, present) = ("qkv_4bit", "mlp_4bit") if name[0] in "qkvo" else ("mlp_4bit", "qkv_4bit")
    assert not calls[absent] and calls[present]
    for handle in handles:
        handle.remove()
    assert torch.equal(tokens(ours, n=4), want) and calls[absent] and len(seen) == 8


@contextlib.contextmanager
def changed(layer, how):
    """A projection that is no plain layer meanwhile."""
    original, handle = type(layer), None
    if how == "forward":  # as accelerate leaves it
        layer.forward = layer.forward
    elif how == "pre-hook":
        handle = layer.register_forward_pre_hook(lambda m, a: None)
    elif how == "subclass":
        layer.__class__ = type("Mine", (original,), {})
    else:
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, y: None)
    yield
    layer.__dict__.pop("forward", None)
    layer.__class__ = original
    if handle is not None:
        handle.remove()


def test_what_else_a_projection_may_be(pair, calls):
    plain, ours = pair
    ids, layer = IDS[:, :1], ours.model.layers[0]

    def logits(of):
        with torch.no_grad():
            return of(ids, use_cache=False).logits

    want = logits(plain)
    for how in ("forward", "pre-hook", "subclass", "global hook"):
        calls.clear()
        with changed(layer.mlp.up_proj, how):
            torch.testing.assert_close(logits(ours), want)
        assert calls["mlp_4bit"] == (0 if how == "global hook" else 1), how  # the other layer's
    calls.clear()
    assert ours(ids, use_cache=False).logits.requires_grad and by_modules(calls)  # norms that can be trained
    layer.self_attn.k_proj = copy.deepcopy(layer.self_attn.v_proj)
    plain.model.layers[0].self_attn.k_proj = plain.model.layers[0].self_attn.v_proj
    torch.testing.assert_close(logits(ours), logits(plain))
    assert calls["qkv_4bit"] == 2  # the new layer is read


def test_calls_that_ask_for_more(pair, calls):
    plain, ours = pair
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    assert torch.equal(tokens(ours, mask=mask, n=4), tokens(plain, mask=mask, n=4))
    assert not calls["qkv_4bit"] and calls["mlp_4bit"]  # a mask
    for settings in ({"cache_implementation": "static"}, {"num_beams": 2}):
        found = ours.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, **settings)
        wanted = plain.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, **settings)
        assert torch.equal(found, wanted)
    calls.clear()
    ids = IDS[:, :1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours(ids, use_cache=False)
    assert by_modules(calls)
    ours.train()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    assert not calls["qkv_4bit"]  # dropout is the original's
    ours.eval()
    for m in (plain, ours):
        m.set_attn_implementation("eager")
    calls.clear()
    with torch.no_grad():
        found = ours(ids, use_cache=False, output_attentions=True)
        wanted = plain(ids, use_cache=False, output_attentions=True)
    assert torch.equal(found.attentions[0], wanted.attentions[0]) and not calls["qkv_4bit"]


def test_a_cache_that_gives_something_else_back(pair, calls):
    """Keys whose rows are strided: q, k and v were one call, attention is transformers' own."""
    _, ours = pair

    class Strided(transformers.DynamicCache):
        def update(self, key, value, *rest, **more):
            key, value = super().update(key, value, *rest, **more)
            return torch.stack([key, -key], -1)[..., 0], value

    class Same(transformers.DynamicCache):
        def update(self, key, value, *rest, **more):
            key, value = super().update(key, value, *rest, **more)
            return key.repeat(1, 1, 2, 1)[:, :, ::2], value

    with torch.no_grad():
        odd = ours(IDS[:, :1], past_key_values=Strided()).logits
        assert calls["qkv_4bit"] == 2 and not calls["attend_4bit"] and not calls["attend"]
        even = ours(IDS[:, :1], past_key_values=Same()).logits
        assert calls["attend_4bit"] == 2
    torch.testing.assert_close(odd, even)


def test_copied_pickled_compiled(pair, calls):
    plain, ours = pair
    want = tokens(plain, n=4)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        calls.clear()
        assert torch.equal(tokens(again, n=4), want) and calls["qkv_4bit"] and calls["mlp_4bit"]
    assert list(ours.state_dict()) == list(plain.state_dict())
    calls.clear()
    ids = IDS[:, :1]
    with torch.no_grad():
        compiled = torch.compile(ours.model, backend="eager")(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(compiled, plain.model(ids, use_cache=False).last_hidden_state)
    assert by_modules(calls)


def test_lora_on_one_projection(pair, calls):
    peft = pytest.importorskip("peft")
    plain, ours = pair
    config = peft.LoraConfig(
        r=4, target_modules=["v_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    torch.manual_seed(1)
    ours = peft.get_peft_model(ours, config).eval()
    plain = peft.get_peft_model(plain, config).eval()
    plain.load_state_dict(ours.state_dict())
    calls.clear()
    assert torch.equal(tokens(ours, n=4), tokens(plain, n=4)) and by_modules(calls)
    ids = IDS[:, :1]
    for of in (ours, plain):
        of(ids).logits.sum().backward()
        of(IDS, labels=IDS).loss.backward()
    pairs = zip(ours.named_parameters(), plain.named_parameters(), strict=True)
    for (name, p), (_, q) in pairs:
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)  # norms that nobody trains are ours


def test_which_attention_modules_project():
    """Those that do more, or something else, between the projections keep their own forward pass."""

    def projects(family, **settings):
        config = getattr(transformers, f"{family}Config")(**SMALL, **settings)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        use_fused_kernels(model)
        return {m.projects for m in model.modules() if isinstance(m, fused.FusedAttention)}

    assert projects("Llama") == projects("Mistral") == projects("Qwen2") == {True}
    assert projects("Qwen3", head_dim=16) == projects("Olmo2") == {False}  # norms of q and k
    assert projects("Phi3", pad_token_id=0) == {False}  # one projection for all three

    class Scaled(transformers.models.llama.modeling_llama.LlamaAttention):
        def forward(self, hidden_states, **more):
            y, weights = super().forward(hidden_states, **more)
            return y * 1.5, weights

    module = Scaled(transformers.LlamaConfig(**SMALL), 0)
    assert not nn.use_fused_kernels(module) or not module.projects
