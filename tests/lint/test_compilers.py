"""clang has no more to say about the sources than gcc, which built them: no warnings, with the flags of setup.py."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sysconfig

import numpy
import pytest
from common import ROOT


def load_setup():
    spec = importlib.util.spec_from_file_location("halfbyte_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(platform.system() != "Linux", reason="flags of Linux")
def test_clang_has_no_warnings():
    """Every file, for the instruction set of its folder; parsed and analysed, not compiled."""
    compiler = next(filter(None, map(shutil.which, ("clang-19", "clang"))), None)
    if compiler is None:
        pytest.skip("clang is not installed")
    dlpack = pytest.importorskip("tvm_ffi.libinfo").find_dlpack_include_path()
    setup = load_setup()
    includes = [f"-I{path}" for path in (numpy.get_include(), dlpack, sysconfig.get_path("include"))]
    seen = 0
    for folder, flags in [
        ("csrc/core", ["-Wconversion"]),
        ("csrc/python", []),
        *((f"csrc/cpu/{isa}", flags) for isa, flags in setup.ISA_FLAGS.items()),
    ]:
        files = [str(p) for p in sorted((ROOT / folder).glob("*.c"))]
        command = [compiler, "-fsyntax-only", *setup.COMMON, *flags, *includes, *files]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and not result.stderr, result.stderr[:4000]
        seen += len(files)
    assert seen > 50
