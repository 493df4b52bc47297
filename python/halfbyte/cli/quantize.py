"""halfbyte quantize SRC -o OUT --to nf4|fp4|int8"""

from __future__ import annotations

import argparse

from halfbyte.cli.arguments import ProgressBar, add_json, positive, size, thread_count

EPILOG = """\
The linear layers are quantized that transformers' bitsandbytes integration would choose; everything else is
copied. OUT appears when it is complete, or not at all. No torch is needed, memory does not grow with the model.

examples:
  halfbyte quantize MODEL -o OUT --to nf4 --double-quant
  halfbyte quantize MODEL -o OUT --to nf4 --scales search         the same size, less loss
  halfbyte quantize MODEL -o OUT --to int8 --skip '*.down_proj'
  halfbyte quantize MODEL --to nf4 --dry-run --json               the size of every file, to the byte
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        help="model folder, .safetensors file, or ORG/NAME from the Hugging Face cache",
    )
    add("-o", "--out", metavar="OUT", help="folder to make")
    add("--to", required=True, choices=("nf4", "fp4", "int8"), help="format of the linear layers")
    add("--double-quant", action="store_true", help="store the scales of nf4 and fp4 in 8 bits")
    add(
        "--blocksize",
        type=positive,
        default=64,
        metavar="N",
        help="weights that share a scale: 32 ... 4096 (64)",
    )
    add(
        "--scales",
        choices=("absmax", "search"),
        default="absmax",
        help="absmax: as bitsandbytes (default); search: the scale with the least squared error",
    )
    add(
        "--skip", action="append", default=[], metavar="GLOB", help="modules that stay dense; may be repeated"
    )
    add(
        "--compute-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="bnb_4bit_compute_dtype for config.json (default: dtype of the source)",
    )
    add(
        "--max-shard-size",
        type=size,
        metavar="SIZE",
        help="split into files of this size (default: as the source)",
    )
    add(
        "--threads",
        type=thread_count,
        metavar="N",
        help="default: HALFBYTE_NUM_THREADS, or what the machine has",
    )
    add("--overwrite", action="store_true", help="replace OUT, after success")
    add("--dry-run", action="store_true", help="write nothing, print the exact size of every file")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import halfbyte
    from halfbyte.cli.main import print_json

    with ProgressBar("quantize") as bar:
        report = halfbyte.quantize(
            args.source,
            args.out,
            args.to,
            double_quant=args.double_quant,
            blocksize=args.blocksize,
            scales=args.scales,
            skip=args.skip,
            compute_dtype=args.compute_dtype,
            max_shard_size=args.max_shard_size,
            threads=args.threads,
            overwrite=args.overwrite,
            dry_run=args.dry_run,
            progress=bar.update,
        )
    if args.json:
        print_json(report.document)
    else:
        print(report)
    return 0
