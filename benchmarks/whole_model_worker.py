"""One contestant of whole_model.py: transformers' `generate`, as anybody calls it.

    python whole_model_worker.py MODEL --kind dense|nf4|config --dtype bfloat16 --compute float32

nf4 is bitsandbytes' configuration; with `halfbyte run` in front the layers are halfbyte's, and nothing here knows it.
config is HalfbyteConfig with its defaults. Commands come as lines of JSON on standard input, answers go to standard
output: load, logits, generate, prefill, memory.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever a library prints is not an answer


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status, 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def random_tokens(count: int, vocabulary: int) -> list[int]:
    """The same for every contestant."""
    random = Random(1)
    return [random.randrange(vocabulary) for _ in range(count)]


class Torch:
    """A model in transformers."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import transformers
        from transformers import (
            BitsAndBytesConfig,
            LlamaForCausalLM,
        )  # its modules are imported before load's time

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_grad_enabled(False)
        self.torch, self.args = torch, args
        self.arguments: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}
        compute = getattr(torch, args.compute)
        if args.kind == "nf4":
            # A list of modules to skip, though none has the name, replaces the one with the head in it.
            skip = {"llm_int8_skip_modules": ["nothing"]} if args.head else {}
            self.arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, **skip
            )
            import bitsandbytes

            if args.not_fused:
                bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
        elif args.kind == "config":
            from halfbyte.integrations.transformers import HalfbyteConfig

            self.arguments["quantization_config"] = HalfbyteConfig()
        self.of = LlamaForCausalLM
        self.model: Any = None

    def load(self) -> dict[str, float]:
        self.model = None
        gc.collect()
        began = time.perf_counter()
        self.model = self.of.from_pretrained(self.args.model, **self.arguments)
        seconds = time.perf_counter() - began
        self.model.generation_config.eos_token_id = None  # nothing ends a text early
        return {"seconds": seconds}

    def _tokens(self, count: int) -> Any:
        return self.torch.tensor([random_tokens(count, self.model.config.vocab_size)])

    def logits(self, count: int, path: str) -> dict[str, float]:
        """Of the last of `count` tokens, float32 to `path`."""
        self.model(self._tokens(count)).logits[0, -1].float().numpy().tofile(path)
        return {}

    def generate(self, prompt: int, tokens: int, seconds: float) -> dict[str, Any]:
        """Times of the tokens after the first one; stops after `seconds`."""
        ids = self._tokens(prompt)
        times: list[float] = []

        class Clock:  # a streamer: generate hands it the prompt, then each token
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            max_time=seconds,
            streamer=Clock(),
            pad_token_id=0,
        )
        times = times[1:]
        return {"seconds": [b - a for a, b in itertools.pairwise(times)]}

    def prefill(self, count: int) -> dict[str, float]:
        """A prompt of `count` tokens and the first token after it."""
        ids = self._tokens(count)
        mask = self.torch.ones_like(ids)
        began = time.perf_counter()
        self.model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
        return {"seconds": time.perf_counter() - began}


class LlamaCpp:
    """A GGUF file in llama.cpp, with its own loop: no Python runs within a token but the call that decodes it."""

    CONTEXT = 512

    def __init__(self, args: argparse.Namespace) -> None:
        import ctypes

        import llama_cpp
        import numpy

        self.numpy, self.args, self.c = numpy, args, llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = self.context = self.sampler = None

    def load(self) -> dict[str, float]:
        if self.model is not None:
            self.c.llama_free(self.context)
            self.c.llama_model_free(self.model)
        began = time.perf_counter()
        options = self.c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = self.CONTEXT, self.CONTEXT, self.CONTEXT
        options.n_threads = options.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", "2"))
        path = str(Path(self.args.model) / "model.gguf").encode()
        self.model = self.c.llama_model_load_from_file(path, self.c.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp cannot load model.gguf")
        self.context = self.c.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        seconds = time.perf_counter() - began
        self.sampler = self.c.llama_sampler_init_greedy()
        self.vocabulary = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        return {"seconds": seconds}

    def _decode(self, tokens: list[int]) -> None:
        array = (self.c.llama_token * len(tokens))(*tokens)
        if self.c.llama_decode(self.context, self.c.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp cannot decode")

    def _clear(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)

    def logits(self, count: int, path: str) -> dict[str, float]:
        self._clear()
        self._decode(random_tokens(count, self.vocabulary))
        found = self.c.llama_get_logits_ith(self.context, -1)
        self.numpy.ctypeslib.as_array(found, (self.vocabulary,)).tofile(path)
        return {}

    def generate(self, prompt: int, tokens: int, seconds: float) -> dict[str, Any]:
        self._clear()
        end = time.perf_counter() + seconds
        self._decode(random_tokens(prompt, self.vocabulary))
        times: list[float] = []
        for _ in range(tokens - 1):
            token = self.c.llama_sampler_sample(self.sampler, self.context, -1)
            times.append(time.perf_counter())
            if times[-1] > end:
                break
            self._decode([token])
        self.c.llama_sampler_sample(self.sampler, self.context, -1)
        times.append(time.perf_counter())
        return {"seconds": [b - a for a, b in itertools.pairwise(times)]}

    def prefill(self, count: int) -> dict[str, float]:
        tokens = random_tokens(count, self.vocabulary)
        self._clear()
        began = time.perf_counter()
        self._decode(tokens)
        self.c.llama_sampler_sample(self.sampler, self.context, -1)
        return {"seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--kind", choices=("dense", "nf4", "config", "llama.cpp"), required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compute", default="bfloat16", help="of nf4; config: as the model, the default")
    parser.add_argument(
        "--not-fused", action="store_true", help="bitsandbytes as on a processor without AVX-512 BF16"
    )
    parser.add_argument("--head", action="store_true", help="quantize the head too")
    args = parser.parse_args()
    began = time.perf_counter()
    contestant = LlamaCpp(args) if args.kind == "llama.cpp" else Torch(args)
    print(json.dumps({"import_seconds": time.perf_counter() - began}), file=answers, flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "memory":
            answer = {
                "peak_bytes": status("VmHWM"),
                "resident_bytes": status("VmRSS"),
                "own_bytes": status("RssAnon"),
            }
        else:
            answer = getattr(contestant, command)(*arguments)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
