"""A pytest plugin: the checks of the torch layer (tests/cuda/torch_checks) on a GPU instead of the fake device.

    python -m pytest -p benchmarks.gpu_plugin tests/cuda/torch_checks/check_*.py

What a check asks of the fake device and a GPU cannot give (streams by number, counters) skips the check.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_device import Device

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT / "python"),
    str(ROOT / "tests" / "cuda"),
    str(ROOT / "tests" / "cuda" / "torch_checks"),
]


class Real:
    """Stands where the checks expect the fake device."""

    def __init__(self) -> None:
        self._device = Device()

    def no_synchronisation(self) -> AbstractContextManager[None]:
        return self._device.no_synchronisation()

    def current_stream(self) -> int:
        return self._device.torch.cuda.current_stream().cuda_stream

    def __getattr__(self, name: str) -> Any:
        pytest.skip(f"the fake device's {name} has no equal on a GPU")


@pytest.fixture(scope="session")
def real() -> Real:
    return Real()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    try:
        return (yield)
    except (RuntimeError, AssertionError) as error:
        if "invalid device ordinal" in str(error):
            pytest.skip("needs a second GPU")
        raise


@pytest.fixture(autouse=True)
def fake(real: Real) -> Iterator[Real]:
    """Every check ends with all its work done, so that a late error is its own."""
    yield real
    real._device.synchronize()
