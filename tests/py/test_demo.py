"""The demo: it runs, its report is complete and consistent, and its checks can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from halfbyte import demo, demo_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama):
    """`halfbyte demo --json` on a little of the text, in a process of its own: it takes bitsandbytes' place."""
    folder = tmp_path_factory.mktemp("demo")
    text = tiny_llama.parent / "heldout.txt"
    command = [
        sys.executable,
        "-m",
        "halfbyte.cli.main",
        "demo",
        str(tiny_llama),
        "--text",
        str(text),
        "--json",
    ]
    command += ["--max-tokens", "1024", "--new-tokens", "4", "--output", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    return result, folder


@pytest.fixture(scope="module")
def report(finished):
    return json.loads(finished[0].stdout)


def test_all_checks_pass_and_files_are_written(finished, report):
    result, folder = finished
    assert result.returncode == 0, result.stderr
    assert [check["ok"] for check in report["checks"]] == [True] * 4
    assert json.loads((folder / "quality.json").read_text(encoding="utf-8")) == report
    if "quality.png" in result.stderr:
        assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")
    else:
        with pytest.raises(ModuleNotFoundError):
            import matplotlib  # noqa: F401


def test_rows_say_what_the_files_say(report):
    original, *quantized = report["rows"]
    assert [row["name"] for row in quantized] == list(demo.RECIPES)
    assert report["parameters"]["linear"] == 2_359_296
    assert original["bits_per_parameter"] == 16 and original["kl"] == 0 and original["nll_change"] == 0
    dense = original["bytes"] - original["linear_bytes"]
    for row in [*quantized, report["control"]]:
        # The rest of the file is the dense tensors, which the same bytes hold, and a longer header.
        assert 0 <= row["bytes"] - row["linear_bytes"] - dense < 40_000
        assert row["nll"] - original["nll"] == pytest.approx(row["nll_change"], abs=1e-9)
        assert row["kl_se"] > 0 and row["tokens_per_second"] > 0 and row["generated_tokens_per_second"] > 0
        assert row["generated"]
    assert report["control"]["tokens"] == 4 * 255


def test_texts_show_every_model(report):
    table, samples = demo_report.table(report), demo_report.samples(report)
    for row in [*report["rows"], report["control"]]:
        assert row["name"] in table and row["name"] in samples
        assert f"{row['bytes']:,}" in table
    assert f"{report['rows'][2]['kl']:.5f} ± {report['rows'][2]['kl_se']:.5f}" in table


def test_checks_fail_when_a_number_is_wrong(report):
    def judged(**changed):
        rows = [{**row, "kl": changed.get(row["name"], row["kl"])} for row in report["rows"]]
        control = {**report["control"], "kl": changed.get("control", report["control"]["kl"])}
        return [check.ok for check in demo.checks(rows, control)]

    nf4 = report["rows"][2]["kl"]
    assert judged() == [True, True, True, True]
    assert judged(int8=0.002) == [False, True, True, True]
    assert judged(fp4=1.3 * nf4) == [True, False, True, True]
    assert judged(**{"nf4, searched scales": nf4}) == [True, True, False, True]
    assert judged(control=0.04) == [True, True, True, False]


def test_swapping_half_bytes_touches_the_codes_only(tmp_path, tiny_llama):
    import halfbyte

    source, once, twice = tmp_path / "nf4", tmp_path / "once", tmp_path / "twice"
    halfbyte.quantize(tiny_llama, source, to="nf4", compute_dtype="float32")
    demo.swap_half_bytes(source, once)
    demo.swap_half_bytes(once, twice)
    name = "model.safetensors"
    assert (twice / name).read_bytes() == (source / name).read_bytes()
    before = packed_codes(source / name)
    after = packed_codes(once / name)
    assert before.keys() == after.keys() and len(before) == 28
    for key, codes in before.items():
        assert np.array_equal(after[key], (codes >> 4) | (codes << 4))


def packed_codes(path):
    """The packed weights of a checkpoint, without what else is in it."""
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    data = np.fromfile(path, dtype=np.uint8)
    header = json.loads(bytes(data[8 : 8 + header_bytes]))
    body = data[8 + header_bytes :]
    packed = [k.removesuffix(".absmax") for k in header if k.endswith(".weight.absmax")]
    return {key: body[slice(*header[key]["data_offsets"])] for key in packed}
