"""Interleaved measuring: who is faster, on a machine whose speed changes from second to second.

Entries take turns. A turn is one warm-up (a call, repeated for 3 ms where calls are short, so that one
library's idle threads have gone to sleep and the other's are awake) and then up to `BURST` timed calls. Turns
go round until the time is spent, each time in another order. A call gets a number that counts up, with which
it chooses among copies of its data.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WARM_NS = 3_000_000
LONG_US = 100_000  # calls from here on need no warm-up
BURST = 4
LEAST_SAMPLES = 5

Call = Callable[[int], Any]
Row = dict[str, Any]
pin = False  # call keep_apart(); set by the command line
spare_cpus: set[int] = set()  # what keep_apart() has taken from the main thread


@dataclass
class Entry:
    """One competitor. `call(i)` does the work once; `bytes` is what a call must move, `operations` its
    arithmetic, a multiply-add counted as two; `repeat` calls are timed as one where a call is tiny;
    `before` runs untimed before each timed call, in place of the warm-up."""

    name: str
    call: Call
    bytes: int = 0
    operations: int = 0
    repeat: int = 1
    before: Callable[[], Any] | None = None
    warm: bool = True
    samples: list[float] = field(default_factory=list)
    count: int = 0

    def turn(self) -> None:
        began = time.perf_counter_ns()
        while self.warm and self.before is None and not (self.samples and self.samples[-1] > LONG_US):
            self._once()
            if time.perf_counter_ns() - began > WARM_NS:
                break
        one = 0.0
        for _ in range(BURST):
            if self.before is not None:
                self.before()
            began = time.perf_counter_ns()
            for _ in range(self.repeat):
                self._once()
            one = (time.perf_counter_ns() - began) / self.repeat / 1e3
            self.samples.append(one)
            if one > 20_000:
                return

    def _once(self) -> None:
        self.call(self.count)
        self.count += 1

    def percentile(self, share: float) -> float:
        return sorted(self.samples)[int(share * (len(self.samples) - 1))]

    @property
    def p10(self) -> float:
        return self.percentile(0.1)


def keep_apart() -> None:
    """Binds the main thread to the first CPU and all others to the rest, as they would lie on a quiet machine.
    On a busy one the scheduler may leave two threads of ours on one CPU for seconds, whoever's they are."""
    main, cpus = os.getpid(), sorted(os.sched_getaffinity(0) | spare_cpus)
    if len(cpus) < 2:
        return
    spare_cpus.update(cpus)
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, {cpus[0]} if thread == main else set(cpus[1:]))


def measure(entries: list[Entry], seconds: float) -> None:
    """Fills the entries' samples (microseconds); `seconds` for all, but at least a few samples each."""
    order = list(entries)
    if pin:
        if spare_cpus:
            os.sched_setaffinity(0, spare_cpus)  # threads that a first call starts inherit it
        for entry in order:
            entry.call(0)
        keep_apart()
    shuffle = random.Random(0).shuffle
    began = time.perf_counter()
    while True:
        shuffle(order)
        for entry in order:
            entry.turn()
        if time.perf_counter() - began > seconds and all(len(e.samples) >= LEAST_SAMPLES for e in entries):
            return


def rows(title: str, entries: list[Entry], reference: str | None = None, **limits: Entry | None) -> list[Row]:
    """One row per entry. `ratio` is the reference's 10th percentile over the entry's: above 1, the entry is
    faster; with a reading ruler as reference, the share of read bandwidth. `limits` are rulers: `of_read=ruler`
    gives each entry of bytes a share of that name of the ruler's rate, or each of operations."""
    base = next((e for e in entries if e.name == reference), None)
    table = []
    for entry in entries:
        row: Row = {
            "title": title,
            "name": entry.name,
            "p10_us": round(entry.p10, 3),
            "median_us": round(entry.percentile(0.5), 3),
            "samples": len(entry.samples),
        }
        if entry.bytes:
            row["gb_per_s"] = round(entry.bytes / entry.p10 / 1e3, 2)
        if entry.operations:
            row["gflop_per_s"] = round(entry.operations / entry.p10 / 1e3, 1)
        if base is not None:
            row["reference"] = base.name
            row["ratio"] = round(base.p10 / entry.p10, 3)
            row["ratio_of_medians"] = round(base.percentile(0.5) / entry.percentile(0.5), 3)
        for share, ruler in limits.items():
            if ruler is not None and ruler is not entry:
                work, most = (e.bytes if ruler.bytes else e.operations for e in (entry, ruler))
                if work:
                    row[share] = round(work / entry.p10 / (most / ruler.p10), 3)
        table.append(row)
    return table
