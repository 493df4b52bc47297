"""torch where it is installed; halfbyte and these tests also work with NumPy alone."""

from __future__ import annotations

import numpy as np
import pytest

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
# Makes an array of the framework from a NumPy array.
FRAMEWORKS = [np.asarray] if torch is None else [np.asarray, torch.from_numpy]
