"""What the formats cost a real model, measured the way `make demo` measures it, and what the documents say of it.

One run of `halfbyte demo` on the bundled model and the whole of heldout.txt; every test looks at its report. The
bounds leave room for another compiler or CPU, whose roundings differ; the runs of one machine are equal.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
DOCUMENTS = ("README.md", "docs/evaluation.md")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = subprocess.run(
        [sys.executable, "-m", "halfbyte.cli.main", "demo", DATA / "tiny-llama"]
        + ["--text", DATA / "heldout.txt", "-o", folder],
        capture_output=True,
        text=True,
        timeout=580,
    )
    report = json.loads((folder / "quality.json").read_text())
    return result, report


@pytest.fixture(scope="module")
def kl(demo):
    return {row["name"]: row["kl"] for row in demo[1]["rows"]}


def test_the_demo_succeeds_on_enough_text(demo):
    result, report = demo
    assert result.returncode == 0, result.stdout + result.stderr
    assert report["predicted_tokens"] >= 15_000
    assert report["rows"][0]["kl"] == 0.0  # the original beside itself
    assert 2.0 < report["rows"][0]["nll"] < 4.5  # it was trained: log(2048) = 7.6


def test_formats_rank_as_they_must(kl):
    assert kl["fp4"] >= 1.4 * kl["nf4"]
    assert kl["nf4, searched scales"] <= 0.92 * kl["nf4"]
    assert kl["int8"] < 0.001
    assert 0.02 < kl["nf4"] < 0.08
    assert kl["nf4, nested scales"] <= 1.05 * kl["nf4"]  # 8 bits for a scale cost little


def test_the_difference_is_larger_than_its_error(demo):
    rows = {row["name"]: row for row in demo[1]["rows"]}
    for worse, better in (("fp4", "nf4"), ("nf4", "nf4, searched scales"), ("nf4", "int8")):
        a, b = rows[worse], rows[better]
        assert a["kl"] - b["kl"] > 4 * (a["kl_se"] ** 2 + b["kl_se"] ** 2) ** 0.5, (worse, better)


def test_the_broken_control_fails_loudly(demo):
    _, report = demo
    control, nf4 = report["control"], next(row for row in report["rows"] if row["name"] == "nf4")
    assert control["kl"] > 3.0 and control["kl"] > 50 * nf4["kl"]
    assert control["nll_change"] > 3.0
    assert control["top1"] < 0.05 < 0.8 < nf4["top1"]
    assert control["bytes"] == nf4["bytes"]  # of the right size, and nonsense


def test_sizes_are_those_of_the_files(demo):
    rows = {row["name"]: row for row in demo[1]["rows"]}
    assert rows["original"]["bytes"] == (DATA / "tiny-llama" / "model.safetensors").stat().st_size
    assert rows["nf4"]["bytes"] == rows["fp4"]["bytes"] == rows["nf4, searched scales"]["bytes"]
    assert rows["nf4, nested scales"]["bytes"] < rows["nf4"]["bytes"] < rows["int8"]["bytes"]
    assert 4.5 <= rows["nf4"]["bits_per_parameter"] < 4.55  # 4 bits, and a float32 for 64 weights
    assert 4.12 < rows["nf4, nested scales"]["bits_per_parameter"] < 4.3
    assert 8.0 < rows["int8"]["bits_per_parameter"] < 8.3


def claims(text, names):
    """{name: KL divergence} of the lines of a table that begin with a name and hold "KL ± error"."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip(" *`") for cell in re.split(r"\||\s{2,}", line) if cell.strip()]
        numbers = re.search(r"(\d+\.\d+) ± \d", line)
        if cells and numbers and cells[0] in names:
            found[cells[0]] = float(numbers[1])
    return found


def test_documents_show_the_numbers_of_this_code(demo, kl):
    """Within 3 %: what roundings of another machine may do; a format's own change would be larger."""
    result, report = demo
    kl = kl | {report["control"]["name"]: report["control"]["kl"]}
    printed = claims(result.stdout, kl)
    assert printed.keys() == kl.keys() - {"original"}
    documented = {name: claims((ROOT / name).read_text(encoding="utf-8"), kl) for name in DOCUMENTS}
    assert len(documented["docs/evaluation.md"]) >= 5
    for found in (printed, *documented.values()):
        for name, value in found.items():
            assert value == pytest.approx(kl[name], rel=0.03, abs=2e-5), name
