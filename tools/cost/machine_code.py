"""From PTX to machine code whose every instruction names its line of PTX.

Products lie in ``build/cost``, named by a hash of what they are made of.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .sass import Program

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "build" / "cost"
_PRODUCT = "1"  # of what is made here
_INSTRUCTION = re.compile(r"[ \t]*(?:@!?%\w+[ \t]+)?[a-z][\w.:]*[ \t;]")
_LOCATIONS = re.compile(r"^[ \t]*\.(?:loc|file)\b.*$", re.M)
_SECTION = re.compile(r"^[ \t]*\.section\b.*?^[ \t]*\}", re.S | re.M)


def for_tests() -> Any:
    """``ptx.compiling`` of the tests, which has nvcc, PTX and what executes it."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    from ptx import compiling

    return compiling


def why_not() -> str | None:
    """Why machine code cannot be made and read here; None when it can."""
    missing = [name for name in ("ptxas", "nvdisasm") if for_tests().tool(name) is None]
    if find_spec("scipy") is None:
        missing.append("scipy")
    reason = for_tests().why_not()
    return reason or (f"no {' and no '.join(missing)}" if missing else None)


def release(program: str | None = None) -> str:
    """Of ptxas, whose choices a price depends on."""
    assembler = program or for_tests().tool("ptxas")
    assert assembler
    found = re.search(r"V([\d.]+)", for_tests().version(assembler))
    return f"ptxas {found[1] if found else 'of an unknown release'}"


class Resources(NamedTuple):
    registers: int
    stack: int  # bytes: what is spilled is there
    spills: int  # bytes stored and loaded


class MachineCode(NamedTuple):
    program: Program
    resources: Resources


def located(ptx: str) -> str:
    """The PTX with a ``.loc`` before every instruction, which names the line that it has."""

    def blank(found: re.Match[str]) -> str:
        return "\n" * found[0].count("\n")

    lines = []
    for number, line in enumerate(_LOCATIONS.sub("", _SECTION.sub(blank, ptx)).split("\n"), 1):
        if _INSTRUCTION.match(line):
            lines.append(f".loc 1 {number} 0")
        lines.append(line)
    return "\n".join([*lines, '.file 1 "kernel.ptx"', ""])


@functools.cache
def compiled(
    ptx: str, target: str, entry: str, assembler: str | None = None, flags: tuple[str, ...] = ()
) -> MachineCode:
    """What ptxas (``assembler``, where it is another one) makes of a kernel's PTX for
    ``sm_<target>``.

    Raises:
        RuntimeError: the messages of ptxas or nvdisasm.
    """
    compiling = for_tests()
    assembler = assembler or compiling.tool("ptxas")
    disassembler = compiling.tool("nvdisasm")
    assert assembler
    assert disassembler
    parts = [
        ptx,
        target,
        *flags,
        compiling.version(assembler),
        compiling.version(disassembler),
        _PRODUCT,
    ]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    product = OUT / f"{target}-{key}.json"
    if not product.exists():
        with tempfile.TemporaryDirectory() as folder:
            source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            source.write_text(located(ptx))
            command = [assembler, f"-arch=sm_{target}", "-lineinfo", "-v", *flags, str(source)]
            said = _run([*command, "-o", str(cubin)])
            text = _run([disassembler, "-c", "-g", str(cubin)])
        compiling.write(product, json.dumps({"said": said, "text": text}))
    made = json.loads(product.read_text())
    return MachineCode(Program(made["text"], entry), _resources(made["said"], entry))


def _resources(said: str, entry: str) -> Resources:
    of_entry = said[said.index(f"'{entry}'") :]
    registers = re.search(r"Used (\d+) registers", of_entry)
    stack = [int(n) for n in re.findall(r"(\d+) bytes stack frame", said)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    assert registers
    return Resources(int(registers[1]), max(stack, default=0), sum(spills))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr
