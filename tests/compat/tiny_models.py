"""Tiny random models of several families, made on the fly: `save(folder, family)`."""

import torch


def _llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    sizes.update(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def _untied():
    return _llama(tie_word_embeddings=False)


def _tied():
    return _llama(tie_word_embeddings=True)


def _gpt2():  # Conv1D: weights are [in, out]
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4))


def _opt():  # biases, tied
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(vocab_size=128, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4)
    return OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=64))


def _t5():  # encoder and decoder, `wo` kept in float32
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def _mixtral():  # fused experts, which the bitsandbytes integration leaves alone
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    sizes.update(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    return MixtralForCausalLM(MixtralConfig(**sizes, max_position_embeddings=64))


def _odd():  # no size is a multiple of the block, the number of weights is odd in places
    return _llama(
        hidden_size=45, intermediate_size=75, num_attention_heads=3, num_key_value_heads=1, head_dim=6
    )


FAMILIES = {
    "llama": _untied,
    "llama-tied": _tied,
    "llama-odd": _odd,
    "gpt2": _gpt2,
    "opt": _opt,
    "t5": _t5,
    "mixtral": _mixtral,
}


def make(family, seed=0):
    """A random model whose weights are large enough that its logits mean something."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, p.shape[-1] ** -0.5)
            elif p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def save(folder, family, dtype=torch.bfloat16, seed=0, **kwargs):
    model = make(family, seed).to(dtype)
    model.save_pretrained(folder, **kwargs)
    return folder


def tokenizer(folder):
    """The bundled model's tokenizer; its configuration names a class that transformers 4 does not know."""
    from transformers import PreTrainedTokenizerFast

    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}

    return PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", **tokens)


def auto_class(family):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM


def inputs(family, rows=2, tokens=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 128, (rows, tokens), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if family == "t5" else {"input_ids": ids}


def load(folder, family="llama", quantization_config=None, **kwargs):
    """The model in a folder, in evaluation mode, bfloat16 unless asked otherwise."""
    cls = auto_class(family)
    kwargs.setdefault("dtype", torch.bfloat16)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    return cls.from_pretrained(folder, **kwargs).eval()


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits
