"""What the words in a forward's code ask for, beside numbers: in how many settings it is captured,
and whether it may be fused at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.fx import GraphModule

from .namespaces import Unwatchable, spelled, words_of
from .parts import Refusal

OF_DTYPES = frozenset((
    "dtype", "is_floating_point", "is_complex", "element_size", "itemsize", "nbytes", "finfo",
    "to", "type", "type_as", "float", "half", "double", "bfloat16", "float16", "float32", "float64",
))  # fmt: skip
OF_GRADIENTS = frozenset(("is_grad_enabled", "requires_grad"))
OF_LAYOUT = frozenset((
    "is_contiguous", "stride", "data_ptr", "storage_offset", "suggest_memory_format", "dim_order",
))  # fmt: skip
#: Extents are taken to be larger than 0 where a graph is captured.
OF_EXTENTS = frozenset(("numel", "nelement", "shape", "size", "len", "__len__", "nbytes"))
#: What switches gradients, not only for what the forward computes.
_OF_GRADIENT_MODES = frozenset((
    "enable_grad", "set_grad_enabled", "inference_mode", "_set_grad_enabled",
))  # fmt: skip
_OF_DEVICES = frozenset((
    "device", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "get_device",
))  # fmt: skip
_OF_HISTORY = frozenset((
    "requires_grad_", "is_leaf", "grad", "grad_fn", "is_inference", "is_inference_mode_enabled",
    "retains_grad",
))  # fmt: skip
_OF_PROCESS = frozenset((
    "are_deterministic_algorithms_enabled", "is_deterministic_algorithms_warn_only_enabled",
    "get_deterministic_debug_mode", "get_default_dtype", "get_default_device", "get_num_threads",
    "get_float32_matmul_precision", "is_anomaly_enabled", "backends", "cudnn", "mkldnn",
))  # fmt: skip
#: What a tensor or a module may be or have beside its numbers.
_UNSEEN = frozenset((
    "Parameter", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
))  # fmt: skip
_OF_PROFILERS = frozenset(("record_function", "nvtx", "itt"))
#: What a forward may not ask for, or do: it was seen in one state, and nothing tells of others.
_REFUSED = (
    (_OF_GRADIENT_MODES, "switches gradients ({}), and what then needs one is not seen"),
    (_OF_DEVICES, "asks for a device ({}), and was seen on one alone"),
    (_OF_HISTORY, "asks how a tensor was made ({}), which is seen in one way alone"),
    (_OF_PROCESS, "asks for settings of the process ({}), which may change unseen"),
    (_UNSEEN, "asks for {}, which may change unseen"),
    (_OF_PROFILERS, "marks ranges for profilers ({}), which would be lost"),
)
_OF_COMPILERS = re.compile(r"is_(\w+_)?(compiling|exporting)")
OF_AUTOCAST = re.compile(r"autocast|\bamp\b")
#: What tells modules and tensors of one class from others.
OF_CLASSES = frozenset(("isinstance", "issubclass", "type", "__class__"))


class Words(NamedTuple):
    """What code names, PyTorch's own aside: that of a module's class; and its own and its
    children's, and what their attributes are, which may be functions and names of attributes."""

    own: frozenset[str]
    every: frozenset[str]


def words_in(
    module: nn.Module, of_kind: Callable[[type[nn.Module]], frozenset[str]] = words_of
) -> Words:
    """The words of a module.

    Args:
        of_kind: what gives those of a class.

    Raises:
        Refusal: something that it reads cannot be watched for changes.
    """
    kinds = {type(child) for child in module.modules()}
    kinds = {
        kind  # a traced graph is refused for what it is
        for kind in kinds
        if not (kind.__module__.startswith("torch.nn.") or issubclass(kind, GraphModule))
    }
    attributes = (v for child in module.modules() for v in vars(child).values())
    words = frozenset(filter(None, map(spelled, attributes)))
    try:
        every = words.union(*map(of_kind, kinds))
        own = of_kind(type(module)) if type(module) in kinds else frozenset()
    except Unwatchable as unwatchable:
        raise Refusal(str(unwatchable)) from unwatchable
    return Words(own, every)


def check(words: set[str]) -> None:
    """Refuse what a forward may not ask for.

    Raises:
        Refusal: it does.
    """
    for refused, reason in _REFUSED:
        if words & refused:
            raise Refusal(f"its forward {reason.format(', '.join(sorted(words & refused)))}")
    asked = set(filter(_OF_COMPILERS.fullmatch, words))
    if asked:
        raise Refusal(f"its forward asks whether it is being compiled ({', '.join(sorted(asked))})")
