"""What all tests share: no network, quiet thread pools, paths of the bundled data."""

import contextlib
import os
from importlib.util import find_spec
from pathlib import Path

# Before anything imports torch or transformers. torch on one thread, halfbyte on two (so that its pool is
# always at work); a test that measures or varies threads sets its own number.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HALFBYTE_NUM_THREADS", "2")

import pytest

with contextlib.suppress(ImportError):  # it refuses to come after the standard library's distutils
    import setuptools  # noqa: F401

# halfbyte works with NumPy alone, and the tests of that part do, too.
if find_spec("torch") is None:
    collect_ignore_glob = ["py/test_torch_*.py", "compat/*"]

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The bundled, really trained model (2.9 M parameters, bfloat16); never write into it."""
    return DATA / "tiny-llama"


@pytest.fixture(scope="session")
def heldout_text() -> str:
    """Prose that the bundled model never saw."""
    return (DATA / "heldout.txt").read_text(encoding="utf-8")
