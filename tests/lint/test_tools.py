"""The formatters and checkers have nothing to say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from common import ROOT, files

SUFFIXES = {".c", ".h", ".cpp", ".cu", ".cuh"}


def tool(*names: str) -> str:
    """The first of these programs that is beside the interpreter (make puts it there) or on the path."""
    for name in names:
        beside = Path(sys.executable).parent / name
        found = str(beside) if beside.exists() else shutil.which(name)
        if found is not None:
            return found
    pytest.skip(f"{names[0]} is not installed; `make` installs it")


def check(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


def test_ruff_check():
    check(tool("ruff"), "check", ".")


def test_ruff_format():
    check(tool("ruff"), "format", "--check", ".")


def test_clang_format():
    """Version 19, whose output the sources have; other versions disagree in places. Tables (.def) are laid out
    by hand."""
    command = tool("clang-format-19", "clang-format")
    version = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
    if " 19." not in version:
        pytest.skip(f"needs clang-format 19, found {version.strip()}")
    sources = [str(p) for p in files() if p.suffix in SUFFIXES]
    assert len(sources) > 50
    check(command, "--dry-run", "-Werror", *sources)


def test_stub_matches_the_module():
    """_C.pyi says what _C has: names, parameters, defaults."""
    pytest.importorskip("mypy")
    check(
        sys.executable,
        "-m",
        "mypy.stubtest",
        "halfbyte._C",
        "--mypy-config-file",
        str(ROOT / "pyproject.toml"),
    )
