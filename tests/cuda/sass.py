"""Reads the machine code of a kernel: blocks, loops, and how many instructions one turn of a loop issues.

The input is the text of `nvdisasm -c`. Nothing is executed, so "issued" is a statement about a path through the code:
of all paths from the head of a loop back to it, the one that moves the most global memory by wide accesses and the
least by others, and among those the longest: the iteration over a full tile, in which every `if (inside)` holds.
Loops inside (a spin on a barrier, say) count once.
Code that only a CALL reaches (the slow half of a 64-bit division, whose fast half is in line) counts as the CALL alone.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
LABEL = re.compile(r"^([.$\w]+):")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
TARGET = re.compile(r"`\(([^)]*)\)")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
GLOBAL_MEMORY = ("LDG", "STG", "LDGSTS", "RED", "ATOMG")
WIDE = 8  # bytes a lane from which on an access belongs to the path for full tiles
BULK_BYTES = 1 << 12  # a bulk copy or a tensor map's tile: one instruction for many bytes


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", "@!UP1" or ""
    opcode: str  # with all its suffixes: "LDG.E.128.CONSTANT"
    operands: str

    def is_a(self, pattern: str) -> bool:
        """Is it of this kind? "LDG.128" is every LDG whose suffixes have 128 among them."""
        name, *suffixes = pattern.split(".")
        own_name, *own_suffixes = self.opcode.split(".")
        return own_name == name and set(suffixes) <= set(own_suffixes)

    @property
    def global_bytes(self) -> int:
        """Bytes a lane moves between global memory and elsewhere."""
        name, *suffixes = self.opcode.split(".")
        if name.startswith(("UBLKCP", "UTMALDG", "UTMASTG")):
            return BULK_BYTES
        if name not in GLOBAL_MEMORY:
            return 0
        return next((WIDTHS[s] for s in suffixes if s in WIDTHS), 4)

    @property
    def narrow(self) -> bool:
        """An access to global memory of fewer than 32 bits."""
        return 0 < self.global_bytes < 4

    def weight(self, through: str | None) -> tuple[int, int, int, int]:
        """How much a path gains by it; the first number that differs decides."""
        wide = self.global_bytes if self.global_bytes >= WIDE else 0
        other = self.global_bytes > 0 and not wide
        return wide, through is not None and self.is_a(through), -other, 1

    @property
    def conditional(self) -> bool:
        if self.predicate and self.predicate not in ("@PT", "@UPT"):
            return True
        before_target = self.operands.partition("`(")[0]
        return self.opcode.startswith("BRA.DIV") or re.search(r"\bU?P\d", before_target) is not None


@dataclass
class Block:
    """Instructions that are executed one after the other, and the blocks that may come next."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Path:
    """What one turn of a loop issues, or one run of a kernel without its loops' repetitions."""

    instructions: tuple[Instruction, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    def count(self, pattern: str) -> int:
        return sum(i.is_a(pattern) for i in self.instructions)

    @property
    def narrow(self) -> int:
        return sum(i.narrow for i in self.instructions)

    def histogram(self) -> Counter[str]:
        return Counter(i.opcode.split(".")[0] for i in self.instructions)


class Kernel:
    """The control flow of one entry function."""

    def __init__(self, lines: list[str]) -> None:
        self.blocks: list[Block] = [Block()]
        labels: dict[str, int] = {}
        jumps: list[tuple[int, str]] = []
        after_jump = False
        for line in lines:
            if label := LABEL.match(line):
                if self.blocks[-1].instructions:
                    self._next(falls_through=not after_jump)
                labels[label[1]] = len(self.blocks) - 1
                after_jump = False
                continue
            if (instruction := _parse(line)) is None:
                continue
            block = self.blocks[-1]
            block.instructions.append(instruction)
            base = instruction.opcode.split(".")[0]
            if base in ("BRA", "JMP") and (target := TARGET.search(instruction.operands)):
                jumps.append((len(self.blocks) - 1, target[1]))
            elif base in ("BRX", "JMX"):
                raise ValueError(f"a jump through a register at {instruction.address:#x}: cannot be followed")
            elif base not in ("EXIT", "RET"):
                continue
            self._next(falls_through=instruction.conditional)
        for source, name in jumps:
            self.blocks[source].successors.append(labels[name])
        self.order = self._reverse_postorder()
        self.position = {block: i for i, block in enumerate(self.order)}
        self.dominator = self._dominators()
        self.loops = self._loops()

    def _next(self, falls_through: bool) -> None:
        if falls_through:
            self.blocks[-1].successors.append(len(self.blocks))
        self.blocks.append(Block())

    def _reverse_postorder(self) -> list[int]:
        seen, order = {0}, []
        stack = [(0, iter(self.blocks[0].successors))]
        while stack:
            block, successors = stack[-1]
            following = next((s for s in successors if s not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].successors)))
        return order[::-1]

    def _predecessors(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for successor in self.blocks[block].successors:
                found[successor].append(block)
        return found

    def _dominators(self) -> dict[int, int]:
        """The immediate dominator of each block, after Cooper, Harvey and Kennedy (2001)."""
        predecessors = self._predecessors()
        dominator = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                known = [p for p in predecessors[block] if p in dominator]
                new = known[0]
                for other in known[1:]:
                    while new != other:
                        if self.position[new] > self.position[other]:
                            new = dominator[new]
                        else:
                            other = dominator[other]
                if dominator.get(block) != new:
                    dominator[block] = new
                    changed = True
        return dominator

    def _dominates(self, a: int, b: int) -> bool:
        while self.position[b] > self.position[a]:
            b = self.dominator[b]
        return a == b

    def _loops(self) -> dict[int, frozenset[int]]:
        """Natural loops: the head, and all blocks from which it is reached without leaving the loop."""
        predecessors = self._predecessors()
        loops: dict[int, frozenset[int]] = {}
        for latch in self.order:
            for head in self.blocks[latch].successors:
                if not self._dominates(head, latch):
                    continue
                body, stack = {head}, [latch]
                while stack:
                    block = stack.pop()
                    if block not in body:
                        body.add(block)
                        stack += predecessors[block]
                loops[head] = loops.get(head, frozenset()) | body
        return loops

    def _heaviest(self, head: int, body: frozenset[int], ends: set[int], through: str | None) -> Path:
        """From head to one of `ends`, along forward edges."""
        best: dict[int, tuple[int, ...]] = {}
        after: dict[int, int | None] = {}
        for block in reversed([b for b in self.order if b in body]):
            instructions = self.blocks[block].instructions
            own = tuple(
                sum(column) for column in zip(*(i.weight(through) for i in instructions), strict=True)
            )
            forward = [s for s in self.blocks[block].successors
                       if s in best and s != head and self.position[s] > self.position[block]]  # fmt: skip
            following = max(forward, key=lambda s: best[s], default=None)
            if block in ends and (following is None or best[following] < (0, 0, 0, 0)):
                best[block], after[block] = own, None
            elif following is not None:
                best[block] = tuple(a + b for a, b in zip(own, best[following], strict=True))
                after[block] = following
        found: list[Instruction] = []
        step: int | None = head
        while step is not None:
            found += self.blocks[step].instructions
            step = after[step]
        return Path(tuple(found))

    def _count(self, body: frozenset[int], marker: str | None) -> int:
        return sum(
            i.is_a(marker) if marker else i.global_bytes**2  # one of 16 outweighs eight of 2
            for block in body
            for i in self.blocks[block].instructions
        )

    def main_loop(self, marker: str | None = None, through: str | None = None) -> Path:
        """One turn of the loop in which most of the `marker` instructions are (None: of the global memory).

        Of loops inside one another it is the inner one if it has any of them. `through`: of the paths, one with as
        many of these instructions as possible ("LDG.U8": the branch for nested scales).
        """
        marked = {head: body for head, body in self.loops.items() if self._count(body, marker)}
        inner = {
            head: body
            for head, body in marked.items()
            if not any(other != head and other in body for other in marked)
        }
        if not inner:
            raise ValueError(f"no loop has {marker or 'an access to global memory'}")
        head, body = max(inner.items(), key=lambda item: self._count(item[1], marker))
        return self._heaviest(head, body, {b for b in body if head in self.blocks[b].successors}, through)

    def straight(self, through: str | None = None) -> Path:
        """From the first instruction to an exit, each loop once."""
        ends = {b for b in self.order if any(i.opcode == "EXIT" for i in self.blocks[b].instructions[-1:])}
        return self._heaviest(0, frozenset(self.order), ends, through)

    def all_instructions(self) -> Path:
        return Path(tuple(i for block in self.blocks for i in block.instructions))


def _parse(line: str) -> Instruction | None:
    found = INSTRUCTION.search(line)
    if found is None:
        return None
    text = found[2].strip("{} ")
    predicate = ""
    if text.startswith("@"):
        predicate, _, text = text.partition(" ")
    opcode, _, operands = text.strip().partition(" ")
    return Instruction(int(found[1], 16), predicate, opcode, operands)


def kernels(disassembly: str) -> dict[str, Kernel]:
    """Every entry function of a cubin by its mangled name, from the output of `nvdisasm -c`."""
    sections: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in disassembly.splitlines():
        if section := SECTION.match(line):
            lines = sections.setdefault(section[1], [])
        elif line.lstrip().startswith(".section"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return {name: Kernel(body) for name, body in sections.items()}
