"""halfbyte against torch, bitsandbytes and ggml, interleaved in one process, beside what the machine can do.

    python -m benchmarks peers [PART] [--threads 1,2] [--seconds N] [--size N] [--depth N]
                                  [--pin] [--json FILE]

The contests of `halfbyte bench`, all whose name contains PART, with their results in a file. For each number of threads
one process is started, with OMP_NUM_THREADS and HALFBYTE_NUM_THREADS set. Weights are 4096 x 4096 (--size outputs,
--depth inputs); every call uses another copy, together more than four times the last-level cache, so they come from
DRAM as a model's layers do. Times are 10th percentile and median of calls taken in turns. `ratio` is the reference's
time over the entry's: beside "read" it is the share of raw read bandwidth, beside another library how many times as
fast. A peer that is not installed is listed as absent; halfbyte/bench/ggml.py says how to install ggml, llama.cpp's
kernels. `of_read`, `of_peak` and `of_copy` are shares of rates measured in the same turns: reading, arithmetic of the
kind that the entry uses, copying. Pictures of "one row" and "rows" are drawn beside the JSON file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.bench import chart
from halfbyte.bench.compare import CONTESTS, ContestFailed, Options, compare, text_of

from .output import write_json

PARTS = tuple(name for name in CONTESTS if name != "layers")  # which is a short form of others


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", default="", metavar="PART")
    parser.add_argument("--threads", default="1,2", help="how many, one run each (default 1,2)")
    parser.add_argument("--seconds", type=float, default=4.0, help="for a contest, more or less (default 4)")
    parser.add_argument("--size", type=int, default=4096, help="outputs of the layers (default 4096)")
    parser.add_argument("--depth", type=int, help="inputs of the layers (default: as --size)")
    parser.add_argument(
        "--pin", action="store_true", help="keep threads on CPUs of their own (busy machines)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: build/benchmarks/peers.json")
    options = parser.parse_args(arguments)
    contests = tuple(name for name in PARTS if options.part in name)
    if not contests:
        parser.error(f"PART: expected part of one of {', '.join(PARTS)}, got {options.part!r}")
    asked = Options(contests, options.size, options.depth or options.size, options.seconds, pin=options.pin)
    try:
        result = compare(asked, [int(n) for n in options.threads.split(",")])
    except ContestFailed as error:
        raise SystemExit(str(error)) from None
    print(text_of(result))
    path = write_json(options.json, "peers", result)
    print(f"\nwritten: {path}")
    for name, draw in (("one-row", chart.bars), ("rows", chart.many_rows)):
        picture = path.with_name(f"{path.stem}-{name}.svg")
        drawn = draw(result)
        if drawn is not None:
            picture.write_text(drawn)
            print(f"written: {picture}")
    return 0
