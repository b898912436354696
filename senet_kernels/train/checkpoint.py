"""Checkpoints: whole or not there at all, and enough to go on bit for bit.

A file holds tensors and plain values, so that ``torch.load(..., weights_only=True)`` reads it. It
is one file whatever the number of processes: ``weights`` and ``optimizer`` are those of the whole
model, by parameter name; ``ranks`` has what each process has for itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from .errors import TrainError
from .network import read
from .options import FREE, Options

FORMAT = 1
LAST = "last.pt"
BEST = "best.pt"


@dataclass
class Progress:
    """Where a run is: before step ``step`` of epoch ``epoch`` of stage ``stage``."""

    stage: int = 0
    epoch: int = 0  # within the stage
    step: int = 0  # within the epoch
    epochs: int = 0  # finished, of all stages
    steps: int = 0  # of all stages
    seconds: float = 0.0  # of training and testing so far, all sessions together
    best_accuracy: float = -1.0


def whole_weights(model: nn.Module, *, everywhere: bool = False) -> dict[str, Tensor]:
    """The whole model's state dict, names without DDP's prefix: on every process, or on the CPU
    of the first."""
    weights: dict[str, Any] = get_model_state_dict(model, options=_whole(everywhere))
    return weights


def whole_momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state by parameter name, on the CPU of the first process."""
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_whole(False))
    return state


def _whole(everywhere: bool) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)


def load_momentum(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Undo :func:`whole_momentum`, also into another number of shards."""
    set_optimizer_state_dict(
        model, optimizer, state, options=StateDictOptions(full_state_dict=True)
    )


def own_state(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """What a process has for itself: random numbers and, within an epoch, BatchNorm statistics."""
    buffers = {name: value.cpu() for name, value in _buffers(model)}
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"rng": torch.get_rng_state(), "cuda_rng": cuda, "buffers": buffers}


def load_own_state(model: nn.Module, device: torch.device, state: dict[str, Any]) -> None:
    """Undo :func:`own_state`."""
    with torch.no_grad():
        for name, value in _buffers(model):
            value.copy_(state["buffers"][name])
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def _buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name.removeprefix("module."), value) for name, value in model.named_buffers()]


def save(path: Path, content: dict[str, Any]) -> None:
    """Write the file so that there is always a whole one, the old or the new.

    Raises:
        TrainError: it cannot be written (the old one is still there).
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise TrainError(f"{path}: the checkpoint cannot be written: {error}") from error


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and needs not be
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def content(
    options: Options,
    config: dict[str, Any],
    classes: list[str],
    fingerprint: str,
    world: int,
    progress: Progress,
) -> dict[str, Any]:
    """Whose checkpoint it is; the weights and the rest are added."""
    return {
        "format": FORMAT,
        "model": config,
        "classes": classes,
        "data": fingerprint,
        "world": world,
        "options": asdict(options),
        "progress": asdict(progress),
    }


def find(resume: str, given: Mapping[str, Any]) -> str | None:
    """The checkpoint that ``--resume`` names: a file, a run's folder, or (``auto``) what is in
    the folder that a run with the options ``given`` has; None where ``auto`` finds none.

    Raises:
        TrainError: there is none.
    """
    if resume == "auto":
        path = Options.of(given).folder / LAST
        return str(path) if path.is_file() else None
    path = Path(resume)
    path = path / LAST if path.is_dir() else path
    if not path.is_file():
        raise TrainError(f"--resume: no checkpoint {path}")
    return str(path)


def resumed(path: str, given: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """The checkpoint's content, and its options with those given that do not change the course.

    Raises:
        TrainError: it is not this recipe's, or an option asks for another model or course.
    """
    state = read(path)
    if state.get("format") != FORMAT or "options" not in state or "ranks" not in state:
        raise TrainError(f"{path}: not a checkpoint to resume (weights alone: --init-from)")
    stored = state["options"]
    changed = {n: v for n, v in given.items() if n not in FREE and v != stored.get(n)}
    models = {"model", "model_args"} & changed.keys()
    what = "of another model" if models else "of a run with other options"
    if changed:
        listed = "; ".join(
            f"--{name.replace('_', '-')} {stored.get(name)!r}, not {value!r}"
            for name, value in changed.items()
        )
        raise TrainError(
            f"--resume: {path} is {what}: {listed}. A new run can start from its weights: "
            f"--init-from {path}"
        )
    # What was said of the earlier session alone.
    session = {"out": str(Path(path).parent), "overwrite": False, "stop_after": 0}
    return state, Options.of({**stored, **session, **given})


def dtype(state: dict[str, Any]) -> torch.dtype:
    """Of the weights."""
    tensors: list[Tensor] = list(state["weights"].values())
    return next(t.dtype for t in tensors if t.is_floating_point())


def check_same(
    state: dict[str, Any], config: dict[str, Any], fingerprint: str, world: int, path: str
) -> None:
    """Refuse to resume with another model, other images or another number of processes."""
    if state["model"] != config:
        raise TrainError(f"--resume: {path} is of another model: {state['model']}, not {config}")
    if state["data"] != fingerprint:
        raise TrainError(f"--resume: {path} was trained on other images than --data has now")
    if state["world"] != world:
        raise TrainError(
            f"--resume: {path} is of {state['world']} processes, not {world}: their BatchNorm "
            f"statistics differ. A new run can start from its weights: --init-from {path}"
        )
