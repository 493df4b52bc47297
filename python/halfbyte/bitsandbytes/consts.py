"""Where the package lies and what its libraries end in."""

import platform
from pathlib import Path

PACKAGE_DIR = Path(__file__).parent
DYNAMIC_LIBRARY_SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
