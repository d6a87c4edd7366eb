"""What the compiler made of the widest loops: instructions counted from ``objdump -d``.

For each function of the object files the innermost loop with the most vector
multiply-adds: how many it has, the vectors and the scalars (to multiply with, broadcast
or by element) it loads, its vector stores, accesses of the stack, and all instructions.
``on paper`` is the share of the multiply-add peak that remains on a core which starts
two multiply-adds, two loads and four instructions a cycle: 100 % where the
multiply-adds take the longest. Latencies and caches are left out.

Of the instances of a template that differ in numbers the widest is shown, or ``--all``.

    python -m benchmarks.inner_loops build/selftest [--markdown]
    python -m benchmarks.inner_loops build/aarch64 --objdump aarch64-linux-gnu-objdump
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.section import Summary, console, text_table
from benchmarks.tables import markdown

FMAS, LOADS, WIDTH = 2, 2, 4  # a cycle
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(?:\{\w+\}\s+)?([\w.]+)\s*(.*)$")
_JUMP = re.compile(r"^(?:j\w+|b|b\.\w+|cbn?z|tbn?z)$")
_TARGET = re.compile(r"\b([0-9a-f]+) <")

_X86_FMA = re.compile(r"^(vfn?m(add|sub)\d+p[sd]|vpdp\w+)$")
_X86_MEMORY = re.compile(r"\(%r\w+|\(,%r")
_ARM_FMA = re.compile(r"^(fml[as]|[us]{1,2}dot|bfdot)$")
_ARM_LOAD = re.compile(r"^(ldn?p|ldu?r|ld[1-4]r?)$")
_ARM_STORE = re.compile(r"^(stn?p|stu?r|st[1-4])$")
_ARM_VECTOR = re.compile(r"^\{?\s*(q\d+|v\d+)")
_ARM_SCALAR = re.compile(r"^[sd]\d+$")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: tuple[str, ...]
    #: Where it jumps to, when it does.
    target: int | None = None


@dataclass
class Loop:
    """Counts of one innermost loop."""

    function: str
    multiply_adds: int = 0
    vectors: int = 0
    scalars: int = 0
    load_instructions: int = 0
    stores: int = 0
    stack: int = 0
    instructions: int = 0

    @property
    def on_paper(self) -> float:
        """Cycles of the multiply-adds over those of what takes the longest."""
        cycles = self.multiply_adds / FMAS
        loads, all_of_them = self.load_instructions / LOADS, self.instructions / WIDTH
        return cycles / max(cycles, loads, all_of_them)


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """The functions of a listing by ``objdump -d -C --no-show-raw-insn``."""
    name, body = "", list[Instruction]()
    for line in listing.splitlines():
        if found := _FUNCTION.match(line):
            yield name, body
            name, body = found[1], []
        elif found := _INSTRUCTION.match(line):
            body.append(_instruction(found[1], found[2], found[3]))
    yield name, body


def _instruction(address: str, name: str, text: str) -> Instruction:
    target = _TARGET.search(text) if _JUMP.match(name) else None
    text = re.sub(r"\s+(//|# |;).*$", "", text)
    # Commas inside of brackets belong to an address or to a list of registers.
    operands = re.split(r",\s*(?![^(\[{]*[)\]}])", text) if text else []
    return Instruction(
        int(address, 16), name, tuple(operands), int(target[1], 16) if target else None
    )


def innermost_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """From the target of a jump backwards to the jump, with no such pair inside."""
    if not body:
        return []
    spans = {
        (i.target, i.address)
        for i in body
        if i.target is not None and body[0].address <= i.target <= i.address
    }
    inner = [
        (start, end)
        for start, end in spans
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in spans)
    ]
    return [[i for i in body if start <= i.address <= end] for start, end in inner]


def count(function: str, loop: list[Instruction]) -> Loop:
    counts = Loop(function, instructions=len(loop))
    for instruction in loop:
        if any("%" in operand for operand in instruction.operands):
            _count_x86(counts, instruction)
        else:
            _count_aarch64(counts, instruction)
    return counts


def _count_x86(counts: Loop, instruction: Instruction) -> None:
    """AT&T order: the last operand is the destination."""
    name, operands = instruction.name, instruction.operands
    counts.multiply_adds += bool(_X86_FMA.match(name))
    places = [i for i, text in enumerate(operands) if _X86_MEMORY.search(text)]
    if not places or name.startswith(("lea", "nop", "prefetch")):
        return
    memory = operands[places[0]]
    counts.stack += "(%rsp" in memory or "(%rbp" in memory
    vector = any(re.search(r"%[xyz]mm", text) for text in operands)
    if places[0] == len(operands) - 1 and "mov" in name:
        counts.stores += vector
        return
    counts.load_instructions += 1
    if "broadcast" in name or "{1to" in memory:
        counts.scalars += 1
    elif vector:
        counts.vectors += 1


def _count_aarch64(counts: Loop, instruction: Instruction) -> None:
    name, operands = instruction.name, instruction.operands
    first = operands[0] if operands else ""
    vector = bool(_ARM_VECTOR.match(first))
    counts.multiply_adds += vector and bool(_ARM_FMA.match(name))
    memory = operands[-1] if operands and "[" in " ".join(operands[1:]) else ""
    counts.stack += any(text.startswith("[sp") for text in operands)
    if _ARM_STORE.match(name) and memory:
        counts.stores += vector
    elif _ARM_LOAD.match(name) and memory:
        counts.load_instructions += 1
        registers = [
            text
            for text in operands
            if _ARM_VECTOR.match(text) or _ARM_SCALAR.match(text)
        ]
        many = len(re.findall(r"v\d+", first)) or len(registers)
        if name.endswith("r") and name.startswith("ld1"):
            counts.scalars += 1
        elif vector:
            counts.vectors += many
        elif _ARM_SCALAR.match(first):
            counts.scalars += many


def widest_loops(listing: str, least: int) -> list[Loop]:
    """By function, its innermost loop with the most multiply-adds; widest first."""
    widest = []
    for name, body in functions(listing):
        loops = [count(short_name(name), loop) for loop in innermost_loops(body)]
        if loops:
            widest.append(max(loops, key=lambda loop: loop.multiply_adds))
    wide = [loop for loop in widest if loop.multiply_adds >= least]
    return sorted(wide, key=lambda loop: -loop.multiply_adds)


def one_each(loops: list[Loop]) -> list[Loop]:
    """The first of the instances of each template that differ in numbers."""
    first: dict[str, Loop] = {}
    for loop in loops:
        first.setdefault(re.sub(r"\b\d+\b", "#", loop.function), loop)
    return list(first.values())


def short_name(function: str) -> str:
    """Without namespaces, the return type, arguments and the compiler's suffixes."""
    name = re.sub(r" \[clone .*?\]", "", function)
    name = re.sub(r"\(anonymous namespace\)::|\bpybsp::(\w+::)*", "", name)
    name = re.sub(r"\((?!\w+\)\d).*$", "", name)
    return re.sub(r"\((\w+)\)(\d+)", r"\2", name).removeprefix("void ").strip()


def summary(loops: dict[str, list[Loop]]) -> Summary:
    head = ("object", "function", "multiply-adds", "vectors loaded", "scalars loaded",
            "stores", "stack", "all instructions", "on paper")  # fmt: skip
    return head, [
        [
            name,
            f"`{loop.function}`",
            str(loop.multiply_adds),
            str(loop.vectors),
            str(loop.scalars),
            str(loop.stores),
            str(loop.stack),
            str(loop.instructions),
            f"{loop.on_paper:.0%}",
        ]
        for name, found in loops.items()
        for loop in found
    ]


def objects(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(path.rglob("*_isa.cpp.o")) if path.is_dir() else [path]


def object_name(path: Path) -> str:
    """``avx512 token_tiles`` for ``.../pybsp_avx512.dir/.../token_tiles_isa.cpp.o``."""
    isa = re.search(r"pybsp_(\w+)\.dir", str(path))
    file = path.name.removesuffix(".o").removesuffix(".cpp").removesuffix("_isa")
    return f"{isa[1]} {file}" if isa else file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", help="objects, build folders")
    parser.add_argument("--objdump", default="objdump")
    parser.add_argument("--least", type=int, default=8, help="multiply-adds in a loop")
    parser.add_argument("--all", action="store_true", help="every instance")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    loops = {}
    for path in objects(arguments.paths):
        listing = subprocess.run(
            [arguments.objdump, "-d", "-C", "--no-show-raw-insn", str(path)],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        found = widest_loops(listing, arguments.least)
        loops[object_name(path)] = found if arguments.all else one_each(found)
    head, rows = summary(loops)
    if arguments.markdown:
        print(markdown(head, rows))
    else:
        console().print(text_table("innermost loops", head, rows))


if __name__ == "__main__":
    main()
