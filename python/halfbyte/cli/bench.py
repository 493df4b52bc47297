"""halfbyte bench"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from halfbyte.cli.arguments import add_json, at_least_zero, check_writable, positive, thread_count

EPILOG = """\
Times halfbyte beside what else is installed (torch, bitsandbytes, llama-cpp-python's ggml, NumPy) and beside
what the machine can do, in turns, with weights that are not in the cache. Close what else runs. `ratio` above 1:
faster than the reference that stands over the table. of_read, of_peak: shares of what reading and multiplying
reach in the same turns. (bitsandbytes' float32 layer computes in bfloat16 on processors that can.)

contests: layers (the default: 4-bit layers, --rows of x), one-row, rows (1 to 512), cached, dense, grad,
quantize, optimizers, steps (each optimizer beside a copy), int8, calls, import; all: every one but layers.
Without torch there is "layers" against NumPy.

examples:
  halfbyte bench                                   half a minute: 1, 8 and 64 rows
  halfbyte bench --rows 1 512 --depth 14336 --json --svg bench.svg
  halfbyte bench optimizers int8 --threads 1 2
"""


def contest(text: str) -> str:
    """One of the contests, or "all"; they are written with hyphens."""
    from halfbyte.bench.compare import CONTESTS

    known = ["all", *(name.replace(" ", "-") for name in CONTESTS)]
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected {', '.join(known)}, got {text!r}")
    return text.replace("-", " ")


def blocks(text: str) -> int:
    """A multiple of 64: sizes for which every competitor has a kernel."""
    if not text.isdecimal() or int(text) < 64 or int(text) % 64:
        raise argparse.ArgumentTypeError(f"expected a multiple of 64, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("contest", type=contest, nargs="*", metavar="CONTEST", help="see below")
    parser.add_argument(
        "--rows", type=positive, nargs="+", default=[1, 8, 64], metavar="M", help="rows of x; default: 1 8 64"
    )
    parser.add_argument("--size", type=blocks, default=4096, metavar="N", help="outputs; default: 4096")
    parser.add_argument("--depth", type=blocks, metavar="K", help="inputs; default: as outputs")
    parser.add_argument(
        "--threads",
        type=thread_count,
        nargs="+",
        metavar="N",
        help="one run each; default: halfbyte's own choice",
    )
    parser.add_argument(
        "--seconds",
        type=at_least_zero,
        default=3.0,
        metavar="S",
        help="for each number of rows, or contest; default: 3",
    )
    parser.add_argument(
        "--pin", action="store_true", help="keep threads on CPUs of their own (busy machines)"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw layers, or one-row, into FILE as well")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from halfbyte import _C
    from halfbyte.bench.chart import bars
    from halfbyte.bench.compare import CONTESTS, ContestFailed, Options, compare, text_of
    from halfbyte.cli.main import print_json
    from halfbyte.errors import CheckpointError

    names = args.contest or ["layers"]
    if "all" in names:
        names = [name for name in CONTESTS if name != "layers"]
    if args.svg and not {"layers", "one row"} & set(names):
        raise CheckpointError(
            "E203", "bench: --svg draws the contests layers and one-row", fix="name one of them"
        )
    if args.svg:
        check_writable(args.svg)
    titles = [f"{m} rows" for m in args.rows] if "layers" in names else ["one row"]
    options = Options(
        names,
        args.size,
        args.depth or args.size,
        args.seconds,
        args.rows,
        args.pin,
    )
    try:
        result = compare(options, args.threads or [_C.get_num_threads()])
    except ContestFailed as error:  # it has said why
        print(error, file=sys.stderr)
        return 1
    if args.svg:
        args.svg.write_text(bars(result, titles) or "")
    if args.json:
        print_json({"schema": "halfbyte.bench/2", **result})
    else:
        print(text_of(result))
    return 0
