"""The device of gpu.py: a GPU through torch, or the emulator, on which nothing is fast and every line runs.

Times come from `Device.seconds`: a CUDA graph of the calls is replayed between two events. On the emulator the calls
are made once and a made-up clock tells the time, so that the code behind the numbers runs and no number means anything.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[[], Any]


class Limits(NamedTuple):
    """Data sheet: bytes and operations a second, dense, without sparsity."""

    bandwidth: float
    bf16: float  # float16 where the GPU has no bfloat16
    int8: float


# By what the name of the device contains; the first that fits counts.
DATASHEET = {
    "B200": Limits(8.0e12, 2250e12, 4500e12),
    "H200": Limits(4.8e12, 989e12, 1979e12),
    "H100 PCIe": Limits(2.0e12, 756e12, 1513e12),
    "H100": Limits(3.35e12, 989e12, 1979e12),
    "A100": Limits(2.04e12, 312e12, 624e12),
    "L40S": Limits(0.864e12, 362e12, 733e12),
    "RTX 5090": Limits(1.79e12, 210e12, 419e12),
    "RTX 4090": Limits(1.008e12, 165e12, 330e12),
    "RTX 3090": Limits(0.936e12, 71e12, 142e12),
    "T4": Limits(0.32e12, 65e12, 130e12),
}


def datasheet(name: str) -> Limits | None:
    return next((limits for key, limits in DATASHEET.items() if key in name), None)


class Device:
    """cuda:0 through torch."""

    emulated = False

    def __init__(self) -> None:
        import torch

        self.torch = torch
        if not torch.cuda.is_available():
            raise SystemExit("gpu: torch sees no CUDA device (a CUDA build of torch and a driver are needed)")
        torch.cuda.init()

    def describe(self) -> dict[str, Any]:
        from halfbyte import _C

        torch = self.torch
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": _C.cuda_info()["driver"],
            "runtime": _C.cuda_info()["runtime"],
            "torch": torch.__version__,
            "cuda_of_torch": torch.version.cuda,
        }

    @property
    def capability(self) -> tuple[int, int]:
        return self.torch.cuda.get_device_capability(0)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """A new stream is current inside; it begins behind what the current one has to do."""
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)

    def join(self) -> None:
        """The current stream waits for all others."""
        self.torch.cuda.synchronize()

    def busy(self) -> None:
        """Some milliseconds of work on the current stream, so that what follows without waiting would be early."""
        self.torch.cuda._sleep(20_000_000)

    @contextlib.contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        """A call inside that waits for the device is an error."""
        self.torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            self.torch.cuda.set_sync_debug_mode("default")

    def capture(self, calls: Sequence[Call]) -> Call:
        """A CUDA graph of the calls; returns what replays it. Each call runs before, outside of the graph."""
        torch = self.torch
        with self.stream():
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def seconds(self, calls: Sequence[Call], least: float = 0.02, graph: bool = True) -> list[float]:
        """Seconds of one call, several times over: all calls in turn for `least` seconds each time.

        graph: as a CUDA graph, without the caller's share. Peers that cannot be captured are called one by one.
        """
        torch = self.torch

        def one_by_one() -> None:
            for call in calls:
                call()

        replay = self.capture(calls) if graph else one_by_one
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        repeat, found = 1, []
        for _ in range(7):
            torch.cuda.synchronize()
            begin.record()
            for _ in range(repeat):
                replay()
            end.record()
            torch.cuda.synchronize()
            took = begin.elapsed_time(end) / 1e3
            found.append(took / repeat / len(calls))
            if took < least:
                repeat = max(repeat + 1, int(repeat * least / max(took, 1e-6)))
        return found[2:]  # the first turns warm up and find the number of repetitions

    def host_seconds(self, call: Call, repeat: int = 20_000) -> float:
        """Seconds that the caller spends in one call that only launches."""
        best = float("inf")
        for _ in range(5):
            self.synchronize()
            # In batches that fit into the launch queue, else the queue's length would be measured.
            spent = 0.0
            for _ in range(repeat // 500):
                begin = time.perf_counter()
                for _ in range(500):
                    call()
                spent += time.perf_counter() - begin
                self.synchronize()
            best = min(best, spent / (repeat // 500 * 500))
        return best

    def free(self) -> None:
        self.torch.cuda.empty_cache()


class Emulated(Device):
    """The test suite's device in host memory. torch must not be imported before."""

    emulated = True

    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT / "tests" / "cuda"))
        import torch_device

        self.fake = torch_device.install()
        import torch

        self.torch = torch
        self.streams = 0
        self.ticks = 0

    def describe(self) -> dict[str, Any]:
        return {"gpu": "emulated on the host", "capability": [9, 0], "torch": self.torch.__version__}

    @property
    def capability(self) -> tuple[int, int]:
        return (9, 0)

    def synchronize(self) -> None:
        assert self.fake.emulator.fault == "", self.fake.emulator.fault

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        self.streams += 1
        return self.fake.stream(0x1000 * self.streams)

    def join(self) -> None:
        self.synchronize()

    def busy(self) -> None:
        pass

    @contextlib.contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        with self.fake.no_synchronisation():
            yield
        self.synchronize()

    def capture(self, calls: Sequence[Call]) -> Call:
        def replay() -> None:
            with self.no_synchronisation():
                for call in calls:
                    call()

        replay()
        return replay

    def seconds(self, calls: Sequence[Call], least: float = 0.02, graph: bool = True) -> list[float]:
        self.capture(calls[:1])
        self.ticks += 1
        return [1e-5 * (1 + (self.ticks * 7919 + i) % 100 / 1000) for i in range(5)]

    def host_seconds(self, call: Call, repeat: int = 20_000) -> float:
        call()
        return 1.5e-6

    def free(self) -> None:
        pass


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)
