"""Inductor chooses between a public op and its decomposition, by measuring both.

For graphs that hold the public ops: exported programs that are compiled again. What Dynamo captures
of a module holds the private ops of the backend that was chosen then, with what they save for
backward; there is nothing left to choose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import public_kernels, public_ops


def _positional_tensors(op: Any) -> int:
    return sum(not argument.kwarg_only for argument in op._schema.arguments)


def _choosing(op: Any, choose: Callable[..., Any]) -> Callable[..., Any]:
    """``choose`` for calls whose tensors are all given by position, and None, Inductor's usual
    lowering, for others: it hands candidates the tensors that are there by position."""
    from torch._inductor.ir import TensorBox

    @functools.wraps(choose)
    def lower(*args: Any, **kwargs: Any) -> Any:
        by_position = len(args) == _positional_tensors(op) and None not in args
        if not by_position or any(isinstance(value, TensorBox) for value in kwargs.values()):
            return None
        for tensor in args:
            tensor.realize()  # candidates read buffers
        return choose(*args, **kwargs)

    return lower


def autotune_in_inductor() -> None:
    """Let Inductor's ``max_autotune`` measure a public op against its decomposition, and take the
    faster; for this process, from now on.

    It does so in graphs that hold the public ops, as exported programs do, without gradients. Calls
    with tensors by keyword (``residual``, ``lengths``...) or without a bias keep the op.

    Raises:
        RuntimeError: this torch has no ``register_custom_op_autotuning`` for operators that are
            defined elsewhere.
    """
    try:
        from torch._inductor.kernel import custom_op
        from torch._inductor.lowering import user_lowerings
    except ImportError as error:
        raise RuntimeError(
            f"expected a torch whose Inductor tunes custom operators, 2.13 or newer: {error}"
        ) from error
    for name, op in public_ops.OPS.items():
        if op in user_lowerings:
            continue
        custom_op.register_custom_op_autotuning(
            op, configs=[custom_op.CustomOpConfig(public_kernels.decomposition(name))]
        )
        user_lowerings[op] = _choosing(op, user_lowerings[op])
