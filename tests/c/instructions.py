"""Instructions of the kernels' main loops, counted, beside what they may be: the table instructions.toml.

    python tests/c/instructions.py                    counts everything this processor has, beside the table
    python tests/c/instructions.py dot tile           only kernels whose name contains one of the words
    python tests/c/instructions.py --update           writes the counts into the table (of this compiler)
    CC=clang-19 python tests/c/instructions.py --update

count_kernels.c says what is executed; count.c counts it, exactly: a count differs from the table because the code
does, never because the machine is busy. Counts belong to a compiler (family and major version), not to a processor:
each processor with the instruction set gives the same.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = build.HERE / "instructions.toml"
NOT_AVAILABLE = 77
UPPER = 1.02  # times what the table says
SLACK = 16  # and so many more for a call: what linkers and hardened compilers add to functions
EMPTY = "nothing"


@dataclass(frozen=True)
class Count:
    isa: str
    name: str
    unit: str
    work: float  # units
    instructions: int

    @property
    def key(self) -> str:
        return f"{self.isa} {self.name}"

    @property
    def each(self) -> float:
        return self.instructions / self.work


def compiler() -> str:
    """ "gcc 12", "clang 19"; counts of other compilers are not comparable."""
    done = subprocess.run(
        [*build.compilers("native"), "-dM", "-E", "-x", "c", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    )
    macros = dict(re.findall(r"^#define (\w+) (.*)$", done.stdout, re.MULTILINE))
    if "__clang_major__" in macros:
        return f"clang {macros['__clang_major__']}"
    return f"gcc {macros.get('__GNUC__', '?')}"


def run(isa: str, part: str = "") -> list[Count] | None:
    """Counts of one instruction set; None where this processor lacks it, or cannot count."""
    program = build.build("native")
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as file:
        command = [str(program), f"--count={part}", f"--isa={isa}", "--threads=1", f"--json={file.name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == NOT_AVAILABLE:
            return None
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return [Count(**json.loads(line)) for line in Path(file.name).read_text().splitlines()]


def table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def violations(counts: list[Count], known: dict[str, float]) -> list[str]:
    """What a count has too much, and kernels that the table lacks."""
    found = []
    for count in counts:
        if count.name == EMPTY:
            continue
        if count.key not in known:
            found.append(f"{count.key}: {count.each:.4f} instructions per {count.unit}, not in the table")
        elif count.instructions > known[count.key] * count.work * UPPER + SLACK:
            found.append(
                f"{count.key}: {count.each:.4f} instructions per {count.unit}, in the table {known[count.key]:.4f}"
            )
    return found


def fewer(counts: list[Count], known: dict[str, float]) -> list[str]:
    """Counts that are below the table by more than its tolerance: it should be updated."""
    return [
        f"{c.key}: {c.each:.4f}, in the table {known[c.key]:.4f}"
        for c in counts
        if c.key in known and c.instructions * UPPER + SLACK < known[c.key] * c.work
    ]


def update(name: str, counts: list[Count], isas: list[str]) -> None:
    """Replaces the table's section of this compiler; instruction sets that were not counted keep their lines."""
    text = TABLE.read_text(encoding="utf-8")
    kept = {k: v for k, v in table().get(name, {}).items() if k.split()[0] not in isas}
    lines = [f'["{name}"]'] + [f'"{key}" = {value}' for key, value in kept.items()]
    lines += [f'"{c.key}" = {round(c.each, 4)} # {c.unit}' for c in counts if c.name != EMPTY]
    section = re.compile(rf'^\["{re.escape(name)}"\]\n(?:(?!\[).*\n)*', re.MULTILINE)
    text = section.sub("", text).rstrip("\n") + "\n\n" + "\n".join(lines) + "\n"
    TABLE.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args()
    if options.update and options.words:
        parser.error("--update counts everything")
    name = compiler()
    known, floors = table().get(name, {}), table()["floor"]
    counts, isas = [], []
    for isa in build.isas("native")[1:]:
        found = run(isa)
        if found is None:
            print(f"{isa}: not on this processor", file=sys.stderr)
            continue
        isas.append(isa)
        counts += [c for c in found if not options.words or any(word in c.key for word in options.words)]
    print(f"{name:52} {'counted':>9} {'table':>9} {'floor':>9}")
    for count in counts:
        floor = floors.get(count.key, {}).get("least")
        cells = [f"{value:9.4f}" if value is not None else " " * 9 for value in (known.get(count.key), floor)]
        print(f"{count.key:52} {count.each:9.4f} {' '.join(cells)}  per {count.unit}")
    if options.update:
        update(name, counts, isas)
    return 0


if __name__ == "__main__":
    sys.exit(main())
