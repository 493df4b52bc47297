"""PEFT on models of HalfbyteConfig: what merges is right, what PEFT cannot merge is refused before a weight changes.

Each case runs in a process of its own, because what PEFT knows is settled when it is imported.
"""

import subprocess
import sys

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="5")

PROGRAM = r"""
import sys
how, bits, folder = sys.argv[1:]
import halfbyte
if how == "stand-in":
    halfbyte.install()
if how == "peft first":
    import peft
import torch, transformers
from halfbyte import HalfbyteConfig

def load():
    settings = HalfbyteConfig("nf4" if bits == "4" else "int8")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)

model = load()
import peft
ids = torch.arange(2, 34)[None]
TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}

def adapted(model, config):
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "lokr" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.02)
    return model

def logits(model):
    with torch.no_grad():
        return model(ids).logits

lora = {"r": 4, "lora_alpha": 4, **TARGETS}
model = adapted(model, peft.LoraConfig(**lora))
before = logits(model)

def refuses(function, names="LoRA"):
    try:
        function()
    except ValueError as error:
        text = str(error)
        assert text.startswith("merge: ") and "q_proj" in text and "halfbyte.install()" in text, text
    else:
        raise AssertionError("a merge that should be refused")

if how == "stand-in":
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.model.layers[0].self_attn.q_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = logits(adapted(dense, peft.LoraConfig(**lora)))
    far = lambda y: ((y - wanted).norm() / wanted.norm()).item()
    assert far(logits(merged)) < 2 * far(before), (far(logits(merged)), far(before))  # quantized twice
else:
    for safe in (False, True):
        refuses(lambda: model.merge_and_unload(safe_merge=safe))
        refuses(lambda: model.merge_adapter(safe_merge=safe))
    assert torch.equal(logits(model), before)  # nothing was merged half-way
    base = logits(model.unload())
    assert not torch.equal(base, before) and torch.equal(base, logits(load()))
# What PEFT has no quantized layer for is refused in any case.
refuses(adapted(load(), peft.LoKrConfig(r=4, **TARGETS)).merge_and_unload)
# Models of others are left alone.
dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
dense = adapted(dense, peft.LoraConfig(**lora))
before = logits(dense)
torch.testing.assert_close(logits(dense.merge_and_unload()), before, rtol=1e-3, atol=1e-3)
"""


@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("how", ["peft first", "peft last", "stand-in"])
def test_merging(how, bits, tiny_llama):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, how, bits, str(tiny_llama)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
