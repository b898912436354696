"""What ptxas makes of the synchronizing instructions: SASS by nvdisasm."""

from __future__ import annotations

import functools
import re
import subprocess
from typing import NamedTuple

from ptx import compiling

#: Opcodes that order memory, or that are ordered: what lies between two of these matters not.
_CONCERNS = re.compile(
    r"MEMBAR|ERRBAR|CGAERRBAR|CCTL\.IV|UCGABAR|RED|ATOM|BAR\.|SYNCS|FENCE|UBLKCP|DEPBAR|LDGDEPBAR|"
    r"LDGSTS|LDG|LD\.|LDS|STG|ST\.|STS|BRA|BRX|CALL|RET|EXIT"
)


class Line(NamedTuple):
    """An instruction: opcode without predicate, operands, and the text as nvdisasm has it."""

    opcode: str
    operands: str
    text: str


@functools.cache
def sass(kernel: str, target: str) -> list[Line]:
    """Of a kernel's memory accesses, barriers and branches, in the order of the text."""
    cubin = compiling.cubin_of(kernel, target)
    disassembler = compiling.tool("nvdisasm")
    assert disassembler
    text = subprocess.run(
        [disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)([^;]*);", text, re.M)
    lines = [Line(opcode, operands.strip(), f"{opcode}{operands}") for opcode, operands in found]
    return [line for line in lines if _CONCERNS.match(line.opcode)]
