"""QLoRA under FSDP and FSDP2 on two processes (gloo): what one process computes, and a state dict that reloads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from lazy import lazy  # noqa: E402

transformers = lazy("transformers")
peft = lazy("peft")

SCRIPT = Path(__file__).parent / "scripts" / "fsdp_qlora.py"
MODES = ["fsdp1", "fsdp2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("model") / "llama", "llama", torch.float32)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """run(mode, storage) -> (report, state dict); each is run once."""
    from safetensors.torch import load_file

    done = {}

    def run(mode, storage):
        if (mode, storage) not in done:
            out = tmp_path_factory.mktemp(mode)
            command = [sys.executable]
            if mode != "none":
                command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command += ["-m", "halfbyte.cli.main", "run", str(SCRIPT), str(folder), str(out), mode, storage]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "HALFBYTE_NUM_THREADS": "1"}
            child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
            assert child.returncode == 0, child.stderr[-6000:]
            report = json.loads((out / "report.json").read_text())
            done[mode, storage] = report, load_file(out / "state.safetensors")
        return done[mode, storage]

    return run


@pytest.mark.parametrize(
    ("mode", "storage"),
    [
        ("fsdp1", "float32"),
        ("fsdp2", "float32"),
        # other storage types: FSDP1 flattens parameters of one dtype only
        pytest.param("fsdp2", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_equals_one_process(run, mode, storage):
    alone, expected = run("none", storage)
    report, state = run(mode, storage)
    assert {"fsdp1": "FullyShardedDataParallel", "fsdp2": "FSDPLlamaDecoderLayer"}[mode] in report["classes"]
    # Sums over the batch are split in two: float32 roundings of three steps, with AdamW's division by
    # small second moments between them.
    assert len(report["losses"]) == 3
    for a, b in zip(report["losses"], alone["losses"], strict=True):
        assert abs(a - b) < 1e-5 * b
    assert alone["losses"][-1] < alone["losses"][0]
    # gathered: every name, statistics included, and the packed codes untouched
    assert state.keys() == expected.keys()
    assert sum(key.endswith("quant_state.bitsandbytes__nf4") for key in state) == 14
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and state[key].shape == value.shape, key
        if "lora_" in key:  # trained
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-5)
        else:
            # as bytes: packed codes in a float dtype may spell NaN
            assert torch.equal(state[key].view(torch.uint8), value.view(torch.uint8)), key
    # reloaded into a model that never was sharded
    assert report["missing"] == report["unexpected"] == []
    assert report["difference"] < 1e-5
