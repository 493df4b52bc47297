"""Where the package lies and what its libraries end in."""

import platform
from pathlib import Path

PACKAGE_DIR = Path(__file__).parent
DYNAMIC_LIBRARY_SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
PACKAGE_GITHUB_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"
NONPYTORCH_DOC_URL = "https://huggingface.co/docs/bitsandbytes/main/en/installation"
