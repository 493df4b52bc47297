"""How much memory a model takes, in each format, and what fits here.

    peak = runtime + weights + max(cache, loading)

checkpoint/footprint.py computes the parts for a model; the sum and the question whether it fits are here.

Available memory is what the kernel can give without swapping (MemAvailable), or less where a control group
(container) or an address-space limit allows less. A control group's inactive file cache counts as available:
the kernel drops it first.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

# Interpreter, torch, transformers, and what transformers imports when it loads its first model: 280 MiB private,
# measured with torch 2.13, transformers 5.23 and accelerate on a model of 3 MB, and room for activations of a
# short prompt.
RUNTIME_BYTES = 320 << 20


class MemoryPlanError(MemoryError):
    """A model does not fit. `plan` is the MemoryPlan, `missing_bytes` what is lacking for the route asked for."""

    def __init__(self, message: str, plan: MemoryPlan, missing_bytes: int):
        super().__init__(message)
        self.plan = plan
        self.missing_bytes = missing_bytes


@dataclass(frozen=True)
class Available:
    """Memory that can be used, in bytes, and what limits it."""

    nbytes: int
    limited_by: str


@dataclass(frozen=True)
class Route:
    """One way to hold the model. All in bytes; `needed` is the peak: weights, then the larger of cache and loading."""

    name: str
    weights: int
    cache: int
    loading: int

    @property
    def needed(self) -> int:
        return RUNTIME_BYTES + self.weights + max(self.cache, self.loading)


@dataclass
class MemoryPlan:
    """What a model takes here.

    Attributes
    ----------
    model : str
    parameters : int
    context, batch : int
        Tokens and sequences that `cache` is for.
    available : Available
    routes : list of Route
        Largest first; a quantized checkpoint has the one it is in.
    notes : list of str
    """

    model: str
    parameters: int
    context: int
    batch: int
    available: Available
    routes: list[Route]
    notes: list[str] = field(default_factory=list)

    def fitting(self) -> list[Route]:
        """The routes that fit, largest first."""
        return [route for route in self.routes if route.needed <= self.available.nbytes]

    def route(self, name: str) -> Route:
        return next(route for route in self.routes if route.name == name)

    def require(self, name: str) -> None:
        """Raise MemoryPlanError unless the route called `name` fits."""
        route = self.route(name)
        missing = route.needed - self.available.nbytes
        if missing <= 0:
            return
        fits = [other for other in self.fitting() if other.name != name]
        instead = (
            "; would fit: " + ", ".join(f"{other.name} ({other.needed:,} bytes)" for other in fits)
            if fits
            else "; no format that halfbyte has would fit"
        )
        raise MemoryPlanError(
            f"'{self.model}' as {name} takes {route.needed:,} bytes ({route.weights:,} of them weights), "
            f"{self.available.nbytes:,} are available ({self.available.limited_by}): "
            f"{missing:,} bytes are missing{instead}",
            self,
            missing,
        )

    def to_json(self) -> dict[str, Any]:
        """The document of `halfbyte plan --json`, schema "halfbyte.plan/1"."""
        return {
            "schema": "halfbyte.plan/1",
            "model": self.model,
            "parameters": self.parameters,
            "context": self.context,
            "batch": self.batch,
            "available_bytes": self.available.nbytes,
            "limited_by": self.available.limited_by,
            "runtime_bytes": RUNTIME_BYTES,
            "routes": [
                {
                    "route": r.name,
                    "weight_bytes": r.weights,
                    "bits_per_parameter": round(8 * r.weights / self.parameters, 4)
                    if self.parameters
                    else 0.0,
                    "cache_bytes": r.cache,
                    "loading_bytes": r.loading,
                    "needed_bytes": r.needed,
                    "fits": r.needed <= self.available.nbytes,
                }
                for r in self.routes
            ],
            "notes": self.notes,
        }

    def _table(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("", "weights", "bits", "cache", "loading", "peak", "fits")]
        for r in self.to_json()["routes"]:
            sizes = [
                f"{r[key]:,}" for key in ("weight_bytes", "cache_bytes", "loading_bytes", "needed_bytes")
            ]
            bits = f"{r['bits_per_parameter']:.2f}"
            rows.append((r["route"], sizes[0], bits, *sizes[1:], "yes" if r["fits"] else "no"))
        return rows

    def __str__(self) -> str:
        rows = self._table()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            f"{self.model}: {self.parameters:,} parameters, {self.context:,} tokens x {self.batch}",
            f"available: {self.available.nbytes:,} bytes ({self.available.limited_by})",
        ]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        lines.append(
            f"peak: {RUNTIME_BYTES:,} for Python and torch, the weights, and the larger of cache and loading"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), *self._advice()])

    def _advice(self) -> list[str]:
        """What to type when the model does not fit as it is, but in a smaller format."""
        fitting = self.fitting()
        if not self.routes or self.routes[0] in fitting:
            return []
        if not fitting:
            return ["nothing fits: a smaller model, a shorter --context, or more memory is needed"]
        format_, _, nested = fitting[0].name.partition(" + ")
        flags = format_ + (" --double-quant" if nested else "")
        return [f"to make it fit: halfbyte quantize {self.model} -o OUT --to {flags}"]

    def __repr__(self) -> str:
        fits = ", ".join(route.name for route in self.fitting()) or "nothing"
        return f"<MemoryPlan {self.model}: {fits} fits in {self.available.nbytes:,} bytes>"

    def _repr_html_(self) -> str:
        head, *body = self._table()
        cells = "".join(f"<th>{escape(c)}</th>" for c in head)
        rows = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in body)
        caption = (
            f"{escape(self.model)}: {self.parameters:,} parameters, bytes; "
            f"{self.available.nbytes:,} available ({escape(self.available.limited_by)})"
        )
        return f"<table><caption>{caption}</caption><tr>{cells}</tr>{rows}</table>"


# ---- what is available ----


def available_memory(root: str | os.PathLike[str] = "/") -> Available:
    """Memory that this process can still use. `root` is where /proc and /sys are looked for."""
    base = Path(root)
    candidates = [Available(_meminfo(base), "free memory")]
    candidates += [a for a in (_cgroup_v2(base), _cgroup_v1(base), _address_space(base)) if a is not None]
    return min(candidates, key=lambda a: a.nbytes)


def total_memory(root: str | os.PathLike[str] = "/") -> int:
    """Physical memory of the machine, in bytes."""
    return _meminfo(Path(root), "MemTotal")


def _meminfo(base: Path, key: str = "MemAvailable") -> int:
    for line in _text(base / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_v2(base: Path) -> Available | None:
    """The tightest memory.max from the process's group up to the root."""
    path = next(
        (ln[3:] for ln in _text(base / "proc/self/cgroup").splitlines() if ln.startswith("0::")), None
    )
    if path is None:
        return None
    top = base / "sys/fs/cgroup"
    group = top / path.strip("/")
    tightest = None
    for folder in [group, *group.parents]:
        limit = _number(folder / "memory.max")
        if limit is not None:
            used = (_number(folder / "memory.current") or 0) - _stat(folder, "inactive_file")
            left = max(0, limit - max(0, used))
            tightest = left if tightest is None else min(tightest, left)
        if folder == top:
            break
    return None if tightest is None else Available(tightest, "memory.max of the control group")


def _cgroup_v1(base: Path) -> Available | None:
    for line in _text(base / "proc/self/cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3 and "memory" in fields[1].split(","):
            top = base / "sys/fs/cgroup/memory"
            for folder in (top / fields[2].strip("/"), top):  # inside a container the path is the host's
                limit = _number(folder / "memory.limit_in_bytes")
                if limit is not None and limit < 1 << 60:  # "no limit" is the largest page-aligned int64
                    used = (_number(folder / "memory.usage_in_bytes") or 0) - _stat(
                        folder, "total_inactive_file"
                    )
                    return Available(max(0, limit - max(0, used)), "memory limit of the control group")
    return None


def _address_space(base: Path) -> Available | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    pages = _text(base / "proc/self/statm").split()
    used = int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0
    return Available(max(0, limit - used), "address-space limit (ulimit -v)")


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _stat(folder: Path, key: str) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
