"""What a number needs beside it: machine, compiler, revision, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte import _C


def _revision() -> str:
    """The commit that is measured, or the version of an installed package."""
    root = Path(halfbyte.__file__).parents[2]
    if not (root / "csrc").is_dir():
        return halfbyte.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return halfbyte.__version__
    return (done.stdout.splitlines() or [halfbyte.__version__])[0]


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
        "compiler": _C.build_info()["compiler"],
        "revision": _revision(),
        "command": shlex.join([*overrides, *command]),
        "load_average": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def lines_of(description: dict[str, Any]) -> list[str]:
    """What a reader of a table wants to know of it; the description has "isa" as well."""
    d = description
    return [
        f"{d['cpu']}, {d['cpus']} CPUs, {d['isa']}, load {d['load_average']}",
        f"{d['compiler']}; {d['system']}; revision {d['revision']}",
        f"$ {d['command']}",
    ]
