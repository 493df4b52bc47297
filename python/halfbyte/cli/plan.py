"""halfbyte plan MODEL"""

from __future__ import annotations

import argparse

from halfbyte.cli.arguments import add_json, positive

EPILOG = """\
Bytes of the weights are exact, from the headers. The peak adds the runtime and the larger of keys and values
(--context, --batch) and what is alive while loading. Available is what the kernel, a container's limit and
`ulimit -v` allow. All formats are listed; exit code 0 whatever fits.

example:
  halfbyte plan MODEL --context 8192
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="model folder, or ORG/NAME from the Hugging Face cache"
    )
    parser.add_argument("--context", type=positive, default=4096, metavar="TOKENS", help="default: 4096")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at a time (1)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from halfbyte.checkpoint.footprint import memory_plan
    from halfbyte.cli.main import print_json

    plan = memory_plan(args.model, args.context, args.batch)
    if args.json:
        print_json(plan.to_json())
    else:
        print(plan)
    return 0
