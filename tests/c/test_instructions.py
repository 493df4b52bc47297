"""The kernels' main loops execute as many instructions as instructions.toml says, or fewer."""

import re
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import build
import instructions

UPDATE = "python tests/c/instructions.py --update"


@cache
def counted(isa):
    return instructions.run(isa)


def counts_of(isa):
    counts = counted(isa)
    if counts is None:
        pytest.skip(f"this processor lacks {isa}, or its instructions cannot be counted one by one")
    return counts


@pytest.mark.timeout(1800)  # the first case may compile the program
@pytest.mark.parametrize("isa", build.isas("native")[1:])
def test_no_loop_has_grown(isa):
    table, compiler = instructions.table(), instructions.compiler()
    if compiler not in table:
        pytest.skip(f"instructions.toml has no counts of {compiler}")
    found = instructions.violations(counts_of(isa), table[compiler])
    assert not found, "\n".join([*found, f"If that must be: {UPDATE}, and say why in the commit."])
    if shrunk := instructions.fewer(counts_of(isa), table[compiler]):
        warnings.warn("\n".join(["fewer instructions, please run " + UPDATE, *shrunk]), stacklevel=1)


def test_every_line_is_of_a_kernel_that_exists():
    table = instructions.table()
    lines = {key for section in table.values() for key in section}
    for isa in build.isas("native")[1:]:
        counts = counted(isa)
        if counts is not None:
            of_isa = {key for key in lines if key.split()[0] == isa}
            assert of_isa <= {count.key for count in counts}, f"instructions.toml: {UPDATE}"


def test_an_empty_statement_has_next_to_none():
    (empty,) = [c for c in counts_of("avx2") if c.name == instructions.EMPTY]
    assert 0 <= empty.instructions <= 8


@pytest.mark.no_asan
def test_callgrind_counts_the_same(tmp_path):
    """Two ways to count that have nothing in common, where both work."""
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    if not Path("/usr/include/valgrind/callgrind.h").exists():
        pytest.skip("valgrind's header was not there to compile with")
    mine = {count.name: count for count in counts_of("avx2")}
    command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={tmp_path}/out",
               str(build.build("native")), "--count", "--isa=avx2", "--threads=1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = {}
    for path in tmp_path.glob("out*"):
        text = path.read_text()
        name = re.search(r"^desc: Trigger: Client Request: \w+ avx2 (.*)$", text, re.MULTILINE)
        number = re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)
        if name and number:
            theirs[name[1]] = int(number[1])
    assert theirs.keys() == mine.keys()
    nothing = theirs[instructions.EMPTY] - mine[instructions.EMPTY].instructions
    for name, number in theirs.items():
        assert number - nothing == pytest.approx(mine[name].instructions, rel=0.005, abs=8), name


def test_violations():
    def count(n):
        return instructions.Count("avx9", "dot", "weight", 1000.0, n)

    known = {"avx9 dot": 0.5}
    assert instructions.violations([count(526)], known) == []
    (text,) = instructions.violations([count(527)], known)
    assert "avx9 dot: 0.5270" in text and "0.5000" in text
    assert "not in the table" in instructions.violations([count(1)], {})[0]
    assert instructions.fewer([count(475)], known) == []
    assert instructions.fewer([count(470)], known) != []
