"""Every C test group at every instruction set, as one pytest case each (see README.md here)."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import build  # noqa: E402

NOT_AVAILABLE = 77  # exit status of the program: this processor lacks the ISA


def cases():
    groups = []
    for path in sorted(HERE.glob("test_*.c")):
        # What does not depend on the ISA is not repeated in the emulated programs.
        home = {"test_simde.c": "simde_x86", "test_tiles.c": "emulated_tiles"}.get(path.name, "native")
        for once, group in re.findall(r"^CHECK_GROUP(_ONCE)?\((\w+)\)", path.read_text(), re.MULTILINE):
            groups.append((group, home if once else None))
    for variant in build.VARIANTS:
        for group, home in sorted(groups):
            if home is not None:
                if variant == home:
                    yield pytest.param(variant, group, "-", id=f"{variant}-{group}")
                continue
            for isa in build.isas(variant):
                if isa == "ref" and variant != "native":
                    continue
                yield pytest.param(variant, group, isa, id=f"{variant}-{group}-{isa}")


@cache
def program(variant):
    try:
        return [*build.runner(variant), str(build.build(variant))]
    except build.Unavailable as reason:
        return str(reason)


@pytest.mark.timeout(1800)  # the first case of a variant compiles it, which a busy machine takes its time for
@pytest.mark.parametrize(("variant", "group", "isa"), list(cases()))
def test_kernels(variant, group, isa):
    command = program(variant)
    if isinstance(command, str):
        pytest.skip(command)
    done = subprocess.run(
        [*command, f"--group={group}", f"--isa={isa}"], capture_output=True, text=True, timeout=300
    )
    if done.returncode == NOT_AVAILABLE:
        pytest.skip(f"this processor lacks {isa}; simde_x86 tests it")
    assert done.returncode == 0, done.stdout + done.stderr
