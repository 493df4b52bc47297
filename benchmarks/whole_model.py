"""A whole model through transformers' `generate`: dense, bitsandbytes, halfbyte in its place, and llama.cpp.

    python -m benchmarks.whole_model                                all contestants; some 7 minutes
    python -m benchmarks.whole_model --only dense,halfbyte --rounds 1 --tokens 16
    python -m benchmarks.whole_model --models bundled               the small model alone, a minute
    python -m benchmarks.whole_model --folder DIR                   keeps the model's files (5 GB) for the next run

There are two models, batch 1: "bundled", the trained Llama of 2.9M parameters in tests/data, and "random", one of
1.2B random parameters in bfloat16 shards (whole_model_files.py). Each contestant is a process of its own
(whole_model_worker.py) that loads the model and then waits; with all of them alive, rounds go by in which each one in
turn reads a prompt of 256 tokens and decodes. So that they fit in 16 GB, models in float32 form a second heat. --only
chooses.

load      seconds of from_pretrained, shards in the page cache: read, convert, quantize; best of --loads
ready     load and the first token of a prompt of 16, best of --loads. Dense bfloat16 weights that need no conversion
          are only mapped by load; their pages come one by one when the first token needs them
decode    1 / median seconds of a token, over all rounds, after a prompt of 16 tokens
prefill   seconds from a prompt of 256 tokens to the first token after it, best of all rounds
peak      resident memory as the system counts it, file pages included; `own`: without them, at the end
cosine    of the angle between the logits after 32 tokens and those of the dense float32 model: that everyone
          computes this model, and how well. Quantizing random weights costs more than quantizing trained ones

"not fused" is bitsandbytes as on a processor without AVX-512 BF16, where it dequantizes each weight for each call.
"head too" is the one contestant that also quantizes the head, which transformers leaves dense unless told otherwise
(it sits out where head and embedding are one tensor). "HalfbyteConfig" is halfbyte's own way into transformers with
all its defaults; the other contestants of halfbyte are bitsandbytes' configuration, run in its place. llama.cpp comes
with llama-cpp-python (ggml.py says how to install it; its file is written by the package `gguf`), and runs its own
loop in C. It multiplies activations rounded to 8 bits; all others keep 16 or 32.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte import _C
from halfbyte.bench import environment
from halfbyte.bench.compare import versions
from halfbyte.bench.turns import Entry, measure

from . import whole_model_chart
from .output import ROOT, write_json
from .whole_model_files import Shape, copy_bundled, describe, make_gguf, make_model

WORKER = Path(__file__).with_name("whole_model_worker.py")
PLAIN = [sys.executable, str(WORKER)]
DROP_IN = [sys.executable, "-m", "halfbyte.cli.main", "run", str(WORKER)]
BF16, F32 = ["--dtype", "bfloat16", "--compute", "bfloat16"], ["--dtype", "float32", "--compute", "float32"]
CONTESTANTS: dict[str, tuple[list[str], list[str]]] = {
    "dense bfloat16": (PLAIN, ["--kind", "dense", *BF16]),
    "dense float32": (PLAIN, ["--kind", "dense", *F32]),
    "bitsandbytes nf4 bfloat16": (PLAIN, ["--kind", "nf4", *BF16]),
    "bitsandbytes nf4 bfloat16, not fused": (PLAIN, ["--kind", "nf4", "--not-fused", *BF16]),
    "bitsandbytes nf4 float32": (PLAIN, ["--kind", "nf4", *F32]),
    "halfbyte nf4 bfloat16": (DROP_IN, ["--kind", "nf4", *BF16]),
    "halfbyte nf4 float32": (DROP_IN, ["--kind", "nf4", *F32]),
    "halfbyte nf4 float32 in a bfloat16 model": (
        DROP_IN, ["--kind", "nf4", "--dtype", "bfloat16", "--compute", "float32"],
    ),
    "halfbyte HalfbyteConfig bfloat16": (PLAIN, ["--kind", "config", "--dtype", "bfloat16"]),
    "halfbyte nf4, head too, bfloat16": (DROP_IN, ["--kind", "nf4", "--head", *BF16]),
    "llama.cpp Q4_0": (PLAIN, ["--kind", "llama.cpp"]),
}  # fmt: skip
NF4_BYTES = 0.5 + 4 / 64  # of a weight: a code, and a float32 scale for 64
MODELS = ("bundled", "random")
COSINE_TOKENS, DECODE_PROMPT = 32, 16
SLOW_LOAD = 10.0  # seconds; what takes longer is not repeated


class Contestant:
    """A process that answers; `result` collects what it said."""

    def __init__(self, name: str, model: Path, log: Path) -> None:
        command, options = CONTESTANTS[name]
        self.name, self.log = name, log
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                [*command, str(model), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink,
                text=True, env=self.environ(),
            )  # fmt: skip
        self.result: dict[str, Any] = {
            "name": name,
            **self._answer(),
            "load": [],
            "ready": [],
            "decode": [],
            "prefill": [],
        }

    @staticmethod
    def environ() -> dict[str, str]:
        path = os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended\n{self.log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, *command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def load(self, times: int) -> None:
        for _ in range(times):
            seconds = self.ask("load")["seconds"]
            self.result["load"].append(seconds)
            self.result["ready"].append(seconds + self.ask("prefill", DECODE_PROMPT)["seconds"])
            if seconds > SLOW_LOAD:
                break

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def absent() -> dict[str, str]:
    """Contestants that cannot take part: what each lacks."""
    missing = {}
    for name in CONTESTANTS:
        needs = ["bitsandbytes"] if name.startswith("bitsandbytes") else []
        needs = ["llama_cpp", "gguf"] if name.startswith("llama") else needs
        lacks = [package for package in needs if importlib.util.find_spec(package) is None]
        if lacks:
            missing[name] = f"{' and '.join(lacks)} not installed"
    return missing


def chosen(only: str) -> list[str]:
    """Contestants whose names contain one of the comma-separated parts."""
    parts = [part.strip() for part in only.split(",")]
    return [name for name in CONTESTANTS if any(part in name for part in parts)]


def read_rate(threads: int) -> float:
    """GB/s at which `threads` threads read memory that is in no cache, best of a second: the ruler."""
    data = np.ones(256 << 20, np.uint8)
    entry = Entry("read", lambda i: _C.read_memory(data), bytes=data.nbytes)
    before = _C.get_num_threads()
    _C.set_num_threads(threads)
    measure([entry], 1.0)
    _C.set_num_threads(before)
    return data.nbytes / min(entry.samples) / 1e3


def floor(name: str, shape: Shape, rate: float) -> dict[str, float]:
    """What a token must read of weights, in bytes, and the seconds that takes at `rate` GB/s."""
    width = {"dense bfloat16": 2.0, "dense float32": 4.0}.get(name, NF4_BYTES)
    head = NF4_BYTES if "head too" in name else 4 if name.endswith(" float32") else 2
    layers, rest = shape.linear_weights * width, shape.head_weights * head
    return {
        "layer_bytes": layers,
        "head_bytes": rest,
        "floor_seconds": (layers + rest) / rate / 1e9,
        "floor_layers_seconds": layers / rate / 1e9,
    }


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of one contestant's samples."""
    token = statistics.median(result["decode"])
    return {
        "load_seconds": min(result["load"]),
        "ready_seconds": min(result["ready"]),
        "token_seconds": token,
        "tokens_per_second": 1 / token,
        "token_seconds_p10": sorted(result["decode"])[len(result["decode"]) // 10],
        "prefill_seconds": min(result["prefill"]),
    }


def heat(names: list[str], options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """One heat: loads one after the other, then takes turns. The results, in the order of `names`."""
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        everyone: list[Contestant] = []
        for name in names:
            one = Contestant(name, model, Path(scratch, "log"))
            stack.callback(one.close)
            everyone.append(one)
            one.load(options.loads)
            one.ask("generate", DECODE_PROMPT, 3, 60.0)  # warms up
            loads, ready = (", ".join(map(seconds, one.result[key])) for key in ("load", "ready"))
            print(f"{name}: load {loads} s, ready {ready} s", file=sys.stderr, flush=True)
            path = Path(scratch, "logits")
            one.ask("logits", COSINE_TOKENS, str(path))
            one.result["logits"] = np.fromfile(path, np.float32).astype(np.float64)
        for turn in range(options.rounds):
            for one in everyone if turn % 2 == 0 else everyone[::-1]:
                one.result["prefill"].append(one.ask("prefill", options.prompt)["seconds"])
                answer = one.ask("generate", DECODE_PROMPT, options.tokens, options.seconds)
                one.result["decode"] += answer["seconds"]
                rate = 1 / statistics.median(answer["seconds"])
                prompt = one.result["prefill"][-1]
                print(
                    f"{turn + 1}. {one.name}: {rate:.2f} tok/s, prompt {seconds(prompt)} s",
                    file=sys.stderr,
                    flush=True,
                )
        for one in everyone:
            one.result |= summary(one.result) | one.ask("memory")
        return [one.result for one in everyone]


def add_cosines(results: list[dict[str, Any]]) -> None:
    """Takes the logits out of the results; beside those of the dense float32 model, if it took part, their cosine."""
    logits = {result["name"]: result.pop("logits") for result in results}
    reference = logits.get("dense float32")
    for result in results if reference is not None else ():
        mine = logits[result["name"]]
        result["cosine"] = float(mine @ reference / (np.linalg.norm(mine) * np.linalg.norm(reference)))


def seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, as it stands in docs/performance.md."""
    lines = [
        "| | load, s | to the first token, s | tok/s | of the floor | prompt, s | peak GB | own GB | cosine |",
        "|---|" + "---:|" * 8,
    ]
    for r in results:
        cells = (
            seconds(r["load_seconds"]), seconds(r["ready_seconds"]), f"{r['tokens_per_second']:.1f}",
            f"{r['floor_seconds'] / r['token_seconds']:.2f}", seconds(r["prefill_seconds"]),
            f"{r['peak_bytes'] / 1e9:.1f}", f"{r['own_bytes'] / 1e9:.1f}",
            f"{r['cosine']:.3f}" if "cosine" in r else "",
        )  # fmt: skip
        lines.append(f"| {r['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def contest(names: list[str], shape: Shape, options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Everything about one model but its floors. The results, float32 last."""
    if any(name.startswith("llama.cpp") for name in names):
        make_gguf(model, shape)
    heats = [[name for name in names if name.endswith(" float32") == last] for last in (False, True)]
    results = [result for some in heats for result in heat(some, options, model)]
    add_cosines(results)
    return results


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_model", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, help="where the random model lies or shall lie (default: a temporary one)"
    )
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="A,B", help="contestants whose names contain A or B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of prompt and decoding (default 3)")
    parser.add_argument(
        "--loads", type=int, default=3, help=f"unless one takes {SLOW_LOAD:.0f} s (default 3)"
    )
    parser.add_argument("--tokens", type=int, default=48, help="to decode in a turn, at most (default 48)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="for decoding in a turn, at most (default 4)"
    )
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt (default 256)")
    parser.add_argument(
        "--shape", type=json.loads, default={}, metavar="JSON", help='of the random model, e.g. {"layers": 2}'
    )
    parser.add_argument("--json", type=Path, help="default: build/benchmarks/whole_model.json")
    parser.add_argument("--svg", type=Path, help="default: beside the JSON")
    options = parser.parse_args(arguments)
    options.names, options.models = chosen(options.only), options.models.split(",")
    if not options.names:
        parser.error(f"--only: expected part of one of {', '.join(CONTESTANTS)}, got {options.only!r}")
    if not set(options.models) <= set(MODELS):
        parser.error(f"--models: expected some of {', '.join(MODELS)}, got {','.join(options.models)!r}")
    if min(options.tokens, options.rounds, options.loads) < 1 or options.tokens < 2:
        parser.error("--rounds and --loads: at least 1, --tokens: at least 2")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = arguments_of(arguments)
    missing = absent()
    names = [name for name in options.names if name not in missing]
    threads = {"OMP_NUM_THREADS": str(options.threads), "HALFBYTE_NUM_THREADS": str(options.threads)}
    os.environ.update(threads)
    description = environment.describe() | {
        "isa": _C.cpu_info()["used"],
        "threads": options.threads,
        "versions": versions(),
    }
    print("\n".join(environment.lines_of(description)), flush=True)
    for name, why in missing.items():
        print(f"{name}: absent, {why}")
    shapes: dict[str, Shape] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        rate = read_rate(options.threads)
        for which in options.models:
            if which == "bundled":
                folder = Path(scratch, "bundled")
                copy_bundled(folder)
                shape = Shape.of(folder)
            else:
                folder, shape = options.folder or Path(scratch, "random"), Shape(**options.shape)
                make_model(folder, shape)
            able = [name for name in names if not (shape.tied and "head too" in name)]
            shapes[which], results[which] = shape, contest(able, shape, options, folder)
        rate = max(rate, read_rate(options.threads))
    print(f"read {rate:.1f} GB/s")
    for which, shape in shapes.items():
        for result in results[which]:
            result |= floor(result["name"], shape, rate)
        print(f"{which}: {shape.parameters / 1e6:,.1f}M parameters\n{table(results[which])}")
    content = {
        "environment": description,
        "absent": missing,
        "read_gb_per_s": rate,
        "prompt_tokens": options.prompt,
        "models": {which: {"model": describe(shapes[which]), "results": results[which]} for which in shapes},
    }
    path = write_json(options.json, "whole_model", content)
    print(f"written: {path}")
    if "random" in shapes:
        picture = options.svg or path.with_suffix(".svg")
        picture.write_text(whole_model_chart.draw(content))
        print(f"written: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
