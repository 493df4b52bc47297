"""Arguments that several verbs share, and the progress display."""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def size(text: str) -> int:
    """ "5GB", "500M", "2GiB" or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*((?:[KMGT]I?)?)B?", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"expected a size like 5GB or 500MiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


MAX_THREADS = 1024  # as HB_MAX_THREADS in csrc/core/thread_count.h


def thread_count(text: str) -> int:
    """A whole number from 1 to MAX_THREADS."""
    number = positive(text)
    if number > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_THREADS} threads, got {text!r}")
    return number


def at_least_zero(text: str) -> float:
    """A finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def check_writable(path: Path) -> None:
    """OSError where a file of this name cannot be written; before the work that is to be written into it."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def read_text(path: str) -> str:
    """A UTF-8 file, or a CheckpointError with its name and the place that is not UTF-8."""
    from halfbyte.errors import CheckpointError

    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "E403", f"'{path}' is not UTF-8 text (byte {error.start:,})", fix="give a text file"
        ) from error


def folder_of(model: str) -> Path:
    """The folder of a checkpoint that can be opened; CheckpointError with file and cause otherwise."""
    from halfbyte.formats.folder import open_model

    with open_model(model) as opened:
        return opened.root


class ProgressBar:
    """Bytes done on stderr: a bar on a terminal, else a line now and then. Use as a context manager."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, label: str, stream: Any = None):
        self.label = label
        self.stream = stream or sys.stderr
        self.bar: Any = None
        self.began = self.last_line = time.monotonic()
        quiet = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
        self.update: Callable[[int, int, str], None] = self._nothing if quiet else self._line
        if not quiet and self.stream.isatty() and os.environ.get("TERM") != "dumb":
            self.update = self._bar

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def _nothing(self, done: int, total: int, name: str) -> None:
        pass

    def _bar(self, done: int, total: int, name: str) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, unit="B", unit_scale=True, desc=self.label, file=self.stream, dynamic_ncols=True
            )
        self.bar.set_postfix_str(name[-40:], refresh=False)
        self.bar.update(done - self.bar.n)

    def _line(self, done: int, total: int, name: str) -> None:
        now = time.monotonic()
        if now - self.last_line < self.SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        left = (now - self.began) * (total - done) / done if done else 0.0
        percent = 100 * done // total if total else 100
        print(
            f"{self.label}: {percent} %, {done:,} of {total:,} bytes, {left:.0f} s left, {name}",
            file=self.stream,
            flush=True,
        )
