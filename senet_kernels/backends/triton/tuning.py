"""Which plan a call gets: a pinned one, a timed one where autotuning is on, else the fixed one.

Off by default, since timing may choose differently from process to process, and other plans sum in
another order: other last bits. ``enable()`` or ``SENET_KERNELS_TRITON_AUTOTUNE=1`` turns it on: the
first call of a shape, dtype, layout and device then times the candidates of
:func:`plan.candidates` and pins the fastest. ``save(path)`` writes what is pinned to a JSON file;
``load(path)``, or ``SENET_KERNELS_TRITON_PLANS=path``, pins it again, with autotuning on or off.

A first call during the capture of a CUDA graph is refused, as it is without autotuning. Not yet run
on a GPU. Needs no Triton until something is timed.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import (
    Choice,
    Device,
    Plan,
    Shape,
    candidates,
    fixed_choice,
    is_legal,
    make_plan,
    make_resident_plan,
)

SCHEMA = "senet_kernels.triton_plans/2"
DIRECTIONS = (
    "forward", "backward", "squeeze", "squeeze_backward", "channel_scale", "channel_scale_backward",
)  # fmt: skip


class CannotCompileError(RuntimeError):
    """Triton does not compile a kernel for this device with these constants."""


class Key(NamedTuple):
    """What a plan is pinned for. The options of a call are not in it: the first one decides."""

    direction: str
    shape: Shape
    dtype: str
    device: Device


_enabled = os.environ.get("SENET_KERNELS_TRITON_AUTOTUNE") == "1"
_file: str | None = os.environ.get("SENET_KERNELS_TRITON_PLANS") or None
_pinned: dict[Key, Choice] = {}
_resident: bool | None = None  # forced, see strategy()
_listeners: list[Callable[[], None]] = []


def enable(on: bool = True) -> None:
    """Turn autotuning on, or off. What is pinned stays."""
    global _enabled
    _enabled = on
    _changed()


def forget() -> None:
    """Unpin everything."""
    _pinned.clear()
    _changed()


def save(path: str | os.PathLike[str]) -> None:
    """Write the pinned plans to a JSON file that :func:`load` reads."""
    plans = [
        {
            "direction": key.direction, "dtype": key.dtype,
            "architecture": key.device.architecture,
            "multiprocessors": key.device.multiprocessors,
            "shape": key.shape._asdict(), "plan": choice.plan._asdict(),
            "resident": choice.resident,
        }
        for key, choice in _pinned.items()
    ]  # fmt: skip
    Path(path).write_text(json.dumps({"schema": SCHEMA, "plans": plans}, indent=1) + "\n")


def load(path: str | os.PathLike[str]) -> None:
    """Pin the plans of a file that :func:`save` wrote, beside those pinned already.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or has a plan that does not fit its shape.
    """
    try:
        record = json.loads(Path(path).read_text())
        if record["schema"] != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA!r}, got {record['schema']!r}")
        read = dict(map(_entry, record["plans"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of Triton plans: {error}") from error
    _pinned.update(read)
    _changed()


def _entry(entry: dict[str, Any]) -> tuple[Key, Choice]:
    direction = entry["direction"]
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    shape = Shape(**entry["shape"])
    device = Device(entry["architecture"], entry["multiprocessors"])
    choice = Choice(Plan(**entry["plan"]), entry["resident"])
    if not is_legal(choice, shape):
        raise ValueError(f"plan: {choice} does not fit {shape}")
    return Key(direction, shape, entry["dtype"], device), choice


def on_change(listener: Callable[[], None]) -> None:
    """Call ``listener`` whenever calls may get other plans than before."""
    _listeners.append(listener)


def _changed() -> None:
    for listener in _listeners:
        listener()


@contextmanager
def strategy(*, resident: bool) -> Iterator[None]:
    """Force one launch over images that stay on chip, or two that share them: for comparisons.
    Calls that cannot be cut so raise a RuntimeError."""
    global _resident
    before, _resident = _resident, resident
    try:
        yield
    finally:
        _resident = before


def forced() -> bool | None:
    """Whether images must stay on chip now; None where that is left to the plan."""
    return _resident


def _forced_choice(shape: Shape, itemsize: int, device: Device, forward: bool) -> Choice:
    if not _resident:
        return Choice(make_plan(shape, itemsize, device))
    plan = make_resident_plan(shape, itemsize, device, forward=forward, however_few=True)
    if plan is None:
        raise RuntimeError("strategy: no image of this call stays on chip")
    return Choice(plan, True)


def choose(
    direction: str,
    shape: Shape,
    x: Tensor,
    device: Device,
    prepare: Callable[[Choice], Callable[[], object]],
) -> Choice:
    """The plan for a call like the one at hand, which ``prepare`` makes ready to run."""
    global _file
    if _resident is not None:
        return _forced_choice(shape, x.element_size(), device, direction == "forward")
    if _file is not None:
        path, _file = _file, None
        load(path)
    key = _key(direction, shape, x, device)
    if key in _pinned or not _enabled:
        return planned(direction, shape, x, device)
    cut = shape, x.element_size(), device, direction == "forward"
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        choice = _pinned[key] = _fastest(direction, candidates(*cut), prepare)
    return choice


def instead(
    refused: Choice, error: Exception, direction: str, shape: Shape, x: Tensor, device: Device
) -> Choice | None:
    """What takes the place of a choice whose kernels do not compile or do not fit the device, from
    now on: two launches where one was chosen. None where one is forced, or two have failed."""
    if _resident is not None or not refused.resident:
        return None
    choice = Choice(make_plan(shape, x.element_size(), device))
    _pinned[_key(direction, shape, x, device)] = choice
    warnings.warn(
        f"triton_{direction}: one launch over images, which was planned for {list(x.shape)}, takes "
        f"a kernel that cannot be had; two launches take its place: {error}",
        RuntimeWarning,
        stacklevel=2,
    )
    return choice


def planned(direction: str, shape: Shape, x: Tensor, device: Device) -> Choice:
    """The plan that a call would get if nothing was timed."""
    key = _key(direction, shape, x, device)
    return _pinned.get(key) or fixed_choice(shape, x.element_size(), device, direction == "forward")


def _key(direction: str, shape: Shape, x: Tensor, device: Device) -> Key:
    return Key(direction, shape, str(x.dtype).removeprefix("torch."), device)


def _fastest(
    direction: str, choices: list[Choice], prepare: Callable[[Choice], Callable[[], object]]
) -> Choice:
    """The choice whose call takes the least time. Some may not compile or not fit the device."""
    times = {choice: _time(choice, prepare) for choice in choices}
    found = {choice: t for choice, t in times.items() if isinstance(t, float)}
    failures = [t for t in times.values() if isinstance(t, Exception)]
    if not found:
        raise failures[0]
    broken = [failure for failure in failures if isinstance(failure, CannotCompileError)]
    if broken:
        warnings.warn(
            f"triton_{direction}: {len(broken)} of {len(choices)} plans that autotuning would time "
            f"do not compile and are passed over, the first of them: {broken[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
    return min(found, key=lambda choice: found[choice])


def _time(choice: Choice, prepare: Callable[[Choice], Callable[[], object]]) -> float | Exception:
    from triton.errors import TritonError

    try:
        return milliseconds(prepare(choice))
    except (TritonError, CannotCompileError) as error:
        failure: Exception = error
        return failure


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call, second-level cache emptied before each."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))
