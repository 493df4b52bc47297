"""halfbyte bench"""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli.arguments import add_json, positive

EPILOG = """\
Times a 4-bit layer beside the dense one (of torch, else of NumPy) and beside bitsandbytes' where they are
installed, in turns, with weights that are not in the cache. Close what else runs. In the last column below 1
is faster than dense. (bitsandbytes' float32 layer computes in bfloat16 on processors that can.)

examples:
  halfbyte bench                                   a minute: 1, 8 and 64 rows
  halfbyte bench --rows 1 512 --depth 14336 --json --svg bench.svg
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=positive, nargs="+", default=[1, 8, 64], metavar="M", help="rows of x; default: 1 8 64"
    )
    parser.add_argument("--size", type=positive, default=4096, metavar="N", help="outputs; default: 4096")
    parser.add_argument("--depth", type=positive, metavar="K", help="inputs; default: as outputs")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="of halfbyte and torch; default: each one's own choice"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, metavar="S", help="for each number of rows; default: 3"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the result into FILE as well")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from halfbyte import _C
    from halfbyte.bench import bench, svg_of, text_of
    from halfbyte.cli.main import print_json

    if args.threads:
        _C.set_num_threads(args.threads)
        try:
            import torch
        except ModuleNotFoundError:
            pass
        else:
            torch.set_num_threads(args.threads)
    report = bench(args.rows, args.size, args.depth or args.size, args.seconds)
    if args.svg:
        args.svg.write_text(svg_of(report))
    if args.json:
        print_json({"schema": "halfbyte.bench/1", **report})
    else:
        print(text_of(report))
    return 0
