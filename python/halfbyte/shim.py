"""`halfbyte.install()`: let transformers, PEFT, accelerate and TRL find halfbyte under the name bitsandbytes.

Two things are put at the front of `sys.meta_path`, in one object: a finder that serves the module
`bitsandbytes` from the files of `halfbyte.bitsandbytes`, and a distribution record of that name for
`importlib.metadata`. Nothing enters `sys.modules` before somebody imports the module, because some callers
take its mere presence there for use (accelerate's notebook launcher, TRL's activation offloading).

`python -m halfbyte.shim install|remove` does the same for good (see permanent.py).
"""

import importlib.metadata
import runpy
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar, Literal

NAME = "bitsandbytes"
# The release whose behaviour the stand-in has; callers compare it with the oldest they support.
VERSION = "0.50.2"
_FOLDER = Path(__file__).parent / "bitsandbytes"
_SCALES = ("absmax", "search")


class _Distribution(importlib.metadata.Distribution):
    """What importlib.metadata knows of the stand-in. It lists no files: it owns none under that name."""

    _texts: ClassVar[dict[str, str]] = {
        "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n"
        "Summary: halfbyte, standing in for bitsandbytes\nRequires-Dist: torch\n",
        "top_level.txt": f"{NAME}\n",
        "INSTALLER": "halfbyte\n",
    }

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        return _FOLDER.parent / path


class _Finder:
    """Meta path finder and distribution finder; `scales` is the setting `install` was given."""

    def __init__(self, scales: str) -> None:
        self.scales = scales

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != NAME:
            return None  # submodules are found through the package's __path__
        return spec_from_file_location(
            NAME, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
        )

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        name = getattr(context, "name", None)
        if name is None or name.lower() == NAME:
            yield _Distribution()

    def invalidate_caches(self) -> None:
        pass


def take_over() -> None:
    """Put the stand-in into the place of the module `bitsandbytes` that is being imported and calls this."""
    spec = _Finder("absmax").find_spec(NAME)
    module = module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)


def _installed() -> _Finder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)


def is_ours(module: Any) -> bool:
    """Whether a module is the stand-in, served under the name bitsandbytes."""
    return getattr(module, "__file__", None) == str(_FOLDER / "__init__.py")


def install(scales: Literal["absmax", "search"] = "absmax") -> None:
    """Make `import bitsandbytes` find halfbyte. Call it before transformers is imported.

    Parameters
    ----------
    scales
        How 4-bit weights are scaled when nothing else is said: "absmax" as bitsandbytes does, or "search",
        which stores the scale of least squared error in the same format.

    Raises
    ------
    ValueError
        Unknown scales.
    RuntimeError
        The real bitsandbytes is imported already, or transformers is and has looked for it in vain.
    """
    if scales not in _SCALES:
        raise ValueError(f"install: scales must be one of {_SCALES}, got {scales!r}")
    loaded = sys.modules.get(NAME)
    if loaded is not None and not is_ours(loaded):
        raise RuntimeError(
            f"install: the real bitsandbytes is imported already ({getattr(loaded, '__file__', loaded)}); "
            "call halfbyte.install() before anything imports it, best in the first line of the script"
        )
    finder = _installed()
    if finder is not None:
        finder.scales = scales
        return
    if "transformers" in sys.modules and not any(_finds(finder) for finder in sys.meta_path):
        raise RuntimeError(
            "install: transformers is imported already and remembers that there is no bitsandbytes; "
            "call halfbyte.install() before importing transformers"
        )
    sys.meta_path.insert(0, _Finder(scales))


def _finds(finder: Any) -> bool:
    return hasattr(finder, "find_spec") and finder.find_spec(NAME, None) is not None


def uninstall() -> None:
    """Undo `install`. Modules that imported the stand-in keep it; new imports find what else is there."""
    finder = _installed()
    if finder is None:
        return
    sys.meta_path.remove(finder)
    if is_ours(sys.modules.get(NAME)):
        for name in [n for n in sys.modules if n == NAME or n.startswith(NAME + ".")]:
            del sys.modules[name]


def default_scales() -> str:
    """The `scales` setting of `install`, "absmax" when it is not installed."""
    finder = _installed()
    return "absmax" if finder is None else finder.scales


def run_script(path: str, argv: Iterable[str] = (), scales: Literal["absmax", "search"] = "absmax") -> None:
    """Run a Python script as `python path *argv` would, with the stand-in installed first.

    Raises
    ------
    FileNotFoundError
        No such script. Whatever the script raises, SystemExit included, passes through.
    """
    script = Path(path)
    if not script.is_file():
        raise FileNotFoundError(f"run_script: no such file: {path}")
    install(scales)
    sys.argv = [path, *argv]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    from halfbyte.permanent import main

    sys.exit(main(sys.argv[1:]))
