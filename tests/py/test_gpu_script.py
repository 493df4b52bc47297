"""benchmarks/gpu.py without a GPU: every part runs on the emulator, and what it says about numbers is right."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, gpu_device, gpu_floors, gpu_model  # noqa: E402
from benchmarks.gpu_floors import Ceilings, Shape  # noqa: E402

pytest.importorskip("torch")
H200 = Ceilings(4.3e12, 790e12, 1580e12)
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"
)


def script(tmp_path, *arguments):
    """Runs it emulated; returns exit status, output and the JSON."""
    target = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--emulate", "--json", str(target), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return (
        done.returncode,
        done.stdout + done.stderr,
        json.loads(target.read_text()) if target.exists() else None,
    )


@needs_compiler
def test_correctness_and_streams(tmp_path):
    status, output, result = script(tmp_path, "build", "correct", "streams")
    assert result is not None, output
    assert result["parts"]["correct"]["failed"] == {}
    assert result["parts"]["streams"]["failed"] == {}
    assert result["parts"]["correct"]["done"] > 200
    assert set(result["parts"]["correct"]["worst"]) == {"codecs", "products", "optimizers"}
    assert 0 < result["parts"]["correct"]["worst"]["products"] <= 1
    assert result["parts"]["build"]["HALFBYTE_CUDA_ARCHS"] == "90"
    assert status == 0 and "all parts passed" in output.splitlines()  # a sanitizer warns of fibers after it
    assert result["environment"]["revision"]


@needs_compiler
def test_the_benchmark_runs(tmp_path):
    """With made-up times: every row is there, timed and judged."""
    status, output, result = script(tmp_path, "products", "optimizers", "host")
    assert status == 0, output
    rows = result["parts"]["products"]["rows"]
    assert {row["kind"] for row in rows} == {"nf4", "nf4 nested", "nf4 grad_input", "int8", "quantize", "dequantize",
                                             "dequantize nested"}  # fmt: skip
    assert all(row["seconds"] > 0 and "error" not in row for row in rows)
    assert all(row["verdict"] in ("PASS", "FAIL") for row in rows if row["kind"] == "nf4")
    assert [row["kind"][:5] for row in result["parts"]["optimizers"]["rows"]] == ["Adam8"] * 2
    assert len(result["parts"]["host"]["rows"]) == 3
    assert [line.split('"')[1] for line in result["entries"]] == ["linear_4bit", "linear_4bit_grad_input"]


@needs_compiler
def test_layers(tmp_path):
    """The checks of the torch layer are found, run and counted; all of them are run by tests/cuda/test_torch.py."""
    status, output, result = script(tmp_path, "layers", "--only", "storage_types")
    assert status == 0, output
    assert result["parts"]["layers"]["done"] >= 3
    assert result["parts"]["layers"]["failed"] == {}


@needs_compiler
def test_models_run(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    status, output, result = script(tmp_path, "model")
    assert status == 0, output
    assert [(row["model"], row["engine"]) for row in result["parts"]["model"]["rows"]] == [
        ("tiny-llama", "halfbyte"),
        ("random-llama", "halfbyte"),
    ]


FAKE_SANITIZER = """#!/bin/sh
case "$2" in racecheck) echo "========= ERROR SUMMARY: 1 hazard"; exit 86;; synccheck) echo broken; exit 1;; esac
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_what_the_sanitizer_says_is_reported(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_SANITIZER)
    tool.chmod(0o755)
    result = gpu.sanitize(True, str(tool), lambda: 10.0)
    assert result["failed"].keys() == {"racecheck", "synccheck"}
    assert "1 hazard" in result["failed"]["racecheck"]
    assert result["failed"]["synccheck"].startswith("exit 1: broken")
    assert gpu.sanitize(True, None, lambda: 10.0)["left_out"]


def test_a_part_without_time_says_so(tmp_path):
    status, output, result = script(tmp_path, "products", "--minutes", "0")
    assert status == 0, output
    assert all(row["error"] == "left out: no time" for row in result["parts"]["products"]["rows"])


def test_floors_are_those_of_the_research():
    """Microseconds on an H200, to the digits that were written down: nf4, nested, bfloat16, int8."""
    kinds = ("nf4", "nf4 nested", "bf16", "int8")
    known = {
        (4096, 4096, 1): (2.20, 2.02, 7.81, 3.91),
        (4096, 4096, 64): (2.72, 2.72, 8.05, 4.15),
        (4096, 4096, 2048): (87.0, 87.0, 87.0, 43.5),
        (8192, 8192, 16): (8.90, 8.17, 31.3, 15.7),
        (28672, 8192, 1): (30.7, 28.2, 109, 54.7),
    }
    for (rows, depth, m), expected in known.items():
        ours = [1e6 * gpu_floors.product_floor(kind, Shape(rows, depth), m, H200) for kind in kinds]
        assert ours == pytest.approx(expected, rel=0.006)
    assert 1e6 * gpu_floors.codec_floor(Shape(8192, 8192), H200) == pytest.approx(40.0, rel=0.006)


def test_judgement():
    shape = [4096, 4096]
    row = {"kind": "nf4", "shape": shape, "rows": 1, "floor": 2.2e-6, "seconds": 5.4e-6}
    assert gpu_floors.judge(dict(row))["verdict"] == "PASS"
    assert gpu_floors.judge(row | {"seconds": 5.6e-6})["verdict"] == "FAIL"
    large = {
        "kind": "nf4",
        "shape": shape,
        "rows": 2048,
        "floor": 87e-6,
        "seconds": 113e-6,
        "torch_seconds": 100e-6,
    }
    assert gpu_floors.judge(dict(large)) | {"must": 0} == large | {"verdict": "PASS", "must": 0}
    assert gpu_floors.judge(large | {"seconds": 115e-6})["verdict"] == "FAIL"
    assert "verdict" not in gpu_floors.judge(large | {"torch_seconds": None})
    assert "verdict" not in gpu_floors.judge(row | {"rows": 32})
    nothing = {key: value for key, value in row.items() if key != "seconds"}
    assert gpu_floors.judge(nothing)["verdict"] == "FAIL"


def test_proposed_entries():
    def row(m, fused, dense):
        return {
            "operator": "linear_4bit",
            "dtype": "bfloat16",
            "rows": m,
            "fused_seconds": fused,
            "dense_seconds": dense,
        }

    rows = [row(1, 1, 4), row(64, 2, 4), row(64, 3, 4), row(64, 5, 4), row(128, 5, 4), {"kind": "quantize"}]
    assert gpu_floors.propose_entries(rows, (9, 0), "here") == [
        '    Entry("linear_4bit", (9, 0), "bfloat16", 64, "here"),'
    ]
    assert gpu_floors.propose_entries([row(1, 5, 4)], (8, 0), "x")[0].endswith('"bfloat16", 0, "x"),')


def test_build_is_for_the_gpu_that_is_there():
    assert gpu.build_command((9, 0))[1]["HALFBYTE_CUDA_ARCHS"] == "90"
    assert gpu.build_command((8, 7))[1]["HALFBYTE_CUDA_ARCHS"] == "86"
    assert gpu.build_command((12, 1))[1]["HALFBYTE_CUDA_ARCHS"] == "120"
    with pytest.raises(SystemExit, match=r"compute capability 7\.0"):
        gpu.build_command((7, 0))


def test_data_sheets():
    assert gpu_device.datasheet("NVIDIA H200").bandwidth == 4.8e12
    assert gpu_device.datasheet("NVIDIA H100 PCIe").bandwidth == 2.0e12
    assert gpu_device.datasheet("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    assert gpu_device.datasheet("GeForce 256") is None


def test_wrong_losses_are_found():
    losses = [
        ("a", "bfloat16", 2.0),
        ("a", "halfbyte", 2.1),
        ("a", "halfbyte int8", 2.5),
        ("b", "halfbyte", math.nan),
    ]
    rows = [dict(zip(("model", "engine", "loss"), values, strict=True)) for values in losses]
    assert gpu_model.wrong_losses(rows).keys() == {"a, halfbyte int8", "b, halfbyte"}
