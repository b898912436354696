"""torch.export with any batch size, saved, loaded in a new process, and run.

``python examples/export.py``
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.export import Dim

from senet_kernels.models import create_model

# The program calls the fused op by name: importing senet_kernels registers it.
LOAD = """
import sys, torch
import senet_kernels
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), expected)
print("a new process computes the same for a batch of", len(x))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="se_resnet8")
    args = parser.parse_args()
    model = create_model(args.model, num_classes=10, in_chans=3).eval()
    example = (torch.randn(2, 3, 32, 32),)
    program = torch.export.export(model, example, dynamic_shapes=({0: Dim("batch", min=1)},))
    ops = {str(n.target) for n in program.graph.nodes if "senet_kernels" in str(n.target)}
    print("fused ops in the graph:", *sorted(ops))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        x = torch.randn(5, 3, 32, 32)
        torch.export.save(program, Path(folder) / "model.pt2")
        torch.save((x, model(x)), Path(folder) / "data.pt")
        files = [f"{folder}/model.pt2", f"{folder}/data.pt"]
        subprocess.run([sys.executable, "-c", LOAD, *files], check=True)


if __name__ == "__main__":
    main()
