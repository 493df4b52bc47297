"""The tool chooses the layers that transformers' bitsandbytes integration replaces: models made without weights."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402
from transformers.quantizers.base import get_keys_to_not_convert  # noqa: E402

from halfbyte.checkpoint.layers import AGREED, select, skipped_by  # noqa: E402
from halfbyte.formats.safetensors import TensorInfo  # noqa: E402

CAUSAL = """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox gptj gpt_neo opt bloom olmo olmo2
    stablelm starcoder2 cohere cohere2 granite glm glm4 smollm3 codegen mpt falcon exaone4 biogpt xglm
    """.split()  # noqa: SIM905
SEQ2SEQ = "t5 mt5 bart mbart pegasus m2m_100".split()  # noqa: SIM905


def skeleton(family):
    """The model with its own default sizes and few layers, on the meta device."""
    config = AutoConfig.for_model(family)
    for name in (
        "num_hidden_layers",
        "n_layer",
        "num_layers",
        "encoder_layers",
        "decoder_layers",
        "n_layers",
    ):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 2)
    if family == "gpt_neo":
        config.attention_layers = ["global", "local"]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        return (AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForCausalLM).from_config(config)


@pytest.mark.parametrize("family", CAUSAL + SEQ2SEQ)
def test_same_choice_as_transformers(family):
    model = skeleton(family)
    keep = set(get_keys_to_not_convert(model)) | set(model._keep_in_fp32_modules or ())
    replaced = {
        name
        for name, module in model.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D) and not skipped_by(name, keep)
        and not any(part in keep for part in name.split("."))
    }  # fmt: skip
    assert len(replaced) >= 8 or family == "falcon"  # whose layers are of its own class
    tensors = [
        TensorInfo(name, "BF16", tuple(p.shape), 0, 2 * p.numel(), None)
        for name, p in model.named_parameters()  # what is tied has one name, as in a file
    ]
    config = {"model_type": family, "architectures": [type(model).__name__]}
    if not replaced:
        assert all(choice.kind == "dense" for choice in select(tensors, config).choices.values())
        return
    selection = select(tensors, config)
    ours = {n.removesuffix(".weight") for n, choice in selection.choices.items() if choice.kind != "dense"}
    assert ours == replaced
    assert (selection.skip_modules is None) == (family in AGREED)
    if selection.skip_modules is not None:
        assert not any(skipped_by(name, selection.skip_modules) for name in ours)
