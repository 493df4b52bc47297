"""`halfbyte bench`: what it measures and says; the times themselves are nobody's to test."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from halfbyte import _C, shim
from halfbyte.bench import chart, compare, layers, turns
from halfbyte.cli import bench as verb
from halfbyte.cli.main import main

TORCH = importlib.util.find_spec("torch") is not None
SMALL = ("--size", "64", "--seconds", "0.01", "--threads", "1")
needs_torch = pytest.mark.skipif(not TORCH, reason="torch is not installed")


def test_rulers_read_and_multiply():
    words = np.random.default_rng(0).integers(0, 2**64, 3 * layers.PIECE // 8 + 5, dtype=np.uint64)
    whole = words[: 3 * layers.PIECE // 8]
    before = _C.get_num_threads()
    try:
        for threads in (1, 2, 3):
            _C.set_num_threads(threads)
            assert _C.read_memory(words) == int(whole.sum(dtype=np.uint64))
            one = _C.multiply_adds("float32", 1)
            assert one > 0 and _C.multiply_adds("float32", 7) == 7 * one
    finally:
        _C.set_num_threads(before)
    assert _C.read_memory(b"") == 0 and _C.multiply_adds("float32", 0) == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), TypeError),
        (("float32",), TypeError),
        (("float64", 1), ValueError),
        (("float32", -1), ValueError),
        (("float32", 1 << 30), ValueError),
        (("float32", "1"), TypeError),
    ],
)
def test_multiply_adds_refuses(arguments, error):
    with pytest.raises(error, match="multiply_adds"):
        _C.multiply_adds(*arguments)


def test_read_memory_refuses():
    with pytest.raises(TypeError):
        _C.read_memory(1)
    with pytest.raises((BufferError, ValueError)):
        _C.read_memory(np.zeros((8, 8))[:, ::2])


@pytest.mark.no_asan  # a subprocess with torch, for its times
def test_document(capfd, tmp_path):
    target = tmp_path / "bench.svg"
    assert main(["bench", "--rows", "1", "8", *SMALL, "--depth", "128", "--json", "--svg", str(target)]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["schema"] == "halfbyte.bench/2"
    described = document["environment"]
    assert described["size"] == [64, 128] and described["threads"] == [1]
    assert described["compiler"] == _C.build_info()["compiler"]
    absent = {name for name, version in described["versions"].items() if version is None}
    assert set(document["absent"]) == absent
    assert {row["title"] for row in document["rows"]} == {"1 rows", "8 rows"}
    dense = "torch F.linear float32" if TORCH else "numpy matmul float32"
    for rows in (1, 8):
        table = [row for row in document["rows"] if row["title"] == f"{rows} rows"]
        names = [row["name"] for row in table]
        assert {"halfbyte nf4 float32", "halfbyte nf4 bfloat16", dense, "read"} <= set(names)
        assert len(names) == len(set(names))
        for row in table:
            assert 0 < row["p10_us"] <= row["median_us"] and row["samples"] >= turns.LEAST_SAMPLES
            if row["name"] == dense:
                assert row["ratio"] == 1
        (own,) = (row for row in table if row["name"] == "halfbyte nf4 float32")
        assert ("gb_per_s" in own) == ("of_read" in own) == (rows <= 4)
    texts = [e.text for e in ElementTree.fromstring(target.read_text()).iter() if e.text and e.text.strip()]
    assert {"1 rows", "8 rows", "halfbyte nf4 float32"} <= set(texts)


@needs_torch
@pytest.mark.no_asan
def test_text_of_a_chosen_contest(capfd):
    assert main(["bench", "calls", *SMALL]) == 0
    text = capfd.readouterr().out
    assert "call of a 64 x 64 layer, 1 threads" in text and "halfbyte.torch.nn.Linear4bit" in text
    assert "torch " in text and "ratios to torch.nn.Linear" in text


def test_wrong_usage(capsys):
    with pytest.raises(SystemExit) as refused:
        main(["bench", "football"])
    assert refused.value.code == 2 and "one-row" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--depth", "100"])
    assert "multiple of 64" in capsys.readouterr().err
    assert main(["bench", "calls", "--svg", "calls.svg"]) == 2
    assert "--svg" in capsys.readouterr().err


def test_one_list_of_contests():
    assert all(name.replace(" ", "-") in verb.EPILOG for name in compare.CONTESTS)
    if TORCH:
        from halfbyte.bench import contests

        assert tuple(contests.CONTESTS) == compare.CONTESTS


def test_a_failed_contest_is_no_result(monkeypatch, capfd):
    monkeypatch.setattr(compare.sys, "executable", "/bin/false")
    assert main(["bench", *SMALL]) == 1
    out, err = capfd.readouterr()
    assert out == "" and "with 1 threads failed" in err


def test_without_torch(monkeypatch, tmp_path, capfd):
    """ "layers" is measured against NumPy; the other contests name what is missing."""
    options = compare.Options(("layers",), 512, 512, 0.01, (2,))
    monkeypatch.setattr(layers, "cache_bytes", lambda: 1 << 10)
    rows = layers.run(options, 1)
    names = ["halfbyte nf4 float32", "halfbyte nf4 bfloat16", "numpy matmul float32"]
    assert [row["name"] for row in rows][:4] == [*names, "read"]
    assert rows[2]["ratio"] == 1 and rows[0]["of_read"] > 0
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "int8", *SMALL]) == 3
    assert "torch" in capfd.readouterr().err


def test_runs_without_torch_in_its_process(tmp_path):
    """What compare.py starts where torch is missing imports neither torch nor anything that needs it."""
    out = tmp_path / "rows.json"
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from halfbyte.bench import layers\n"
        "layers.cache_bytes = lambda: 1 << 10\n"
        'layers.main([\'{"contests": ["layers"], "size": 64, "depth": 64, "seconds": 0.01, "rows": [1]}\', "1", '
        f"{str(out)!r}])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {row["threads"] for row in json.loads(out.read_text())} == {1}


@needs_torch
def test_entries_compute_the_same(monkeypatch):
    """Competitors multiply the same matrices: none is faster because it does something else."""
    import torch

    from halfbyte.bench import contests

    monkeypatch.setattr(contests, "cache_bytes", lambda: 1 << 10)
    torch.manual_seed(0)
    bench = contests.Bench(compare.Options(("layers",), 64, 128, 0.01), 1)
    x = torch.randn(3, 128)
    dense = bench.dense(torch.float32)[0](0)(x)
    made = [
        (bench.halfbyte_4bit(), x),
        (bench.halfbyte_4bit(compute="bfloat16"), x.bfloat16()),
        (bench.halfbyte_4bit(nested=True), x),
        (bench.halfbyte_int8("exact"), x),
        (bench.dense(torch.bfloat16), x.bfloat16()),
    ]
    bnb = contests.bitsandbytes()
    if bnb is not None:
        made.append((bench.bitsandbytes_4bit(bnb, torch.float32), x))
        made.append((bench.bitsandbytes_4bit(bnb, torch.float32, fused=False), x))
    with torch.no_grad():
        for (layer, _), argument in made:
            # 4 bits keep at least nine tenths of the signal's energy, another matrix keeps none
            error = (layer(0)(argument).float() - dense).square().sum()
            assert error < 0.1 * dense.square().sum()


@needs_torch
def test_copies_do_not_fit_in_the_cache(monkeypatch):
    from halfbyte.bench import contests

    monkeypatch.setattr(contests, "cache_bytes", lambda: 1000)
    bench = contests.Bench(compare.Options(("layers",), 64, 64, 0.01), 1)
    bench.cold_bytes = 4000
    made = bench.copies(lambda: object(), 100)
    assert len({id(made(i)) for i in range(1000)}) > 40


@needs_torch
def test_our_stand_in_is_no_competitor(monkeypatch):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    from halfbyte.bench import contests

    monkeypatch.setattr(shim, "is_ours", lambda module: True)
    assert contests.bitsandbytes() is None


def test_cache_size_is_plausible():
    assert 1 << 16 <= layers.cache_bytes() <= 1 << 34


def test_no_bars_of_nothing():
    assert chart.bars({"environment": {"threads": [1]}, "rows": []}) is None


def test_a_bar_that_would_hide_the_others_is_broken():
    environment = {"threads": [2], "size": [8, 8], "cpu": "a processor", "isa": "ref"}
    times = {"read": 10.0, "halfbyte": 20.0, "torch": 200.0, "bitsandbytes": 5000.0}
    rows = [{"title": "one row", "threads": 2, "name": n, "p10_us": t} for n, t in times.items()]
    picture = chart.bars({"environment": environment, "rows": rows})
    widths = [float(w) for w in re.findall(r'<rect x="260" y="\d+" width="([\d.]+)"', picture)]
    assert widths == [chart.WIDTH / 20, chart.WIDTH / 10, chart.WIDTH, chart.WIDTH]
    assert picture.count("<path") == 1 and "5,000" in picture
