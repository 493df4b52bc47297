"""What a number needs beside it: machine, compiler, revision, command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_JSON = ROOT / "build" / "benchmarks"


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name") or found.get("CPU part") or platform.machine()
    if "cpu family" in found:
        name += f" (family {found['cpu family']} model {found.get('model', '?')})"
    return name


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Machine, system, compiler, revision, command line, load and time of this run."""
    command = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    overrides = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("HALFBYTE_")]
    return {
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpus": _cpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "compiler": _first_line([*os.environ.get("CC", "cc").split(), "--version"]),
        "revision": _first_line(["git", "describe", "--always", "--dirty"]),
        "command": shlex.join([*overrides, *command]),
        "load_average": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def print_description(description: dict[str, Any]) -> None:
    d = description
    print(f"{d['cpu']}, {d['cpus']} CPUs, {d['isa']}, load {d['load_average']}")
    print(f"{d['compiler']}; {d['system']}; revision {d['revision']}")
    print(f"$ {d['command']}", flush=True)


def write_json(path: Path | None, default: str, result: dict[str, Any]) -> Path:
    """Writes `result` to `path`, or to build/benchmarks/<default>.json."""
    target = path or DEFAULT_JSON / f"{default}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    return target
