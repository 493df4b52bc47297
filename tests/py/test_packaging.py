"""Source distribution, wheel, and what the build says about itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import halfbyte

ROOT = Path(__file__).resolve().parents[2]
SETUP = [sys.executable, "setup.py", "-q"]


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | environment, timeout=550
    )


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The source distribution, unpacked far from any git repository."""
    folder = tmp_path_factory.mktemp("sdist")
    result = run([*SETUP, "egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder)], ROOT)
    assert result.returncode == 0, result.stderr
    (archive,) = folder.glob("halfbyte-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "out", filter="data") if sys.version_info >= (3, 12) else file.extractall(
            folder / "out"
        )
    (root,) = (folder / "out").iterdir()
    return root


def test_the_source_distribution_is_complete(unpacked):
    """Sources, headers, tests, model and documentation, and no build output."""
    kept = ("csrc/**/*", "cuda/*", "python/halfbyte/**/*.py*", "tests/**/*", "benchmarks/*", "docs/*")
    rubbish = {".pyc", ".pyo", ".so", ".o", ".a"}
    for pattern in kept:
        here = {p.relative_to(ROOT) for p in ROOT.glob(pattern) if p.is_file() and p.suffix not in rubbish}
        there = {p.relative_to(unpacked) for p in unpacked.glob(pattern) if p.is_file()}
        assert here and here <= there, f"missing: {sorted(map(str, here - there))}"
    for name in ("setup.py", "pyproject.toml", "Makefile", "requirements-dev.txt", "README.md", "LICENSE"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
    assert not [p for p in unpacked.rglob("*") if p.suffix in rubbish]


IMPORT = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "ml_dtypes"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
sys.path.insert(0, sys.argv.pop(1))
"""


@pytest.mark.slow
def test_a_wheel_from_the_source_distribution_works(unpacked, tmp_path):
    """Built outside git, installed by pip without its neighbours, run where there is no torch."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    result = run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(unpacked)], tmp_path
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("halfbyte-*.whl")
    target = tmp_path / "installed"
    result = run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], tmp_path)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in target.iterdir()} - {"bin"} == {
        "halfbyte",
        wheel.name.split("-cp")[0] + ".dist-info",
    }
    assert (target / "halfbyte/py.typed").exists() and (target / "halfbyte/_C.pyi").exists()

    python = [sys.executable, "-I", "-c"]
    result = run([*python, IMPORT + "import halfbyte; halfbyte.quantize_4bit", str(target)], tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    main = (
        IMPORT
        + "import halfbyte; assert halfbyte.__file__.startswith(sys.path[0])\n"
        + "from halfbyte.cli.main import main; sys.exit(main())"
    )
    model = str(ROOT / "tests/data/tiny-llama")
    result = run([*python, main, str(target), "quantize", model, "-o", "out", "--to", "nf4"], tmp_path)
    assert result.returncode == 0, result.stderr
    result = run([*python, main, str(target), "verify", "out"], tmp_path)
    assert result.returncode == 0 and "28 quantized weights are complete" in result.stdout, result.stderr


def test_the_build_says_whether_there_is_cuda():
    info = halfbyte.build_info()
    assert info["cuda"].startswith(("CPU only (", "CUDA for sm_"))
    library = Path(halfbyte._C.__file__).with_name("libhalfbyte_cuda.so")
    assert library.exists() == info["cuda"].startswith("CUDA for")


WITHOUT_TVM_FFI = """
import importlib.util, sys
sys.modules["tvm_ffi"] = None
spec = importlib.util.spec_from_file_location("halfbyte_setup", sys.argv[1])
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)
print(setup.dlpack_include(sys.argv[2]))
"""


def test_dlpack_comes_from_torch_where_its_package_is_missing(tmp_path):
    """A machine without a network that has torch has all that a build needs."""
    pytest.importorskip("torch")
    # In a process of its own: setuptools refuses to come after somebody's import of distutils.
    including = [sys.executable, "-c", WITHOUT_TVM_FFI, str(ROOT / "setup.py"), str(tmp_path)]
    done = subprocess.run(including, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.split()[-1])
    header = (folder / "dlpack" / "dlpack.h").read_text()
    assert folder == tmp_path and "DLPackExchangeAPI" in header
    source = tmp_path / "use.c"
    source.write_text(
        "#include <dlpack/dlpack.h>\nint f(DLPackExchangeAPI *a) { return a->managed_tensor_allocator != 0; }\n"
    )
    command = [
        os.environ.get("CC", "cc"),
        "-std=c11",
        "-Wall",
        "-Werror",
        f"-I{folder}",
        "-c",
        source,
        "-o",
        tmp_path / "use.o",
    ]
    assert subprocess.run(command).returncode == 0
    code = WITHOUT_TVM_FFI.replace("print(", "importlib.util.find_spec = lambda name: None\nprint(")
    including[2] = code
    done = subprocess.run(including, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr, done.stderr


def test_a_wish_for_cuda_is_not_ignored(tmp_path):
    """HALFBYTE_CUDA=1 where it cannot be built ends the build with the reason, before anything is compiled."""
    if any(ROOT.glob("cuda/*.cu")):
        environment = {"HALFBYTE_CUDA": "1", "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
        reason = "nvcc not found"
    else:
        environment = {"HALFBYTE_CUDA": "1"}
        reason = "no CUDA sources"
    command = [*SETUP, "build_ext", "--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l")]
    result = run(command, ROOT, **environment)
    assert result.returncode != 0 and reason in result.stderr
    assert not list(tmp_path.rglob("*.o"))
