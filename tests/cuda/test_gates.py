"""Every kernel within the limits of gates.toml: registers, spills, accesses, instructions per weight."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import gates
import pytest
import sass

import halfbyte._C

BAD = gates.ROOT / "tests" / "cuda" / "host" / "bad_gates.cu"


@pytest.fixture(scope="module")
def everything() -> list[gates.Compiled]:
    try:
        return gates.compile_all()
    except gates.Unavailable as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def kernels(everything) -> list[gates.Measured]:
    return [kernel for compiled in everything for kernel in compiled.kernels]


@pytest.fixture(scope="module")
def bad() -> dict[str, gates.Measured]:
    try:
        return {kernel.name: kernel for kernel in gates.compiled(BAD, "90").kernels}
    except gates.Unavailable as why:
        pytest.skip(str(why))


def test_every_kernel_has_a_row_and_every_row_a_kernel(kernels):
    rows = gates.table()["kernel"]
    without_row = [k.name for k in kernels if not any(k in gates.matching(row, kernels) for row in rows)]
    without_kernel = [row["name"] for row in rows if not gates.matching(row, kernels)]
    assert not without_row, f"add rows to {gates.TABLE.name}"
    assert not without_kernel, f"remove rows from {gates.TABLE.name}"
    assert len(kernels) > 30


def test_every_kernel_keeps_to_its_row(kernels):
    found = {
        f"{kernel.name} ({row['file']}{', ' + row['through'] if 'through' in row else ''})": broken
        for row in gates.table()["kernel"]
        for kernel in gates.matching(row, kernels)
        if (broken := gates.violations(row, kernel))
    }
    assert not found


def test_the_table_is_true(kernels):
    """Where a kernel got better the table says so; where it misses its budget the table says why."""
    table = gates.table()
    stale = {}
    for row in table["kernel"]:
        number = max(gates.per_item(row, kernel) for kernel in gates.matching(row, kernels))
        if table["nvcc"] == gates.nvcc_version() and number < row["counted"] * gates.LOWER:
            stale[row["name"]] = f"{number:.2f}, table {row['counted']}: run gates.py --update"
        if row["counted"] > row["budget"] and not row.get("why"):
            stale[row["name"]] = "over its budget, and no word why"
        if row["counted"] <= row["budget"] and row.get("why"):
            stale[row["name"]] = "within its budget: the why is old"
    assert not stale


def test_the_compiler_had_nothing_to_say(everything):
    assert [note for compiled in everything for note in compiled.notes] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", gates.setup_module().CUDA_ARCHS)
def test_nothing_spills_on_any_architecture(arch):
    try:
        made = [gates.compiled(source, arch) for source in gates.sources()]
    except gates.Unavailable as why:
        pytest.skip(str(why))
    assert [note for compiled in made for note in compiled.notes] == []
    spilling = [k.name for compiled in made for k in compiled.kernels if k.stack or k.spills]
    assert not spilling


def test_the_library_that_was_built(kernels):
    """Stack and local memory of every kernel and architecture in the libhalfbyte_cuda.so beside the module."""
    library = os.path.join(os.path.dirname(halfbyte._C.__file__), "libhalfbyte_cuda.so")
    if not os.path.exists(library):
        pytest.skip("the CUDA library was not built")
    try:
        cuobjdump = gates.tool("cuobjdump", "nvidia-cuda-cuobjdump")
    except gates.Unavailable as why:
        pytest.skip(str(why))
    text = subprocess.run(
        [cuobjdump, "-res-usage", library], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert len(found) >= len(kernels)
    assert not [name for name, _, stack, local in found if int(stack) or int(local)]


ROW = {
    "name": "*",
    "file": "bad_gates.cu",
    "registers": 64,
    "loop": "memory",
    "work": 16,
    "unit": "byte",
    "counted": 1.0,
}


def test_a_good_kernel_passes(bad):
    assert gates.violations(ROW | {"contains": ["LDG.128"], "lacks": ["SHFL"]}, bad["good_kernel"]) == []


@pytest.mark.parametrize(
    ("name", "row", "texts"),
    [
        ("bad_stack_kernel", {}, ["bytes of stack: 128", "local memory"]),
        ("bad_spill_kernel", {"work": 96}, ["bytes of spills: "]),
        ("bad_bytes_kernel", {}, ["accesses to global memory below 32 bits: 16, allowed 0"]),
        ("bad_bytes_kernel", {"contains": ["LDG.128"]}, ["LDG.128 is missing"]),
        ("bad_division_kernel", {}, ["instructions per byte: "]),
        ("good_kernel", {"registers": 8}, ["registers: ", "allowed 8"]),
        ("good_kernel", {"lacks": ["LDG.128"]}, ["LDG.128 is there 1 times"]),
    ],
)
def test_bad_kernels_are_caught(bad, name, row, texts):
    found = "; ".join(gates.violations(ROW | row, bad[name]))
    assert all(text in found for text in texts), found


def test_nothing_is_claimed_without_tools(tmp_path):
    """Without nvcc the script says so in a sentence and fails; the tests above skip with that sentence."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    script = (
        "import importlib.util as u, sys; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'nvidia' else find(name, *a); "
        f"sys.path.insert(0, {os.path.dirname(gates.__file__)!r}); sys.argv = ['gates']; import gates; gates.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment | {"PATH": str(tmp_path)},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == "gates: nvcc not found; set CUDA_HOME, or pip install '.[build-cuda]'"


# Three loops: a table is filled, a spin waits inside the main loop, the main loop has two ways, one of them longer.
SASS = """
	.section	.text.toy,"ax",@progbits
toy:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   STS [R0], R1 ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0040*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R8], R9 ;
        /*0060*/              @!P2 BRA `(.L_x_2) ;
        /*0070*/                   LDG.E.U8 R7, desc[UR4][R6.64] ;
        /*0080*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*0090*/                   LDG.E R7, desc[UR4][R6.64] ;
        /*00a0*/                   FMUL R7, R7, R7 ;
        /*00b0*/                   FMUL R7, R7, R7 ;
        /*00b8*/                   FMUL R7, R7, R7 ;
        /*00c0*/                   CALL.REL.NOINC `($slow) ;
.L_x_4:
        /*00d0*/                   FADD R8, R8, R7 ;
        /*00e0*/               @P0 BRA `(.L_x_1) ;
        /*00f0*/                   EXIT ;
$slow:
        /*0100*/                   LDL R1, [R1] ;
        /*0110*/                   RET.REL.NODEC R2 `(toy) ;
.L_x_5:
        /*0120*/                   BRA `(.L_x_5) ;
"""


def test_paths_of_a_known_program():
    (kernel,) = sass.kernels(SASS).values()
    assert len(kernel.loops) == 3
    plain = kernel.main_loop()
    assert [i.address for i in plain.instructions] == [0x30, 0x40, 0x90, 0xA0, 0xB0, 0xB8, 0xC0, 0xD0, 0xE0]
    nested = kernel.main_loop(through="LDG.U8")
    assert [i.address for i in nested.instructions] == [0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0xD0, 0xE0]
    assert (plain.narrow, nested.narrow) == (0, 1)
    assert [i.address for i in kernel.main_loop("STS").instructions] == [0x10, 0x20]
    assert len(kernel.straight()) == 1 + 2 + 9 + 1
    assert kernel.all_instructions().count("LDL") == 1
    with pytest.raises(ValueError, match="no loop has HMMA"):
        kernel.main_loop("HMMA")
