"""What the compiler made of it: exported symbols, libraries needed, registers used, names of kernels."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from common import ROOT

import halfbyte._C

MODULE = Path(halfbyte._C.__file__)
SANITIZED = halfbyte._C.build_info()["sanitize"]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="ELF tools"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not installed"),
]


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    """The folder with csrc/**/*.o of a build with the normal flags."""
    built = sorted(ROOT.glob("build/temp.*/csrc/core"), key=lambda p: p.stat().st_mtime)
    newest_source = max(p.stat().st_mtime for p in ROOT.glob("csrc/**/*.[ch]"))
    if (
        built
        and min(p.stat().st_mtime for p in built[-1].glob("*.o"))
        and MODULE.stat().st_mtime > newest_source
    ):
        return built[-1].parent
    base = tmp_path_factory.mktemp("build")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(base),
        "--build-lib",
        str(base / "lib"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(base.glob("temp.*")) / "csrc"


def test_only_the_init_function_is_exported():
    defined = [line.split()[-1] for line in run("nm", "-D", "--defined-only", str(MODULE)).splitlines()]
    exported = [name for name in defined if not name.startswith(("__odr_asan", "__asan", "__ubsan"))]
    assert exported == ["PyInit__C"]


def test_needed_libraries():
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", run("readelf", "-d", str(MODULE))))
    allowed = {
        "libc.so.6",
        "libm.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
    }
    if SANITIZED:
        needed = {name for name in needed if not name.startswith(("libasan", "libubsan"))}
    assert needed <= allowed, needed - allowed


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 registers")
def test_baseline_objects_use_no_wide_registers(objects):
    """What runs on every x86-64 machine contains no AVX: no ymm, no zmm, no mask register."""
    baseline = [p for folder in ("core", "python", "cpu/ref") for p in sorted((objects / folder).glob("*.o"))]
    assert len(baseline) > 10
    for path in baseline:
        wide = re.search(r"%[yz]mm\d|\{%k\d\}", run("objdump", "-d", "--no-show-raw-insn", str(path)))
        assert not wide, f"{path.relative_to(objects)} uses {wide.group()}"
    # The search sees such registers where they are.
    avx2 = "".join(
        run("objdump", "-d", "--no-show-raw-insn", str(p)) for p in (objects / "cpu/avx2").glob("codec4.o")
    )
    assert "%ymm" in avx2


@pytest.mark.skipif("amx" not in halfbyte._C.build_info()["isas"], reason="built without AMX")
def test_tile_instructions_are_where_they_belong(objects):
    """Tests run the AMX kernels on an emulation; the real ones consist of the instructions, and no others do."""
    code = {p: run("objdump", "-d", "--no-show-raw-insn", str(p)) for p in objects.glob("**/*.o")}
    for path, text in code.items():
        found = set(re.findall(r"\t(tile\w+|tdp\w+|ldtilecfg|sttilecfg)", text))
        if path.parent.name != "amx":
            assert not found, f"{path.relative_to(objects)} uses {found}"
        elif path.stem != "table":
            product = {"linear4": "tdpbf16ps", "linear8": "tdpbssd"}[path.stem]
            needed = {"ldtilecfg", "tileloadd", "tilezero", "tilestored", "tilerelease", product}
            assert found == needed, f"{path.relative_to(objects)} uses {found}"


@pytest.mark.skipif("avxvnni" not in halfbyte._C.build_info()["isas"], reason="built without AVX-VNNI")
def test_vnni_without_avx512_has_its_own_encoding(objects):
    """The first byte is that of a VEX prefix; there is no EVEX (0x62), which the processor lacks."""
    dots = 0
    for path in sorted((objects / "cpu/avxvnni").glob("*.o")):
        for line in run("objdump", "-d", "-w", str(path)).splitlines():
            columns = line.split("\t")
            if len(columns) < 3:
                continue
            assert not columns[1].startswith("62 "), f"{path.name}: {line}"
            assert "%zmm" not in columns[2], f"{path.name}: {line}"
            if re.search(r"vpdp(busd|wssd)\b", columns[2]):
                assert columns[1].startswith(("c4 ", "c5 ")), f"{path.name}: {line}"
                dots += 1
    assert dots > 20


FORMATS = "absmax|code4|nf4|fp4|map8|int8|dyn8|block4|blocks"


def test_kernels_are_named_by_the_grammar(objects):
    """hb_<format>_<op>[_<io>]_<isa>, the ISA that of the folder; hb_[<family>_]table_<isa> fills the table."""
    seen = 0
    for folder in sorted((objects / "cpu").iterdir()):
        grammar = re.compile(rf"^hb_((\w+_)?table|({FORMATS})(_[a-z0-9]+)*)_{folder.name}$")
        for path in sorted(folder.glob("*.o")):
            for line in run("nm", "--defined-only", "--extern-only", str(path)).splitlines():
                name = line.split()[-1]
                assert grammar.match(name), f"{folder.name}/{path.name}: {name}"
                seen += 1
    assert seen > 30
