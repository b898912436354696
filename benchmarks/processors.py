"""Processors by the name that people know: several generations share what they call themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# By vendor and family: from which model on, and the architecture. From the kernel's
# arch/x86/include/asm/intel-family.h, and AMD's processor programming references.
_AMD = {
    23: ((0x00, "Zen"), (0x30, "Zen 2")),
    25: ((0x00, "Zen 3"), (0x10, "Zen 4"), (0x20, "Zen 3"), (0x60, "Zen 4"), (0xA0, "Zen 4c")),
    26: ((0x00, "Zen 5"),),
}
_INTEL = {
    0x55: "Skylake to Cooper Lake", 0x6A: "Ice Lake", 0x8F: "Sapphire Rapids",
    0xCF: "Emerald Rapids", 0xAD: "Granite Rapids", 0xAF: "Sierra Forest",
}  # fmt: skip
_SIGNATURE = re.compile(r" \(family (\d+), model (\d+)\)$")


def name(environment: Mapping[str, Any]) -> str:
    """``AMD EPYC, Zen 3`` from a record's environment; what Linux said where that is not known."""
    text = str(environment["cpu"])
    found = _SIGNATURE.search(text)
    brand = re.sub(r"\(R\)|\(TM\)|\bProcessor\b", "", _SIGNATURE.sub("", text))
    brand = " ".join(brand.split())
    if found is None:
        return f"{brand}{_by_caches(brand, environment)}"
    family, model = int(found[1]), int(found[2])
    architecture = None
    if "AMD" in brand:
        steps = [zen for first, zen in _AMD.get(family, ()) if model >= first]
        architecture = steps[-1] if steps else None
    elif "Intel" in brand and family == 6:
        architecture = _INTEL.get(model)
    return f"{brand}, {architecture}" if architecture else f"{brand}{found[0]}"


def _by_caches(brand: str, environment: Mapping[str, Any]) -> str:
    """What remains where family and model were not recorded: AMD has had AVX-512, and 1 MB of
    second-level cache for each core, since Zen 4."""
    core = (environment.get("caches") or {}).get("core")
    both = environment.get("cpu_capability") == "AVX512" and core == 1 << 20
    return ", Zen 4 or 5" if "AMD" in brand and both else ""
