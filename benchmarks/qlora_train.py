"""QLoRA as anybody writes it: transformers, PEFT, Trainer; an NF4 model, adapters of rank 8, paged 8-bit AdamW.

It knows nothing of halfbyte. `python qlora_train.py MODEL TEXT OUT.json` trains with the bitsandbytes that is
installed, `halfbyte run qlora_train.py MODEL TEXT OUT.json` with halfbyte in its place. The losses and the times of the
steps go to OUT.json. `benchmarks/qlora.py` runs both and compares.
"""

import argparse
import json
import os
import tempfile
import time

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("text")
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument(
    "--turns", type=int, nargs=2, metavar="FD", help="read a byte before each step, write one after"
)
args = parser.parse_args()

set_seed(args.seed)

tokenizer = AutoTokenizer.from_pretrained(args.model)
with open(args.text, encoding="utf-8") as file:
    tokens = torch.tensor(tokenizer(file.read())["input_ids"])
blocks = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)
dataset = [{"input_ids": block, "labels": block} for block in blocks]

model = AutoModelForCausalLM.from_pretrained(
    args.model,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
)
model.config.use_cache = False
model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(
    model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
)


class Clock(TrainerCallback):
    """Seconds of each step: of the wall, and of all processors."""

    def __init__(self):
        self.seconds, self.cpu_seconds = [], []

    def on_step_begin(self, *_, **__):
        if args.turns:
            os.read(args.turns[0], 1)
        self.begin = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.begin[0])
        self.cpu_seconds.append(time.process_time() - self.begin[1])
        if args.turns:
            os.write(args.turns[1], b"x")


clock = Clock()
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-3,
            warmup_steps=10,
            optim="paged_adamw_8bit",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        callbacks=[clock],
    )
    begin = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - begin

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
with open(args.out, "w", encoding="utf-8") as file:
    times = {
        "step_seconds": clock.seconds,
        "step_cpu_seconds": clock.cpu_seconds,
        "train_seconds": train_seconds,
    }
    json.dump({"losses": losses, **times}, file)
