"""The benchmarks run, on next to nothing, and write what they promise."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
DESCRIPTION = {
    "machine",
    "cpu",
    "cpus",
    "system",
    "compiler",
    "revision",
    "command",
    "isa",
    "threads",
    "time",
}


def benchmark(target, *arguments):
    path = os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments, "--json", str(target)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    return done, json.loads(target.read_text()) if target.exists() else None


def test_operations_beside_the_machine(tmp_path):
    done, result = benchmark(tmp_path / "kernels.json", "quantize_rows_int8 512", "--ms", "1")
    assert done.returncode == 0, done.stderr
    assert set(result["environment"]) >= DESCRIPTION
    assert "-m benchmarks" in result["environment"]["command"]
    rulers = {row["name"] for row in result["rulers"]}
    assert {"machine read DRAM", "machine copy DRAM", "machine read L2"} <= rulers
    names = {row["name"] for row in result["rows"]}
    assert "quantize_rows_int8 512x4096 float32" in names
    for row in result["rows"]:
        assert 0 < row["p10_us"] <= row["median_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["p10_us"] / 1e3, rel=1e-3)
        assert row["name"] in done.stdout
    assert {row["threads"] for row in result["rows"]} == {1, 2}


def test_nothing_to_measure_is_an_error(tmp_path):
    done, result = benchmark(tmp_path / "none.json", "no such kernel", "--ms", "1")
    assert done.returncode == 1 and "no such kernel" in done.stderr
    assert result["rows"] == []


@pytest.mark.no_asan  # a subprocess with torch, for its times
def test_peers(tmp_path):
    pytest.importorskip("torch")
    size = ("--size", "128", "--seconds", "0.01", "--threads", "1")
    done, result = benchmark(tmp_path / "peers.json", "peers", "one row", *size)
    assert done.returncode == 0, done.stderr
    assert set(result["environment"]) >= DESCRIPTION | {"versions", "size"}
    absent = {name for name, version in result["environment"]["versions"].items() if version is None}
    assert set(result["absent"]) == absent
    assert {row["threads"] for row in result["rows"]} == {1}
    libraries = {row["name"].split()[0].split(".")[0] for row in result["rows"]}
    assert "halfbyte" in libraries
    assert ("bitsandbytes" in libraries) == ("bitsandbytes" not in absent)
    assert ("ggml" in libraries) == ("llama-cpp-python" not in absent)
    for row in result["rows"]:
        assert row["samples"] >= 5 and 0 < row["p10_us"] <= row["median_us"]
        assert row["name"] in done.stdout
        if "ratio" in row:
            base = next(
                r for r in result["rows"] if (r["title"], r["name"]) == (row["title"], row["reference"])
            )
            assert row["ratio"] == pytest.approx(base["p10_us"] / row["p10_us"], rel=0.01)
        if "gb_per_s" in row and row["name"] != "read":
            (read,) = (r for r in result["rows"] if r["name"] == "read")
            assert row["of_read"] == pytest.approx(row["gb_per_s"] / read["gb_per_s"], rel=0.05, abs=2e-3)
    (picture,) = tmp_path.glob("*.svg")
    assert picture.name == "peers-one-row.svg" and str(picture) in done.stdout
    ElementTree.fromstring(picture.read_text())


@pytest.mark.no_asan
def test_peers_in_the_cache_and_in_curves(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    pytest.importorskip("torch")
    size = ("--size", "128", "--seconds", "0.01", "--threads", "2")
    done, result = benchmark(tmp_path / "peers.json", "peers", "cached", *size)
    assert done.returncode == 0, done.stderr
    titles = {row["title"] for row in result["rows"]}
    assert titles == {"one row, cached", "1 rows, cached", "8 rows, cached", "64 rows, cached"}
    rows = [row for row in result["rows"] if row["title"] == "8 rows, cached"]
    assert {"numpy matmul float32", "torch F.linear bfloat16"} <= {row["name"] for row in rows}
    for row in rows:  # integer products have no peak among the rulers
        without = (
            row["name"].startswith(("multiply-add peak", "read"))
            or "int8" in row["name"]
            or "int16" in row["name"]
        )
        assert ("of_peak" in row) != without, row["name"]
    renamed = [{**row, "title": row["title"].removesuffix(", cached")} for row in result["rows"]]
    picture = importlib.import_module("halfbyte.bench.chart").many_rows({**result, "rows": renamed})
    assert "torch F.linear bfloat16" in picture
    ElementTree.fromstring(picture)


def test_ggml_multiplies(monkeypatch):
    """Its product of Q4_0 weights is that of the weights they stand for, but for x, which it rounds to 8 bits."""
    monkeypatch.syspath_prepend(str(ROOT))
    ggml = importlib.import_module("halfbyte.bench.ggml")
    if ggml.installed() is None:
        pytest.skip("llama-cpp-python is not installed")
    library = ggml.Ggml(2)
    weight = np.random.default_rng(0).standard_normal((64, 256), np.float32)
    packed = library.quantize(weight)
    decoded = ggml.dequantize(packed)
    # A block's scale is its largest magnitude / -8, so that a value of the other sign misses by up to one scale.
    scale = np.abs(weight).reshape(64, -1, 32).max(-1, keepdims=True) / 8
    assert (np.abs(decoded - weight).reshape(64, -1, 32) <= scale * (1 + 2**-9)).all()
    layer = library.layer(packed)
    for m in (1, 3, 16):
        x = np.random.default_rng(m).standard_normal((m, 256), np.float32)
        layer.prepare(x).run(m)
        # |x - rounded x| <= 1/2 step of 1/127 of its block's maximum, and twice 2^-11 for float16 scales.
        step = np.abs(x).reshape(m, -1, 32).max(-1, keepdims=True) / 127
        error = (np.broadcast_to(step / 2, (m, 8, 32)).reshape(m, -1) + np.abs(x) * 2**-10) @ np.abs(
            decoded
        ).T
        assert (np.abs(layer.result(m) - x @ decoded.T) <= error * 1.01).all()
    with pytest.raises(ValueError, match="multiple of 32"):
        library.quantize(weight[:, :100])


def test_peers_says_which_contests_there_are(tmp_path):
    done, result = benchmark(tmp_path / "peers.json", "peers", "football")
    assert done.returncode == 2 and "one row" in done.stderr and result is None


@pytest.mark.no_asan  # a subprocess with torch, for its times
def test_never_slower_gathers_its_parts(tmp_path):
    pytest.importorskip("torch")
    target = tmp_path / "never.json"
    small = ("never-slower", "--size", "64", "--depth", "64,128", "--rows", "1,8", "--seconds", "0.01")
    for part in (1, 2):
        done, result = benchmark(target, *small, "--threads", "1", "--part", f"{part}/2")
        assert done.returncode == 0, done.stderr
        assert str(target) in done.stdout and str(target.with_suffix(".svg")) in done.stdout
    cells = {(r["direction"], r["dtype"], r["depth"], r["rows"]) for r in result["rows"]}
    assert len(cells) == len(result["rows"]) == 16
    assert set(result["environment"]) >= DESCRIPTION - {"threads"}
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["p10_us"] / row["dense_p10_us"], rel=0.05, abs=2e-3)
        assert row["goal"] == 1.0 and row["samples"] >= 5
    picture = target.with_suffix(".svg").read_text()
    assert "forward" in picture and "64 x 128, bfloat16" in picture
    ElementTree.fromstring(picture)
