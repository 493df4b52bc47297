"""The same QLoRA script with the real bitsandbytes and with halfbyte in its place: losses, time, memory, a picture.

    python benchmarks/qlora.py                    3 seeds of 200 steps each; writes build/benchmarks/qlora.{json,svg}
    python benchmarks/qlora.py --steps 20 --seeds 1
    python benchmarks/qlora.py --turns --threads 2 --steps 40 --seeds 1     times only, on a busy machine

`qlora_train.py`, which knows nothing of either, runs in processes of their own, alternating, so that what else the
machine does meets both. Compared are

- the losses, step by step, of equal seeds: their difference must be small beside what another seed does;
- wall seconds of a step (median over all steps of all runs) and of the whole process, and its CPU seconds;
- the peak resident memory of the process, as the operating system counts it.

With `--turns` both processes live at once and take turns step by step (20 ms apart, so that the threads of one sleep
before the other starts): the ratio of two steps that are neighbours in time says more than that of two medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "qlora_train.py"
COMMANDS = {
    "bitsandbytes": [sys.executable, str(SCRIPT)],
    "halfbyte": [sys.executable, "-m", "halfbyte.cli.main", "run", str(SCRIPT)],
}
SMOOTHING = 10  # steps of the running mean that is drawn


def environment() -> dict[str, str]:
    """Of a run: this repository's halfbyte, no network."""
    path = os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_once(name: str, seed: int, steps: int, model: Path, text: Path) -> dict[str, Any]:
    """One process. Its losses and times, `process_seconds`, `cpu_seconds` and `peak_bytes`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        log = Path(folder, "log")
        command = [
            *COMMANDS[name],
            str(model),
            str(text),
            str(out),
            "--steps",
            str(steps),
            "--seed",
            str(seed),
        ]
        begin = time.perf_counter()
        with log.open("w") as sink:
            process = subprocess.Popen(command, env=environment(), stdout=sink, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{name}, seed {seed}: exit {process.returncode}\n{log.read_text()[-3000:]}")
        result = json.loads(out.read_text())
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss * unit
    return {**result, "process_seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, "seed": seed}


def take_turns(seed: int, steps: int, model: Path, text: Path) -> dict[str, list[float]]:
    """Wall seconds of each step of both, the steps of one between those of the other."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes, ends, outs = {}, {}, {}
        for name in COMMANDS:
            theirs_in, ours_out = os.pipe()
            ours_in, theirs_out = os.pipe()
            outs[name] = Path(folder, f"{name}.json")
            command = [*COMMANDS[name], str(model), str(text), str(outs[name]), "--steps", str(steps),
                       "--seed", str(seed), "--turns", str(theirs_in), str(theirs_out)]  # fmt: skip
            sink = stack.enter_context(Path(folder, f"{name}.log").open("w"))
            processes[name] = subprocess.Popen(
                command, env=environment(), stdout=sink, stderr=sink, pass_fds=(theirs_in, theirs_out)
            )
            stack.callback(processes[name].kill)
            os.close(theirs_in)
            os.close(theirs_out)
            ends[name] = ours_out, ours_in
        for step in range(steps):
            for name in list(COMMANDS)[:: 1 if step % 2 == 0 else -1]:
                os.write(ends[name][0], b"x")
                if os.read(ends[name][1], 1) != b"x":
                    raise RuntimeError(f"{name}: {Path(folder, f'{name}.log').read_text()[-3000:]}")
                time.sleep(0.02)
        for process in processes.values():
            process.wait()
        return {name: json.loads(out.read_text())["step_seconds"] for name, out in outs.items()}


def mean_difference(a: list[float], b: list[float]) -> float:
    """mean |a - b| over the steps."""
    return statistics.fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of the comparison, from `runs[name][i]`, whose seeds agree between the names."""
    theirs, ours = runs["bitsandbytes"], runs["halfbyte"]
    same = [mean_difference(a["losses"], b["losses"]) for a, b in zip(theirs, ours, strict=True)]
    worst = max(
        abs(x - y)
        for a, b in zip(theirs, ours, strict=True)
        for x, y in zip(a["losses"], b["losses"], strict=True)
    )
    other = [mean_difference(a["losses"], b["losses"]) for i, a in enumerate(theirs) for b in theirs[i + 1 :]]
    tail = {name: [statistics.fmean(r["losses"][-20:]) for r in each] for name, each in runs.items()}
    report: dict[str, Any] = {
        "mean_loss_difference": statistics.fmean(same),
        "largest_loss_difference": worst,
        "mean_loss_difference_between_seeds": statistics.fmean(other) if other else None,
        "last_losses": tail,
    }
    for name, each in runs.items():
        steps = [s for run in each for s in run["step_seconds"][1:]]  # the first one warms up
        deciles = statistics.quantiles(steps, n=10, method="inclusive")
        report[name] = {
            "step_seconds_median": statistics.median(steps),
            "step_seconds_p10": deciles[0],
            "step_cpu_seconds": statistics.median(s for run in each for s in run["step_cpu_seconds"][1:]),
            "train_seconds": statistics.median(run["train_seconds"] for run in each),
            "process_seconds": statistics.median(run["process_seconds"] for run in each),
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in each),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in each),
        }
    # A pair ran one after the other: the ratio of a pair is less noisy than the ratio of two medians.
    report["step_ratio_of_pairs"] = [
        statistics.median(b["step_seconds"][1:]) / statistics.median(a["step_seconds"][1:])
        for a, b in zip(theirs, ours, strict=True)
    ]
    return report


def smooth(values: list[float]) -> list[float]:
    """Running mean of the last SMOOTHING values."""
    return [statistics.fmean(values[max(0, i + 1 - SMOOTHING) : i + 1]) for i in range(len(values))]


def picture(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Losses of both above, their difference beside the spread of the seeds below."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "halfbyte", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(7.5, 6), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    steps = range(1, len(runs["halfbyte"][0]["losses"]) + 1)
    for i, (a, b) in enumerate(zip(runs["bitsandbytes"], runs["halfbyte"], strict=True)):
        once = i == 0
        top.plot(
            steps, smooth(a["losses"]), color="#c44e52", linewidth=3.5, alpha=0.45,
            label="bitsandbytes" if once else None,
        )  # fmt: skip
        top.plot(
            steps, smooth(b["losses"]), color="#1f3b73", linewidth=1, linestyle="--",
            label="halfbyte" if once else None,
        )  # fmt: skip
        bottom.plot(
            steps, [abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True)], color="#1f3b73",
            linewidth=0.8, label="halfbyte and bitsandbytes, same seed" if once else None,
        )  # fmt: skip
    first, *others = runs["bitsandbytes"]
    for i, other in enumerate(others):
        bottom.plot(
            steps, [abs(x - y) for x, y in zip(first["losses"], other["losses"], strict=True)], color="#c44e52",
            linewidth=0.8, alpha=0.6, label="bitsandbytes, two seeds" if i == 0 else None,
        )  # fmt: skip
    top.set_ylabel(f"loss (running mean of {SMOOTHING} steps)")
    top.set_title(f"QLoRA on the bundled model, {len(runs['halfbyte'])} seeds", fontsize=11)
    top.legend(frameon=False)
    bottom.set_yscale("log")
    bottom.set_ylim(1e-9, 3)  # room for the legend
    bottom.set_ylabel("|difference of losses|")
    bottom.set_xlabel("step")
    bottom.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def table(report: dict[str, Any]) -> str:
    rows = [
        ("seconds a step, median", "step_seconds_median", 1, ".3f"),
        ("seconds a step, 10th percentile", "step_seconds_p10", 1, ".3f"),
        ("CPU seconds a step, median", "step_cpu_seconds", 1, ".3f"),
        ("seconds of training", "train_seconds", 1, ".1f"),
        ("seconds of the process", "process_seconds", 1, ".1f"),
        ("CPU seconds of the process", "cpu_seconds", 1, ".1f"),
        ("peak memory, MB", "peak_bytes", 1e6, ".0f"),
    ]
    lines = [f"{'':34}{'bitsandbytes':>14}{'halfbyte':>14}"]
    for title, key, unit, how in rows:
        values = [format(report[name][key] / unit, how) for name in ("bitsandbytes", "halfbyte")]
        lines.append(f"{title:34}{values[0]:>14}{values[1]:>14}")
    tails = [statistics.fmean(report["last_losses"][n]) for n in ("bitsandbytes", "halfbyte")]
    lines.append(f"{'loss, mean of the last 20 steps':34}{tails[0]:>14.4f}{tails[1]:>14.4f}")
    ratios = ", ".join(f"{r:.2f}" for r in report["step_ratio_of_pairs"])
    lines.append(f"step time, halfbyte / bitsandbytes, each pair of runs: {ratios}")
    lines.append(
        f"|loss difference|, same seed: mean {report['mean_loss_difference']:.5f}, "
        f"largest {report['largest_loss_difference']:.5f}"
    )
    if report["mean_loss_difference_between_seeds"] is not None:
        lines.append(
            f"|loss difference|, two seeds of bitsandbytes: mean {report['mean_loss_difference_between_seeds']:.5f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, help="of torch and of halfbyte; default: each one's own choice"
    )
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "data" / "tiny-llama")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "heldout.txt")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "benchmarks" / "qlora.json")
    parser.add_argument("--turns", action="store_true", help="only times, step by step in turns")
    args = parser.parse_args()
    if args.threads:
        os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HALFBYTE_NUM_THREADS": str(args.threads)}
    if args.turns:
        for seed in range(args.seeds):
            seconds = {name: s[2:] for name, s in take_turns(seed, args.steps, args.model, args.text).items()}
            ratios = [b / a for a, b in zip(seconds["bitsandbytes"], seconds["halfbyte"], strict=True)]
            quartiles = ", ".join(f"{q:.3f}" for q in statistics.quantiles(ratios, n=4))
            for name, each in seconds.items():
                p10 = statistics.quantiles(each, n=10)[0]
                print(f"{name}: {statistics.median(each):.4f} s a step, 10th percentile {p10:.4f} s")
            print(f"step time, halfbyte / bitsandbytes, quartiles over the steps: {quartiles}")
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in COMMANDS}
    for seed in range(args.seeds):
        names = list(COMMANDS) if seed % 2 == 0 else list(COMMANDS)[::-1]
        for name in names:
            runs[name].append(run_once(name, seed, args.steps, args.model, args.text))
            done = runs[name][-1]
            print(
                f"seed {seed} {name}: {done['process_seconds']:.1f} s, {done['peak_bytes'] / 1e6:.0f} MB, "
                f"last loss {done['losses'][-1]:.4f}",
                file=sys.stderr,
            )
    report = compare(runs)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "settings": vars(args),
        **report,
        "runs": runs,
    }
    args.output.write_text(json.dumps(content, indent=1, default=str))
    picture(runs, args.output.with_suffix(".svg"))
    print(table(report))


if __name__ == "__main__":
    main()
