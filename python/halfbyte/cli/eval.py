"""halfbyte eval ORIGINAL MODEL --text FILE"""

from __future__ import annotations

import argparse

from halfbyte.cli.arguments import add_json, at_least_zero, folder_of, positive, read_text

EPILOG = """\
Both models read the same text in float32. KL divergence: how far the predictions moved, in nats per token; the
yardstick. NLL change: what it cost on this text. The errors are standard errors over windows. Needs torch and
transformers. Exit code 7 with --max-kl: the model is worse than that.

example:
  halfbyte eval MODEL OUT --text book.txt --max-kl 0.1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("original", metavar="ORIGINAL", help="folder of the original checkpoint")
    parser.add_argument("model", metavar="MODEL", help="folder of the checkpoint to compare with it")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text that both models read")
    parser.add_argument("--window", type=positive, default=256, metavar="N", help="tokens per window")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="read no more of the text")
    parser.add_argument(
        "--max-kl", type=at_least_zero, metavar="X", help="exit with 7 if the KL divergence is larger"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import halfbyte
    from halfbyte.cli.demo import quiet_transformers
    from halfbyte.cli.main import print_json

    text = read_text(args.text)
    original, model = folder_of(args.original), folder_of(args.model)
    quiet_transformers()
    halfbyte.install()
    from halfbyte.evaluation import compare

    result = compare(original, model, text, window=args.window, max_tokens=args.max_tokens)
    if args.json:
        print_json({"schema": "halfbyte.eval/1", **result.to_dict()})
    else:
        print(f"KL divergence  {result.kl:.6f} ± {result.kl_se:.6f} nats per token")
        print(
            f"NLL change     {result.nll_change:+.6f} ± {result.nll_change_se:.6f} ({result.nll_original:.4f} before)"
        )
        print(f"same top token {result.top1:.2%} of {result.tokens:,} tokens in {result.windows} windows")
    return 7 if args.max_kl is not None and not result.kl <= args.max_kl else 0  # NaN is no pass
