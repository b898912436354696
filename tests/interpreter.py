"""Triton's interpreter, put right where it is not what a device does.

It proves that a kernel's text computes the right thing, element by element, masks included. It does
not prove that it compiles (types are Python's: a name with two types passes here and not there),
nor anything about what it has no notion of: registers, shared memory, alignment, vectors, the order
of a device's additions and its fused multiply-adds, its exp and erf, races and barriers (programs
run one after another, a cluster as one program), launching, streams, graphs, time. Reads a little
out of bounds may pass unnoticed. What compiling proves is in ``test_triton_compile.py``; the rest
needs a GPU: ``test_gpu.py`` and ``make gpu``.

It converts float32 to bfloat16 by cutting bits off, and subnormal bfloat16 to another number; a
device rounds to nearest even, and keeps subnormals. That of Triton 3.9 takes a comparison for an
integer of 32 bits, and then not for a mask; that of Triton 3.6 makes integers of arrays of one
element, which numpy has given up. For each function that a kernel calls it puts itself in the place
of ``triton.language`` once more, which takes milliseconds and changes nothing: done once per launch
here. Nothing is changed about arithmetic on bfloat16, which it gets
wrong altogether: kernels must not do any.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 to the bit patterns of bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def _widened(bits: np.ndarray) -> np.ndarray:
    """The bit patterns of bfloat16 to float32."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _as_mask(mask: Any) -> Any:
    return TensorHandle(mask.data.astype(bool), tl.int1)


def install() -> None:
    """bfloat16 as on a device; masks are masks; no warnings for the infinities of the tests."""
    np.seterr(all="ignore")
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_rounded(src.data), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return TensorHandle(_widened(src.data), tl.float32)
        return cast(self, src, dst_type)

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointers, _as_mask(mask), *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, _as_mask(mask), *rest)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    launch, patched = interpreter.GridExecutor.__call__, set[frozenset[str]]()

    def grid_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen = self.fn.__globals__
        langs = frozenset(n for n in ("tl", "core") if seen.get(n) in (tl, tl.core))
        if langs not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(langs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = grid_call
    interpreter.InterpretedFunction.__call__ = call
    interpreter._patch_lang_tensor = patch_lang_tensor
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store
