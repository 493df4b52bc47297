"""`lazy("transformers")`: the module, imported at its first use.

The process that only collects stand_in tests (see conftest.py) never uses it, and saves those seconds.
"""

import importlib
import importlib.util
from typing import Any

import pytest


class _Lazy:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def lazy(name: str) -> Any:
    """A stand-in for the module; the calling test module is skipped when it is not installed."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    return _Lazy(name)
