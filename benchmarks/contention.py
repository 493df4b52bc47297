"""How long loops of several threads take on a machine that others use too.

    python -m benchmarks.contention [--threads 2] [--seconds 2] [--neighbours 0,1,2] [--scenes alone,torch,training]

One row of a 4096 x 4096 four-bit layer (or `--rows`), whose work is split over threads in four ways:

- `one thread`: not at all;
- `own threads`: by halfbyte's pool, as without torch (`HALFBYTE_OPENMP=0`);
- `libgomp`: by torch's OpenMP threads, whatever that costs (`HALFBYTE_OPENMP=always`);
- `halfbyte`: as it comes.

They take turns in one process, each by an extension module of its own, because a pool belongs to a module. Scenes:
`alone`, nothing between the calls; `torch`, a parallel loop of torch before each call, whose threads go on spinning;
`training`, a product and its gradient between operations of torch, as in a step of fine-tuning. Neighbours are
processes of default priority that compute without end. Only our calls are timed, except `round`: everything.
Where there are as many neighbours as processors the caller itself has to share one: `one thread` shows that part.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import importlib.util
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from halfbyte.bench import environment

from .output import write_json

WAYS = {"one thread": None, "own threads": "0", "libgomp": "always", "halfbyte": ""}
TURN_SECONDS = 2.0
REST_SECONDS = 0.02  # between turns: idle threads of either kind fall asleep


def another_module() -> ModuleType:
    """A second instance of the extension module, with a pool of its own."""
    from halfbyte import _C

    loader = importlib.machinery.ExtensionFileLoader("halfbyte._C", _C.__file__)
    spec = importlib.util.spec_from_file_location("halfbyte._C", _C.__file__, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that use a processor each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3 if count else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Competitor:
    """One way to split the work, and the times it took: `samples` of our calls, `rounds` with what is between."""

    def __init__(self, name: str, threads: int, rows: int, size: int) -> None:
        import torch

        wish = WAYS[name]
        os.environ["HALFBYTE_OPENMP"] = "" if wish is None else wish
        self.name, self.module = name, another_module()
        self.module.set_num_threads(1 if wish is None else threads)
        torch.manual_seed(0)
        self.layer = self.module.Linear4bit.from_float(torch.randn(size, size).numpy(), double_quant=True)
        small = torch.randn(256, 256).numpy()
        self.small = self.module.Linear4bit.from_float(small, double_quant=True, compute="bfloat16")
        self.x, self.small_x = torch.randn(rows, size), torch.randn(512, 256)
        self.other = torch.randn(1 << 17)
        self.dense = torch.randn(256, 256)
        self.layer(self.x), self.small(self.small_x)  # looks for torch while the variable stands
        self.reset()

    def reset(self) -> None:
        self.samples: list[float] = []
        self.rounds: list[float] = []

    def timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter_ns()
        result = call(*arguments)
        self.samples.append((time.perf_counter_ns() - began) / 1e3)
        return result

    def alone(self) -> None:
        self.timed(self.layer, self.x)

    def torch(self) -> None:
        self.other.add_(1.0)
        self.timed(self.layer, self.x)

    def training(self) -> None:
        import torch

        hidden = torch.nn.functional.silu(self.small_x @ self.dense)
        y = self.timed(self.small, hidden)
        gradient = torch.softmax(y, -1).mul_(0.1)
        torch.nn.functional.silu(self.timed(self.small.grad_input, gradient) @ self.dense)

    def turn(self, scene: str, seconds: float) -> None:
        once = getattr(self, scene)
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            once()
            self.rounds.append((time.perf_counter() - began) * 1e6)
        time.sleep(REST_SECONDS)


def row(competitor: Competitor) -> dict[str, Any]:
    samples = sorted(competitor.samples)
    at = [samples[min(len(samples) - 1, int(share * len(samples)))] for share in (0.1, 0.5, 0.9, 0.99)]
    return {
        "name": competitor.name, "calls": len(samples), "p10_us": at[0], "p50_us": at[1], "p90_us": at[2],
        "p99_us": at[3], "p99_over_p50": at[3] / at[1], "mean_us": statistics.fmean(samples),
        "round_us": statistics.fmean(competitor.rounds),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each way in each scene")
    parser.add_argument("--neighbours", default="0,1,2")
    parser.add_argument("--scenes", default="alone,torch,training")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: build/benchmarks/contention.json")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    kept = os.environ.get("HALFBYTE_OPENMP")
    ways = [Competitor(name, options.threads, options.rows, options.size) for name in options.ways.split(",")]
    os.environ.pop("HALFBYTE_OPENMP") if kept is None else os.environ.update(HALFBYTE_OPENMP=kept)
    results = []
    turns = max(1, round(options.seconds / TURN_SECONDS))
    print(
        f"{'':30}{'calls':>8}{'p10':>9}{'p50':>9}{'p90':>9}{'p99':>9}{'p99/p50':>9}{'mean':>9}{'round':>9}  us"
    )
    for count in map(int, options.neighbours.split(",")):
        with neighbours(count):
            for scene in options.scenes.split(","):
                for way in ways:
                    way.reset()
                for _ in range(turns):
                    for way in random.sample(ways, len(ways)):
                        way.turn(scene, options.seconds / turns)
                for way in ways:
                    result = {"neighbours": count, "scene": scene, **row(way)}
                    results.append(result)
                    keys = ("p10_us", "p50_us", "p90_us", "p99_us", "p99_over_p50", "mean_us", "round_us")
                    cells = "".join(f"{result[k]:>9.{2 if k == 'p99_over_p50' else 0}f}" for k in keys)
                    print(f"{count} {scene:10}{way.name:18}{result['calls']:>8}{cells}", flush=True)
    content = {
        "environment": environment.describe(),
        "options": {k: str(v) for k, v in vars(options).items()},
        "rows": results,
    }
    print(f"written: {write_json(options.json, 'contention', content)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
