"""Everything that only a GPU can tell, in one script: is it right, is it safe, how fast is it.

    python benchmarks/gpu.py                         all parts, one after the other
    python benchmarks/gpu.py correct streams         some of them
    python benchmarks/gpu.py --emulate               every line of it without a GPU, on the tests' emulator

    build      the extension and the CUDA library for the GPU that is here
    correct    every operation beside the CPU's bits or float64, at all tails, small and large
    layers     the checks of the torch layer and the stand-in (tests/cuda/torch_checks; needs pytest)
    sanitize   the small ones under compute-sanitizer: memcheck, racecheck, synccheck
    streams    the caller's stream, two streams, graphs, no waiting, the same bits every time
    products, optimizers, host     the benchmark: floors, torch, bitsandbytes, PASS or FAIL against the table
                                   of gpu_floors.py; entries for the dispatch table of halfbyte.torch
    model      tokens a second of the bundled model and a random one with 1.1e9 parameters

A part takes --minutes at most (10) and says what it left out. Results go to --json (build/benchmarks/gpu.json) after
each part; to keep one, commit it as benchmarks/results/<gpu>-<date>.json. Exit status 1: something is wrong; a number
below its goal is no error.

No network is needed. The machine must have torch with CUDA, NumPy, a C compiler, and for `build` nvcc; where
`apache-tvm-ffi` is missing torch's own copy of DLPack's header is used. What was built elsewhere can be brought along:
leave out `build`, have halfbyte/_C.*.so of the same Python version in python/halfbyte or an installed halfbyte, and
name the CUDA library in HALFBYTE_CUDA_LIBRARY (it needs nothing but the C library, so it may be built on any machine
with nvcc or the packages of the extra build-cuda: HALFBYTE_CUDA_ARCHS=90 pip wheel .). compute-sanitizer is taken from
the CUDA Toolkit or from PyPI's nvidia-cuda-sanitizer-api.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from benchmarks.output import DEFAULT_JSON, write_json  # noqa: E402

PARTS = ("build", "correct", "layers", "sanitize", "streams", "products", "optimizers", "host", "model")
SPEED = ("products", "optimizers", "host")
TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZER_EXIT = 86


def setup_module() -> Any:
    spec = importlib.util.spec_from_file_location("halfbyte_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_command(capability: tuple[int, int]) -> tuple[list[str], dict[str, str]]:
    """What builds the extension in place for one GPU, and the environment that it needs."""
    arch = "{}{}".format(*capability)
    known = setup_module().CUDA_ARCHS
    if arch not in known:  # 8.7 runs code of 8.6, 12.1 that of 12.0: the newest of the same generation
        fitting = [a for a in known if a[:-1] == arch[:-1] and int(a) <= int(arch)]
        if not fitting:
            raise SystemExit(f"gpu: no kernels for compute capability {capability[0]}.{capability[1]}")
        arch = fitting[-1]
    return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], {
        "HALFBYTE_CUDA": "1",
        "HALFBYTE_CUDA_ARCHS": arch,
    }


def build(emulate: bool) -> dict[str, Any]:
    """In a process of its own, before anything of halfbyte is imported here."""
    if emulate:
        capability = (9, 0)
    else:
        question = "import torch; print(*torch.cuda.get_device_capability())"
        done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"gpu: torch sees no GPU: {done.stderr.strip()[-300:]}")
        major, minor = map(int, done.stdout.split())
        capability = (major, minor)
    command, variables = build_command(capability)
    begin = time.perf_counter()
    if not emulate:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stdout[-3000:] + done.stderr[-3000:])
            raise SystemExit("gpu: the build failed")
    seconds = time.perf_counter() - begin
    print(f"built for sm_{variables['HALFBYTE_CUDA_ARCHS']} in {seconds:.0f} s", flush=True)
    return {"seconds": seconds, "failed": {}, **variables}


def layers(emulate: bool, remaining: Callable[[], float], only: str = "") -> dict[str, Any]:
    """pytest over the checks of the torch layer, in a process of its own."""
    checks = ROOT / "tests" / "cuda" / "torch_checks"
    report = DEFAULT_JSON / "layers.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    tests = ROOT / "tests"
    folders = (ROOT, ROOT / "python", checks.parent, checks, tests / "py", tests / "compat")
    paths = [str(folder) for folder in folders]
    plugin = "torch_plugin" if emulate else "benchmarks.gpu_plugin"
    command = [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", "--tb=line"]
    command += ["-o", "addopts=", f"--junitxml={report}", *(["-k", only] if only else [])]
    command += map(str, sorted(checks.glob("check_*.py")))
    try:
        done = subprocess.run(command, cwd=checks.parent, capture_output=True, text=True, timeout=max(1.0, remaining()),
                              env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})  # fmt: skip
    except subprocess.TimeoutExpired:
        print("FAIL layers: not ready in time")
        return {"failed": {"layers": "not ready in time"}}
    if not report.exists():
        print(f"FAIL layers: {(done.stdout + done.stderr)[-2000:]}")
        return {"failed": {"layers": (done.stdout + done.stderr)[-2000:]}}
    cases = ElementTree.parse(report).getroot().iter("testcase")
    failed: dict[str, str] = {}
    done_cases = skipped = 0
    for case in cases:
        done_cases += 1
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped += case.find("skipped") is not None
        if problem is not None:
            failed[f"{case.get('classname')} {case.get('name')}"] = (problem.get("message") or "")[:300]
    for name, why in failed.items():
        print(f"FAIL {name}: {why}")
    print(f"layers: {done_cases} checks, {len(failed)} failed, {skipped} skipped", flush=True)
    return {"done": done_cases, "skipped": skipped, "failed": failed}


def find_sanitizer() -> str | None:
    setup = setup_module()
    if found := setup.find_cuda_tool("compute-sanitizer"):
        return found
    if nvcc := setup.find_cuda_tool("nvcc"):  # a toolkit keeps it in a folder of its own
        beside = Path(nvcc).resolve().parents[1] / "compute-sanitizer" / "compute-sanitizer"
        return str(beside) if beside.exists() else None
    return None


def sanitize(emulate: bool, sanitizer: str | None, remaining: Callable[[], float]) -> dict[str, Any]:
    """The small cases once under each tool. What is found is an error; a tool that is missing is said."""
    if sanitizer is None:
        print("sanitize: left out, compute-sanitizer not found (pip install nvidia-cuda-sanitizer-api)")
        return {"left_out": "compute-sanitizer not found", "failed": {}}
    failed: dict[str, str] = {}
    program = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "correct",
        "--size",
        "tiny",
        "--json",
        os.devnull,
    ]
    if emulate:
        program += ["--emulate", "--only", "quantize_8bit"]
    for tool in TOOLS:
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            str(SANITIZER_EXIT),
            "--print-limit",
            "20",
            *program,
        ]
        try:
            # A part of the time for each, so that a slow tool does not keep the others from their turn.
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, remaining() / 2),
                                  env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})  # fmt: skip
        except subprocess.TimeoutExpired:
            failed[tool] = "left out: no time"
            continue
        found = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        if done.returncode == SANITIZER_EXIT:
            failed[tool] = "\n".join(found[:40])
        elif done.returncode != 0:
            failed[tool] = f"exit {done.returncode}: " + (done.stdout + done.stderr)[-2000:]
        print(f"sanitize {tool}: {found[-1] if found else 'no summary'}", flush=True)
    for tool, why in failed.items():
        print(f"FAIL {tool}: {why}")
    return {"failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="the most that a part may take")
    parser.add_argument("--emulate", action="store_true", help="without a GPU, tiny, with made-up times")
    parser.add_argument("--size", choices=("tiny", "full"), help="of the cases of `correct`")
    parser.add_argument(
        "--only", default="", help="cases of `correct` (and `layers`) whose name contains this"
    )
    parser.add_argument("--no-peers", action="store_true", help="without bitsandbytes")
    parser.add_argument("--sanitizer", default=None, help="path of compute-sanitizer")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if wrong := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(wrong))}")
    parts = options.parts or PARTS
    result: dict[str, Any] = {"environment": None, "device": None, "parts": {}}
    if "build" in parts:
        result["parts"]["build"] = build(options.emulate)
    # Only now: importing halfbyte needs what has been built.
    from halfbyte.bench import environment

    result["environment"] = environment.describe()
    from benchmarks import gpu_correct, gpu_device, gpu_floors, gpu_model, gpu_speed, gpu_streams

    device = gpu_device.Emulated() if options.emulate else gpu_device.Device()
    result["device"] = device.describe()
    sheet = gpu_device.datasheet(result["device"]["gpu"])
    result["datasheet"] = sheet._asdict() if sheet else None
    print(" ".join(f"{k}={v}" for k, v in result["device"].items()))
    print(f"data sheet: {sheet or 'not in the list'}; goals are stated for an H200", flush=True)

    def part(name: str, function: Callable[[Callable[[], float]], dict[str, Any]]) -> None:
        if name not in parts:
            return
        print(f"---- {name}", flush=True)
        begin = time.monotonic()
        end = begin + 60 * options.minutes
        try:
            result["parts"][name] = function(lambda: end - time.monotonic())
        except Exception as problem:  # the other parts are worth having
            result["parts"][name] = {"failed": {name: f"{type(problem).__name__}: {problem}"}}
            print(f"FAIL {name}: {type(problem).__name__}: {problem}")
        result["parts"][name]["part_seconds"] = round(time.monotonic() - begin, 1)
        write_json(options.json, "gpu", result)

    size = options.size or ("tiny" if options.emulate else "full")
    part("correct", lambda left: gpu_correct.run(device, size, left, options.only))
    part("layers", lambda left: layers(options.emulate, left, options.only))
    sanitizer = options.sanitizer or find_sanitizer()
    part("sanitize", lambda left: sanitize(options.emulate, sanitizer, left))
    part("streams", lambda left: gpu_streams.run(device, left))
    for name in SPEED:
        part(name, lambda left, name=name: gpu_speed.Speed(device, left, not options.no_peers).run([name]))
    part("model", lambda left: gpu_model.run(options.emulate, left))

    if "rows" in result["parts"].get("products", {}):
        source = f"{result['device']['gpu']}, {result['environment']['time'][:10]}"
        entries = gpu_floors.propose_entries(result["parts"]["products"]["rows"], device.capability, source)
        result["entries"] = entries
        print("entries for halfbyte/torch/cuda_table.py:\n" + "\n".join(entries))
    print(f"written: {write_json(options.json, 'gpu', result)}")
    bad = {name: list(each["failed"]) for name, each in result["parts"].items() if each.get("failed")}
    print("all parts passed" if not bad else f"FAILED: {bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
