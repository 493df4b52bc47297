"""`import halfbyte` is cheap and silent; its names arrive when they are used."""

import subprocess
import sys

import pytest

import halfbyte

HEAVY = ("torch", "numpy", "transformers", "safetensors", "tqdm", "halfbyte._C")


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_loads_nothing_heavy_and_prints_nothing():
    result = run(
        f"import halfbyte, sys; assert not [m for m in {HEAVY} if m in sys.modules], sorted(sys.modules)"
    )
    assert result.stdout == "" and result.stderr == ""


def test_import_costs_less_than_fifty_milliseconds_over_numpy():
    """Best of five fresh interpreters that have numpy already. A slow or busy machine is given as much as it
    takes for two imports of unittest.mock."""
    code = (
        "import numpy, time; a = time.perf_counter(); import unittest.mock; b = time.perf_counter(); "
        "import halfbyte; halfbyte.Params4bit; c = time.perf_counter(); print(b - a, c - b)"
    )
    times = [tuple(map(float, run(code).stdout.split())) for _ in range(5)]
    yardstick, cost = (min(column) for column in zip(*times, strict=True))
    assert cost < max(0.050, 2 * yardstick), f"{cost * 1e3:.1f} ms"


def test_every_public_name_resolves():
    pytest.importorskip("torch")
    for name in halfbyte.__all__:
        assert getattr(halfbyte, name) is not None, name
    assert set(halfbyte.__all__) <= set(dir(halfbyte))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = halfbyte.no_such_name


def test_version_is_the_installed_one():
    """One definition: pyproject.toml reads it from the package."""
    from importlib import metadata

    try:
        installed = metadata.version("halfbyte")
    except metadata.PackageNotFoundError:
        pytest.skip("halfbyte is on the path, not installed")
    assert installed == halfbyte.__version__


def test_quantize_conveniences_are_the_types_own():
    assert halfbyte.quantize_4bit == halfbyte.Params4bit.quantize
    assert halfbyte.quantize_8bit == halfbyte.Params8bit.quantize
    assert halfbyte.quantize_int8 == halfbyte.Int8Params.quantize
