"""What README.md and the documentation show is true: examples run, sizes are right, links and commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import halfbyte

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
CONSOLE = re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
DOCUMENTS = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


@pytest.fixture
def clone(tmp_path):
    """A folder in which the paths of the examples exist, and which they may write into."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/data").symlink_to(ROOT / "tests/data")
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    package = str(Path(halfbyte.__file__).resolve().parents[1])
    result = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": package},
        timeout=500,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("example", PYTHON, ids=["script", "notebook"])
def test_python_examples_run(example, clone):
    if "transformers" in example:
        pytest.importorskip("transformers")
    output = run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", example], clone)
    if "transformers" in example:
        assert output.startswith("The function returns ") and len(output) > 40
    else:
        assert "Params4bit(nf4, shape=(512, 1024)" in output and " 294912 0.09" in output
        assert "(3, 512)" in output


@pytest.mark.parametrize("example", CONSOLE, ids=["ship", "look"])
def test_console_examples_run(example, clone, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    for line in example.splitlines():
        assert line.startswith("$ halfbyte ")
        words = shlex.split(line.removeprefix("$ halfbyte "))
        if words[0] == "bench":  # a minute with its own sizes
            words += ["--size", "128", "--seconds", "0.1"]
        output = run([sys.executable, "-m", "halfbyte.cli.main", *words], clone)
        expected = {"quantize": "28 tensors", "inspect": "nf4 block 64", "verify": "ok", "plan": "nf4",
                    "doctor": "PASS  quantize nf4", "bench": "halfbyte nf4 float32"}  # fmt: skip
        assert expected[words[0]] in output
    if "quantize" in example:
        assert (clone / "tiny-nf4/model.safetensors").stat().st_size == 2_398_032


def test_sizes_in_the_accuracy_table(clone):
    """The columns that do not depend on a measurement. tests/compat measures the others."""

    def row(of: str) -> list[str]:
        return next(line for line in README.splitlines() if line.startswith(f"| {of}")).split(" | ")

    recipes = {
        "int8": {"to": "int8"},
        "NF4 |": {"to": "nf4"},
        "NF4, nested": {"to": "nf4", "double_quant": True},
        "NF4, searched": {"to": "nf4", "scales": "search"},
        "FP4": {"to": "fp4"},
    }
    for name, options in recipes.items():
        report = halfbyte.quantize(
            clone / "tests/data/tiny-llama", None, dry_run=True, compute_dtype="float32", **options
        )
        weights = next(f["bytes"] for f in report.document["files"] if f["name"] == "model.safetensors")
        assert row(name)[1:3] == [f"{report.bits_per_parameter:.3f}", f"{weights:,}"], name


def test_speeds_are_those_of_the_page_on_performance():
    """The README repeats rows of docs/performance.md; a new measurement has to reach both."""
    section = README.split("## What it gains in speed")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    measured = (ROOT / "docs/performance.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 10
    assert not [row for row in rows if row not in measured]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    if name == "README.md":
        assert len(links) > 8
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{name}: {link}"


def test_every_document_is_in_the_list():
    listed = set(re.findall(r"\((docs/[\w-]+\.md)\)", README))
    assert listed == set(DOCUMENTS) - {"README.md"}


def test_commands_and_options_in_the_documentation_exist():
    """Each `halfbyte VERB` in the documentation is a verb, and each option that follows is one of its options."""
    from halfbyte.cli.main import _VERBS, build_parser

    seen = 0
    words = "|".join(
        [*_VERBS, "bench", "cache", "dequantize", "merge-lora"]
    )  # planned ones must not be promised
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for verb, rest in re.findall(rf"\bhalfbyte ({words})\b([^`\n]*)", text):
            assert verb in _VERBS, f"{name}: halfbyte {verb}"
            parser = build_parser(verb)
            help_text = next(a for a in parser._actions if a.dest == "verb").choices[verb].format_help()
            for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", rest):
                assert option in help_text, f"{name}: halfbyte {verb} {option}"
            seen += 1
    assert seen > 10
