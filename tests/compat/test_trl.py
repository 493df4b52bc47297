"""TRL's SFTTrainer doing QLoRA, as its documentation shows it, on halfbyte."""

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from lazy import lazy  # noqa: E402

transformers = lazy("transformers")
peft = lazy("peft")
trl = lazy("trl")
datasets = lazy("datasets")
pytestmark = pytest.mark.stand_in


@pytest.mark.parametrize("bits", [4, 8])
def test_sft_with_qlora(tiny_llama, heldout_text, tmp_path, bits):
    if bits == 4:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    else:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=config, dtype=torch.float32
    )
    paragraphs = [p for p in heldout_text.split("\n\n") if len(p) > 200][:16]
    train = datasets.Dataset.from_list([{"text": p} for p in paragraphs])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        max_length=48,
        optim="paged_adamw_8bit" if bits == 4 else "adamw_8bit",
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataset_num_proc=None,
    )
    run = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        processing_class=tiny_models.tokenizer(tiny_llama),
        peft_config=peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    kinds = {type(m.weight).__name__ for n, m in run.model.named_modules() if n.endswith("base_layer")}
    assert kinds == {"Params4bit" if bits == 4 else "Int8Params"}
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 6 and sum(losses[3:]) < sum(losses[:3])
    run.save_model(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=config, dtype=torch.float32
    )
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        served, trained = again(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits
    # the trained one casts other parts to float32 (prepare_model_for_kbit_training), the served one does not
    assert (served.float() - trained.float()).norm() < 0.03 * trained.float().norm()
