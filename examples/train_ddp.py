"""Training in several processes, in as few lines as it takes.

``torchrun --nproc-per-node 2 examples/train_ddp.py`` (one process without torchrun). The trainer of
the package, ``python -m senet_kernels.train``, adds data, checkpoints, schedules and logs.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from senet_kernels.models import create_model, parameter_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="of each process")
    args = parser.parse_args()
    several = "RANK" in os.environ  # set by torchrun
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else "cpu"
    if several:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank() if several else 0

    torch.manual_seed(0)  # the same weights everywhere
    network = create_model("se_resnet8", num_classes=2, in_chans=1).to(device)
    model = DistributedDataParallel(network) if several else network
    # Keeps weight decay off biases, norms, alpha and beta.
    optimiser = torch.optim.SGD(parameter_groups(network, 1e-4), lr=0.05, momentum=0.9)

    torch.manual_seed(1 + rank)  # other data in each process
    for step in range(args.steps):
        labels = torch.randint(2, (args.batch,), device=device)
        images = torch.randn(args.batch, 1, 8, 8, device=device)
        images[:, :, 2:6, 2:6] += labels[:, None, None, None]
        loss = nn.functional.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
