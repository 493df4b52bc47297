"""QLoRA with FSDP as a user of bitsandbytes writes it: torchrun fsdp_qlora.py MODEL OUT none|fsdp1|fsdp2 STORAGE

Every process takes its rows of the same batches; rank 0 writes losses, the gathered state dict and logits.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

folder, out, mode, storage = sys.argv[1], Path(sys.argv[2]), sys.argv[3], getattr(torch, sys.argv[4])
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if mode != "none":
    dist.init_process_group("gloo")


def build():
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


peft_model = build()
layers = peft_model.base_model.model.model.layers
if mode == "fsdp1":
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = FSDP(
        peft_model,
        auto_wrap_policy=ModuleWrapPolicy({type(layers[0])}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
elif mode == "fsdp2":
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    model = fully_shard(peft_model, mesh=mesh)
else:
    model = peft_model

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
generator = torch.Generator().manual_seed(1)
losses = []
for _ in range(3):
    batch = torch.randint(2, 128, (4, 12), generator=generator)
    mine = batch.chunk(world)[rank]
    loss = model(input_ids=mine, labels=mine).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    if world > 1:
        dist.all_reduce(total)
    losses.append(total.item() / world)

if mode == "fsdp1":
    # offload_to_cpu=True crashes torch 2.13 with parameters on the CPU, also those of a plain nn.Linear
    how = FullStateDictConfig(rank0_only=True)
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, how):
        state = model.state_dict()
elif mode == "fsdp2":
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
else:
    state = model.state_dict()
with torch.no_grad():
    logits = model(input_ids=batch).logits

if rank == 0:
    out.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().clone().contiguous() for key, value in state.items()}
    save_file(state, out / "state.safetensors")
    # Reloaded into a model that was never sharded, the state dict must give what the sharded one gives.
    fresh = build()
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    with torch.no_grad():
        again = fresh(input_ids=batch).logits
    report = {
        "losses": losses,
        "missing": list(missing),
        "unexpected": list(unexpected),
        "difference": (again - logits).abs().max().item(),
        "classes": sorted({type(m).__name__ for m in peft_model.modules()}),
    }
    (out / "report.json").write_text(json.dumps(report))
if mode != "none":
    dist.barrier()
    dist.destroy_process_group()
