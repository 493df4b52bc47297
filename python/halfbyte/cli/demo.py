"""halfbyte demo MODEL --text FILE"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from halfbyte.cli.arguments import add_json, folder_of, positive, read_text

EPILOG = """\
Writes DIR/quality.json, and DIR/quality.png where matplotlib is installed. One more model is broken on purpose;
if that one does not fail loudly, the measurement is worth nothing. The bounds (--no-gate leaves them out) are
those of the bundled model. Needs torch and transformers. Exit code 7: a bound does not hold.

example:
  halfbyte demo tests/data/tiny-llama --text tests/data/heldout.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a small causal language model")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text that the models read")
    parser.add_argument(
        "-o", "--output", default="demo-output", metavar="DIR", help="for quality.json, quality.png"
    )
    parser.add_argument("--prompt", default="The function returns the", help="what the models continue")
    parser.add_argument("--new-tokens", type=positive, default=40, metavar="N", help="and by how many tokens")
    parser.add_argument("--window", type=positive, default=256, metavar="N", help="tokens per window")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="read no more of the text")
    parser.add_argument("--no-gate", action="store_true", help="judge the broken control only")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from halfbyte import demo, demo_report
    from halfbyte.cli.main import print_json

    text = read_text(args.text)
    model = folder_of(args.model)
    Path(args.output).mkdir(parents=True, exist_ok=True)  # not after all the work that is to be written there
    quiet_transformers()
    report = demo.run(
        model,
        text,
        window=args.window,
        max_tokens=args.max_tokens,
        prompt=args.prompt,
        new_tokens=args.new_tokens,
    )
    found = [demo.Check(**check) for check in report["checks"]]
    if args.json:
        print_json(report)
    else:
        print(demo_report.table(report), demo_report.samples(report), "\n".join(map(str, found)), sep="\n\n")
        print()
    for path in demo_report.write(report, args.output):
        print(f"written: {path}", file=sys.stderr if args.json else sys.stdout)
    judged = found[-1:] if args.no_gate else found
    return 0 if all(check.ok for check in judged) else 7


def quiet_transformers() -> None:
    """No progress bars for models that load in a blink."""
    import os

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
