"""End to end: tokens a second of a model through transformers, in bfloat16, with halfbyte and with bitsandbytes.

    python -m benchmarks.gpu_model ENGINE MODEL [--tokens N] [--prompt N] [--emulate]
    python -m benchmarks.gpu_model make FOLDER            a random Llama of about 1.1e9 parameters, 2.2 GB

One process for each engine, because halfbyte takes the place of bitsandbytes. The last line is JSON. `loss` is the
mean cross entropy of a fixed text (random tokens where there is no tokenizer), the same for every engine up to what its
format loses.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("bfloat16", "halfbyte", "halfbyte int8", "bitsandbytes", "bitsandbytes int8")
TINY = ROOT / "tests" / "data" / "tiny-llama"


def make(folder: Path, small: bool) -> None:
    """A Llama with random weights; `small` for a run that shows nothing but that it runs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, vocabulary = (64, 2, 128) if small else (2048, 16, 32768)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 64, vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu" if small else "cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def load(engine: str, folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0}, "local_files_only": True}
    if engine.endswith("int8"):
        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif engine != "bfloat16":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def measure(engine: str, folder: Path, tokens: int, prompt: int) -> dict[str, Any]:
    import torch

    model = load(engine, folder)
    vocabulary = model.config.vocab_size
    text = torch.randint(0, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(3))
    if (folder / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        words = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text = tokenizer(words, return_tensors="pt").input_ids[:, :prompt]
    text, prompt = text.cuda(), text.shape[1]
    with torch.no_grad():

        def generate(n: int) -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            model.generate(text[:, :16], max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
            torch.cuda.synchronize()
            return time.perf_counter() - begin

        def read() -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            model(text, logits_to_keep=1)
            torch.cuda.synchronize()
            return time.perf_counter() - begin

        generate(max(2, tokens // 8))
        decode = min(generate(tokens) for _ in range(3))
        read()
        prefill = min(read() for _ in range(3))
        loss = float(model(text, labels=text).loss.float())
    return {
        "engine": engine,
        "tokens_per_second": tokens / decode,
        "prompt_tokens_per_second": prompt / prefill,
        "loss": loss,
        "peak_bytes": int(torch.cuda.max_memory_allocated()),
    }


def run(emulate: bool, remaining: Callable[[], float]) -> dict[str, Any]:
    """All engines on the bundled model and on a random one."""
    try:
        import transformers  # noqa: F401
    except ImportError as why:
        print(f"model: left out, transformers is missing ({why})")
        return {"left_out": f"transformers is missing ({why})", "failed": {}}
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        random_model = Path(temporary) / "random-llama"
        command = [sys.executable, "-m", "benchmarks.gpu_model"]
        small = ["--emulate", "--tokens", "2", "--prompt", "20"] if emulate else []
        done = subprocess.run(
            [*command, "make", str(random_model), *small], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode != 0:
            failed["random model"] = done.stderr[-500:]
        engines = ENGINES[1:2] if emulate else ENGINES
        for model in (TINY, random_model):
            for engine in engines:
                name = f"{model.name}, {engine}"
                if remaining() <= 0 or not model.exists():
                    failed.setdefault(name, "left out: no time" if model.exists() else "left out: no model")
                    continue
                done = subprocess.run(
                    [*command, engine, str(model), *small], cwd=ROOT, capture_output=True, text=True
                )
                if done.returncode != 0:
                    why = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    if engine.startswith(
                        "bitsandbytes"
                    ):  # a peer that is absent or broken is no failure of ours
                        rows.append({"model": model.name, "engine": engine, "absent": why})
                    else:
                        failed[name] = done.stderr[-1500:]
                    continue
                rows.append({"model": model.name, **json.loads(done.stdout.splitlines()[-1])})
    for row in rows:
        print(f"{row['model']:14} {row['engine']:18} " + (row.get("absent") or
              f"{row['tokens_per_second']:8.1f} tokens/s, prompt {row['prompt_tokens_per_second']:9.0f}/s, "
              f"loss {row['loss']:.4f}, {row['peak_bytes'] / 1e9:.2f} GB"))  # fmt: skip
    failed |= wrong_losses(rows)
    for name, why in failed.items():
        print(f"FAIL {name}: {why}")
    return {"rows": rows, "failed": failed}


def wrong_losses(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Models whose loss with halfbyte is none, or far from bfloat16's (a tenth: four bits cost hundredths)."""
    base = {row["model"]: row["loss"] for row in rows if row["engine"] == "bfloat16"}
    found = {}
    for row in rows:
        if row["engine"].startswith("halfbyte"):
            other = base.get(row["model"], row["loss"])
            if not math.isfinite(row["loss"]) or abs(row["loss"] - other) > 0.1 * abs(other):
                found[f"{row['model']}, {row['engine']}"] = f"loss {row['loss']}, in bfloat16 {other}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=(*ENGINES, "make"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--emulate", action="store_true")
    options = parser.parse_args()
    if options.engine == "make":
        make(options.model, options.emulate)
        return
    sys.path.insert(0, str(ROOT / "python"))
    if options.emulate:
        from benchmarks.gpu_device import Emulated

        Emulated()
        import torch

        torch.cuda.synchronize = lambda *_: None
        torch.cuda.max_memory_allocated = lambda *_: 0
    if options.engine.startswith("halfbyte"):
        import halfbyte

        halfbyte.install()
    print(json.dumps(measure(options.engine, options.model, options.tokens, options.prompt)))


if __name__ == "__main__":
    main()
