"""One side of the exchange of checkpoints: run with "bitsandbytes" it is a user's script and nothing else; run
with "halfbyte" it has one more line at its beginning.

    python checkpoint_side.py bitsandbytes|halfbyte JOBS.json

Each job is {"load": folder, "dump": file, "config": arguments of BitsAndBytesConfig or null, "save": folder or
null, "shard": bytes or null, "via": "transformers" or "halfbyte.load"}. The dump holds, for each quantized
layer, what is in memory and what it stands for:

    P.packed, P.absmax (decoded), P.dequantized         4 bits
    P.codes, P.scale, P.dequantized                     int8
    every other parameter under its own name; "logits" of a few tokens
"""

import json
import sys

side, job_file = sys.argv[1:]
if side == "halfbyte":
    import halfbyte

    halfbyte.install()

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

F = bnb.functional


def four_bit(weight):
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = weight.data.contiguous().view(torch.uint8).reshape(-1)
    if state.shape[1] % state.blocksize:
        # Decoded by the definition: the AVX-512 code of bitsandbytes 0.50 takes the wrong scale where a block
        # goes on in the next row (its GPU code and its generic code do not).
        codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: state.shape.numel()].int()
        scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
        dequantized = (state.code[codes] * scales).to(state.dtype).reshape(state.shape)
    else:
        dequantized = F.dequantize_4bit(weight.data, state)
    return {"packed": packed, "absmax": absmax, "dequantized": dequantized}


def eight_bit(module):
    codes, scale = module.weight.data, module.weight.SCB
    if scale is None:
        codes, scale = module.state.CB, module.state.SCB
    return {"codes": codes, "scale": scale, "dequantized": F.int8_vectorwise_dequant(codes, scale)}


def contents(model):
    tensors, quantized = {}, []
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            parts = four_bit(module.weight)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            parts = eight_bit(module)
        else:
            continue
        quantized.append(f"{name}.weight")
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    tensors |= {n: p.data for n, p in model.named_parameters() if n not in quantized}
    # In training mode (nothing here differs in it but this): when a 4-bit layer of bitsandbytes infers on a CPU with
    # AVX512-BF16, it wants a number of rows divisible by 32.
    with torch.inference_mode():
        tensors["logits"] = model.train()(torch.arange(1, 13)[None]).logits
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


with open(job_file) as file:
    jobs = json.load(file)
for job in jobs:
    config = None if job["config"] is None else BitsAndBytesConfig(**job["config"])
    if job["via"] == "halfbyte.load":
        model = halfbyte.load(job["load"], config)
    else:
        more = {} if config is None else {"quantization_config": config}
        model = AutoModelForCausalLM.from_pretrained(job["load"], **more)
    save_file(contents(model), job["dump"])
    if job["save"]:
        model.save_pretrained(job["save"], **({"max_shard_size": job["shard"]} if job["shard"] else {}))
print(bnb.__file__, bnb.__version__)
