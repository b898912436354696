"""What a step keeps in memory: bytes saved for backward, and on CUDA the peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of storage that ``forward`` keeps alive for backward.

    Each storage counts once and whole, however many views of it were saved: that is what stays
    allocated. Parameters and other tensors in ``exclude`` exist anyway and do not count.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    # What was saved lives until `kept` goes, so no address is used twice before that.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(found.values())


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """Peak of the allocator during ``step`` beyond what was allocated before; None on a CPU,
    whose allocator keeps no account. Not yet run on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
