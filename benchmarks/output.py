"""Where the programs of this folder write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_JSON = ROOT / "build" / "benchmarks"


def write_json(path: Path | None, default: str, result: dict[str, Any]) -> Path:
    """Writes `result` to `path`, or to build/benchmarks/<default>.json."""
    target = path or DEFAULT_JSON / f"{default}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    return target
