"""transformers' Trainer with every optimizer it takes from bitsandbytes: trained, saved, resumed, on halfbyte."""

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from lazy import lazy  # noqa: E402

transformers = lazy("transformers")
pytestmark = pytest.mark.stand_in

# Every value of TrainingArguments.optim that is built from bitsandbytes (test_the_list_is_complete compares).
OPTIMIZERS = [
    "adamw_8bit",
    "adamw_bnb_8bit",
    "ademamix",
    "ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_adamw",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_32bit",
    "rmsprop_bnb_8bit",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("model") / "llama", "llama", torch.float32)


class Tokens(torch.utils.data.Dataset):
    def __init__(self, n=16, length=12):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, 128, (n, length), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer(folder, output, optim, max_steps=3, **kwargs):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        optim=optim,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **kwargs,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Tokens())


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def inner(optimizer):
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def test_the_list_is_complete():
    names = {str(o.value) for o in transformers.training_args.OptimizerNames}
    words = ("bnb", "8bit", "paged", "lion", "ademamix")
    others = ("torch", "galore", "apollo", "stable_adamw", "schedule_free")
    found = {n for n in names if any(w in n for w in words) and not any(o in n for o in others)}
    # "paged_adamw" is the spelling of older versions for paged_adamw_32bit
    assert found <= set(OPTIMIZERS)
    assert set(OPTIMIZERS) - found <= {"paged_adamw"}


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_trains_saves_and_resumes(folder, tmp_path, optim):
    import bitsandbytes as bnb

    if optim not in {str(o.value) for o in transformers.training_args.OptimizerNames}:
        pytest.skip(f"transformers {transformers.__version__} has no {optim}")
    run = trainer(folder, tmp_path / "a", optim)
    run.train()
    optimizer = inner(run.optimizer)
    assert "bitsandbytes" in type(optimizer).__module__  # or embeddings would get 8-bit states
    assert isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit)
    names = {p: n for n, p in run.model.named_parameters()}
    start = dict(transformers.AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for p, state in optimizer.state.items():
        name = names[p]
        assert state["step"] == 3
        # 4096 elements or more, no embedding: in 8 bits when asked for
        eight = "8bit" in optim and p.numel() >= 4096 and "embed" not in name
        assert state["state1"].dtype == (torch.uint8 if eight else torch.float32), name
        assert p.isfinite().all()
        assert not torch.equal(p, start[name]), name
    assert len(optimizer.state) == len(names)
    assert len(losses(run)) == 3

    resumed = trainer(folder, tmp_path / "a", optim)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    after = dict(resumed.model.named_parameters())
    for p, name in names.items():
        assert torch.equal(p, after[name]), name
    for p, state in inner(resumed.optimizer).state.items():
        original = optimizer.state[dict(run.model.named_parameters())[_name(resumed.model, p)]]
        assert state.keys() == original.keys()
        for key, value in state.items():
            same = torch.equal(value, original[key]) if torch.is_tensor(value) else value == original[key]
            assert same, key


def _name(model, wanted):
    return next(n for n, p in model.named_parameters() if p is wanted)


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb"])
def test_bfloat16_and_accumulation(folder, tmp_path, optim):
    """Mixed precision, accumulated gradients and clipping between the loss and the optimizer."""
    kwargs = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "bf16": True, "weight_decay": 0.1}
    run = trainer(folder, tmp_path, optim, max_steps=6, **kwargs)
    run.train()
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert min(losses(run)[-2:]) < losses(run)[0]


def test_optim_args(folder, tmp_path):
    """Settings in a string, as the command line passes them."""
    arguments = "beta1=0.8,beta2=0.9,beta3=0.95,alpha=3.0,t_alpha=10,t_beta3=10"
    run = trainer(folder, tmp_path, "ademamix_8bit", max_steps=1, optim_args=arguments)
    run.train()
    group = inner(run.optimizer).param_groups[0]
    assert tuple(group["betas"]) == (0.8, 0.9, 0.95)
    assert (group["alpha"], group["t_alpha"], group["t_beta3"]) == (3.0, 10, 10)


def test_trains_a_quantized_model_with_adapters(tiny_llama, heldout_text, tmp_path):
    """QLoRA by Trainer: 4-bit base, LoRA, paged 8-bit AdamW, checkpointing; the loss falls, the base stays."""
    peft = pytest.importorskip("peft")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tiny_llama, quantization_config=config)
    model = peft.prepare_model_for_kbit_training(model)
    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    tokenizer = tiny_models.tokenizer(tiny_llama)
    ids = tokenizer(heldout_text, return_tensors="pt")["input_ids"][0, : 8 * 48].view(8, 48)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        optim="paged_adamw_8bit",
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=2e-3,
        warmup_steps=0,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    run = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    run.train()
    found = losses(run)
    assert sum(found[4:]) < sum(found[:4]) - 0.4
    for name, p in model.named_parameters():
        if name in before:
            assert torch.equal(p, before[name]), name


def test_refuses_a_quantized_model_without_adapters(tiny_llama, tmp_path):
    """Trainer's own check, which reads what the quantizer says of itself."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model, args=arguments)
