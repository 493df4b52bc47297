"""transformers with BitsAndBytesConfig(load_in_4bit=True), as anybody would write it, on halfbyte."""

import copy
import json

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from layer_check import check_layers, weight_4bit  # noqa: E402
from lazy import lazy  # noqa: E402
from tiny_models import load, logits  # noqa: E402

transformers = lazy("transformers")
pytestmark = pytest.mark.stand_in


def config(**changes):
    """The configuration of every QLoRA tutorial."""
    usual = dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return transformers.BitsAndBytesConfig(**{**usual, **changes})


def layers(model):
    import bitsandbytes as bnb

    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


@pytest.fixture(scope="module")
def trained(tiny_llama):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config())


# ---- load, generate, save, reload ----------------------------------------------------------------


def test_replaces_every_linear_but_the_head(trained):
    import halfbyte.torch.nn as ours

    found = layers(trained)
    assert len(found) == 4 * 7
    for layer in found.values():
        assert type(layer) is ours.Linear4bit and type(layer.weight) is ours.Params4bit
        assert layer.compute_dtype == torch.bfloat16
        state = layer.weight.quant_state
        assert state is layer.quant_state
        assert (state.quant_type, state.nested, state.blocksize, state.dtype) == (
            "nf4",
            True,
            64,
            trained.dtype,  # transformers 4 takes float16 where nothing is said
        )
        assert layer.weight.shape == (layer.in_features * layer.out_features // 2, 1)
        assert not layer.weight.requires_grad
    assert type(trained.lm_head) is torch.nn.Linear
    assert trained.is_loaded_in_4bit and trained.is_quantized


def test_generates_what_its_logits_say(trained, text):
    out = trained.generate(**text, max_new_tokens=12, do_sample=False)
    assert out.shape[1] > text["input_ids"].shape[1]
    ids = text["input_ids"]
    for token in out[0, ids.shape[1] :]:
        scores = logits(trained, input_ids=ids)[0, -1].float()
        # bfloat16 logits tie, and cached and uncached sums differ by roundings: as good as the best
        assert scores[token] >= scores.max() - 0.0625
        ids = torch.cat([ids, token.view(1, 1)], 1)


def test_understands_english(trained, tiny_llama, heldout_text):
    """4 bits must cost little of what the model knows (0.02 nats measured, 0.043 KL; a broken layer costs nats)."""
    tokenizer = tiny_models.tokenizer(tiny_llama)
    ids = tokenizer(heldout_text, return_tensors="pt")["input_ids"][:, : 8 * 256].view(8, 256)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    with torch.no_grad():
        change = trained(input_ids=ids, labels=ids).loss - dense(input_ids=ids, labels=ids).loss
    assert -0.02 < change < 0.08


def test_save_and_reload(trained, text, tmp_path):
    before = logits(trained, **text)
    trained.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (
        saved["load_in_4bit"] and saved["bnb_4bit_quant_type"] == "nf4" and saved["bnb_4bit_use_double_quant"]
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(layers(again)) == len(layers(trained))
    assert torch.equal(logits(again, **text), before)
    a, b = trained.state_dict(), again.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    # And a second generation of the same files. transformers 5 cannot undo its own reading of quantized
    # tensors (Bnb4bitDeserialize has no reverse_op), so it must be told to write what it has.
    as_it_is = {"save_original_format": False} if int(transformers.__version__.split(".")[0]) >= 5 else {}
    again.save_pretrained(tmp_path / "second", **as_it_is)
    name = "model.safetensors"
    assert (tmp_path / "second" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_save_in_shards(trained, text, tmp_path):
    trained.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, **text), logits(trained, **text))


@pytest.mark.parametrize("double_quant", [False, True])
def test_reads_what_halfbyte_quantize_writes(tiny_llama, text, tmp_path, double_quant):
    import halfbyte

    halfbyte.quantize(tiny_llama, tmp_path / "q", to="nf4", double_quant=double_quant)
    # transformers 4 takes float16 where nothing is said
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
    onthefly = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        quantization_config=config(bnb_4bit_use_double_quant=double_quant),
        dtype=torch.bfloat16,
    )
    a, b = model.state_dict(), onthefly.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert torch.equal(logits(model, **text), logits(onthefly, **text))


def test_memory_footprint(trained):
    """get_memory_footprint counts parameters: half a byte a weight, and the dense rest."""
    packed = sum(m.in_features * m.out_features for m in layers(trained).values()) // 2
    dense = sum(p.numel() * p.element_size() for p in trained.parameters() if type(p) is torch.nn.Parameter)
    buffers = sum(b.numel() * b.element_size() for b in trained.buffers())
    assert trained.get_memory_footprint() == packed + dense + buffers
    assert trained.num_parameters() == 2_887_936 or trained.num_parameters() > 2_800_000


def test_dequantize(tiny_llama, text):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config())
    want = {n: weight_4bit(m.weight.quant_state, m.weight) for n, m in layers(model).items()}
    before = logits(model, **text).float()
    model = model.dequantize()
    assert not layers(model)
    modules = dict(model.named_modules())
    for name, w in want.items():
        assert type(modules[name]) is torch.nn.Linear
        # absmax of two float32 roundings, then one rounding to bfloat16
        torch.testing.assert_close(modules[name].weight.double(), w, rtol=2.0**-8 + 2.0**-20, atol=0)
    after = logits(model, **text).float()
    assert (after - before).abs().max() < 0.05 * before.abs().max()
    assert model.generate(**text, max_new_tokens=3, do_sample=False).shape[1] > 3


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}, "balanced"])
def test_device_maps(folders, device_map):
    expected = logits(load(folders["llama"], quantization_config=config()), **tiny_models.inputs("llama"))
    model = load(folders["llama"], quantization_config=config(), device_map=device_map)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model, **tiny_models.inputs("llama")), expected)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_layers_compute_their_definition(folders, compute, dtype, quant_type, nested):
    settings = config(
        bnb_4bit_compute_dtype=compute, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested
    )
    model = load(folders["llama-odd"], quantization_config=settings, dtype=dtype)
    for layer in layers(model).values():
        assert layer.weight.quant_state.dtype == dtype
    assert check_layers(model, lambda: model(**tiny_models.inputs("llama"))) == 14


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_quant_storage(folders, tmp_path, storage):
    inputs = tiny_models.inputs("llama")
    expected = load(folders["llama"], quantization_config=config())
    model = load(folders["llama"], quantization_config=config(bnb_4bit_quant_storage=storage))
    for name, layer in layers(model).items():
        assert layer.weight.dtype == storage
        packed = layer.weight.data.view(torch.uint8).view(-1, 1)
        assert torch.equal(packed, layers(expected)[name].weight.data)
    assert torch.equal(logits(model, **inputs), logits(expected, **inputs))
    if storage not in (torch.uint8, model.dtype) and transformers.__version__ < "5":
        return  # it casts every float tensor of a file to the model's dtype, packed codes too
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert {m.weight.dtype for m in layers(again).values()} == {storage}
    assert torch.equal(logits(again, **inputs), logits(expected, **inputs))


def test_skip_modules(folders, tmp_path):
    settings = config(llm_int8_skip_modules=["q_proj", "lm_head"])
    model = load(folders["llama"], quantization_config=settings)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert len(layers(model)) == 12
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    inputs = tiny_models.inputs("llama")
    assert len(layers(again)) == 12
    assert torch.equal(logits(model, **inputs), logits(again, **inputs))


def test_searched_scales_lose_less(folders):
    """The setting of install(): the same format at the same size, nearer to the weights."""
    import halfbyte

    dense = tiny_models.make("llama").to(torch.bfloat16)

    def loss(model):
        modules = dict(dense.named_modules())
        return sum(
            (weight_4bit(m.weight.quant_state, m.weight) - modules[n].weight.double()).square().sum()
            for n, m in layers(model).items()
        )

    absmax = loss(load(folders["llama"], quantization_config=config()))
    try:
        halfbyte.install(scales="search")
        search = loss(load(folders["llama"], quantization_config=config()))
    finally:
        halfbyte.install(scales="absmax")
    assert search < 0.97 * absmax


# ---- families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
def test_families(folders, tmp_path, family):
    inputs = tiny_models.inputs(family)
    model = load(folders[family], family, config(bnb_4bit_compute_dtype=torch.float32), dtype=torch.float32)
    assert layers(model)
    check_layers(model, lambda: model(**inputs))
    before = logits(model, **inputs)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, family, dtype=torch.float32)
    assert torch.equal(logits(again, **inputs), before)

    # The whole model: beside float64 with the same weights it may be a few times less exact than
    # torch's own float32 (another order of summation), not more.
    def dequantized(dtype):
        copied = load(tmp_path, family, dtype=torch.float32)
        exact = {n: weight_4bit(m.weight.quant_state, m.weight) for n, m in layers(copied).items()}
        plain = copied.dequantize().to(dtype)
        for name, w in exact.items():
            plain.get_submodule(name).weight.data = w.to(dtype)
        return plain

    if family != "mixtral":  # where a rounding may change the choice of experts
        reference = logits(dequantized(torch.float64), **inputs)
        dense = (logits(dequantized(torch.float32), **inputs) - reference).abs().max()
        assert (before - reference).abs().max() <= 4 * dense


def test_gpt2_is_transposed(folders):
    """Conv1D keeps [in, out]; the quantized layer must hold [out, in] of the same numbers."""
    dense = tiny_models.make("gpt2").to(torch.bfloat16)
    model = load(folders["gpt2"], "gpt2", config(), dtype=torch.bfloat16)
    layer = model.transformer.h[0].mlp.c_fc
    assert (layer.out_features, layer.in_features) == (256, 64)
    w = weight_4bit(layer.weight.quant_state, layer.weight)
    original = dense.transformer.h[0].mlp.c_fc.weight.double().T
    assert torch.corrcoef(torch.stack([w.flatten(), original.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "opt"])
def test_heads_tied_or_not(folders, tmp_path, family):
    dense = tiny_models.make(family)
    model = load(folders[family], family, config())
    model.save_pretrained(tmp_path)
    for found in (model, load(tmp_path, family)):
        head, embedding = found.get_output_embeddings(), found.get_input_embeddings()
        assert type(head) is torch.nn.Linear
        tied = head.weight.data_ptr() == embedding.weight.data_ptr()
        assert tied == (family != "llama")
        assert torch.equal(head.weight, dense.get_output_embeddings().weight.bfloat16())


# ---- what else people do with a model ------------------------------------------------------------


def test_copies_and_pickles(folders, tmp_path):
    inputs = tiny_models.inputs("llama")
    model = load(folders["llama"], quantization_config=config())
    expected = logits(model, **inputs)
    assert torch.equal(logits(copy.deepcopy(model), **inputs), expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False), **inputs), expected)
    other = load(tiny_models.save(tmp_path / "other", "llama", seed=5), quantization_config=config())
    assert not torch.equal(logits(other, **inputs), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, **inputs), expected)


def test_to_and_dtype_casts(folders):
    model = load(folders["llama"], quantization_config=config())
    inputs = tiny_models.inputs("llama")
    expected = logits(model, **inputs)
    assert torch.equal(logits(model.to("cpu"), **inputs), expected)
    with pytest.raises(ValueError, match="dtype"):
        model.to(torch.float16)


def test_autocast_and_gradients(folders):
    model = load(folders["llama"], quantization_config=config())
    ids = tiny_models.inputs("llama")["input_ids"]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs_embeds=embedded, labels=ids).loss.backward()
    assert embedded.grad.isfinite().all() and embedded.grad.abs().sum() > 0


def test_missing_keys_are_reported(folders, tmp_path):
    """A truncated checkpoint must not become a silently random model."""
    from safetensors.torch import load_file, save_file

    load(folders["llama"], quantization_config=config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        logits(load(tmp_path), **tiny_models.inputs("llama"))


# ---- dense kernels for what stays dense -----------------------------------------------------------


def test_dense_kernels_generate_what_torch_does(tiny_llama):
    from halfbyte.torch.nn import Linear, use_dense_kernels

    auto = transformers.AutoModelForCausalLM
    quantization = config(bnb_4bit_compute_dtype=torch.float32)
    model = auto.from_pretrained(tiny_llama, quantization_config=quantization, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 50, 7, 23]])
    settings = dict(max_new_tokens=24, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    want = model.generate(ids, **settings)
    assert use_dense_kernels(model) == 1 and type(model.lm_head) is Linear
    assert torch.equal(model.generate(ids, **settings), want)
