"""Memory that shows what a kernel does to it: tensors of NaN between guard bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_BAND = 512  # bytes on either side; what torch's allocator aligns to on a GPU
_PATTERN = 0xFF  # of all bytes: NaN in every floating-point type, -1 in integers

_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    (
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)


class Bands:
    """The bands around tensors made here."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []
        self._gaps: list[tuple[Tensor, Tensor]] = []  # whose tensor leaves some out

    def tensor(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        offset: int = 0,
    ) -> Tensor:
        """A tensor of NaN, ``offset`` elements behind an address that is as aligned as any."""
        extents = zip(shape, strides, strict=True)
        elements = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in extents)
        size = (elements + offset) * dtype.itemsize
        padded = -(-size // _BAND) * _BAND
        buffer = torch.full((_BAND + padded + _BAND,), _PATTERN, dtype=torch.uint8, device=device)
        self._buffers.append((buffer, size))
        inner = buffer[_BAND : _BAND + padded].view(dtype)
        made = inner.as_strided(shape, strides, inner.storage_offset() + offset)
        if elements + offset > made.numel():
            self._gaps.append((buffer, made))
        return made

    def broken(self) -> str | None:
        """Where something was written outside of a tensor; None where nothing was."""
        for buffer, size in self._buffers:
            for side, band in (("before", buffer[:_BAND]), ("behind", buffer[_BAND + size :])):
                if not bool((band == _PATTERN).all()):
                    return f"memory {side} a tensor of {size} bytes was overwritten"
        for buffer, made in self._gaps:
            rest = buffer.clone()
            of_it = rest.view(_integers(made)).as_strided(
                made.shape, made.stride(), made.storage_offset()
            )
            of_it.fill_(-1)
            if not bool((rest == _PATTERN).all()):
                return "memory between the elements of a strided tensor was overwritten"
        return None


class Allocations(TorchDispatchMode):
    """While it is on, what PyTorch operators allocate is NaN between bands."""

    def __init__(self, bands: Bands) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bands = bands
        self.error: BaseException | None = None  # raised in here, an interrupt from outside too

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first call would import Dynamo, to skip it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _ALLOCATIONS:
            return func(*args, **kwargs)
        like = args[0] if args and isinstance(args[0], Tensor) else None
        device = kwargs.get("device") or (like.device if like is not None else "cpu")
        # A tensor without memory says which shape, strides and dtype are meant.
        try:
            meant = func(*args, **{**kwargs, "device": "meta", "pin_memory": None})
            if kwargs.get("pin_memory") or torch.device(device).type == "meta":
                return func(*args, **kwargs)
            return self._bands.tensor(meant.shape, meant.stride(), meant.dtype, device)
        except BaseException as error:
            self.error = error
            raise


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of a dtype and shape agree bit for bit, NaN included."""
    if a.is_floating_point():
        a, b = a.contiguous().view(_integers(a)), b.contiguous().view(_integers(b))
    return torch.equal(a, b)


def _integers(t: Tensor) -> torch.dtype:
    """The integers that are as wide as a tensor's elements."""
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
