"""use_fused_kernels on whole models of transformers: what changes, that tokens stay, PEFT, saving, compiling."""

import collections
import copy
import pickle

import pytest
import torch
import transformers

from halfbyte import _C
from halfbyte.torch.nn import fused, fused_attention, use_fused_kernels

SMALL = dict(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
IDS = torch.arange(2 * 9).view(2, 9) * 7 % 100


def count_calls(monkeypatch, *modules):
    """How often each function of _C is called from these modules, from now on."""
    found = collections.Counter()

    class Spy:
        def __getattr__(self, name):
            def function(*arguments):
                found[name] += 1
                return getattr(_C, name)(*arguments)

            return function

    for module in modules:
        monkeypatch.setattr(module, "_C", Spy())
    return found


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch, fused, fused_attention)


def model(family="Llama", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()


def tokens(of, ids=IDS, mask=None, n=12):
    mask = torch.ones_like(ids) if mask is None else mask
    return of.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)


# (norms, attention modules, MLPs) that change.
FAMILIES = [
    ("Llama", {}, (5, 2, 2)),
    ("Mistral", {"sliding_window": 6}, (5, 2, 2)),
    ("Qwen2", {}, (5, 2, 2)),
    ("Qwen3", {"head_dim": 16}, (9, 2, 2)),
    ("Gemma", {"head_dim": 16}, (0, 2, 2)),
    ("Phi3", {"pad_token_id": 0}, (5, 2, 0)),
    ("Olmo2", {}, (0, 2, 2)),
]


@pytest.mark.parametrize("family, settings, changed", FAMILIES, ids=[f[0] for f in FAMILIES])
def test_the_same_tokens(calls, family, settings, changed):
    plain = model(family, **settings)
    ours = copy.deepcopy(plain)
    assert use_fused_kernels(ours) == sum(changed)
    kinds = collections.Counter(type(m).__mro__[1] for m in ours.modules() if isinstance(m, fused._Fused))
    assert tuple(kinds[k] for k in (fused.FusedNorm, fused.FusedAttention, fused.FusedMLP)) == changed
    calls.clear()
    assert torch.equal(tokens(ours), tokens(plain))
    assert calls["rms_norm"] == 12 * changed[0] and calls["gate"] == 12 * changed[2]
    masked = "sliding_window" in settings  # a window shorter than the text: transformers masks
    assert calls["attend"] == (0 if masked else 11 * 2)  # all tokens but the prompt's
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits)
    assert use_fused_kernels(ours, enabled=False) == sum(changed) and not any(
        isinstance(m, fused._Fused) for m in ours.modules()
    )


def test_padded_prompts_eager_attention_and_static_caches(calls):
    plain = model()
    ours = copy.deepcopy(plain)
    use_fused_kernels(ours)
    calls.clear()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    assert torch.equal(tokens(ours, mask=mask), tokens(plain, mask=mask))
    assert not calls["attend"] and calls["rotate"]  # the mask is transformers' affair
    calls.clear()
    for m in (ours, plain):
        m.set_attn_implementation("eager")
    assert torch.equal(tokens(ours), tokens(plain)) and not calls["attend"]
    assert ours.config._attn_implementation == "eager"


def test_training_and_gradients_are_the_originals(calls):
    plain = model().train()
    ours = copy.deepcopy(plain)
    use_fused_kernels(ours)
    calls.clear()
    for m in (plain, ours):
        m(IDS, labels=IDS).loss.backward()
    assert not calls
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_hooks_and_recorded_outputs(calls):
    ours = model()
    use_fused_kernels(ours)
    seen = []
    for layer in ours.model.layers:
        layer.self_attn.register_forward_hook(lambda m, a, y: seen.append("attention"))
        layer.mlp.act_fn.register_forward_hook(lambda m, a, y: seen.append("act"))
        layer.mlp.gate_proj.register_forward_hook(lambda m, a, y: seen.append("gate"))
    with torch.no_grad():
        ours.set_attn_implementation("eager")
        found = ours(IDS[:, :1], output_attentions=True, output_hidden_states=True)
    assert seen.count("attention") == seen.count("act") == seen.count("gate") == 2 and not calls["gate"]
    assert len(found.attentions) == 2 and found.attentions[0] is not None and len(found.hidden_states) == 3


def test_saved_copied_compiled(calls, tmp_path):
    plain = model()
    ours = copy.deepcopy(plain)
    use_fused_kernels(ours)
    plain.save_pretrained(tmp_path / "plain"), ours.save_pretrained(tmp_path / "ours")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    want = tokens(plain)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        calls.clear()
        assert torch.equal(tokens(again), want) and calls["attend"] and calls["rms_norm"]
    calls.clear()
    with torch.no_grad():
        compiled = torch.compile(ours.model, backend="eager")
        torch.testing.assert_close(
            compiled(IDS[:, :1], use_cache=False).last_hidden_state,
            plain.model(IDS[:, :1], use_cache=False).last_hidden_state,
        )
    assert not calls


def test_lora(calls):
    peft = pytest.importorskip("peft")
    ours = model()
    use_fused_kernels(ours)
    targets = ["q_proj", "gate_proj", "down_proj"]
    adapted = peft.get_peft_model(ours, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    calls.clear()
    adapted(IDS, labels=IDS).loss.backward()
    assert not calls["gate"] and not calls["attend"]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                assert parameter.grad is not None
                parameter.normal_(std=0.1)
    adapted.eval()
    want = model()
    want = peft.get_peft_model(
        want, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    ).eval()
    want.load_state_dict(adapted.state_dict())
    assert torch.equal(tokens(adapted), tokens(want)) and calls["gate"] and calls["attend"]


def test_globals_are_read_when_they_are_used(monkeypatch):
    """What somebody puts into transformers' module later counts, but for the two names that are ours."""
    from transformers.models.llama import modeling_llama

    ours = model()
    use_fused_kernels(ours)
    seen = []
    monkeypatch.setattr(modeling_llama, "Callable", seen, raising=False)
    assert fused_attention.attention_forward(modeling_llama.LlamaAttention).__globals__["Callable"] is seen
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__  # untouched
