"""The repository's files, for the lint tests."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where there is no git (an unpacked source distribution), these folders are searched.
FOLDERS = ("csrc", "cuda", "python", "tests", "benchmarks", "docs", ".ci")


@cache
def files(pattern: str = "*") -> tuple[Path, ...]:
    """Every file under version control whose name matches, relative to the root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [Path(line) for line in listed.stdout.splitlines()]
    else:
        paths = [p.relative_to(ROOT) for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file()]
        paths += [p.relative_to(ROOT) for p in ROOT.glob("*") if p.is_file()]
    return tuple(p for p in sorted(paths) if p.match(pattern) and (ROOT / p).is_file())


@cache
def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def code_of_c(path: Path) -> str:
    """C source without comments; strings become empty."""
    text = re.sub(r"//[^\n]*", "", read(path))
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', text)


def c_sources() -> list[Path]:
    return [
        p
        for pattern in ("*.c", "*.h", "*.def", "*.cu", "*.cuh")
        for p in files(pattern)
        if p.parts[0] in ("csrc", "cuda")
    ]
