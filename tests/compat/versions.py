"""Run the tests of integrations with released versions of other libraries: python tests/compat/versions.py [NAME...]

Each set gets an environment in build/versions/NAME that holds its packages and takes everything else (torch, halfbyte)
from the interpreter that runs this file. Needs pip and an index; the results are in docs/drop-in.md.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# One set of releases of about the same date. Only what depends on transformers' major version is named.
SETS = {
    "2025-11": [
        "transformers==4.57.6",
        "peft==0.18.1",
        "accelerate==1.12.*",
        "trl==0.25.*",
        "datasets==4.4.*",
        "diffusers==0.35.*",
    ],
}
TESTS = ["transformers_4bit", "transformers_8bit", "peft", "trainer", "trl", "loaders", "fsdp"]


def prepare(name: str) -> Path:
    """The environment's interpreter; packages are installed when the list of them has changed."""
    folder = ROOT / "build" / "versions" / name
    python = folder / "bin" / "python"
    done = folder / "installed"
    if done.exists() and done.read_text() == "\n".join(SETS[name]):
        return python
    venv.create(folder, with_pip=True, symlinks=True)
    inner = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    # After the environment's own packages, which therefore win.
    (inner / "zz_outer.pth").write_text(sysconfig.get_path("purelib") + "\n" + str(ROOT / "python") + "\n")
    subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *SETS[name]], check=True
    )
    done.write_text("\n".join(SETS[name]))
    return python


def main(names: list[str]) -> int:
    status = 0
    for name in names or SETS:
        python = prepare(name)
        packages = ["torch", *(spec.split("=")[0] for spec in SETS[name])]
        show = f"import importlib.metadata as m; print(*(f'{{p}} {{m.version(p)}}' for p in {packages}), sep=', ')"
        print(name, subprocess.run([python, "-c", show], capture_output=True, text=True).stdout, flush=True)
        tests = [f"tests/compat/test_{test}.py" for test in TESTS]
        command = [python, "-m", "pytest", *tests, "-rfs", *os.environ.get("TESTS", "").split()]
        status |= subprocess.run(command, cwd=ROOT).returncode
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
