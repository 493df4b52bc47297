#!/usr/bin/env python3
"""Run bitsandbytes' own tests on the CPU, against bitsandbytes and against halfbyte, and compare case by case.

    git clone --depth 1 --branch 0.50.2 https://github.com/bitsandbytes-foundation/bitsandbytes
    python tests/compat/run_upstream_tests.py bitsandbytes            # all files, both; an hour or more
    python tests/compat/run_upstream_tests.py bitsandbytes test_ops.py --only halfbyte -k gemm_4bit

The tests are used as they are, at their own tolerances; only the folder `tests/` is copied, so that the
package beside it is not what `import bitsandbytes` finds. "upstream" is the bitsandbytes that pip installed,
"halfbyte" the same interpreter with `halfbyte.install()` called by a pytest plugin before the tests are
imported. `lion_pytorch`, which the tests compare with, is given as the dozen lines of Lion's formula.

Prints a Markdown table, one line a file, then each case that passes upstream and not here. Exit status 1 if
there is one, 0 otherwise. Results are kept as JUnit XML in --results; a file that has one is not run again
unless --again is given, so a long comparison can be done in parts.

Left out: test_generation.py (downloads models), test_cuda_setup_evaluator.py (which of its own shared
libraries bitsandbytes picks for which CUDA version; there is nothing of the kind here).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

PYTHON = Path(__file__).resolve().parents[2] / "python"
LEFT_OUT = ("test_generation.py", "test_cuda_setup_evaluator.py")
PLUGIN = "import halfbyte\nhalfbyte.install()\n"
# Lion (Chen et al. 2023, algorithm 2) with decoupled weight decay.
LION = """
import torch

class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((m * beta1 + p.grad * (1 - beta1)).sign(), alpha=-group["lr"])
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)
"""


def run(file: str, side: str, folder: Path, xml: Path, extra: list[str]) -> float:
    """Run one test file; returns seconds. What pytest says goes to `xml` with the ending .log."""
    paths = [folder] + ([PYTHON, folder / "plugin"] if side == "halfbyte" else [])
    env = os.environ | {
        "BNB_TEST_DEVICE": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_OFFLINE": "1",
    }
    env.setdefault("OMP_NUM_THREADS", "1")
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", f"--junitxml={xml}",
        "-o", "addopts=-m 'not slow and not benchmark'", "-o", "junit_family=xunit1",
        *(["-p", "use_halfbyte"] if side == "halfbyte" else []), *extra, f"tests/{file}",
    ]  # fmt: skip
    began = time.perf_counter()
    with open(xml.with_suffix(".log"), "w") as log:
        subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    return time.perf_counter() - began


def outcomes(xml: Path) -> dict[str, str]:
    """{case: "passed" | "failed" | "skipped"}; an expected failure counts as skipped.

    Raises
    ------
    FileNotFoundError
        pytest ended before it wrote anything; the log says why.
    """
    found = {}
    for case in ET.parse(xml).getroot().iter("testcase"):
        tags = {child.tag for child in case}
        result = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        # Some ids hold addresses, and classes of the tested package under the name of their module.
        name = re.sub(r"0x[0-9a-f]+", "0x", f"{case.get('classname', '')}::{case.get('name')}")
        found[name] = result if found.get(name) != "failed" else "failed"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder with bitsandbytes' tests/ in it")
    parser.add_argument("files", nargs="*", help="names of test files; default all")
    parser.add_argument("--only", choices=("upstream", "halfbyte"), help="run only one of the two")
    parser.add_argument(
        "--results", type=Path, default=Path("upstream-tests"), help="default ./upstream-tests"
    )
    parser.add_argument("--again", action="store_true", help="run also what has a result already")
    arguments, extra = parser.parse_known_args()

    tests = arguments.checkout / "tests"
    if not tests.is_dir():
        parser.error(f"no folder {tests}")
    files = arguments.files or sorted(p.name for p in tests.glob("test_*.py") if p.name not in LEFT_OUT)
    sides = (arguments.only,) if arguments.only else ("upstream", "halfbyte")
    arguments.results.mkdir(parents=True, exist_ok=True)
    table, worse = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(tests, folder / "tests")
        (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    benchmark\n    deprecated\n")
        (folder / "lion_pytorch.py").write_text(LION)
        (folder / "plugin").mkdir()
        (folder / "plugin" / "use_halfbyte.py").write_text(PLUGIN)
        for file in files:
            found, seconds = {}, {}
            for side in sides:
                xml = arguments.results.resolve() / f"{Path(file).stem}-{side}.xml"
                note = xml.with_suffix(".seconds")
                if arguments.again or not note.exists():
                    xml.unlink(missing_ok=True)
                    note.write_text(f"{run(file, side, folder, xml, extra):.0f}")
                found[side], seconds[side] = outcomes(xml), note.read_text()
            table.append(row(file, found, seconds))
            print(table[-1], file=sys.stderr, flush=True)
            if len(sides) == 2:
                up, here = found["upstream"], found["halfbyte"]
                worse += [
                    f"{c} ({here.get(c, 'missing')})"
                    for c in up
                    if up[c] == "passed" and here.get(c) != "passed"
                ]
            else:
                worse += [c for c, result in found[sides[0]].items() if result == "failed"]
    print("| file | " + " | ".join(f"{s}: passed, skipped, failed | s" for s in sides) + " |")
    print("|---|" + "---|---|" * len(sides))
    print("\n".join(table))
    print(f"\n{len(worse)} cases fail" + ("" if arguments.only else " here that pass upstream"))
    print("\n".join(f"- {case}" for case in worse))
    return bool(worse)


def row(file: str, found: dict[str, dict[str, str]], seconds: dict[str, str]) -> str:
    cells = []
    for side, cases in found.items():
        counts = [list(cases.values()).count(result) for result in ("passed", "skipped", "failed")]
        cells += [", ".join(map(str, counts)), seconds[side]]
    return f"| {file} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
