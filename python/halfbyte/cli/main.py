"""`halfbyte VERB ...`: parsing, dispatch, exit codes.

Results go to stdout, progress and errors to stderr. `--json` prints one JSON document with a `schema`, also
for an error. Exit codes: 0 ok, 1 a bug in halfbyte, 2 wrong usage, 3 something is not installed, 4 bad input,
5 not enough memory or disk, 6 locked by another run, 7 a verification failed, 130/143 interrupted.

Only argparse is imported here, so that `halfbyte --help` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import halfbyte

# verb -> (one line for the overview, module)
_VERBS = {
    "quantize": ("write a model in 4 or 8 bits, in the layout of bitsandbytes", "quantize"),
    "inspect": ("show what is in a checkpoint: formats, bytes, bits per parameter", "inspect"),
    "verify": ("check a quantized checkpoint against its manifest and its layout", "verify"),
    "plan": ("show what a model takes in memory, dense and quantized, and what fits here", "plan"),
    "doctor": ("check this machine and test every kernel against known answers", "doctor"),
    "bench": ("time layers, codecs and optimizers beside what else is installed", "bench"),
    "eval": ("compare a model with the original: KL divergence, change of the likelihood", "eval"),
    "demo": ("quantize a small model by every recipe, measure it, draw a picture", "demo"),
    "run": ("run a Python script with halfbyte in the place of bitsandbytes", "run"),
}


# What loading a model takes.
_MODELS = ("torch", "transformers", "accelerate")

_EXIT_CODES = """\
exit codes:
  0  done
  1  an error of halfbyte itself (a traceback follows)
  2  wrong usage, or an output folder that is in the way
  3  something is not installed, or a kernel is wrong here (doctor)
  4  bad input: a checkpoint is missing, broken, hostile, or of a kind that is not read
  5  not enough memory or disk
  6  another run writes the same output
  7  a check failed (verify, demo, eval --max-kl)
  130, 143  interrupted, terminated; unfinished output was removed
run ends with the code of the script.

examples:
  halfbyte plan MODEL                              does it fit?
  halfbyte quantize MODEL -o OUT --to nf4          write it in 4 bits
  halfbyte verify OUT                              is it what was written?
  halfbyte run train.py                            a bitsandbytes script, unchanged
`halfbyte VERB --help` explains one verb. Results go to stdout, progress and errors to stderr.
"""


class Terminated(BaseException):
    """SIGTERM, as an exception, so that half-written output is removed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _print_error({"code": "HB-E200", "message": message, "details": [], "fix": f"{self.prog} --help"})
        raise SystemExit(2)


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The overview, with an empty subparser for each verb; `verb`'s own module adds its arguments to it."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="halfbyte",
        description="Large language models in 4 and 8 bits.",
        epilog=_EXIT_CODES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"halfbyte {halfbyte.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (line, module) in _VERBS.items():
        subparser = verbs.add_parser(
            name, help=line, description=line[0].upper() + line[1:] + ".", formatter_class=raw
        )
        if name == verb:
            loaded = import_module(f"halfbyte.cli.{module}")
            subparser.epilog = loaded.EPILOG
            loaded.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(arguments[0] if arguments and arguments[0] in _VERBS else None)
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    args = parser.parse_args(arguments)
    if args.verb == "run":  # what the script raises is the script's own affair
        return import_module("halfbyte.cli.run").run(args)
    return _guarded(args)


def _guarded(args: argparse.Namespace) -> int:
    """Run a verb; exceptions become messages and exit codes."""
    from halfbyte.errors import CheckpointError, from_os_error

    def terminate(number: int, frame: object) -> NoReturn:
        raise Terminated

    as_json = getattr(args, "json", False)
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        return import_module(f"halfbyte.cli.{_VERBS[args.verb][1]}").run(args)
    except CheckpointError as error:
        return _fail(error, as_json)
    except ModuleNotFoundError as error:
        return _fail(_missing(error), as_json)
    except BrokenPipeError:  # `halfbyte ... | head`: no traceback, also not when stdout is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(from_os_error(error, os.fspath(error.filename or args.verb)), as_json)
    except MemoryError as error:
        return _fail(CheckpointError("E503", str(error) or "out of memory"), as_json)
    except KeyboardInterrupt:
        print("interrupted: the unfinished output was removed", file=sys.stderr)
        return 130
    except Terminated:
        print("terminated: the unfinished output was removed", file=sys.stderr)
        return 143
    finally:
        signal.signal(signal.SIGTERM, previous)


def _missing(error: ModuleNotFoundError) -> Any:
    from halfbyte.errors import CheckpointError

    name = (error.name or "").split(".")[0]
    if error.name == "halfbyte._C":
        return CheckpointError("E302", "the extension module halfbyte._C is not built", fix="pip install .")
    if name == "halfbyte":
        raise error
    needed = "torch transformers accelerate" if name in _MODELS else name  # at once, not one after the other
    return CheckpointError("E301", f"'{name}' is not installed", fix=f"pip install {needed}")


def _fail(error: Any, as_json: bool) -> int:
    if as_json:
        with contextlib.suppress(OSError):  # stdout itself may be what cannot be written
            print_json({"schema": "halfbyte.error/1", "exit_code": error.exit_code, "error": error.to_json()})
    _print_error(error.to_json())
    return error.exit_code


def _print_error(error: dict[str, Any]) -> None:
    lines = [f"error[{error['code']}]: {error['message']}"]
    lines += [f"  {line}" for line in error["details"]]
    if error["fix"]:
        lines.append(f"  fix: {error['fix']}")
    print("\n".join(lines), file=sys.stderr)


def print_json(document: dict[str, Any]) -> None:
    """The one JSON document of a run, on stdout."""
    import json

    print(json.dumps(_without_nan(document), indent=2))


def _without_nan(value: Any) -> Any:
    """JSON has neither NaN nor infinities: null stands for them."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
