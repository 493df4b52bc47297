"""What nvcc made of the kernels, beside what gates.toml allows. `test_gates.py` runs it; by hand:

    python tests/cuda/gates.py                         every kernel: registers, memory, instructions, verdict
    python tests/cuda/gates.py --show 'quantize4*'     and the instructions of the path that is counted
    python tests/cuda/gates.py --update                write the counted numbers into gates.toml

Needs nvcc (any machine that builds the CUDA library has it), and nvdisasm of the machine or from PyPI
(`nvidia-cuda-nvdisasm`, among the test requirements). Cubins are kept in build/tests-cuda/gates by the digest of all
that they were made from.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import sass

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings this one
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).parent / "gates.toml"
CACHE = ROOT / "build" / "tests-cuda" / "gates"
# C7508: setmaxnreg ignored; C7510, C7511, C7517: wgmma serialised, or waits added to it. ptxas only informs.
NOTES = re.compile(r"\(C75\d\d\)")
# Counts move a little with nvcc's version; within these the table is still true.
UPPER, LOWER = 1.06, 0.90


class Unavailable(Exception):
    """This machine lacks a tool; the text says which, and what to do."""


@cache
def setup_module() -> Any:
    spec = importlib.util.spec_from_file_location("halfbyte_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(name: str, package: str) -> str:
    if (found := setup_module().find_cuda_tool(name)) is None:
        raise Unavailable(f"{name} not found; set CUDA_HOME, or pip install {package}")
    return found


def nvcc() -> str:
    return tool("nvcc", "'.[build-cuda]'")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@cache
def nvcc_version() -> str:
    """Such as 13.0."""
    found = re.search(r"release (\d+\.\d+)", run(nvcc(), "--version").stdout)
    return found[1] if found else "unknown"


@cache
def included(source: Path) -> frozenset[Path]:
    """The file and all of ours that it includes."""
    found = {source}
    for name in re.findall(r'#\s*include "([^"]+)"', source.read_text(encoding="utf-8")):
        for folder in (source.parent, ROOT / "cuda", ROOT / "csrc"):
            if (folder / name).exists():
                found |= included((folder / name).resolve())
                break
    return frozenset(found)


@dataclass(frozen=True)
class Measured:
    """One entry function for one architecture."""

    name: str  # demangled, without namespaces and parameters: "quantize4_kernel<1, true, false>"
    file: str
    arch: str
    registers: int
    stack: int
    spills: int  # bytes stored and loaded
    shared: int  # static; what a launch asks for comes on top
    code: sass.Kernel = field(repr=False)


@dataclass(frozen=True)
class Compiled:
    kernels: tuple[Measured, ...]
    notes: tuple[str, ...]  # lines of ptxas that must not be there


def demangle(names: list[str]) -> list[str]:
    if not names:
        return []
    if (filt := shutil.which("c++filt")) is None:
        raise Unavailable("c++filt not found; install binutils")
    done = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"^void |\(anonymous namespace\)::|\([^()]*\)$", "", line.replace("(anonymous namespace)::", ""))
            for line in done.stdout.splitlines()]  # fmt: skip


@cache
def compile_cubin(source: Path, arch: str) -> tuple[str, str]:
    """The output of ptxas, and the disassembly; from the cache where nothing changed."""
    wanted = [
        f for f in setup_module().CUDA_FLAGS if not f.startswith(("-X", "--threads", "--compress", "-cudart"))
    ]
    own = setup_module().CUDA_OWN_ARCH.get(source.name) == arch
    wanted += [f"-DHB_CUDA_SM{arch.upper()}"] if own else []
    command = [nvcc(), "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", *wanted, str(source)]
    disassembler = tool("nvdisasm", "nvidia-cuda-nvdisasm")
    digest = hashlib.sha256("\0".join([*command, disassembler, nvcc_version()]).encode())
    for path in sorted(included(source)):
        digest.update(path.read_bytes())
    folder = CACHE / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}"
    log, code = folder / "ptxas.log", folder / "code.sass"
    if not code.exists():
        for old in CACHE.glob(f"{source.stem}-{arch}-*"):
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True)
        done = run(*command, "-o", str(folder / "code.cubin"))
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
        log.write_text(done.stdout + done.stderr)
        done = run(disassembler, "-c", str(folder / "code.cubin"))
        if done.returncode != 0:
            version = run(disassembler, "--version").stdout.strip().splitlines()[-1]
            raise Unavailable(
                f"nvdisasm ({version}) cannot read what nvcc {nvcc_version()} made: {done.stderr}"
            )
        code.write_text(done.stdout)
    return log.read_text(), code.read_text()


@cache
def compiled(source: Path, arch: str) -> Compiled:
    log, disassembly = compile_cubin(source, arch)
    code = sass.kernels(disassembly)
    numbers: dict[str, list[int]] = {}
    pattern = (r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
               r"(\d+) bytes spill loads\nptxas info\s+: Used (\d+) registers([^\n]*)")  # fmt: skip
    for name, stack, stores, loads, registers, rest in re.findall(pattern, log):
        shared = re.search(r"(\d+) bytes smem", rest)
        numbers[name] = [
            int(registers),
            int(stack),
            int(stores) + int(loads),
            int(shared[1]) if shared else 0,
        ]
    missing = code.keys() - numbers.keys()
    assert not missing, f"ptxas says nothing about {missing}:\n{log}"
    names = list(code)
    short = (
        source.relative_to(ROOT / "cuda").as_posix() if source.is_relative_to(ROOT / "cuda") else source.name
    )
    return Compiled(
        tuple(Measured(plain, short, arch, *numbers[name], code=code[name])
              for name, plain in zip(names, demangle(names), strict=True)),
        tuple(line for line in log.splitlines() if NOTES.search(line) or "warning" in line),
    )  # fmt: skip


def table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def sources() -> list[Path]:
    return sorted((ROOT / "cuda").glob("*.cu"))


def compile_all() -> list[Compiled]:
    """Every file for the architecture that the table counts for."""
    other = table()["architectures"]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda s: compiled(s, other.get(s.name, other["default"])), sources()))


def path_of(row: dict[str, Any], kernel: Measured) -> sass.Path:
    if row["loop"] == "none":
        return kernel.code.straight(row.get("through"))
    return kernel.code.main_loop(None if row["loop"] == "memory" else row["loop"], row.get("through"))


def per_item(row: dict[str, Any], kernel: Measured) -> float:
    return len(path_of(row, kernel)) / row["work"]


def violations(row: dict[str, Any], kernel: Measured, same_compiler: bool = True) -> list[str]:
    """What a kernel does that its row does not allow. Each text names the number and the limit."""
    found = []

    def at_most(what: str, number: float, limit: float) -> None:
        if number > limit:
            found.append(f"{what}: {number:g}, allowed {limit:g}")

    at_most("registers", kernel.registers, row["registers"])
    at_most("bytes of stack", kernel.stack, 0)
    at_most("bytes of spills", kernel.spills, 0)
    at_most("bytes of static shared memory", kernel.shared, row.get("shared", 0))
    everything = kernel.code.all_instructions()
    at_most("loads and stores of local memory", everything.count("LDL") + everything.count("STL"), 0)
    path = path_of(row, kernel)
    at_most("accesses to global memory below 32 bits", path.narrow, row.get("narrow", 0))
    found += [f"{p} is missing" for p in row.get("contains", []) if not path.count(p)]
    found += [f"{p} is there {path.count(p)} times" for p in row.get("lacks", []) if path.count(p)]
    number = len(path) / row["work"]
    at_most(f"instructions per {row['unit']}", round(number, 2), round(row["counted"] * UPPER, 2))
    return found


def matching(row: dict[str, Any], kernels: list[Measured]) -> list[Measured]:
    return [k for k in kernels if k.file == row["file"] and fnmatchcase(k.name, row["name"])]


def update(rows: list[dict[str, Any]], kernels: list[Measured]) -> None:
    """Writes the largest count of each row's kernels over the old one."""
    numbers = iter([max((per_item(r, k) for k in matching(r, kernels)), default=r["counted"]) for r in rows])
    text = re.sub(
        r"(?m)^counted = \S+", lambda _: f"counted = {next(numbers):.2f}", TABLE.read_text(encoding="utf-8")
    )
    TABLE.write_text(re.sub(r'(?m)^nvcc = "[^"]*"', f'nvcc = "{nvcc_version()}"', text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--show", metavar="PATTERN", help="print the counted path of the kernels of this name"
    )
    parser.add_argument("--update", action="store_true", help="write the counted numbers into gates.toml")
    options = parser.parse_args()
    try:
        everything = compile_all()
    except Unavailable as why:
        sys.exit(f"gates: {why}")
    kernels = [k for c in everything for k in c.kernels]
    rows = table()["kernel"]
    if options.update:
        update(rows, kernels)
        rows = table()["kernel"]
    heads = ("regs", "limit", "smem", "path", "work", "count", "table", "budget")
    print(f"{'kernel':58} " + " ".join(f"{head:>6}" for head in heads))
    for row in rows:
        for kernel in matching(row, kernels):
            path = path_of(row, kernel)
            print(f"{kernel.name:58} {kernel.registers:6} {row['registers']:6} {kernel.shared:6} {len(path):6} "
                  f"{row['work']:6} {len(path) / row['work']:6.2f} {row['counted']:6.2f} {row['budget']:6g}  "
                  f"{row.get('through', '')} {'; '.join(violations(row, kernel))}")  # fmt: skip
            if options.show and fnmatchcase(kernel.name, options.show):
                print(
                    "\n".join(
                        f"    {i.address:5x} {i.predicate:5} {i.opcode:24} {i.operands}"
                        for i in path.instructions
                    )
                )
                print("   ", dict(path.histogram().most_common()))
    for kernel in kernels:
        if not any(kernel in matching(row, kernels) for row in rows):
            print(f"{kernel.name:58} {kernel.registers:6}  of {kernel.file}: NO ROW IN gates.toml")
    print(*[note for c in everything for note in c.notes], sep="\n")


if __name__ == "__main__":
    main()
