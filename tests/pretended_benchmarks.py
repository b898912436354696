"""``python -m benchmarks ...``, or ``python -m benchmarks.launches cpu`` by ``launches``, on the
pretended card: for the dry run of ``make gpu``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import launches
from benchmarks.__main__ import main
from tools.gpu_kernels import card

_card = card("triton", "cpu")
_card.__enter__()
words = sys.argv[1:]
sys.exit(launches.main(["cpu"]) if words == ["launches"] else main(words))
