"""`halfbyte bench`: what it measures and says; the times themselves are nobody's to test."""

from __future__ import annotations

import importlib.util
import json
from xml.etree import ElementTree

import numpy as np
import pytest

from halfbyte import bench
from halfbyte.cli.main import main


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch):
    """Few copies of the weight."""
    monkeypatch.setattr(bench, "cache_bytes", lambda: 1 << 10)


def test_document(capsys):
    assert (
        main(["bench", "--rows", "1", "8", "--size", "96", "--depth", "64", "--seconds", "0.01", "--json"])
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "halfbyte.bench/1"
    assert [table["rows"] for table in document["tables"]] == [1, 8]
    assert document["size"], document["depth"] == (96, 64)
    for table in document["tables"]:
        names = [entry["name"] for entry in table["entries"]]
        assert len(names) == len(set(names)) and "halfbyte nf4, float32" in names
        for entry in table["entries"]:
            assert 0 < entry["p10_us"] <= entry["median_us"]
            assert (entry["gb_per_s"] is None) == (table["rows"] > 4)
            if " dense" in entry["name"]:
                assert entry["of_dense"] == 1


def test_text(capsys):
    assert main(["bench", "--rows", "1", "--size", "64", "--seconds", "0.01"]) == 0
    text = capsys.readouterr().out
    assert "64 x 64 weights" in text and "of dense" in text and "halfbyte nf4, bfloat16" in text


def test_picture(capsys, tmp_path):
    target = tmp_path / "bench.svg"
    small = ["bench", "--rows", "1", "4", "--size", "64", "--seconds", "0.01"]
    assert main([*small, "--svg", str(target)]) == 0
    texts = [e.text for e in ElementTree.fromstring(target.read_text()).iter() if e.text and e.text.strip()]
    assert {"1 rows of x", "4 rows of x", "halfbyte nf4, float32"} <= set(texts)


def test_without_torch(monkeypatch):
    monkeypatch.setattr(bench, "_installed", lambda name: False)
    names = [entry.name for entry in bench.competitors(2, 64, 64)]
    assert names == ["halfbyte nf4, float32", "halfbyte nf4, bfloat16", "numpy dense, float32"]
    report = bench.bench([2], 64, 64, 0.01)
    assert report["tables"][0]["entries"][2]["of_dense"] == 1
    assert report["tables"][0]["entries"][1]["of_dense"] is None  # no dense layer in bfloat16


def test_entries_compute_the_same():
    """Competitors multiply the same matrices: none is faster because it does something else."""
    results = [np.asarray(e.call(0), dtype="f4") if not hasattr(y := e.call(0), "float") else y.float().numpy()
               for e in bench.competitors(3, 64, 128)]  # fmt: skip
    dense = next(r for e, r in zip(bench.competitors(3, 64, 128), results, strict=True) if " dense" in e.name)
    for (
        result
    ) in results:  # 4 bits keep at least nine tenths of the signal's energy, another matrix keeps none
        assert np.square(result - dense).sum() < 0.1 * np.square(dense).sum()


def test_copies_do_not_fit_in_the_cache(monkeypatch):
    monkeypatch.setattr(bench, "cache_bytes", lambda: 1000)
    assert bench._copies(100) == 40
    assert bench._copies(10**9) == 2
    assert bench._copies(1) == bench.MOST_COPIES  # and no fifteen thousand layers of 128 x 128


def test_our_stand_in_is_no_competitor(monkeypatch):
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("torch or bitsandbytes is not installed")
    monkeypatch.setattr(bench.shim, "is_ours", lambda module: True)
    names = [entry.name for entry in bench.competitors(1, 64, 64)]
    assert names and not any(name.startswith("bitsandbytes") for name in names)


def test_cache_size_is_plausible(monkeypatch):
    monkeypatch.undo()
    assert 1 << 16 <= bench.cache_bytes() <= 1 << 34
