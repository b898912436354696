"""A model of timm's with its squeeze-and-excitation fused: report, parity, and the way back.

``python examples/swap_in_timm.py seresnet50 --pretrained``
"""

from __future__ import annotations

import argparse

import torch

from senet_kernels import fuse_se_blocks, unfuse_se_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="seresnet50")
    parser.add_argument("--pretrained", action="store_true", help="download its checkpoint")
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    import timm

    model = timm.create_model(args.model, pretrained=args.pretrained).eval()
    x = torch.randn(2, 3, args.size, args.size)
    with torch.no_grad():
        before = model(x)
        print(fuse_se_blocks(model, neighbours=True))  # the steps around the blocks join, too
        after = model(x)
    print(f"largest difference: {(after - before).abs().max():.1e}")

    # Training, saving and loading go on as before: parameters and keys are the same.
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    unfuse_se_blocks(model)


if __name__ == "__main__":
    main()
