"""What is right and wrong with halfbyte on this machine: versions, limits, and known answers of every kernel.

Each check is a function that returns (status, detail, fix). The kernels are compared with references written in
numpy float64 beside them, at odd sizes, over strided views, in every dtype: exactly where the maths is exact,
within a derived bound elsewhere. Nothing here imports torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

PASS, WARN, FAIL = "pass", "warn", "fail"
Outcome = tuple[str, str, str | None]

# The oldest releases that are tested; older ones get a warning.
_OLDEST = {"torch": (2, 4), "transformers": (4, 56), "accelerate": (1, 1), "peft": (0, 14), "numpy": (1, 24)}
_NEEDED_FOR = {
    "torch": "halfbyte.torch",
    "transformers": "loading models (halfbyte.load, eval, demo)",
    "accelerate": "loading models with device_map",
    "peft": "training adapters",
}
_FORK_SECONDS = 10.0


@dataclass(frozen=True)
class Check:
    """The outcome of one check; `status` is "pass", "warn" or "fail"."""

    name: str
    status: str
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All checks. `ok` when none failed."""

    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.status != FAIL for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The document of `halfbyte doctor --json`, schema "halfbyte.doctor/1"."""
        checks = [{"name": c.name, "status": c.status, "detail": c.detail, "fix": c.fix} for c in self.checks]
        return {"schema": "halfbyte.doctor/1", "ok": self.ok, "checks": checks}

    def __str__(self) -> str:
        lines = []
        for check in self.checks:
            lines.append(f"{check.status.upper():<5} {check.name:<26} {check.detail}")
            if check.fix:
                lines.append(f"      {'':<26} fix: {check.fix}")
        counts = {status: sum(c.status == status for c in self.checks) for status in (FAIL, WARN)}
        found = [f"{n} {word}" for n, word in ((counts[FAIL], "failed"), (counts[WARN], "to look at")) if n]
        lines.append(f"{len(self.checks)} checks: {', '.join(found) or 'all is well'}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{c.status}</td><td>{escape(c.name)}</td><td>{escape(c.detail)}</td></tr>"
            for c in self.checks
        )
        return f"<table>{rows}</table>"


def diagnose() -> Diagnosis:
    """Run all checks. A check that raises has failed, with the exception as its detail."""
    checks = []
    for name, function in _all_checks():
        try:
            status, detail, fix = function()
        except Exception as error:  # whatever it is, it is the finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            status, fix = FAIL, "report this with the output of `halfbyte doctor --json`"
            detail = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        checks.append(Check(name, status, _redact(detail), fix))
    return Diagnosis(checks)


def _redact(text: str) -> str:
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def _all_checks() -> Iterator[tuple[str, Callable[[], Outcome]]]:
    yield "python", _python
    yield "numpy", lambda: _version("numpy", required=True)
    yield "extension module", _extension
    if importlib.util.find_spec("halfbyte._C") is not None:
        yield "processor", _processor
        yield "threads", _threads
        yield "cuda", _cuda
    yield "memory", _memory
    yield "disk", _disk
    yield "bitsandbytes", _bitsandbytes
    for package in ("torch", "transformers", "accelerate", "peft"):
        yield package, lambda package=package: _version(package)
    yield "environment", _environment
    if importlib.util.find_spec("halfbyte._C") is not None:
        from halfbyte.known_answers import KNOWN_ANSWERS

        for name, function in KNOWN_ANSWERS.items():
            yield name, lambda function=function: (PASS, function(), None)
        yield "fork", _fork


def _python() -> Outcome:
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    detail = f"{platform.python_version()} on {platform.platform()}{'' if gil else ', free-threaded'}"
    return PASS, detail, None


def _version(package: str, required: bool = False) -> Outcome:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if required:
            return FAIL, "not installed", f"pip install {package}"
        return PASS, f"not installed; only {_NEEDED_FOR[package]} needs it", None
    oldest = _OLDEST[package]
    numbers = tuple(int("".join(filter(str.isdecimal, part)) or 0) for part in version.split(".")[:2])
    if numbers < oldest:
        wanted = ".".join(map(str, oldest))
        return (FAIL if required else WARN), f"{version}, older than {wanted}", f"pip install -U {package}"
    return PASS, version, None


def _extension() -> Outcome:
    if importlib.util.find_spec("halfbyte._C") is None:
        return FAIL, "halfbyte._C is not built", "pip install . (needs a C compiler and Python.h)"
    from halfbyte import _C

    info = _C.build_info()
    return PASS, ", ".join(f"{key} {_short(value)}" for key, value in info.items()), None


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _processor() -> Outcome:
    from halfbyte import _C

    info = _C.cpu_info()
    detail = f"{platform.machine()}, best kernels: {info['detected']}, used: {info['used']}"
    if info["amx"] == "off":
        refused = os.environ.get("HALFBYTE_CPU") == "amx"
        detail += ", AMX " + ("refused by the system" if refused else "left alone (see HALFBYTE_CPU)")
    if info["used"] != info["detected"]:
        return WARN, detail + " (HALFBYTE_CPU)", "unset HALFBYTE_CPU"
    return PASS, detail, None


def _cuda() -> Outcome:
    """A machine without a GPU is fine; a GPU that halfbyte cannot use deserves a word."""
    from halfbyte import _C

    info = _C.cuda_info()
    if info["available"]:
        names = [f"{d['name']} (sm_{d['capability'][0]}{d['capability'][1]})" for d in info["devices"]]
        return PASS, f"driver {info['driver']}, runtime {info['runtime']}: {', '.join(names)}", None
    if not os.path.exists("/dev/nvidiactl"):
        return PASS, f"not used: {info['reason']}", None
    fix = (
        "update the NVIDIA driver" if info["driver"] else "install the CUDA toolkit, then reinstall halfbyte"
    )
    return WARN, info["reason"], fix


def _threads() -> Outcome:
    from halfbyte import _C

    used, cores = _C.get_num_threads(), os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = _cpu_quota()
    detail = f"{used} used, {cores} processors, {affinity} allowed"
    allowed = affinity if quota is None else min(affinity, quota)
    if quota is not None:
        detail += f", control group gives {quota:g}"
    if used > max(1, -(-allowed // 1)):
        return WARN, detail, "set HALFBYTE_NUM_THREADS to what the control group gives"
    return PASS, detail, None


def _cpu_quota() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _memory() -> Outcome:
    from halfbyte.memory import available_memory, total_memory

    available = available_memory()
    detail = f"{available.nbytes:,} bytes available ({available.limited_by}), {total_memory():,} in all"
    return (PASS if available.nbytes >= 1 << 30 else WARN), detail, None


def _disk() -> Outcome:
    parts = []
    status = PASS
    for label, folder in (("here", os.getcwd()), ("temporary", tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        parts.append(f"{label} {free:,} bytes free")
        if free < 1 << 30:
            status = WARN
    return status, ", ".join(parts), None


def _bitsandbytes() -> Outcome:
    """Which module `import bitsandbytes` would find."""
    loaded = sys.modules.get("bitsandbytes")
    spec = getattr(loaded, "__spec__", None) or importlib.util.find_spec("bitsandbytes")
    if spec is None:
        return PASS, "not installed; halfbyte.install() or `halfbyte run` provides it", None
    version = importlib.metadata.version("bitsandbytes")
    if str(spec.origin).startswith(str(Path(__file__).parent)):
        return PASS, f"halfbyte's stand-in ({version})", None
    return PASS, f"the real one, {version}, at {spec.origin}; halfbyte.install() takes its place", None


def _environment() -> Outcome:
    names = sorted(n for n in os.environ if n.startswith("HALFBYTE_"))
    names += [n for n in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS") if n in os.environ]
    detail = ", ".join(f"{name}={os.environ[name]}" for name in names) or "nothing set"
    if "BNB_CUDA_VERSION" in os.environ:
        return WARN, detail, "unset BNB_CUDA_VERSION: it is ignored"
    return PASS, detail, None


def _fork() -> Outcome:
    """A child of fork() must be able to work, though its parent's threads are gone."""
    import signal
    import time

    from halfbyte.known_answers import KNOWN_ANSWERS

    first = next(iter(KNOWN_ANSWERS.values()))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            first()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + _FORK_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return (
                (PASS, "a child works", None) if code == 0 else (FAIL, f"the child ended with {code}", None)
            )
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return FAIL, f"the child hung for {_FORK_SECONDS:g} s", None
