"""diffusers' and accelerate's own loaders of quantized models, on halfbyte.

Both refuse to begin without a GPU. That check, and the device they choose, are replaced; the rest is theirs.
"""

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from layer_check import check_layers, weight_4bit, weight_8bit  # noqa: E402
from lazy import lazy  # noqa: E402

transformers = lazy("transformers")
accelerate = lazy("accelerate")
pytestmark = pytest.mark.stand_in

both = pytest.mark.parametrize("bits", [4, 8])


def layers(model):
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


# ---- diffusers -----------------------------------------------------------------------------------


@pytest.fixture
def diffusers(monkeypatch):
    module = pytest.importorskip("diffusers")
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        quantizer = getattr(bnb_quantizer, name)
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, map: map or {"": "cpu"})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    return module


def diffusion_config(diffusers, bits):
    if bits == 8:
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    return diffusers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def diffusion_model(diffusers):
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=64,
        caption_channels=32,
        sample_size=8,
        norm_num_groups=4,
        use_additional_conditions=False,
    )


@torch.no_grad()
def diffuse(model):
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 5, 32, generator=generator)
    kwargs = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return model(sample, text, timestep=torch.tensor([7]), **kwargs).sample


@both
def test_diffusers_quantizes_saves_and_reloads(diffusers, tmp_path, bits):
    """The reload calls Params4bit.from_prequantized without a module; the layer finds its state all the same."""
    dense = diffusion_model(diffusers)
    dense.save_pretrained(tmp_path / "dense")
    load = diffusers.PixArtTransformer2DModel.from_pretrained
    kwargs = {"torch_dtype": torch.float32}
    model = load(tmp_path / "dense", quantization_config=diffusion_config(diffusers, bits), **kwargs)
    found = layers(model)
    assert len(found) > 20
    w = dense.get_submodule(next(iter(found))).weight.double()
    layer = found[next(iter(found))]
    got = weight_4bit(layer.weight.quant_state, layer.weight) if bits == 4 else weight_8bit(layer)
    assert (got - w).norm() < (0.12 if bits == 4 else 0.01) * w.norm()
    assert check_layers(model, lambda: diffuse(model)) >= len(found) // 2
    before = diffuse(model)
    original = diffuse(dense)
    assert (before - original).norm() < (0.5 if bits == 4 else 0.1) * original.norm()
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized", **kwargs)
    assert len(layers(again)) == len(found)
    assert torch.equal(diffuse(again), before)
    assert again.get_memory_footprint() < 0.75 * dense.get_memory_footprint()


@both
def test_diffusers_dequantizes(diffusers, tmp_path, bits):
    diffusion_model(diffusers).save_pretrained(tmp_path)
    model = diffusers.PixArtTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=diffusion_config(diffusers, bits), torch_dtype=torch.float32
    )
    before = diffuse(model)
    model = model.dequantize()
    assert not layers(model)
    # 4 bits: the same weights, another summation; 8 bits: the activations are no longer rounded
    tolerance = 1e-4 if bits == 4 else 0.1
    assert (diffuse(model).to(before.dtype) - before).norm() < tolerance * before.norm()


def test_from_prequantized_without_a_module():
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    saved = layer.state_dict()
    with torch.device("meta"):
        other = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = saved.pop("weight")
    other._parameters["weight"] = bnb.nn.Params4bit.from_prequantized(
        data=weight, quantized_stats=saved, requires_grad=False, device="cpu"
    )
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(x), layer(x))


# ---- accelerate ----------------------------------------------------------------------------------


def accelerate_config(bits):
    from accelerate.utils import BnbQuantizationConfig

    if bits == 8:
        return BnbQuantizationConfig(load_in_8bit=True, torch_dtype=torch.float32)
    return BnbQuantizationConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        torch_dtype=torch.float32,
    )


def check_accelerate(model, bits):
    assert len(layers(model)) == 14
    assert type(model.lm_head) is torch.nn.Linear
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (bits == 4, bits == 8)
    model.eval()
    check_layers(model, lambda: model(**tiny_models.inputs("llama")))
    for name, layer in layers(model).items():
        w = tiny_models.make("llama").get_submodule(name).weight.double()
        got = weight_4bit(layer.weight.quant_state, layer.weight) if bits == 4 else weight_8bit(layer)
        assert (got - w).norm() < (0.12 if bits == 4 else 0.01) * w.norm(), name


@both
def test_accelerate_quantizes_a_loaded_model(bits):
    """It replaces the layers and then moves the model; without a GPU it stops in between, and we move it."""
    from accelerate.utils import load_and_quantize_model

    model = tiny_models.make("llama")
    with pytest.raises(RuntimeError, match="No GPU"):
        load_and_quantize_model(model, accelerate_config(bits))
    check_accelerate(model.to("cpu"), bits)


def test_accelerate_loads_into_an_empty_model(tmp_path):
    """Weights from files into meta parameters. (Its int8 branch goes through `.to(0)`, a GPU, always.)"""
    from accelerate import init_empty_weights, load_checkpoint_in_model
    from accelerate.utils import load_and_quantize_model
    from accelerate.utils.bnb import replace_with_bnb_layers

    tiny_models.save(tmp_path, "llama", torch.float32)
    with init_empty_weights():
        empty = tiny_models.FAMILIES["llama"]()
    config, devices = accelerate_config(4), {"": "cpu"}
    with pytest.raises(ValueError, match="on the CPU"):  # it refuses; so, what it calls next:
        load_and_quantize_model(empty, config, weights_location=str(tmp_path), device_map=devices)
    with init_empty_weights():
        model = replace_with_bnb_layers(tiny_models.FAMILIES["llama"](), config, ["lm_head"])
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = True, False
    load_checkpoint_in_model(model, str(tmp_path), device_map=devices, dtype=torch.float32)
    for module in model.modules():  # the table of rotations, which no file holds
        if hasattr(module, "original_inv_freq"):
            module.__init__(model.config)
    check_accelerate(model, 4)


def test_accelerate_sets_a_parameter():
    """set_module_tensor_to_device rebuilds the parameter from its `__dict__`. (Its int8 branch needs a GPU.)"""
    import bitsandbytes as bnb
    from accelerate.utils import set_module_tensor_to_device

    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    set_module_tensor_to_device(layer, "weight", "cpu", value=weight)
    check_layers(layer, lambda: layer(torch.randn(3, 64, generator=generator)))
    w = weight_4bit(layer.weight.quant_state, layer.weight)
    assert (w - weight).norm() < 0.12 * weight.norm()
