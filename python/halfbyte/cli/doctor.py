"""halfbyte doctor"""

from __future__ import annotations

import argparse

from halfbyte.cli.arguments import add_json

EPILOG = """\
Looks at the CPU, threads, memory, installed packages and caches, and runs every kernel against answers worked
out beforehand. Exit code 0: all is well; 3: something is wrong, with the command that mends it.

example:
  halfbyte doctor --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from halfbyte.cli.main import print_json
    from halfbyte.doctor import diagnose

    diagnosis = diagnose()
    if args.json:
        print_json(diagnosis.to_json())
    else:
        print(diagnosis)
    return 0 if diagnosis.ok else 3
