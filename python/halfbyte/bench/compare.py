"""Contests in processes of their own, one for each number of threads, and their table."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte import _C
from halfbyte.bench import environment

PACKAGES = ("halfbyte", "torch", "bitsandbytes", "llama-cpp-python", "numpy")
CONTESTS = (
    "layers",
    "one row",
    "rows",
    "cached",
    "dense",
    "grad",
    "quantize",
    "optimizers",
    "steps",
    "int8",
    "calls",
    "import",
)
SHARES = ("of_read", "of_peak", "of_copy")
Row = dict[str, Any]


class ContestFailed(RuntimeError):
    """The process of a contest ended with an error."""


@dataclass(frozen=True)
class Options:
    """What a process of contests is told."""

    contests: Sequence[str]  # of CONTESTS
    size: int = 4096  # outputs of the layers
    depth: int = 4096  # inputs
    seconds: float = 4.0  # for a contest, more or less
    rows: Sequence[int] = (1, 8, 64)  # of x, in "layers"
    pin: bool = False  # keep threads on CPUs of their own


def versions() -> dict[str, str | None]:
    """The packages measured; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["halfbyte"] = halfbyte.__version__  # of the one imported, installed or not
    return found


def compare(options: Options, threads: Sequence[int]) -> dict[str, Any]:
    """Measure the contests with each number of threads.

    Returns
    -------
    dict
        "environment": machine and versions; "absent": packages that are not installed; "rows": an entry of
        `turns.rows` each, with "threads".

    Raises
    ------
    ContestFailed
        The process of a contest failed; its own message has gone to stderr.
    ModuleNotFoundError
        A contest needs torch.
    """
    needing = [name for name in options.contests if name != "layers"]
    if needing and importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError(f"bench: the contest {needing[0]!r} needs torch", name="torch")
    rows = [row for n in threads for row in _in_process(options, n)]
    described = environment.describe() | {
        "isa": _C.cpu_info()["used"],
        "threads": list(threads),
        "pinned": options.pin,
        "size": [options.size, options.depth],
        "versions": versions(),
    }
    absent = [name for name, version in described["versions"].items() if version is None]
    return {"environment": described, "absent": absent, "rows": rows}


def _in_process(options: Options, threads: int) -> list[Row]:
    names = ("OMP_NUM_THREADS", "HALFBYTE_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    # OpenBLAS, which NumPy has, spins 2^26 cycles after a call: it would meet the next in turn.
    environ = os.environ | dict.fromkeys(names, str(threads)) | {"OPENBLAS_THREAD_TIMEOUT": "20"}
    package = str(Path(halfbyte.__file__).parents[1])  # the one that is imported here, installed or not
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    module = "halfbyte.bench.contests" if importlib.util.find_spec("torch") else "halfbyte.bench.layers"
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [sys.executable, "-m", module, json.dumps(asdict(options)), str(threads), file.name]
        done = subprocess.run(command, env=environ)
        if done.returncode:
            raise ContestFailed(
                f"bench: the process with {threads} threads failed with status {done.returncode}"
            )
        result: list[Row] = json.load(file)
        return result


def text_of(result: dict[str, Any]) -> str:
    """The result as a table to read."""
    found = result["environment"]["versions"].items()
    lines = [
        *environment.lines_of(result["environment"]),
        "  ".join(f"{name} {version or 'absent'}" for name, version in found),
    ]
    title = None
    for row in result["rows"]:
        if (row["title"], row["threads"], row.get("reference")) != title:
            title = row["title"], row["threads"], row.get("reference")
            lines += ["", f"{row['title']}, {row['threads']} threads, ratios to {row.get('reference', '-')}"]
            lines.append(f"  {'':44}{'us':>12}{'median us':>14}{'':30}{'ratio':>9}")
        rate = f"{row['gb_per_s']:8.1f} GB/s" if "gb_per_s" in row else " " * 13
        rate += f"{row['gflop_per_s']:9.0f} GFLOP/s" if "gflop_per_s" in row else " " * 17
        ratio = f"{row['ratio']:9.2f}" if "ratio" in row else " " * 9
        shares = "".join(f"  {key} {row[key]:.2f}" for key in SHARES if key in row)
        times = f"{row['p10_us']:12,.1f}{row['median_us']:14,.1f}"
        lines.append(f"  {row['name']:44}{times}{rate}{ratio}{shares}".rstrip())
    return "\n".join(lines)
