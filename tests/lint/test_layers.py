"""Includes and imports point downward only (docs/architecture.md, "The shape of the whole")."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from common import ROOT, c_sources, files, read

INTRINSICS = re.compile(r"^(\w*intrin|arm_neon|arm_sve|simde/.*)\.h$|^simde/")
# Folder under csrc -> folders whose headers it may include ("." is its own).
MAY_INCLUDE = {"core": {"core"}, "cpu": {"core", "cpu", "."}, "python": {"core", "python"}}
# An instruction set may use the inline helpers of one whose instructions it implies.
BELOW = {isa: {"avx512", "avx2"} for isa in ("avx512vnni", "avx512vbmi", "avx512bf16", "amx")} | {
    "avxvnni": {"avx2"}
}
LIBC = {
    "errno.h", "float.h", "limits.h", "math.h", "stdarg.h", "stdatomic.h", "stdbool.h", "stddef.h", "stdint.h",
    "stdio.h", "stdlib.h", "string.h", "inttypes.h",
}  # fmt: skip
SYSTEM = {
    "core": LIBC | {"pthread.h", "sched.h", "signal.h", "time.h", "unistd.h", "cpuid.h", "sys/auxv.h", "dlfcn.h",
                    "linux/futex.h", "sys/syscall.h", "sys/mman.h", "link.h"},
    "cpu": LIBC,
    "python": LIBC | {"Python.h", "structmember.h", "numpy/arrayobject.h", "dlpack/dlpack.h", "pthread.h", "time.h"},
}  # fmt: skip


def includes(path: Path) -> list[tuple[str, bool]]:
    """(name, in quotation marks) of each include."""
    found = re.findall(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)', read(path), re.MULTILINE)
    return [(quoted or angled, bool(quoted)) for quoted, angled in found]


@pytest.mark.parametrize("path", c_sources(), ids=str)
def test_c_includes_point_downward(path):
    layer = path.parts[1] if path.parts[0] == "csrc" else path.parts[0]
    if layer not in MAY_INCLUDE:
        pytest.skip(f"no rule for {layer}")
    for name, quoted in includes(path):
        if str(path) == "csrc/cpu/simd.h":
            continue  # the one door for intrinsics
        assert not INTRINSICS.match(name), f"{path}: <{name}>; include cpu/simd.h"
        if not quoted:
            assert name in SYSTEM[layer], f"{path}: <{name}> is not for {layer}"
            continue
        folder = name.split("/")[0] if "/" in name else "."
        if folder == ".":
            assert (ROOT / path.parent / name).exists(), f"{path}: {name} is not beside it"
        assert folder in MAY_INCLUDE[layer] | {"."}, f"{path}: {name} lies above {layer}"
        parts = Path(name).parts
        if layer == "cpu" and parts[0] == "cpu" and len(parts) > 2:
            isa = path.parts[2]
            assert parts[1] in {isa, *BELOW.get(isa, ())}, f"{path}: {name} is of another instruction set"


# Where torch and the packages that need it may be imported when a module is loaded.
TORCH_FOLDERS = (
    "python/halfbyte/torch",
    "python/halfbyte/bitsandbytes",
    "python/halfbyte/integrations/",
    "python/halfbyte/bench/contests.py",
)
NEEDS_TORCH = {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl"}
# A module of this part of the package -> parts that it never imports, not even later in a function.
NEVER = {
    "checkpoint": {"torch", "bitsandbytes", "cli", "shim", "loading"},
    "formats": {"torch", "bitsandbytes", "cli", "shim", "loading", "checkpoint"},
    "memory": {"torch", "bitsandbytes", "cli", "checkpoint"},
    "torch": {"bitsandbytes", "cli", "checkpoint", "loading"},
    "bitsandbytes": {"cli", "checkpoint", "loading"},
}
PACKAGE = [p for p in files("*.py") if p.parts[:2] == ("python", "halfbyte")]
# `python -m halfbyte.bitsandbytes` is a command like those of the command line.
COMMANDS = {"__main__.py"}


def imported(path: Path) -> list[tuple[str, bool]]:
    """(absolute module name, executed when the module is loaded)."""
    package = path.with_suffix("").parts[1:-1]
    tree = ast.parse(read(path))
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
        for n in ast.walk(f)
    }
    checking = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for n in ast.walk(i)
    }
    found = []
    for node in ast.walk(tree):
        at_load = id(node) not in inside
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, at_load) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found.append((module, at_load))
            found += [(f"{module}.{alias.name}", at_load) for alias in node.names]
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_python_imports_point_downward(path):
    part = path.parts[2].removesuffix(".py")
    for module, at_load in imported(path):
        names = module.split(".")
        if at_load and not str(path).startswith(TORCH_FOLDERS):
            assert names[0] not in NEEDS_TORCH, f"{path} imports {module} when it is loaded"
            assert names[:2] not in (["halfbyte", "torch"], ["halfbyte", "bitsandbytes"]), (
                f"{path} imports {module}"
            )
        if names[0] == "halfbyte" and len(names) > 1:
            above = NEVER.get(part, set()) - ({"cli"} if path.name in COMMANDS else set())
            assert names[1] not in above, f"{path} imports {module}, which lies above it"


def test_the_rules_see_what_they_should():
    """A rule that finds no include and no import would pass everything."""
    assert ("core/ops.h", True) in includes(Path("csrc/core/ops_4bit.c")) or any(
        name.startswith("core/") for name, _ in includes(Path("csrc/core/ops_4bit.c"))
    )
    assert ("torch", False) in imported(Path("python/halfbyte/evaluation.py"))
    assert len(PACKAGE) > 5 and len(c_sources()) > 20
