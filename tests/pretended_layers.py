"""``python -m benchmarks layers`` on the pretended card, for the dry run of ``make gpu``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.__main__ import main
from tools.gpu_kernels import pretend

pretend("triton")
sys.exit(main(["layers", *sys.argv[1:]]))
