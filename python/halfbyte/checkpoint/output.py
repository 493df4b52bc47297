"""The folder that a run writes: OUT.partial, held with flock, renamed to OUT when it is complete.

A folder OUT.partial that no run holds was left by one that was killed. It is removed and the work starts
anew, but only when it is known to be ours: it has the marker, or the manifest, which is written before the
marker goes. Anything else of that name is refused.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from pathlib import Path

from halfbyte.checkpoint.plan import MANIFEST_NAME, Plan
from halfbyte.errors import CheckpointError, from_os_error

MARKER = ".halfbyte-partial"


def check_output(plan: Plan, out: Path, overwrite: bool) -> None:
    """Refuse an output that would harm something. Raises CheckpointError E201, E202."""
    source = plan.model.root
    real = Path(os.path.realpath(out))
    if real == source or real in source.parents:
        raise CheckpointError(
            "E202", f"the output '{out}' is the source, or contains it", fix="choose another -o"
        )
    if source in real.parents:
        raise CheckpointError(
            "E202",
            f"the output '{out}' is inside the source",
            ["the source is only read"],
            "choose another -o",
        )
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise CheckpointError("E201", f"'{out}' exists and is not a folder", fix="choose another -o")
    content = set(os.listdir(out))
    if not content:
        return
    if not overwrite:
        raise CheckpointError("E201", f"'{out}' exists", fix="choose another -o, or add --overwrite")
    if not content & {"config.json", MANIFEST_NAME}:
        raise CheckpointError(
            "E201",
            f"'{out}' is not a model folder, so --overwrite does not remove it",
            fix="choose another -o",
        )


def reserve(plan: Plan, out: Path, overwrite: bool) -> Path:
    check_output(plan, out, overwrite)
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(partial):
            _remove_stale(partial, plan.model.root)
        partial.mkdir()
        (partial / MARKER).touch()
        disk = os.statvfs(partial)
    except OSError as error:
        raise from_os_error(error, f"cannot make '{partial}'") from error
    need, free = sum(plan.sizes().values()), disk.f_bavail * disk.f_frsize
    if need > free:
        shutil.rmtree(partial)
        raise CheckpointError(
            "E501",
            f"not enough space for '{out}'",
            [f"{need:,} bytes needed, {free:,} free ({need - free:,} missing)", "nothing was written"],
            "free some space, or write to another disk",
        )
    return partial


def _remove_stale(partial: Path, source: Path) -> None:
    """Remove what a killed run left; anything else of that name is the user's and stays."""
    ours = (
        not partial.is_symlink() and partial.is_dir() and partial.resolve() not in (source, *source.parents)
    )
    content = set(os.listdir(partial)) if ours else set()
    if not ours or (content and not content & {MARKER, MANIFEST_NAME}):
        raise CheckpointError(
            "E201",
            f"'{partial}' is in the way, and no run of halfbyte left it",
            fix="move it, or choose another -o",
        )
    fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(partial)
    except BlockingIOError:
        raise CheckpointError(
            "E601", f"another run is writing '{partial}'", fix="wait for it, or choose another -o"
        ) from None
    finally:
        os.close(fd)


def publish(partial: Path, out: Path) -> None:
    """Put `partial` in the place of `out`, in one step where the kernel has renameat2."""
    if not os.path.lexists(out) or not os.listdir(out):
        os.rename(partial, out)
        old = None
    elif _exchange(partial, out):
        old = partial
    else:
        old = out.with_name(f"{out.name}.replaced-{os.getpid()}")
        os.rename(out, old)
        try:
            os.rename(partial, out)
        except OSError:
            os.rename(old, out)
            raise
    _sync_folder(out.parent)
    if old is not None:
        shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
