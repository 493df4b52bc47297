"""Which weights of a model are quantized: the choice of transformers' bitsandbytes integration, from names.

transformers replaces each module whose type is exactly nn.Linear (or GPT-2's Conv1D), except the output
embedding, whatever is tied to it, the last parameter of the model, and modules that the model keeps in
float32. A checkpoint holds names and shapes, no module types, so the choice is made here by rules over names:

    a 2-D float tensor called `<module>.weight` is a linear layer unless a rule below says what else it is.

The rules were checked against every language-model family of transformers 5.23; tests/compat/
test_checkpoint_layers.py does it again for 37 common ones. For the families in `AGREED` the choice is the
same, and the config leaves `llm_int8_skip_modules` empty, as transformers would. For any other family, and
with the user's own skips, the config names each module that stayed dense, so that a loader cannot choose
differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from halfbyte.errors import CheckpointError
from halfbyte.formats.safetensors import TensorInfo

FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# (what it is, pattern searched in the module's name). The first that matches decides.
_RULES = [
    (label, re.compile(pattern))
    for label, pattern in (
        ("expert", r"(^|\.)(experts|local_experts)\.\d+\."),
        (
            "output embedding",
            r"(^|\.)(lm_head|generator_lm_head|lm_loss|output_projection|embed_out)$"
            r"|(^|\.)lm_head\.(decoder|out_proj)$|(^|\.)predictions\.decoder$|(^|\.)pred_layer\.proj$",
        ),
        ("classification head", r"(^|\.)(score|classifier|qa_outputs|classification_head)(\.|$)"),
        (
            "embedding",
            r"(^|\.)(embed_\w+|\w+_embed|embed|\w+_emb|emb|\w*embeddings?|wte|wpe|shared|\w+_embedder"
            r"|tokens_embed|positions_embed|position_embedding_table|\w+_embeddings_table)$"
            r"|(^|\.)relative_attention_bias(_layer\.bias_values)?$|\.audio_bos_eos_token$",
        ),
        ("router", r"(^|\.)(gate|router)$"),
        ("attention pooling", r"(^|\.)(head\.attention|multihead_attn)\.out_proj$"),
    )
]

# Rules of one family, tried first: (what it is or "linear", pattern of the module name).
_FAMILY_RULES = {
    family: [(label, re.compile(pattern)) for label, pattern in rules]
    for families, *rules in (
        ("t5 mt5 umt5 udop", ("kept in float32", r"DenseReluDense\.wo$")),
        ("deepseek_v32 glm_moe_dsa axk2", ("kept in float32", r"indexer\.weights_proj$")),
        ("blip-2", ("kept in float32", r"(^|\.)qformer\.")),
        ("whisper", ("output embedding", r"^proj_out$")),
        ("rwkv", ("output embedding", r"^head$")),
        ("modernbert-decoder", ("output embedding", r"^decoder$")),
        ("git", ("output embedding", r"^output$")),
        ("ctrl", ("embedding", r"(^|\.)w$")),
        ("falcon", ("a layer of the model's own type", r"(self_attention|mlp)\.\w+$")),
        ("afmoe", ("linear", r"router\.gate$")),
        ("longcat_flash nllb-moe switch_transformers", ("linear", r"router\.classifier$")),
        ("prophetnet", ("linear", r"relative_pos_embeddings$")),
        ("lfm2_vl lfm3_vl molmo2", ("linear", r"patch_embed(ding)?$")),
    )
    for family in families.split()
}

# Families whose linear layers may be Conv1D: stored as [in, out], quantized as the transposed [out, in].
_CONV1D_FAMILIES = frozenset(("gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer"))
_CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)$")

# Families that transformers splits or joins while loading: what is in the file is not what it quantizes.
_RESHAPED = frozenset(
    """
    deepseek_v4 hrm_text minimax_m3_vl minimax_m3_vl_text molmo2 kimi_k25 nemo_speechlm qianfan_ocr
    inkling_mm_model inkling_text ernie4_5_vl_moe step3p7 mistral_large4 unlimited_ocr nomic_bert gte
    """.split()  # noqa: SIM905
)

# Families for which transformers, left alone, makes the same choice.
AGREED = frozenset(
    """
    afmoe apertus arcee aria aria_text audioflamingo3 axk1 axk2 bailing_hybrid bamba bart beam bert
    bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small blip bloom blt
    camembert codegen cohere cohere2 cohere2_moe cohere2_vision cosmos3_omni cpmant ctrl cwm data2vec-text
    deepseek_v2 deepseek_v3 deepseek_v32 deepseek_vl deepseek_vl_hybrid diffllama doge dots3_note
    dots3_note_text electra emu3 ernie ernie4_5 ernie4_5_moe exaone4 exaone4_5 exaone_moe falcon_h1
    falcon_mamba flex_olmo flint florence2 fsmt fuyu gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text
    gemma4_unified gemma4_unified_text git glm glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe
    glm5_next glm_moe_dsa glm_ocr glmasr glmga got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox
    gpt_neox_japanese gpt_oss gptj granite granite_docling granite_speech granite_speech_plus granite_swa
    granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hy_v3 hy_v4 hyperclovax
    hyperclovax_vision_v2 idefics idefics2 idefics3 inkling2_text instructblip instructblipvideo internlm3
    internvl iquestcoder jais2 jamba janus jetmoe kimi_linear kolibri1 kosmos-2 kosmos-2.5 laguna led lfm2
    lfm2_vl lfm3 lfm3_vl lighton_ocr llama llama4 llama4_text llava llava_next llava_next_video
    llava_onevision longcat_flash longt5 m2m_100 mamba mamba2 marian mbart megatron-bert mellum
    mimo_v2_flash minicpm3 minicpm_ocr minicpmv4_6 minicpmv4_7 minimax minimax_m2 ministral3 mistral
    mistral3 mistral4 mixtral mllama modernbert-decoder moshi moss_transcribe_diarize mpt mt5
    musicflamingo mvp nanochat nemotron_h nllb-moe olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt ovis2
    paddleocr_vl paligemma pegasus pegasus_x persimmon phi phi3 phi4_multimodal phimoe pi0 pix2struct
    plbart pp_chart2table pp_formulanet prophetnet qwen2 qwen2_5_omni_thinker qwen2_5_vl qwen2_audio
    qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_asr qwen3_moe
    qwen3_next qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe recurrent_gemma rembert roberta
    roberta-prelayernorm roc_bert roformer rwkv seamless_m4t seamless_m4t_v2 seed_oss shieldgemma2 smollm3
    smolvlm solar_open stablelm starcoder2 switch_transformers t5 t5gemma t5gemma2 trocr udop umt5
    vaultgemma vibevoice_asr video_llama_3 video_llava vipllava voxtral whisper xglm xlm xlm-roberta
    xlm-roberta-xl xlnet xlstm xmod youtu zamba2 zaya
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Choice:
    """What happens to one tensor. `kind` is "linear", "conv1d" or "dense"; `label`: why it stays dense."""

    kind: str
    label: str = ""


@dataclass(frozen=True)
class Selection:
    """The choice for a model.

    Attributes
    ----------
    choices : dict of str to Choice
        One per tensor.
    skip_modules : list of str or None
        For `llm_int8_skip_modules`; None where transformers finds the same by itself.
    notes : list of str
        Sentences for the user.
    """

    choices: dict[str, Choice]
    skip_modules: list[str] | None
    notes: list[str]


def select(tensors: Iterable[TensorInfo], config: dict[str, Any], skip: Sequence[str] = ()) -> Selection:
    """Choose the weights to quantize.

    Parameters
    ----------
    tensors : iterable of TensorInfo
    config : dict
        config.json of the model.
    skip : sequence of str
        Globs over module names that stay dense.

    Raises
    ------
    CheckpointError
        E433 when the family cannot be quantized from its file, E203 when a glob matches nothing.
    """
    family = str(config.get("model_type", ""))
    if family in _RESHAPED:
        raise CheckpointError(
            "E433",
            f"models of the family '{family}' cannot be quantized from their file",
            ["transformers splits or joins their layers while loading"],
            "load it with transformers and a BitsAndBytesConfig, then save_pretrained",
        )
    tensors = list(tensors)
    unused = set(skip)
    choices = {tensor.name: _choose(tensor, family, skip, unused) for tensor in tensors}
    if unused:
        raise CheckpointError(
            "E203",
            f"--skip {sorted(unused)[0]!r} matches no linear layer",
            ["globs are compared with module names, for example 'model.layers.0.*' or '*.down_proj'"],
        )
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    generative = re.search(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel)$", architecture)
    notes = []
    skip_modules = None
    if skip or family not in AGREED or not generative:
        skip_modules = _skip_modules(choices, {t.name for t in tensors if len(t.shape) == 2})
        if family not in AGREED:
            notes.append(
                f"family {ascii(family or 'unknown')[:80]} is not in the checked list: layers were chosen by name"
            )
    experts = sum(t.nbytes for t in tensors if choices[t.name].label == "expert")
    if experts:
        notes.append(
            f"{experts:,} bytes of fused experts stay as they are: bitsandbytes does not quantize them"
        )
    return Selection(choices, skip_modules, notes)


def _choose(tensor: TensorInfo, family: str, skip: Sequence[str], unused: set[str]) -> Choice:
    module, _, leaf = tensor.name.rpartition(".")
    if len(tensor.shape) >= 3 and re.search(r"(^|\.)experts\.", tensor.name):
        return Choice("dense", "expert")
    if leaf != "weight" or len(tensor.shape) != 2:
        return Choice("dense", "not a matrix of weights")
    if tensor.dtype not in FLOAT_DTYPES:
        return Choice("dense", f"dtype {tensor.dtype}")
    for label, pattern in _FAMILY_RULES.get(family, []) + _RULES:
        if pattern.search(module):
            if label == "linear":
                break
            return Choice("dense", label)
    matching = [glob for glob in skip if fnmatchcase(module, glob) or fnmatchcase(tensor.name, glob)]
    unused.difference_update(matching)
    if matching:
        return Choice("dense", "skipped")
    if 0 in tensor.shape:
        return Choice("dense", "empty")
    return Choice("conv1d" if family in _CONV1D_FAMILIES and _CONV1D.search(module) else "linear")


def _skip_modules(choices: dict[str, Choice], matrices: set[str]) -> list[str]:
    names = {"lm_head"}  # not in the file where it is tied to the embedding
    for name, choice in choices.items():
        if choice.kind == "dense" and name in matrices and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            names.add(re.sub(r"(experts)\.\d+\..*", r"\1", module) if choice.label == "expert" else module)
    for name, choice in choices.items():
        if choice.kind != "dense" and skipped_by(name.removesuffix(".weight"), names):
            raise CheckpointError(
                "E433", f"'{name}' cannot be told from a module that stays dense", fix="choose another --skip"
            )
    return sorted(names)


def skipped_by(module: str, patterns: Iterable[str]) -> bool:
    """Whether transformers leaves `module` dense for these `llm_int8_skip_modules`.

    A pattern counts as a regular expression that matches from the start up to a module boundary, or as a
    suffix.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(module.endswith(p) or re.match(rf"(?:{p}){boundary}", module) for p in patterns)
