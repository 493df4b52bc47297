"""Rules that a search of the sources can check."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from common import ROOT, c_sources, code_of_c, files, read

TEXT = [
    p
    for p in files()
    if p.suffix in {".c", ".h", ".def", ".py", ".pyi", ".md", ".toml", ".txt", ".yml", ".cu"}
]
TEXT += [p for p in files() if p.name in {"Makefile", "run"}]
HERE = Path("tests/lint")

# Over 600 lines, and why.
LARGE: dict[str, str] = {
    "tests/py/test_tensor_exchange.py": "one producer made of ctypes serves every case",
    "tests/c/test_linear4.c": "three ways to multiply and two operations share their matrices and bounds",
    "tests/compat/test_functional_bitsandbytes.py": "one comparison of all functions, with helpers that they share",
}


@pytest.mark.parametrize("path", c_sources(), ids=str)
def test_native_code_never_ends_or_talks(path):
    calls = re.findall(
        r"\b(exit|_exit|quick_exit|abort|assert|printf|fprintf|puts|fputs|perror)\s*\(", code_of_c(path)
    )
    assert not calls, f"{path} calls {calls}"


def test_constants_of_codebooks_have_one_definition():
    digits = {d for d in re.findall(r"0\.\d{6,}", read(Path("csrc/core/formats.def")))}
    assert len(digits) > 30
    stems = {d[:8] for d in digits} - {"0.666666", "0.333333", "0.166666", "0.000000"}
    for path in TEXT:
        if path.parts[0] in ("tests", "docs") or str(path) == "csrc/core/formats.def":
            continue
        found = {stem for stem in stems if stem in read(path)}
        assert not found, f"{path} repeats constants of formats.def: {sorted(found)}"


def test_most_threads_of_the_command_line_are_those_of_the_pool():
    """The command line knows them without importing anything native."""
    (pool,) = re.findall(r"HB_MAX_THREADS = (\d+)", read(Path("csrc/core/thread_count.h")))
    (line,) = re.findall(r"^MAX_THREADS = (\d+)", read(Path("python/halfbyte/cli/arguments.py")), re.M)
    assert line == pool


def test_no_open_ends():
    pattern = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    for path in TEXT:
        if path.parts[:2] == HERE.parts or path.parts[:2] == ("tests", "data"):
            continue
        assert not pattern.search(read(path)), f"{path}: an open end needs an issue, not a comment"


def test_no_paths_of_somebodys_machine():
    pattern = re.compile(r"(?<![\w.~])/(?:work|home|root|Users)/\w")
    for path in TEXT:
        if path.parts[:2] != HERE.parts:
            found = pattern.search(read(path))
            assert not found, f"{path}: {found.group()}"


@pytest.mark.parametrize("path", files("*.py"), ids=str)
def test_python_is_that_of_the_oldest_version(path):
    """3.10, by the parser as far as it goes; what it lets pass is looked for."""
    for node in ast.walk(ast.parse(read(path), feature_version=(3, 10))):
        index = node.slice if isinstance(node, ast.Subscript) else None
        if isinstance(index, ast.Tuple) and any(isinstance(e, ast.Starred) for e in index.elts):
            # The tree is the same with and without parentheses; with them it is old syntax.
            text = ast.get_source_segment(read(path), index) or ""
            assert text.startswith("("), f"{path}:{node.lineno}: a star in an index is new in Python 3.11"


def test_file_sizes():
    """100 to 400 lines is the aim; more than 600 needs a reason in LARGE, and a reason needs a large file."""
    source = {".c", ".h", ".py", ".cu", ".cuh"}
    large = {str(p): read(p).count("\n") for p in files() if p.suffix in source and read(p).count("\n") > 600}
    unexplained = {name: lines for name, lines in large.items() if name not in LARGE}
    assert not unexplained, f"split these or give a reason in LARGE: {unexplained}"
    assert set(LARGE) <= set(large), f"no longer large: {set(LARGE) - set(large)}"
    assert read(Path("setup.py")).count("\n") <= 248  # two compilers, six instruction sets, eight GPUs
    assert read(Path("python/halfbyte/__init__.py")).count("\n") <= 60


def test_names_of_test_files_are_unique():
    """pytest imports test files by their bare names."""
    names = Counter(p.name for p in files("*.py") if p.parts[0] == "tests" and p.name != "conftest.py")
    assert not [name for name, count in names.items() if count > 1]


# ---- kernels --------------------------------------------------------------------------------------------

ISAS = sorted(p.name for p in (ROOT / "csrc/cpu").iterdir() if p.is_dir())
IO = "(?:_(?:f32|bf16|f16|s32))"


def kernels(path: Path) -> list[str]:
    """Kernels that a file defines, in order, without io and ISA: code4_encode, nf4_gemv, ..."""
    isa = path.parts[2]
    text = code_of_c(path).replace("_##io##_", "_f32_")
    found = re.findall(rf"^(?:#define .*\\\n)?[ \t]*[\w \*]*?\bhb_(\w+?)_{isa}\s*\(", text, re.MULTILINE)
    unique = dict.fromkeys(re.sub(IO + "$", "", name) for name in found)
    return [name for name in unique if not name.startswith("table")]


def test_kernels_keep_one_order():
    """The same file has its kernels in the same order in each ISA folder: a diff is the review."""
    compared = 0
    for reference in files("csrc/cpu/ref/*.c"):
        order = {name: i for i, name in enumerate(kernels(reference))}
        for isa in ISAS:
            path = Path("csrc/cpu", isa, reference.name)
            if isa == "ref" or not (ROOT / path).exists() or reference.name == "table.c":
                continue
            places = [order[name] for name in kernels(path) if name in order]
            assert places == sorted(places), f"{path}: {kernels(path)}, in ref: {list(order)}"
            compared += len(places)
    assert compared > 10


# A file with a part of the kernels of another one, which is the one to compare with.
PARTS = {"quantize4.c": "codec4.c", "optim8.c": "optim.c", "int8_pairs.c": "linear8.c"}


def test_every_isa_file_has_a_reference_of_that_name():
    names = {p.name for p in files("csrc/cpu/ref/*.c")} | set(PARTS)
    assert set(PARTS) <= {p.name for p in files("csrc/cpu/*/*.c")} and set(PARTS.values()) <= names
    for path in files("csrc/cpu/*/*.c"):
        assert path.name in names, f"{path}: no csrc/cpu/ref/{path.name} to compare with"
