"""halfbyte doctor"""

from __future__ import annotations

import argparse

from halfbyte.cli.arguments import add_json


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
