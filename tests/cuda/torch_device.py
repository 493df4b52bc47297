"""`install()`: CUDA tensors for a torch that has no CUDA, and the emulated library behind `halfbyte._C`.

To be called before torch is imported, in a process of its own (see host/torch_device.cpp for what it does to
torch). Tensors of device "cuda" then are torch's own, in host memory, which the emulator knows and checks; every
operation of torch on them is computed on the CPU, every one of halfbyte's by its CUDA kernels on the emulator.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host_library
import pytest

SOURCE = host_library.HOST / "torch_device.cpp"


def library_path() -> Path:
    """The device, compiled against the headers of the installed torch."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    spec = importlib.util.find_spec("torch")
    if compiler is None or spec is None or spec.origin is None:
        pytest.skip("no C++ compiler or no torch")
    torch = Path(spec.origin).parent
    version = (torch / "version.py").read_text()
    stamp = hashlib.sha256(f"{torch} {version}".encode()).hexdigest()[:12]
    host_library.BUILD.mkdir(parents=True, exist_ok=True)
    library = host_library.BUILD / f"libtorch_device.{stamp}.so"
    if not library.exists() or library.stat().st_mtime_ns < SOURCE.stat().st_mtime_ns:
        part = library.with_suffix(f".{os.getpid()}.so")
        command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
        command += [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include", str(SOURCE)]
        command += ["-o", str(part), f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        part.replace(library)
    return library


class FakeDevice:
    """What a test can ask and set."""

    def __init__(self, device: ctypes.CDLL, emulator: host_library.Emulator) -> None:
        self._device = device
        self.emulator = emulator
        device.fake_count.restype = ctypes.c_int64
        device.fake_stream.restype = ctypes.c_int64

    @property
    def host_reads(self) -> int:
        """How often the host has waited for the device: `.item()`, `.cpu()`, `nonzero`, `synchronize`, ..."""
        return self._device.fake_count(0)

    @property
    def uploads(self) -> int:
        """How often pageable memory was copied to the device, which blocks and cannot be captured."""
        return self._device.fake_count(1)

    @contextlib.contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        """What happens inside could be captured into a CUDA graph, as far as the host goes."""
        before = self.host_reads, self.uploads
        yield
        assert (self.host_reads - before[0], self.uploads - before[1]) == (0, 0), (
            "(reads by the host, uploads)"
        )

    @contextlib.contextmanager
    def stream(self, stream: int, device: int = 0) -> Iterator[None]:
        """`stream` is current in this thread."""
        old = self._device.fake_stream(device, ctypes.c_int64(stream))
        try:
            yield
        finally:
            self._device.fake_stream(device, ctypes.c_int64(old))

    def current_stream(self, device: int = 0) -> int:
        return self._device.fake_stream(device, ctypes.c_int64(-1))

    def current(self, device: int = -1) -> int:
        """Makes a device current; returns the one that was."""
        return self._device.fake_device(device)


def install() -> FakeDevice:
    """See above.

    Raises
    ------
    RuntimeError
        torch is imported already.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch_device.install: torch is imported already")
    kernels = host_library.library_path()
    os.environ["HALFBYTE_CUDA_LIBRARY"] = str(kernels)
    device = ctypes.CDLL(str(library_path()), ctypes.RTLD_GLOBAL)
    emulator = host_library.Emulator(kernels)
    device.fake_memory_hooks(emulator.library.hb_host_register, emulator.library.hb_host_forget)
    fake = FakeDevice(device, emulator)
    _patch(fake)
    return fake


def _patch(fake: FakeDevice) -> None:
    """What torch.cuda asks its own C code, which this torch has not."""
    import torch

    from halfbyte import _C

    devices = _C.cuda_info()["devices"][:2]

    def at(device: Any = None) -> dict[str, Any]:
        index = device if isinstance(device, int) or device is None else torch.device(device).index
        return devices[fake.current() if index is None else index]

    class Stream:
        """What torch.cuda.current_stream() is asked for."""

        def __init__(self, handle: int) -> None:
            self.cuda_stream = handle

    def clone(
        storage: Any,
    ) -> Any:  # torch's makes a storage by its device, which has to be known when compiling
        new = torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device).untyped_storage()
        return new.copy_(storage, False)

    torch.UntypedStorage.clone = clone
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: len(devices)
    cuda.current_device = lambda: fake.current()  # dynamo wants functions, each another
    cuda._exchange_device = lambda device: fake.current(device)
    cuda._maybe_exchange_device = lambda device: fake.current(device)
    cuda.set_device = lambda device: fake.current(torch.device(device).index)
    cuda.get_device_capability = lambda device=None: at(device)["capability"]
    cuda.get_device_name = lambda device=None: at(device)["name"]
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.empty_cache = lambda: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda state, device="cuda": None
    cuda.current_stream = lambda device=None: Stream(fake.current_stream())
    cuda.ExternalStream = Stream
    cuda.stream = lambda stream: fake.stream(stream.cuda_stream)
