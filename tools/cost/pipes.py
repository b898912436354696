"""Which part of a multiprocessor an instruction occupies, and for how long.

Times are in cycles of one of the four schedulers for the 32 threads of a warp, after the table of
arithmetic throughput in the CUDA C++ programming guide (results per clock and multiprocessor, over
four); loads, stores and shuffles occupy the one unit that the four schedulers share, 128 bytes of
shared memory or 32 threads of a shuffle in a cycle.
"""

from __future__ import annotations

from typing import NamedTuple

from .sass import Instruction

#: Opcodes by the pipe that they occupy. Integer products (``IMAD``) run beside FFMA. ``OTHER`` take
#: only an issue slot: control flow, barriers, constants, the uniform data path (of a warp, not of
#: its threads; what begins with a U is of it, if it is in no other list).
_PIPES = {
    "ALU": "BMSK CS2R F2FP FMNMX FMNMX3 FSEL FSET FSETP I2FP I2I IABS IADD IADD3 IMNMX ISETP LEA "
           "LOP3 MOV P2R PLOP3 PRMT R2P SEL SGXT SHF SHL SHR VABSDIFF VIADD VIADDMNMX VIMNMX "
           "VIMNMX3 VOTE",
    "FMA": "FADD FADD2 FCHK FFMA FFMA2 FMUL FMUL2 FSWZADD HADD2 HFMA2 HMNMX2 HMUL2 HSET2 HSETP2",
    "IMAD": "IDP IMAD IMUL",
    "SPECIAL": "BREV F2F F2I FLO FRND I2F MUFU POPC",
    "MEMORY": "ATOM ATOMG ATOMS CCTL LD LDG LDGSTS LDL LDS LDSM RED REDG ST STG STL STS STSM SYNCS "
              "UBLKCP UBLKPF",
    "SHUFFLE": "SHFL",
    "TENSOR": "DMMA HGMMA HMMA IMMA QMMA",
    "DOUBLE": "DADD DFMA DMUL DSETP",
    "OTHER": "ACQBULK ACQSHMINIT ARRIVES BAR BPT BRA BREAK BRX BRXU BSSY BSYNC CALL CGAERRBAR "
             "DEPBAR ELECT ENDCOLLECTIVE ERRBAR EXIT FENCE JMP KILL LDC LDCU LDGDEPBAR LEPC MEMBAR "
             "NANOSLEEP NOP PREEXIT R2UR REDUX RET S2R S2UR VOTEU WARPSYNC YIELD",
}  # fmt: skip
PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}


class Use(NamedTuple):
    """Cycles: ``issue``, ``alu``, ``fma``, ``special`` of a scheduler; ``memory`` of the unit for
    loads, stores and shuffles of the multiprocessor."""

    issue: float
    alu: float = 0.0
    fma: float = 0.0
    special: float = 0.0
    memory: float = 0.0

    def plus(self, other: Use, times: float = 1.0) -> Use:
        return Use(*(a + times * b for a, b in zip(self, other, strict=True)))


def pipe_of(instruction: Instruction) -> str:
    """Raises KeyError for an opcode in no list."""
    name = instruction.name
    return PIPE_OF["R2UR"] if name.startswith("U") and name not in PIPE_OF else PIPE_OF[name]


def use(instruction: Instruction, capability: int) -> Use:
    """What an instruction takes for a warp, on a device of that compute capability (90, say)."""
    pipe = pipe_of(instruction)
    if pipe == "ALU":
        return Use(1, alu=2)
    if pipe == "FMA":
        # Half a scheduler's lanes multiply and add on sm_80, all of them on sm_86 and later.
        return Use(1, fma=2 if capability in (70, 72, 75, 80) else 1)
    if pipe == "IMAD":
        return Use(1, fma=2)
    if pipe == "SPECIAL":
        return Use(1, special=8)
    if pipe == "SHUFFLE":
        return Use(1, memory=1)
    if pipe == "MEMORY":
        return Use(1, memory=max(1.0, 32 * instruction.bytes / 128))
    return Use(1)
