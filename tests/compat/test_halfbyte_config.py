"""`HalfbyteConfig`: halfbyte as transformers' own quantizer, without `halfbyte.install()` and without bitsandbytes.

What is saved is read by the real bitsandbytes in a process of its own, where the layout allows it.
"""

import copy
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

import tiny_models  # noqa: E402

import halfbyte  # noqa: E402
from halfbyte import _C, HalfbyteConfig  # noqa: E402
from halfbyte.integrations.transformers import native_config  # noqa: E402
from halfbyte.torch import functional as F  # noqa: E402
from halfbyte.torch.nn import Int8Params, Linear, Linear4bit, Linear8bitLt, Params4bit  # noqa: E402
from halfbyte.torch.nn import linear as linear_module  # noqa: E402
from halfbyte.torch.nn.experts import QuantizedExperts  # noqa: E402

if os.environ.get("HALFBYTE_STAND_IN"):
    pytest.skip("this process has the stand-in", allow_module_level=True)


def qwen_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, head_dim=16)
    sizes.update(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=6)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts_per_tok=2, max_position_embeddings=64))


def gpt_oss():  # experts [in, out], interleaved gate and up, biases
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=16)
    sizes.update(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return GptOssForCausalLM(GptOssConfig(**sizes, max_position_embeddings=64, sliding_window=16))


def llama4():  # experts that compute in their own way
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=64, intermediate_size_mlp=96, head_dim=16)
    sizes.update(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    return Llama4ForCausalLM(
        Llama4TextConfig(**sizes, interleave_moe_layer_step=1, max_position_embeddings=64)
    )


def wide():
    """Depths that are multiples of every block size used: bitsandbytes' CPU code reads others wrongly."""
    return tiny_models._llama(hidden_size=256, intermediate_size=512, num_attention_heads=8)


def wide_mixture():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    sizes.update(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    return MixtralForCausalLM(MixtralConfig(**sizes, max_position_embeddings=64))


MORE = {"wide": wide, "wide-mixture": wide_mixture}
MIXTURES = {"mixtral": tiny_models._mixtral, "qwen3-moe": qwen_moe, "gpt-oss": gpt_oss, "llama4": llama4}
INPUTS = tiny_models.inputs("llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Dense float32 checkpoints, made at first use: folders[family]."""
    root = tmp_path_factory.mktemp("dense")

    class Folders(dict):
        def __missing__(self, family):
            tiny_models.FAMILIES.setdefault(family, (MIXTURES | MORE).get(family))
            self[family] = tiny_models.save(root / family, family, dtype=torch.float32)
            return self[family]

    yield Folders()
    for family in {*MIXTURES, *MORE} - {"mixtral"}:
        tiny_models.FAMILIES.pop(family, None)


def load(folder, quantization=None, family="llama", **kwargs):
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    return tiny_models.auto_class(family).from_pretrained(folder, **kwargs)


def logits(model, family="llama"):
    with torch.no_grad():
        return model(**tiny_models.inputs(family)).logits


def saved_config(folder):
    return json.loads((Path(folder) / "config.json").read_text())["quantization_config"]


def quantized_parameters(model):
    return {n: p for n, p in model.named_parameters() if type(p) in (Params4bit, Int8Params)}


# ---- settings ------------------------------------------------------------------------------------


def test_importing_halfbyte_imports_neither_torch_nor_transformers():
    code = "import halfbyte, sys; assert 'HalfbyteConfig' in dir(halfbyte); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "transformers", "numpy"} & set(loaded.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "nf5"}, "format must be one of"),
        ({"blocksize": 48}, "blocksize must be one of"),
        ({"scales": "best"}, "scales must be"),
        ({"skip": "lm_head"}, "skip must be a list"),
        ({"compute_dtype": "half"}, None),
        ({"compute_dtype": "bf17"}, "compute_dtype must be"),
        ({"format": "int8", "blocksize": 128}, "blocksize=128 is for nf4 and fp4"),
        ({"format": "int8", "scales": "search"}, "is for nf4 and fp4"),
        ({"load_in_4bit": True}, "unexpected argument 'load_in_4bit'"),
    ],
    ids=str,
)
def test_arguments(arguments, message):
    if message is None:
        HalfbyteConfig(**arguments)
        return
    with pytest.raises((ValueError, TypeError), match=message):
        HalfbyteConfig(**arguments)


def test_survives_json():
    config = HalfbyteConfig("fp4", blocksize=256, double_quant=True, scales="search", skip=["*.q_proj"],
                            compute_dtype=torch.bfloat16, quant_storage="float16")  # fmt: skip
    again = HalfbyteConfig.from_dict(json.loads(config.to_json_string()))
    assert again.settings() == config.settings() and again.compute_dtype == torch.bfloat16
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_the_users_object_is_not_changed(folders):
    config = HalfbyteConfig()
    before = config.to_dict()
    load(folders["llama"], config)
    assert config.to_dict() == before


# ---- what is quantized, to what ------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["absmax", "search"])
@pytest.mark.parametrize(("format", "blocksize"), [("nf4", 32), ("nf4", 64), ("fp4", 128), ("nf4", 4096)])
@pytest.mark.parametrize("nested", [False, True])
def test_every_block_size(folders, format, blocksize, nested, scales):
    dense = load(folders["llama"])
    config = HalfbyteConfig(format, blocksize=blocksize, double_quant=nested, scales=scales)
    model = load(folders["llama"], config)
    found = quantized_parameters(model)
    assert len(found) == 14
    for name, parameter in found.items():
        packed, state = F.quantize_4bit(
            dense.get_parameter(name), None, None, blocksize, nested, format, scales=scales
        )
        assert torch.equal(parameter.data, packed) and parameter.quant_state == state
        assert parameter.blocksize == blocksize and not parameter.requires_grad
        module = model.get_submodule(name.removesuffix(".weight"))
        assert type(module) is Linear4bit and module.quant_state is parameter.quant_state
    assert type(model.lm_head) is Linear


def test_int8_is_made_where_the_tensor_is(folders, monkeypatch):
    dense = load(folders["llama"])
    moved = []
    monkeypatch.setattr(Int8Params, "to", lambda self, *a, **k: moved.append(a) or self)
    model = load(folders["llama"], HalfbyteConfig("int8", threshold=3.0))
    assert not moved
    for name, parameter in quantized_parameters(model).items():
        codes, scale, _ = F.int8_vectorwise_quant(dense.get_parameter(name).half())
        assert torch.equal(parameter.data, codes) and torch.equal(parameter.SCB, scale)
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert type(layer) is Linear8bitLt and layer.state.threshold == 3.0
    assert (logits(model) - logits(dense)).abs().max() < 0.1 * logits(dense).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_the_models_dtype(folders, dtype):
    model = load(folders["llama"], HalfbyteConfig(), dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == dtype and layer.weight.quant_state.dtype == dtype
    assert logits(model).dtype == dtype
    other = load(folders["llama"], HalfbyteConfig(compute_dtype="bfloat16"), dtype=dtype)
    assert other.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


def test_skip(folders, tmp_path):
    model = load(
        folders["llama"], HalfbyteConfig(skip=["*.q_proj", "model.layers.1.*", "*.0.mlp.up_proj.weight"])
    )
    left = {"k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    assert {n.split(".")[-2] for n in quantized_parameters(model)} == left
    assert all(".layers.0." in n for n in quantized_parameters(model))
    model.save_pretrained(tmp_path)
    native = load(tmp_path, None, config=native_config(tmp_path))
    assert quantized_parameters(native).keys() == quantized_parameters(model).keys()
    assert torch.equal(logits(native), logits(model))
    with pytest.raises(ValueError, match="'lm_heed' matches no linear layer"):
        load(folders["llama"], HalfbyteConfig(skip=["lm_heed"]))
    with pytest.raises(ValueError, match="no layer that can be quantized"):
        load(folders["llama"], HalfbyteConfig(skip=["*"]))


# ---- families ------------------------------------------------------------------------------------

ALL = ["llama", "llama-tied", "llama-odd", "gpt2", "opt", "t5", *MIXTURES]


@pytest.mark.parametrize("settings", [("nf4", {}), ("nf4", {"double_quant": True, "blocksize": 32}), ("int8", {})],
                         ids=["nf4", "nf4-dq", "int8"])  # fmt: skip
@pytest.mark.parametrize("family", ALL)
def test_families(folders, tmp_path, family, settings):
    format, more = settings
    config = HalfbyteConfig(format, **more)
    if family == "llama4" and format == "int8":
        config.threshold = 0.0
    model = load(folders[family], config, family).eval()
    before = logits(model, family)
    names = list(quantized_parameters(model))
    model.save_pretrained(tmp_path)
    mixture = family in MIXTURES and not (family == "llama4" and format == "int8")
    assert saved_config(tmp_path)["quant_method"] == ("halfbyte" if mixture else "bitsandbytes")
    assert model.hf_quantizer.quantization_config.readable_by_bitsandbytes == (not mixture)

    again = load(tmp_path, None, family, config=native_config(tmp_path))
    assert list(quantized_parameters(again)) == names
    assert torch.equal(logits(again, family), before)
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()

    # As exact as torch's own float32 on the same weights, a few times over; int8 rounds activations, too.
    again.dequantize()
    if family in MIXTURES and hasattr(again, "set_experts_implementation"):
        again.set_experts_implementation("eager")  # the one that takes float64
    assert not quantized_parameters(again) and not hasattr(again, "hf_quantizer")
    assert not any(
        isinstance(m, Linear4bit | Linear8bitLt | QuantizedExperts | Linear) for m in again.modules()
    )
    plain = logits(again, family)
    exact = logits(again.double(), family)
    if format == "nf4":
        assert (before - exact).abs().max() <= 4 * (plain - exact).abs().max() + 1e-6
    else:  # and may choose another expert
        assert (before - exact).norm() < (0.1 if family in MIXTURES else 0.05) * exact.norm()


# ---- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(MIXTURES))
def test_experts_are_quantized(folders, family, tmp_path):
    """Nearly all of a mixture lies in its experts; the bitsandbytes integration leaves them as they are."""
    model = load(folders[family], HalfbyteConfig("nf4"), family)
    stacks = [n for n in model.hf_quantizer.targets if "expert" in n.rsplit(".", 2)[-2] and "shared" not in n]
    assert len(stacks) == 4
    for name in stacks:
        module, parameter = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if family == "llama4":
            assert module.parametrizations[parameter].original.dtype == torch.uint8
            assert getattr(module, parameter).dim() == 3
        else:
            assert isinstance(module, QuantizedExperts)
            assert len(module._parameters[parameter].quant_state.shape) == 3
    dense = load(folders[family], None, family)
    counted = sum(dense.get_parameter(n).numel() for n in model.hf_quantizer.targets)
    assert dense.get_memory_footprint() - model.get_memory_footprint() == counted * 4 - counted // 2
    without = load(folders[family], HalfbyteConfig("nf4", experts=False), family)
    assert without.hf_quantizer.quantization_config.readable_by_bitsandbytes
    assert not any(n in without.hf_quantizer.targets for n in stacks)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_gradients_flow_through_experts(folders, family, format):
    model = load(folders[family], HalfbyteConfig(format), family).train()
    plain = load(folders[family], HalfbyteConfig(format), family).dequantize().train()
    ids = INPUTS["input_ids"]

    def gradient(which):
        embedded = which.get_input_embeddings()(ids).detach().requires_grad_()
        loss = which(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        router = next(
            p for n, p in which.named_parameters() if "router.weight" in n or "mlp.gate.weight" in n
        )
        return loss.detach(), embedded.grad, router.grad

    for a, b in zip(gradient(model), gradient(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_compiles_as_one_graph(folders, family, format):
    model = load(folders[family], HalfbyteConfig(format), family).eval()
    assert model.hf_quantizer.is_compileable
    expected = logits(model, family)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**tiny_models.inputs(family)).logits, expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_mixtures_are_ordinary_modules(folders, tmp_path, format):
    model = load(folders["mixtral"], HalfbyteConfig(format), "mixtral")
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(model.to("cpu")), expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), expected)
    other = load(
        tiny_models.save(tmp_path / "other", "mixtral", torch.float32, seed=5), HalfbyteConfig(format)
    )
    assert not torch.equal(logits(other), expected)
    if format == "nf4":
        assert not any(other.load_state_dict(model.state_dict()))
        assert torch.equal(logits(other), expected)
    out = model.generate(**INPUTS, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 13)


# ---- saving, reading -----------------------------------------------------------------------------

READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
result = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    import bitsandbytes as bnb
    assert "halfbyte" not in sys.modules and "halfbyte" not in bnb.__file__
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, bnb.nn.Linear4bit):
            found[name] = bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
            m.train()  # its kernel for inference refuses a depth that is no multiple of the block size
        elif isinstance(m, bnb.nn.Linear8bitLt):
            found[name] = bnb.functional.int8_vectorwise_dequant(m.weight.data, m.weight.SCB)
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        result[folder] = (found, model(input_ids=ids).logits)
torch.save(result, sys.argv[1])
"""


def test_the_real_bitsandbytes_reads_what_is_saved(folders, tmp_path):
    """Plain transformers and bitsandbytes, in a process that never hears of halfbyte."""
    pytest.importorskip("bitsandbytes")
    cases = {
        "nf4": ("wide", HalfbyteConfig("nf4")),
        "fp4-256-dq": ("wide", HalfbyteConfig("fp4", blocksize=256, double_quant=True)),
        "nf4-32-search": ("llama-tied", HalfbyteConfig("nf4", blocksize=32, scales="search")),
        "skip": ("wide", HalfbyteConfig("nf4", double_quant=True, skip=["*.o_proj"])),
        "bf16-storage": ("wide", HalfbyteConfig("nf4", quant_storage=torch.bfloat16)),
        "gpt2": ("gpt2", HalfbyteConfig("nf4")),
        "int8": ("wide", HalfbyteConfig("int8")),
        "gpt2-int8": ("gpt2", HalfbyteConfig("int8")),
        "mixtral": ("wide-mixture", HalfbyteConfig("nf4", experts=False)),
    }
    models = {}
    for name, (family, config) in cases.items():
        models[name] = load(folders[family], config, family)
        models[name].save_pretrained(tmp_path / name)
    out = tmp_path / "out.pt"
    done = subprocess.run(
        [sys.executable, "-c", READ, str(out), *(str(tmp_path / name) for name in cases)],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(out, weights_only=False)
    ids = torch.arange(2, 14)[None]
    for name, model in models.items():
        found, theirs = result[str(tmp_path / name)]
        with torch.no_grad():
            mine = model.eval()(input_ids=ids).logits
        targets = {n.removesuffix(".weight") for n in model.hf_quantizer.targets}
        assert found.keys() == targets, name
        for layer, weight in found.items():
            own = model.get_parameter(f"{layer}.weight")
            if isinstance(own, Params4bit):
                # one rounding of a product of float32 where bitsandbytes may round another way
                torch.testing.assert_close(
                    weight, F.dequantize_4bit(own.data, own.quant_state), rtol=2.0**-22, atol=0
                )
            else:
                scale = model.get_submodule(layer).state.SCB if own.SCB is None else own.SCB
                torch.testing.assert_close(
                    weight, F.int8_vectorwise_dequant(own.data, scale), rtol=2.0**-22, atol=0
                )
        # bitsandbytes multiplies in bfloat16 where the CPU has instructions for it, and int8 passes float16
        assert (mine - theirs).norm() < 0.03 * theirs.norm(), name


def test_reads_what_bitsandbytes_configs_describe(folders, tmp_path):
    """What `halfbyte quantize` wrote speaks of bitsandbytes only; halfbyte.load needs neither it nor install()."""
    source = tiny_models.save(tmp_path / "source", "llama", torch.bfloat16)
    halfbyte.quantize(source, tmp_path / "q", to="nf4", blocksize=128, double_quant=True)
    model = halfbyte.load(tmp_path / "q", HalfbyteConfig())
    assert not any("halfbyte" in (getattr(f, "__module__", "") or "") for f in map(type, sys.meta_path))
    assert len(quantized_parameters(model)) == 14
    fly = load(source, HalfbyteConfig("nf4", blocksize=128, double_quant=True))
    for name, parameter in quantized_parameters(fly).items():
        assert torch.equal(model.get_parameter(name).data, parameter.data)
        assert model.get_parameter(name).quant_state == parameter.quant_state
    assert torch.equal(logits(model), logits(fly))


def test_load(folders, tmp_path):
    model = halfbyte.load(folders["mixtral"], HalfbyteConfig("nf4"))
    assert model.hf_quantizer.quantization_config.quant_method == "halfbyte"
    model.save_pretrained(tmp_path)
    again = halfbyte.load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="must be None"):
        halfbyte.load(tmp_path, "nf4")


def test_shards(folders, tmp_path):
    model = load(folders["mixtral"], HalfbyteConfig("nf4", double_quant=True))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("lost", ["experts.down_proj.absmax", "experts.gate_up_proj", "q_proj.weight.absmax"])
def test_a_truncated_checkpoint_is_an_error(folders, tmp_path, lost):
    from safetensors.torch import load_file, save_file

    load(folders["mixtral"], HalfbyteConfig("nf4")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(k for k in tensors if k.endswith(lost))]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match=r"lacks|conver"):
        load(tmp_path)


def test_disk_offload_is_refused(folders):
    with pytest.raises(ValueError, match="offloaded to the disk"):
        load(folders["llama"], HalfbyteConfig(), device_map={"model": "cpu", "lm_head": "disk"})


# ---- training ------------------------------------------------------------------------------------


def test_adapters_learn(folders, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(folders["mixtral"], HalfbyteConfig("nf4"))
    assert model.hf_quantizer.is_trainable
    torch.manual_seed(0)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    dataset = [{"input_ids": row, "labels": row} for row in tiny_models.inputs("llama", rows=8)["input_ids"]]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3


# ---- what stays dense ----------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch):
    """Shapes of the weights that halfbyte's dense kernels have multiplied."""
    found = []
    real = linear_module._C.linear_dense_few

    def few(x, weight, bias):
        y = real(x, weight, bias)
        if y is not None:
            found.append(tuple(weight.shape))
        return y

    monkeypatch.setattr(linear_module, "_C", types.SimpleNamespace(linear_dense_few=few))
    return found


def greedy(model, prompt):
    ids = torch.tensor([prompt])
    settings = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()


def test_the_head_uses_our_kernels_and_generates_what_torch_does(tiny_llama, products):
    ours = load(tiny_llama, HalfbyteConfig(), dtype=torch.float32).eval()
    torchs = load(tiny_llama, HalfbyteConfig(dense_kernels=False), dtype=torch.float32).eval()
    assert type(ours.lm_head) is Linear and type(torchs.lm_head) is torch.nn.Linear
    for prompt in ([1, 50, 7], list(range(5, 30))):
        found = greedy(ours, prompt)
        heads = products.count(tuple(ours.lm_head.weight.shape))
        # The prompt asks for the logits of one row, too.
        assert heads == (24 if _C.linear_dense_rows("float32") else 0)
        products.clear()
        assert found == greedy(torchs, prompt) and not products


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_dense_kernels_leave_no_trace_in_what_is_saved(folders, tmp_path, family):
    ours = load(folders[family], HalfbyteConfig())
    plain = load(folders[family], HalfbyteConfig(dense_kernels=False))
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == (family == "llama-tied")
    for model, name in ((ours, "ours"), (plain, "plain")):
        model.save_pretrained(tmp_path / name)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    again = load(tmp_path / "ours", None, config=native_config(tmp_path / "ours"))
    assert type(again.lm_head) is Linear
    again.dequantize()
    assert type(again.lm_head) is torch.nn.Linear
    assert halfbyte.torch.nn.use_dense_kernels(again) == 15  # the layers, and the head


def test_lora_on_a_head_with_our_kernels(folders, products):
    peft = pytest.importorskip("peft")
    model = load(folders["llama"], HalfbyteConfig())
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    head = adapted.base_model.model.lm_head
    assert type(head).__name__ == "Linear" and type(head.base_layer) is Linear
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    assert head.lora_A["default"].weight.grad is not None and not products
    adapted.eval()
    with torch.no_grad():
        before = adapted(**INPUTS).logits
        one = adapted(INPUTS["input_ids"][:1, :3]).logits
    assert bool(products) == bool(_C.linear_dense_rows("float32"))
    assert torch.allclose(one, before[:1, :3], atol=1e-4)
    merged = adapted.merge_and_unload()
    assert type(merged.lm_head) is Linear
    assert torch.allclose(logits(merged)[:1, :3], one, atol=0.1 * one.abs().max().item())


def test_halfbyte_load_does_as_the_configuration_says(folders):
    assert type(halfbyte.load(folders["llama"], HalfbyteConfig()).lm_head) is Linear
    left = halfbyte.load(folders["llama"], HalfbyteConfig(dense_kernels=False))
    assert type(left.lm_head) is torch.nn.Linear
