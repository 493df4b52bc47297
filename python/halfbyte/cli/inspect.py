"""halfbyte inspect MODEL"""

from __future__ import annotations

import argparse

from halfbyte.cli.arguments import add_json

EPILOG = """\
Reads the headers only. Quantized are weights in the bitsandbytes layout (nf4, fp4, int8); bits count the scales.

example:
  halfbyte inspect OUT --tensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder or .safetensors file")
    parser.add_argument("--tensors", action="store_true", help="list every weight")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from halfbyte.checkpoint.inspect import inspect
    from halfbyte.cli.main import print_json

    document = inspect(args.model)
    if args.json:
        print_json(document)
        return 0
    family = document["model_type"]  # from the file: it must not talk to the terminal
    family = ascii(family)[1:-1][:80] if isinstance(family, str) and family else "unknown family"
    print(f"{document['source']}  {family}  {len(document['files'])} file(s)")
    print(f"{'format':<24} {'tensors':>8} {'parameters':>18} {'bytes':>18} {'bits':>9}")
    everything = {**document, "format": "all", "tensors": len(document["tensors"])}
    for g in [*document["formats"], everything]:
        print(
            f"{g['format']:<24} {g['tensors']:>8,} {g['parameters']:>18,} {g['bytes']:>18,}"
            f" {g['bits_per_parameter']:>9.3f}"
        )
    if args.tensors:
        for t in document["tensors"]:
            print(f"  {t['name']}  {t['format']}  {t['shape']}  {t['bytes']:,} bytes")
    return 0
