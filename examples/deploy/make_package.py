"""An AOTInductor package of a fused network, for any batch and size, and cases to try it on.

``python examples/deploy/make_package.py FOLDER`` writes ``model.pt2``, ``cases.pt`` (inputs,
each followed by the network's output) and says what ``run_package`` is to be called with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

import senet_kernels
from senet_kernels import public_ops
from senet_kernels.models import create_model


def write(model: nn.Module, folder: Path, *, c_shims: bool = False) -> None:
    """The package of a network that takes images, and what it gives for three of their shapes.

    ``c_shims``: generated code calls the library's C functions, without a dispatcher in between.
    """
    options = {"aot_inductor.custom_ops_to_c_shims": public_ops.c_shims()} if c_shims else {}
    shapes = ({0: Dim("batch", min=1, max=64), 2: Dim("height", min=8), 3: Dim("width", min=8)},)
    example = (torch.randn(2, 3, 32, 40),)
    with torch.no_grad():
        program = torch.export.export(model.eval(), example, dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / "model.pt2"), inductor_configs=options
        )
        inputs = [torch.randn(shape) for shape in ((2, 3, 32, 40), (1, 3, 64, 48), (5, 3, 33, 17))]
        torch.save([t for x in inputs for t in (x, model(x))], folder / "cases.pt")


def library() -> Path:
    """The compiled library beside the package, which has the operators a process needs."""
    found = sorted(Path(senet_kernels.__file__).parent.glob("_native*.so"))
    if not found:
        raise SystemExit(f"the compiled library is missing: {senet_kernels.backends()}")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="se_resnet8")
    parser.add_argument("--c-shims", action="store_true", help="call the library's C functions")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write(create_model(args.model, num_classes=10, in_chans=3), args.folder, c_shims=args.c_shims)
    print(f"run_package {args.folder}/model.pt2 {args.folder}/cases.pt {library()}")


if __name__ == "__main__":
    main()
