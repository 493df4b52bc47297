"""Encoders over all 2^32 float32, decoders over all scales, optimizer states up to 1, at each instruction set here.

Minutes, therefore slow. The same groups run in test_c.py, everywhere, with the neighbours of each threshold, a sample
of every exponent and all 16-bit floats.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import build

NOT_AVAILABLE = 77  # exit status of the program: this processor lacks the ISA


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("isa", build.isas("native"))
@pytest.mark.parametrize(
    "group",
    [
        "codec4_every_value",
        "codec4_quantize_every_value",
        "codec8_every_value",
        "codec8_every_scale",
        "optim_step8_every_state",
        "int8_every_value",
    ],
)
def test_every_float(group, isa):
    command = [str(build.build("native")), f"--group={group}", f"--isa={isa}"]
    environment = {**os.environ, "HALFBYTE_TEST_EXHAUSTIVE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == NOT_AVAILABLE:
        pytest.skip(f"this processor lacks {isa}")
    assert done.returncode == 0, done.stdout + done.stderr
