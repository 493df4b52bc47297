"""Builds the C test program in its variants; run as a script it prints the path of the program.

    python tests/c/build.py native                       every ISA folder with its own flags
    python tests/c/build.py emulated_tiles               the same, but for AMX, its tile registers in plain C, and
                                                         for AVX-VNNI, in the encoding of AVX-512
    python tests/c/build.py simde_x86                    the x86 folders as plain C, through SIMDe
    python tests/c/build.py simde_neon                   the NEON folder as plain C, through SIMDe
    python tests/c/build.py qemu_neon                    the NEON folder for AArch64, run under qemu-user
    python tests/c/build.py native --sanitize=thread     (or address,undefined)

Objects are kept in build/tests-c/<variant> and compiled again when a file that they include changes.
Flags per ISA come from setup.py, so that what is tested is what is shipped.
"""

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "c"
VARIANTS = ("native", "emulated_tiles", "simde_x86", "simde_neon", "qemu_neon")
X86 = ("avx2", "avxvnni", "avx512", "avx512vnni", "avx512vbmi", "avx512bf16", "amx")
EMULATE_TILES = ["-DHB_EMULATE_TILES", f"-isystem{HERE / 'simde'}"]
ISAS = {
    "emulated_tiles": ("avxvnni", "amx"),
    "simde_x86": ("ref", *X86),
    "simde_neon": ("neon",),
    "qemu_neon": ("ref", "neon"),
}


class Unavailable(Exception):
    """This machine lacks what the variant needs; the text says what."""


def setup_module():
    spec = importlib.util.spec_from_file_location("halfbyte_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def isas(variant: str) -> tuple[str, ...]:
    """The ISA folders that the variant can test."""
    return ISAS.get(variant) or tuple(setup_module().ISA_FLAGS)


def runner(variant: str) -> list[str]:
    """What to put before the program's path to run it here."""
    if variant != "qemu_neon" or platform.machine() in ("aarch64", "arm64"):
        return []
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        raise Unavailable("qemu-aarch64 is not installed (Debian: qemu-user-static)")
    return [qemu]


def compilers(variant: str) -> list[str]:
    if variant != "qemu_neon":
        return os.environ.get("CC", "cc").split()
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        raise Unavailable("aarch64-linux-gnu-gcc is not installed (Debian: gcc-aarch64-linux-gnu)")
    return ["aarch64-linux-gnu-gcc"]


def plan(variant: str, sanitize: str) -> dict[Path, list[str]]:
    """Each source file and its flags."""
    setup = setup_module()
    common = [f for f in setup.COMMON if f not in ("-fPIC", "-Icsrc") and not f.startswith("-fsanitize")]
    common += [f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-g"]
    if sanitize:
        common += [f"-fsanitize={sanitize}", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    emulated = variant.startswith("simde")
    flags = {"ref": [], **(setup.X86_FLAGS if not variant.endswith("neon") else setup.ARM_FLAGS)}
    if variant == "native":
        flags = setup.ISA_FLAGS
    if variant == "emulated_tiles":  # no compiler has to know them
        flags = {"ref": [], **setup.X86_FLAGS, "amx": setup.X86_FLAGS["avx512bf16"]}
        flags["avxvnni"] = [*setup.X86_FLAGS["avx512vnni"], "-DHB_EVEX_VNNI"]
    if variant != "native":
        common = [flag for flag in common if not flag.startswith("-DHB_WITHOUT_")]
    if emulated:
        import simde_py

        neon = variant == "simde_neon"
        common += [
            "-DHB_SIMDE",
            "-DSIMDE_NO_NATIVE",
            f"-DHB_WITH_X86={int(not neon)}",
            f"-DHB_WITH_NEON={int(neon)}",
            "-O1",
            "-Wno-psabi",
        ]
        common += [f"-isystem{simde_py.get_include()}", f"-isystem{HERE / 'simde'}"]
        common += ["-DHB_SIMDE_NEON"] if neon else ["-DHB_EMULATE_TILES"]
        flags = {isa: [] for isa in flags}
    files = {path: [*common, "-Wconversion"] for path in sorted((ROOT / "csrc" / "core").glob("*.c"))}
    for isa, isa_flags in flags.items():
        files |= {path: common + isa_flags for path in sorted((ROOT / "csrc" / "cpu" / isa).glob("*.c"))}
    bench = [] if emulated else sorted((ROOT / "benchmarks").glob("bench_*.c"))
    files |= {path: [*common, "-D_GNU_SOURCE"] for path in [*sorted(HERE.glob("*.c")), *bench]}
    if variant == "emulated_tiles":
        for path in [*(ROOT / "csrc" / "cpu" / "amx").glob("*.c"), HERE / "check.c", *HERE.glob("*tiles.c")]:
            files[path] = [*files[path], *EMULATE_TILES]
    return files


def compile_one(compiler: list[str], source: Path, flags: list[str], folder: Path) -> Path:
    target = folder / ("_".join(source.relative_to(ROOT).with_suffix("").parts) + ".o")
    command = [*compiler, *flags, "-MD", "-c", str(source), "-o", str(target)]
    record = target.with_suffix(".cmd")
    if target.exists() and record.exists() and record.read_text() == "\0".join(command):
        needed = target.with_suffix(".d").read_text().replace("\\\n", " ").split(": ", 1)[1].split()
        stamp = target.stat().st_mtime_ns
        if all(os.path.exists(p) and os.stat(p).st_mtime_ns <= stamp for p in needed):
            return target
    record.unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    record.write_text("\0".join(command))
    return target


def build(variant: str, sanitize: str = "") -> Path:
    """Compiles and links what changed. Raises Unavailable, or RuntimeError with the compiler's words."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    if variant == "simde_neon" and platform.machine() in ("aarch64", "arm64"):
        raise Unavailable("this machine runs the NEON kernels natively")
    compiler = compilers(variant)
    runner(variant)
    if variant == "emulated_tiles" and platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable("the kernels around the tiles are for x86")

    def folder_of(variant: str) -> Path:
        name = variant + ("-" + sanitize.replace(",", "-") if sanitize else "")
        return ROOT / "build" / "tests-c" / name

    def compile_into_folder(source: Path, flags: list[str]) -> Path:
        # What is the same as in the native program is compiled once for both.
        shared = variant == "emulated_tiles" and not set(EMULATE_TILES) <= set(flags)
        return compile_one(compiler, source, flags, folder_of("native" if shared else variant))

    program = folder_of(variant) / "check"
    program.parent.mkdir(parents=True, exist_ok=True)
    folder_of("native").mkdir(exist_ok=True)
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(compile_into_folder, s, f) for s, f in plan(variant, sanitize).items()]
        objects = [job.result() for job in jobs]
    if program.exists() and all(o.stat().st_mtime_ns <= program.stat().st_mtime_ns for o in objects):
        return program
    link = [*compiler, *map(str, objects), "-pthread", "-lm", "-o", str(program)]
    link += [f"-fsanitize={sanitize}"] if sanitize else []
    link += ["-static"] if variant == "qemu_neon" else []
    done = subprocess.run(link, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(link)}\n{done.stderr}")
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--sanitize", default="", help="as for gcc -fsanitize=")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="run it with the arguments that follow")
    options = parser.parse_args()
    try:
        program = build(options.variant, options.sanitize)
    except (Unavailable, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.run is None:
        print(program)
        return 0
    return subprocess.run([*runner(options.variant), str(program), *options.run]).returncode


if __name__ == "__main__":
    sys.exit(main())
