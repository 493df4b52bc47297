"""Build of the extension module: one static library per instruction set, each with its own flags.

Everything that is the same on every machine is in pyproject.toml. Environment:
HALFBYTE_WERROR=0      let warnings pass (for compilers that know more of them than ours)
HALFBYTE_SANITIZE=1    build with AddressSanitizer and UndefinedBehaviorSanitizer
HALFBYTE_CUDA=0|1      never build the CUDA library / fail when it cannot be built (default: if nvcc is found)
HALFBYTE_CUDA_ARCHS    e.g. "90;100": the GPU architectures to compile for
"""

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SANITIZE = os.environ.get("HALFBYTE_SANITIZE") == "1"

COMMON = ["-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off",
          "-Wall", "-Wextra", "-Wshadow", "-pthread", "-Icsrc"]  # fmt: skip
if os.environ.get("HALFBYTE_WERROR") != "0":
    COMMON.append("-Werror")
if SANITIZE:
    COMMON += ["-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
               "-fsanitize=float-cast-overflow", "-fno-sanitize-recover=undefined"]  # fmt: skip

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
AVX512 = AVX2 + [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512cd",
    "-mprefer-vector-width=512",
]
VNNI = AVX512 + ["-mavx512vnni"]
VBMI = VNNI + ["-mavx512vbmi", "-mavx512vbmi2"]
BF16 = VBMI + ["-mavx512bf16"]
X86_FLAGS = {"avx2": AVX2, "avxvnni": AVX2 + ["-mavxvnni"], "avx512": AVX512,
             "avx512vnni": VNNI, "avx512vbmi": VBMI, "avx512bf16": BF16,
             "amx": BF16 + ["-mamx-tile", "-mamx-bf16", "-mamx-int8"]}  # fmt: skip
ARM_FLAGS = {"neon": []}
FLAGS_OF_MACHINE = {"x86_64": X86_FLAGS, "AMD64": X86_FLAGS, "aarch64": ARM_FLAGS, "arm64": ARM_FLAGS}
ISA_FLAGS = {"ref": []} | FLAGS_OF_MACHINE.get(platform.machine(), {})


def compiles(flags, code):
    """Whether compiler and assembler know the flags and the instructions in `code`."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    command = [*compiler, *flags, "-x", "c", "-c", "-o", os.devnull, "-"]
    try:
        return subprocess.run(command, input=code, capture_output=True, text=True).returncode == 0
    except OSError:
        return False


for isa, code in {
    "amx": "tdpbf16ps %tmm2, %tmm1, %tmm0",
    "avxvnni": "{vex} vpdpbusd %ymm2, %ymm1, %ymm0",
}.items():
    if isa in ISA_FLAGS and not compiles(ISA_FLAGS[isa], f'__asm__("{code}");'):
        del ISA_FLAGS[isa]  # tools from before 2021
        COMMON.append(f"-DHB_WITHOUT_{isa.upper()}")


CUDA_ARCHS = ["75", "80", "86", "89", "90", "100", "120"]
CUDA_FLAGS = ["-O3", "-std=c++17", "-Icsrc", "-Icuda", "--compress-mode=size", "-cudart=static",
              "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"]  # fmt: skip
CUDA_LINK = ["-Xcompiler=-static-libstdc++,-static-libgcc", "-Xlinker=--exclude-libs,ALL", "-Xlinker=-s"]


# Files with instructions of one architecture alone (sm_90a code runs on 9.0 and nothing else): compiled for it only,
# with the macro that says so, or without their kernels where that architecture is not built for.
CUDA_OWN_ARCH = {"linear4_wgmma.cu": "90a"}


def cuda_arch_flags(source, archs):
    """How nvcc compiles a file when the library is built for `archs`, such as ["80", "90"]."""
    own = CUDA_OWN_ARCH.get(Path(source).name)
    if own and own.rstrip("a") in archs:
        return [f"-gencode=arch=compute_{own},code=sm_{own}", f"-DHB_CUDA_SM{own.upper()}"]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return flags + [f"-gencode=arch=compute_{a},code=compute_{a}" for a in archs[-1:]]  # PTX for later GPUs


def sources(pattern):
    return sorted(glob(pattern, root_dir=ROOT))


def library(name, pattern, flags=()):
    # setuptools compiles each library with its own "cflags"; obj_deps rebuilds when a header changes.
    files = sources(pattern)
    # All of csrc/cpu: avx512vbmi includes headers of avx512.
    headers = sources("csrc/core/*") + sources("csrc/cpu/*.h") + sources("csrc/cpu/*/*.h")
    return (name, {"sources": files, "cflags": COMMON + [*flags], "obj_deps": {"": headers}})


# Linked in this order: each library may use the ones behind it.
LIBRARIES = [library("hb_core", "csrc/core/*.c", ["-Wconversion"])]
LIBRARIES += [library(f"hb_{isa}", f"csrc/cpu/{isa}/*.c", flags) for isa, flags in ISA_FLAGS.items()]


def dlpack_include(folder):
    """Where <dlpack/dlpack.h> is: in the build requirement, else a copy in `folder` of torch's, which is the same."""
    try:
        import tvm_ffi.libinfo
    except ImportError:
        torch = importlib.util.find_spec("torch")
        header = Path(torch.origin).parent / "include/ATen/dlpack.h" if torch and torch.origin else None
        if header is None or not header.exists() or "DLPackExchangeAPI" not in header.read_text():
            raise
        target = Path(folder) / "dlpack" / "dlpack.h"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(header, target)
        return str(folder)
    return tvm_ffi.libinfo.find_dlpack_include_path()


def find_cuda_tool(name):
    """A program of the CUDA Toolkit: of CUDA_HOME, on the path, or from PyPI (extra "build-cuda")."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [home + "/bin"] if home else []
    folders += os.environ.get("PATH", os.defpath).split(os.pathsep)
    packages = importlib.util.find_spec("nvidia")
    for root in packages.submodule_search_locations if packages else ():
        folders += sorted(glob(f"{root}/cu*/bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


def cuda_plan():
    """(nvcc, None) to build the CUDA library with, or (None, why it is not built)."""
    wish = os.environ.get("HALFBYTE_CUDA", "")
    nvcc, why = None, None
    if wish == "0":
        why = "HALFBYTE_CUDA=0"
    elif not sources("cuda/*.cu"):
        why = "this version has no CUDA sources"
    elif (nvcc := find_cuda_tool("nvcc")) is None:
        why = "nvcc not found; set CUDA_HOME, or pip install '.[build-cuda]'"
    if wish == "1" and nvcc is None:
        sys.exit(f"halfbyte: HALFBYTE_CUDA=1, but the CUDA library cannot be built: {why}")
    return nvcc, why


class BuildExt(build_ext):
    def run(self):
        nvcc, why = cuda_plan()
        self.cuda = self.build_cuda(nvcc) if nvcc else f"CPU only ({why})"
        if not self.cuda.startswith("CUDA"):
            self.cuda_target().unlink(missing_ok=True)
        if self.distribution.has_c_libraries():
            objects = Path(self.get_finalized_command("build_clib").build_temp)
            compiled = objects.glob("csrc/**/*.o")
            gone = [o for o in compiled if not (ROOT / o.relative_to(objects)).with_suffix(".c").exists()]
            for file in gone and [*gone, *objects.glob("libhb_*.a")]:
                file.unlink()  # archives keep the objects of deleted files
            self.run_command("build_clib")  # build_ext --inplace alone would skip it
        super().run()
        print(f"halfbyte: {self.cuda}", file=sys.stderr)

    def build_extension(self, ext):
        import numpy

        ext.include_dirs += ["csrc", numpy.get_include(), dlpack_include(Path(self.build_temp) / "include")]
        ext.define_macros.append(("HB_BUILD_CUDA", f'"{self.cuda}"'))
        build_clib = self.get_finalized_command("build_clib")
        ext.library_dirs.append(build_clib.build_clib)
        ext.depends += [str(p) for p in Path(build_clib.build_clib).glob("libhb_*.a")]
        ext.depends += sources("csrc/**/*.h")
        super().build_extension(ext)

    def cuda_target(self):
        return Path(self.get_ext_fullpath("halfbyte._C")).parent / "libhalfbyte_cuda.so"

    def build_cuda(self, nvcc):
        """Compiles the CUDA library unless nothing changed; returns what there is now."""
        target = self.cuda_target()
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        wished = os.environ.get("HALFBYTE_CUDA_ARCHS", ";".join(CUDA_ARCHS)).split(";")
        archs = [arch for arch in wished if f"sm_{arch}" in listed]
        folder = Path(self.build_temp).absolute() / "cuda"
        for needed in (target.parent, folder):
            needed.mkdir(parents=True, exist_ok=True)
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        headers = sources("cuda/*.cuh") + sources("csrc/core/*.h") + sources("csrc/core/*.def")

        def make(made, command, used):
            """Whether `made` is there, made by this command of these files; runs nvcc if it has to."""
            digest = hashlib.sha256("\0".join([*command, version]).encode())
            for path in used:
                digest.update((ROOT / path).read_bytes())
            record = folder / (made.name + ".sha256")
            if made.exists() and record.exists() and record.read_text() == digest.hexdigest():
                return True
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode == 0:
                record.write_text(digest.hexdigest())
            else:
                print(done.stdout + done.stderr, file=sys.stderr)
            return done.returncode == 0

        def compile_one(source):
            made = folder / (Path(source).stem + ".o")
            command = [nvcc, "-c", *CUDA_FLAGS, *cuda_arch_flags(source, archs), source, "-o", str(made)]
            return made if make(made, command, [source, *headers]) else None

        objects = [None]
        if archs:
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                objects = list(pool.map(compile_one, sources("cuda/*.cu")))
        link = [nvcc, "-shared", *CUDA_FLAGS, *CUDA_LINK, *map(str, objects), "-o", str(target)]
        if None in objects or not make(target, link, objects):
            why = f"nvcc failed for {', '.join(f'sm_{a}' for a in wished)}"
            if os.environ.get("HALFBYTE_CUDA") == "1":
                sys.exit(f"halfbyte: HALFBYTE_CUDA=1, but {why}")
            return f"CPU only ({why})"
        return f"CUDA for {', '.join(f'sm_{a}' for a in archs)}"


# A group, because the reference folder and the core call each other's tables.
LINK = ["-pthread", "-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else ["-pthread"]
if SANITIZE:
    LINK += ["-fsanitize=address,undefined"]

if __name__ == "__main__":  # tests/c/build.py reads the flags from here
    setup(
        libraries=LIBRARIES,
        ext_modules=[
            Extension(
                "halfbyte._C",
                sources("csrc/python/*.c"),
                libraries=[name for name, _ in LIBRARIES] + (["dl"] if sys.platform == "linux" else []),
                extra_compile_args=COMMON,
                extra_link_args=LINK,
            )
        ],
        cmdclass={"build_ext": BuildExt},
    )
