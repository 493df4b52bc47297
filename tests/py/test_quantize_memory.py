"""Resident memory of the tool does not grow with the model."""

import json
import subprocess
import sys

import numpy as np
import pytest
from checkpoint_model import write_config

from halfbyte.formats.safetensors import Slot, layout

# Runs the tool in a process of its own and prints its high-water mark.
CODE = """
import sys, halfbyte
source, out, to, double_quant = sys.argv[1:]
report = halfbyte.quantize(source, out, to, double_quant=double_quant == "True", threads=2)
high = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(high.split()[1]) * 1024, report.document["peak_ram_bytes"], report.total_bytes)
"""


def make_large(folder, nbytes, layer_bytes):
    """A bfloat16 checkpoint in one sparse file: mostly zeros, a random megabyte in front of each tensor."""
    folder.mkdir()
    depth = 4096
    rows = layer_bytes // (2 * depth)
    slots = [Slot("model.embed_tokens.weight", "BF16", (1000, depth))]
    for i in range(nbytes // layer_bytes):
        slots.append(Slot(f"model.layers.{i}.mlp.up_proj.weight", "BF16", (rows, depth)))
    header, placed, total = layout(slots, {"format": "pt"})
    normal = np.random.default_rng(0).standard_normal(1 << 19, dtype=np.float32)
    bits = (normal.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        for slot in placed.values():
            file.seek(slot.start)
            file.write(bits[: slot.nbytes])
        file.truncate(total)
    write_config(folder, hidden=depth, mlp=rows, layers=1, dtype="bfloat16", tie_word_embeddings=True)
    return total


def peak(source, out, to, double_quant):
    arguments = [sys.executable, "-c", CODE, str(source), str(out), to, str(double_quant)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stderr
    return tuple(map(int, result.stdout.split()))


@pytest.mark.no_asan  # the sanitizer's shadow memory is what would be measured
@pytest.mark.parametrize(("to", "double_quant"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_peak_on_600_megabytes(to, double_quant, tmp_path):
    """Far below the promised 300 MB, within the estimate, and with tensors larger than the peak itself."""
    make_large(tmp_path / "m", 600_000_000, 200_000_000)
    used, estimate, written = peak(tmp_path / "m", tmp_path / "q", to, double_quant)
    assert used < 130_000_000
    assert used <= estimate
    assert written > 150_000_000


@pytest.mark.no_asan
@pytest.mark.slow
def test_peak_on_3_gigabytes(tmp_path):
    """Three times the size, one tensor of 1 GB: the peak grows by that tensor's scales at most."""
    total = make_large(tmp_path / "m", 3_200_000_000, 1_000_000_000)
    assert total > 3_000_000_000
    used, estimate, _ = peak(tmp_path / "m", tmp_path / "q", "nf4", False)
    assert used < 130_000_000 and used <= estimate
    used, estimate, _ = peak(tmp_path / "m", tmp_path / "d", "nf4", True)
    scales = 4 * 500_000_000 // 64
    assert used < 130_000_000 + 4 * scales < 300_000_000
    assert json.loads((tmp_path / "d" / "halfbyte-manifest.json").read_text())["options"]["double_quant"]
