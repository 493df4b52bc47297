"""The stub and the extension module say the same. Types are compared by mypy.stubtest in tests/lint."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from halfbyte import _C

STUB = Path(__file__).parents[2] / "python/halfbyte/_C.pyi"


def test_every_public_name_is_documented():
    for name, thing in vars(_C).items():
        if name[0] == "_":
            continue
        assert thing.__doc__, name
        for attribute, member in vars(thing).items() if isinstance(thing, type) else ():
            if attribute[0] != "_":
                assert member.__doc__, f"{name}.{attribute}"


def test_functions_have_signatures():
    """help() and editors show them: each function of the stub has the same parameters in inspect.signature."""
    stub = {n.name: n for n in ast.parse(STUB.read_text()).body if isinstance(n, ast.FunctionDef)}
    assert len(stub) > 15
    for name, node in stub.items():
        args = node.args
        want = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
        assert list(inspect.signature(getattr(_C, name)).parameters) == want, name
