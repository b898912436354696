"""An AOTInductor package of a fused network, for any batch and size, and cases to try it on.

``python examples/deploy/make_package.py FOLDER`` writes ``model.pt2``, ``cases.pt`` (inputs,
each followed by the network's output) and says what ``run_package`` is to be called with.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import senet_kernels
from senet_kernels import public_ops
from senet_kernels.models import create_model


def write(model: nn.Module, folder: Path, *, c_shims: bool = False, cases: int = 3) -> None:
    """The package of a network that takes images, and what it gives for ``cases`` of them.

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
    save_cases(model, [*example, *images(cases - 1)], folder / "cases.pt")


def images(count: int) -> list[Tensor]:
    """Random ones, of random batches and sizes."""
    draw = random.Random(0)
    sizes = [(draw.randint(1, 64), draw.randint(8, 96), draw.randint(8, 96)) for _ in range(count)]
    return [torch.randn(batch, 3, height, width) for batch, height, width in sizes]


def save_cases(model: nn.Module, inputs: list[Tensor], path: Path) -> None:
    """Each input, and behind it what the network gives, in the parameters' dtype."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        torch.save([t for x in inputs for t in (x, model(x.to(dtype)))], path)


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
    parser.add_argument("--cases", type=int, default=3, help="how many inputs to try it on")
    parser.add_argument("--c-shims", action="store_true", help="call the library's C functions")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = create_model(args.model, num_classes=10, in_chans=3)
    write(model, args.folder, c_shims=args.c_shims, cases=args.cases)
    print(f"run_package {args.folder}/model.pt2 {args.folder}/cases.pt {library()}")


if __name__ == "__main__":
    main()
