"""halfbyte run SCRIPT [ARGUMENTS...]"""

from __future__ import annotations

import argparse
import os
import sys

EPILOG = """\
The script runs as `python SCRIPT ...` would run it, after halfbyte.install(): transformers, PEFT, accelerate and
TRL find a bitsandbytes, which is halfbyte. The exit code is the script's; 2 when there is no such file.

example:
  halfbyte run train.py --epochs 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", metavar="SCRIPT", help="Python file; it finds halfbyte as bitsandbytes")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script")


def run(args: argparse.Namespace) -> int:
    if not os.path.isfile(args.script):
        print(f"error[HB-E204]: no such file: {args.script}", file=sys.stderr)
        return 2
    from halfbyte.shim import run_script

    run_script(args.script, args.arguments)
    return 0
