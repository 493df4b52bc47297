"""A pytest plugin for `torch_checks/`: the fake device before anything imports torch, and what the checks share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch_device

FAKE = torch_device.install()
_ORDERS = itertools.cycle((0, 1, 2))


@pytest.fixture(autouse=True)
def fake() -> Iterator[torch_device.FakeDevice]:
    """The device; each test runs its threads in the next of the three orders, and no kernel may do wrong."""
    FAKE.emulator.restart(next(_ORDERS))
    yield FAKE
    assert FAKE.emulator.fault == ""
