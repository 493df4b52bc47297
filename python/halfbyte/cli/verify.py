"""halfbyte verify DIR"""

from __future__ import annotations

import argparse

from halfbyte.cli.arguments import add_json

EPILOG = """\
Compares the size and SHA-256 of every file with halfbyte-manifest.json, if there is one, and looks whether the
parts of each quantized weight fit together and to config.json. Exit code 0: all is well; 7: the problems are
listed; 4: there is no such folder.

example:
  halfbyte verify OUT --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder of a quantized checkpoint")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from halfbyte.checkpoint.verify import verify
    from halfbyte.cli.main import print_json

    document = verify(args.folder)
    if args.json:
        print_json(document)
    else:
        for problem in document["problems"]:
            print(f"FAIL  {problem}")
        if document["ok"]:
            against = (
                f"{len(document['files_checked'])} files match the manifest, " if document["manifest"] else ""
            )
            none = "" if document["manifest"] else " (there is no manifest to compare hashes with)"
            complete = f"{document['quantized_weights']} quantized weights are complete"
            if not document["quantized_weights"]:
                complete = f"nothing is quantized, the headers of {document['weights']} weights are sound"
            print(f"ok    {against}{complete}{none}")
    return 0 if document["ok"] else 7
