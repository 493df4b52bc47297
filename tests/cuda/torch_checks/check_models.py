"""Whole models of transformers on CUDA tensors: load, compare with the CPU, save, train adapters."""

from __future__ import annotations

import halfbyte

halfbyte.install()

import pytest  # noqa: E402
import torch  # noqa: E402
from torch_side import CUDA  # noqa: E402

transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402

from halfbyte.torch.nn import Linear4bit, Linear8bitLt  # noqa: E402

CONFIGS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": dict(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_models.save(path, "llama", torch.float32)
    return path


def load(folder, kind, device):
    config = transformers.BitsAndBytesConfig(**CONFIGS[kind])
    return tiny_models.load(folder, quantization_config=config, device_map={"": device}, dtype=torch.float32)


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_of_the_cpu(fake, folder, kind):
    cpu, cuda = load(folder, kind, "cpu"), load(folder, kind, "cuda:0")
    layers = [m for m in cuda.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    assert len(layers) == 14 and all(m.weight.device == CUDA for m in layers)
    inputs = tiny_models.inputs("llama", rows=1, tokens=5)
    there = {key: value.to("cuda") for key, value in inputs.items()}
    torch.testing.assert_close(
        cuda(**there).logits.cpu(), cpu(**inputs).logits, rtol=1e-3, atol=1e-3 if kind == "nf4" else 2e-2
    )


def test_saved_and_loaded(fake, folder, tmp_path):
    cuda = load(folder, "nf4", "cuda:0")
    cuda.save_pretrained(tmp_path)
    again = tiny_models.load(tmp_path, device_map={"": "cuda:0"})
    for (name, ours), (_, theirs) in zip(again.state_dict().items(), cuda.state_dict().items(), strict=True):
        assert ours.device == CUDA and torch.equal(ours.cpu(), theirs.cpu()), name


def test_own_quantizer_with_experts(fake, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    tiny_models.save(tmp_path, "mixtral", torch.float32)
    models = [
        tiny_models.load(
            tmp_path, "mixtral", halfbyte.HalfbyteConfig("nf4"), device_map={"": device}, dtype=torch.float32
        )
        for device in ("cpu", "cuda:0")
    ]
    inputs = tiny_models.inputs("mixtral", rows=1, tokens=3)
    there = {key: value.to("cuda") for key, value in inputs.items()}
    torch.testing.assert_close(
        models[1](**there).logits.cpu(), models[0](**inputs).logits, rtol=1e-3, atol=1e-3
    )


def test_qlora(fake, folder, monkeypatch):
    peft = pytest.importorskip("peft")
    from halfbyte.torch.optim import PagedAdamW8bit, base

    monkeypatch.setattr(base, "LEAST_PAGED", 256)
    losses = {}
    inputs = tiny_models.inputs("llama", rows=1, tokens=4)
    for device in ("cpu", "cuda:0"):
        model = peft.prepare_model_for_kbit_training(load(folder, "nf4", device))
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        optimizer = PagedAdamW8bit(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2, min_8bit_size=128
        )
        there = {key: value.to(device) for key, value in inputs.items()}
        losses[device] = []
        for _ in range(2):
            loss = model(**there, labels=there["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[device].append(float(loss.detach()))
    assert losses["cuda:0"][-1] < losses["cuda:0"][0]
    torch.testing.assert_close(losses["cuda:0"], losses["cpu"], rtol=1e-3, atol=1e-3)
