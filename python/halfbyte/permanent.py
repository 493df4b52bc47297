"""`python -m halfbyte.shim install|remove`: the stand-in as a distribution that pip sees and can remove.

Two things are written into site-packages, as a wheel named bitsandbytes would:

    bitsandbytes/__init__.py                 four lines that put halfbyte.bitsandbytes in its place
    bitsandbytes-<version>.dist-info/        METADATA, RECORD, INSTALLER, WHEEL, top_level.txt

RECORD names every file with its checksum, so `pip list` shows it and `pip uninstall bitsandbytes` removes it.
`remove` does the same without pip, and refuses what `install` did not write.
"""

import base64
import hashlib
import importlib.metadata
import shutil
import sys
import sysconfig
from pathlib import Path

from halfbyte.shim import NAME, VERSION

INSTALLER = "halfbyte\n"
# The module replaces itself: who imports `bitsandbytes` gets the package of halfbyte, at its own place.
CODE = '''\
"""halfbyte standing in for bitsandbytes; remove it with `python -m halfbyte.shim remove` or pip."""

from halfbyte.shim import take_over

take_over()
'''
METADATA = f"""\
Metadata-Version: 2.1
Name: {NAME}
Version: {VERSION}
Summary: halfbyte, standing in for bitsandbytes
Requires-Dist: halfbyte
"""
WHEEL = "Wheel-Version: 1.0\nGenerator: halfbyte\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def _folder() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _distribution(folder: Path) -> importlib.metadata.Distribution | None:
    """The distribution of that name in `folder` itself; others on sys.path do not count."""
    found = importlib.metadata.distributions(name=NAME, path=[str(folder)])
    return next(iter(found), None)


def _is_ours(distribution: importlib.metadata.Distribution) -> bool:
    return distribution.read_text("INSTALLER") == INSTALLER


def install(folder: Path | None = None) -> list[Path]:
    """Write the stand-in into `folder` (site-packages of this interpreter). Returns the files.

    Raises
    ------
    FileExistsError
        There is a bitsandbytes already that is not the stand-in. Nothing was changed.
    PermissionError
        The folder may not be written.
    """
    folder = _folder() if folder is None else folder
    there = _distribution(folder)
    if there is not None and _is_ours(there):
        remove(folder)
    elif there is not None or (folder / NAME).exists():
        version = "" if there is None else f" {there.version}"
        raise FileExistsError(
            f"install: {folder} has the real bitsandbytes{version}; remove it first: "
            f"{sys.executable} -m pip uninstall bitsandbytes"
        )
    info = f"{NAME}-{VERSION}.dist-info"
    contents = {
        f"{NAME}/__init__.py": CODE,
        f"{info}/METADATA": METADATA,
        f"{info}/INSTALLER": INSTALLER,
        f"{info}/WHEEL": WHEEL,
        f"{info}/top_level.txt": f"{NAME}\n",
    }
    record = ""
    for name, text in contents.items():
        data = text.encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    written = []
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written.append(path)
    return written


def remove(folder: Path | None = None) -> Path:
    """Delete what `install` wrote into `folder`. Returns the folder of the distribution's record.

    Raises
    ------
    FileNotFoundError
        It is not there.
    FileExistsError
        The bitsandbytes that is there is the real one. Nothing was changed.
    """
    folder = _folder() if folder is None else folder
    there = _distribution(folder)
    if there is None:
        raise FileNotFoundError(f"remove: {folder} has no stand-in for bitsandbytes")
    if not _is_ours(there):
        raise FileExistsError(f"remove: the bitsandbytes {there.version} in {folder} is not halfbyte's")
    info = folder / f"{NAME}-{there.version}.dist-info"
    shutil.rmtree(folder / NAME, ignore_errors=True)
    shutil.rmtree(info)
    return info


def main(argv: list[str]) -> int:
    """Exit code 0, or 1 with one line on stderr."""
    if argv not in (["install"], ["remove"]):
        print("usage: python -m halfbyte.shim install|remove", file=sys.stderr)
        return 2
    try:
        if argv == ["install"]:
            print(f"bitsandbytes is now halfbyte: {install()[0].parent}")
        else:
            print(f"removed: {remove()}")
    except OSError as error:
        print(f"halfbyte.shim: {error}", file=sys.stderr)
        return 1
    return 0
