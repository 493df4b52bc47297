"""transformers with BitsAndBytesConfig(load_in_8bit=True), as anybody would write it, on halfbyte."""

import copy
import json

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from layer_check import check_layers, weight_8bit  # noqa: E402
from lazy import lazy  # noqa: E402
from tiny_models import load, logits  # noqa: E402

transformers = lazy("transformers")
pytestmark = pytest.mark.stand_in


def config(**changes):
    return transformers.BitsAndBytesConfig(load_in_8bit=True, **changes)


def layers(model):
    import bitsandbytes as bnb

    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)}


@pytest.fixture(scope="module")
def trained(tiny_llama):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config())


def test_replaces_every_linear_but_the_head(trained, tiny_llama):
    import halfbyte.torch.nn as ours

    dense = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    found = layers(trained)
    assert len(found) == 4 * 7
    for name, layer in found.items():
        assert type(layer) is ours.Linear8bitLt and type(layer.weight) is ours.Int8Params
        assert layer.state.threshold == 6.0 and not layer.state.has_fp16_weights
        w = dense.get_submodule(name).weight.double()
        # float16 rounding of the weight, then half a step of its row's grid
        bound = w.abs().amax(1, keepdim=True) * (0.5 / 127 * (1 + 2.0**-10) + 2.0**-10)
        assert ((weight_8bit(layer) - w).abs() <= bound).all()
    assert type(trained.lm_head) is torch.nn.Linear
    assert trained.is_loaded_in_8bit and trained.is_quantized


def test_generates_what_its_logits_say(trained, text):
    out = trained.generate(**text, max_new_tokens=12, do_sample=False)
    ids = text["input_ids"]
    assert out.shape[1] > ids.shape[1]
    for token in out[0, ids.shape[1] :]:
        scores = logits(trained, input_ids=ids)[0, -1].float()
        # rows of x are quantized one by one, so cached and uncached differ by bfloat16 roundings only
        # (which 8-bit steps may amplify): as good as the best, nearly
        assert scores[token] >= scores.max() - 0.25
        ids = torch.cat([ids, token.view(1, 1)], 1)


def test_understands_english(trained, tiny_llama, heldout_text):
    """8 bits cost next to nothing of what the model knows."""
    tokenizer = tiny_models.tokenizer(tiny_llama)
    ids = tokenizer(heldout_text, return_tensors="pt")["input_ids"][:, : 8 * 256].view(8, 256)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    with torch.no_grad():
        change = trained(input_ids=ids, labels=ids).loss - dense(input_ids=ids, labels=ids).loss
    assert change.abs() < 0.01


@pytest.mark.parametrize("after_a_call", [False, True])
def test_save_and_reload(tiny_llama, text, tmp_path, after_a_call):
    """The state moves from the parameter into the layer at the first call; both must be saved alike."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config())
    if after_a_call:
        logits(model, **text)
    model.save_pretrained(tmp_path)
    before = logits(model, **text)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(layers(again)) == len(layers(model))
    assert torch.equal(logits(again, **text), before)
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and any(key.endswith(".SCB") for key in a)
    for key in a:
        assert torch.equal(a[key], b[key]), key
    # transformers 5 cannot undo its own reading of quantized tensors (see test_transformers_4bit.py)
    as_it_is = {"save_original_format": False} if int(transformers.__version__.split(".")[0]) >= 5 else {}
    again.save_pretrained(tmp_path / "second", **as_it_is)
    name = "model.safetensors"
    assert (tmp_path / "second" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_save_in_shards(trained, text, tmp_path):
    trained.save_pretrained(tmp_path, max_shard_size="700KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, **text), logits(trained, **text))


def test_reads_what_halfbyte_quantize_writes(tiny_llama, trained, text, tmp_path):
    import halfbyte

    halfbyte.quantize(tiny_llama, tmp_path / "q", to="int8")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    a, b = model.state_dict(), trained.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert torch.equal(logits(model, **text), logits(trained, **text))


def test_memory_footprint(trained):
    weights = sum(m.in_features * m.out_features for m in layers(trained).values())
    dense = sum(p.numel() * p.element_size() for p in trained.parameters() if type(p) is torch.nn.Parameter)
    buffers = sum(b.numel() * b.element_size() for b in trained.buffers())
    assert trained.get_memory_footprint() == weights + dense + buffers


@pytest.mark.parametrize("after_a_call", [False, True])
def test_dequantize(tiny_llama, text, after_a_call):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config())
    if after_a_call:
        logits(model, **text)
    want = {n: weight_8bit(m) for n, m in layers(model).items()}
    before = logits(copy.deepcopy(model), **text).float()
    model = model.dequantize()
    assert not layers(model)
    for name, w in want.items():
        layer = model.get_submodule(name)
        assert type(layer) is torch.nn.Linear
        # codes * scale / 127 in float32 (1/127 rounded), then to bfloat16 where transformers casts
        torch.testing.assert_close(layer.weight.double(), w, rtol=2.0**-8 + 2.0**-20, atol=0)
    model = model.to(torch.bfloat16)
    assert (logits(model, **text).float() - before).abs().max() < 0.03 * before.abs().max()


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_device_maps(folders, device_map):
    inputs = tiny_models.inputs("llama")
    expected = logits(load(folders["llama"], quantization_config=config()), **inputs)
    model = load(folders["llama"], quantization_config=config(), device_map=device_map)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model, **inputs), expected)


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.5, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_layers_compute_their_definition(folders, threshold, dtype, training):
    model = load(folders["llama-odd"], quantization_config=config(llm_int8_threshold=threshold), dtype=dtype)
    model.train(training)
    assert check_layers(model, lambda: model(**tiny_models.inputs("llama"))) == 14
    if not training:  # one row at a time, which is the other case of the outlier rule
        check_layers(model, lambda: model(**tiny_models.inputs("llama", rows=1, tokens=1)))


def test_skip_modules(folders, tmp_path):
    model = load(folders["llama"], quantization_config=config(llm_int8_skip_modules=["q_proj", "lm_head"]))
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert len(layers(model)) == 12
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    inputs = tiny_models.inputs("llama")
    assert len(layers(again)) == 12
    assert torch.equal(logits(model, **inputs), logits(again, **inputs))


def test_quantizes_the_head_when_told(folders):
    """An empty list of exceptions: everything, the head too."""
    model = load(folders["llama"], quantization_config=config(llm_int8_skip_modules=["nothing"]))
    assert "lm_head" in layers(model)
    check_layers(model, lambda: model(**tiny_models.inputs("llama")))


@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
def test_families(folders, tmp_path, family):
    inputs = tiny_models.inputs(family)
    model = load(folders[family], family, config(), dtype=torch.float32)
    assert layers(model)
    check_layers(model, lambda: model(**inputs))
    before = logits(model, **inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, family, dtype=torch.float32), **inputs), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_training_mode_is_exact(folders, tmp_path, family):
    """The whole model in training mode: as near to float64 with the same weights as torch's float32 is."""
    inputs = tiny_models.inputs(family)
    load(folders[family], family, config(), dtype=torch.float32).save_pretrained(tmp_path)

    def dequantized(dtype):
        model = load(tmp_path, family, dtype=torch.float32)
        exact = {n: weight_8bit(m) for n, m in layers(model).items()}
        plain = model.dequantize().to(dtype)
        for name, w in exact.items():
            plain.get_submodule(name).weight.data = w.to(dtype)
        return logits(plain, **inputs).double()

    model = load(tmp_path, family, dtype=torch.float32)
    for layer in layers(model).values():  # and nothing else, so that dropout stays out
        layer.training = True
    reference = dequantized(torch.float64)
    dense = (dequantized(torch.float32) - reference).abs().max()
    assert (logits(model, **inputs) - reference).abs().max() <= 4 * dense


def test_copies_and_pickles(folders, tmp_path):
    inputs = tiny_models.inputs("llama")
    model = load(folders["llama"], quantization_config=config())
    for _ in range(2):  # before and after the first call
        copied = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        pickled = torch.load(tmp_path / "model.pt", weights_only=False)
        expected = logits(model, **inputs)
        assert torch.equal(logits(copied, **inputs), expected)
        assert torch.equal(logits(pickled, **inputs), expected)
    other = load(tiny_models.save(tmp_path / "other", "llama", seed=5), quantization_config=config())
    assert not torch.equal(logits(other, **inputs), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, **inputs), expected)


def test_activations_beyond_float16_stay_finite(folders):
    """bitsandbytes rounds activations to float16: 1e5 becomes inf there, and NaN behind it."""
    layer = load(folders["llama"], quantization_config=config()).model.layers[0].mlp.up_proj
    x = torch.full((3, 64), 1e5, dtype=torch.bfloat16)
    check_layers(layer, lambda: layer(x))


def test_gradients(folders):
    model = load(folders["llama"], quantization_config=config())
    ids = tiny_models.inputs("llama")["input_ids"]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    for training in (True, False):
        embedded.grad = None
        model.train(training)(inputs_embeds=embedded, labels=ids).loss.backward()
        assert embedded.grad.isfinite().all() and embedded.grad.abs().sum() > 0
