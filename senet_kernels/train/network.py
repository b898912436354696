"""Builds the network and gives it weights."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from senet_kernels._libraries import Unusable, load
from senet_kernels.models import ResNet, create_model, from_legacy

from .data import Data
from .errors import TrainError
from .freeze import freeze
from .options import Options


def check(options: Options) -> None:
    """Find out what can be wrong without the images, which may take long to read.

    Raises:
        TrainError: no such model or file of weights, or nothing of what is to be frozen.
    """
    if options.init_from and not os.path.exists(options.init_from):
        raise TrainError(f"--init-from: there is no {options.init_from}")
    classes = options.model_arguments().get("num_classes", 2)
    with torch.device("meta"):
        model = _create(options, classes, 3)
    for stage in options.plan():
        freeze(model, stage.freeze)


def build(options: Options, data: Data) -> ResNet:
    """The model that the options name, for these data.

    Raises:
        TrainError: there is none; the message is create_model's.
    """
    return _create(options, len(data.classes), data.channels)


def _create(options: Options, classes: int, channels: int) -> ResNet:
    arguments = {"in_chans": channels, **options.model_arguments()}
    if arguments.setdefault("num_classes", classes) != classes:
        raise TrainError(
            f"--model-args: num_classes={arguments['num_classes']}, but the data have {classes}"
        )
    if arguments["in_chans"] not in (1, 3):
        raise TrainError(
            f"--model-args: expected in_chans 1 (grey) or 3, got {arguments['in_chans']!r}"
        )
    try:
        return create_model(options.model, **arguments)
    except (ValueError, TypeError) as error:
        raise TrainError(f"--model, --model-args: {error}") from None


def read(path: str) -> dict[str, Any]:
    """A checkpoint (of a run's folder: its last) or state dict: tensors and plain values only, no
    code is run.

    Raises:
        TrainError: it cannot be read.
    """
    path = os.path.join(path, "last.pt") if os.path.isdir(path) else path
    if path.endswith(".safetensors"):
        try:
            safetensors = load("safetensors.torch", "load_file")
        except Unusable as reason:
            raise TrainError(f"{path}: safetensors is needed: {reason}") from None
    try:
        if path.endswith(".safetensors"):
            return dict(safetensors.load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever loaders make of a broken or foreign file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # torch's advice is to allow code to be run.
        why = f"{type(error).__name__}: {lines[0]}"
        if "weights_only" in lines[0]:
            why = "not tensors and plain values alone"
        raise TrainError(f"{path}: not a readable checkpoint: {why}") from None
    if not isinstance(content, dict):
        raise TrainError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def initialise(model: ResNet, path: str) -> list[str]:
    """Load weights (``--init-from``): a checkpoint of this recipe, or any state dict with the
    names of ours, timm's or torchvision's.

    A classifier of another size keeps its fresh weights, as do alpha and beta where the file has
    none: they start as plain squeeze-and-excitation.

    Returns:
        What was not taken from the file, to be told to the user.

    Raises:
        TrainError: the file's weights are another model's.
    """
    content = read(path)
    _check_geometry(content.get("model"), model, path)
    weights = _state_dict(content, path)
    own = model.state_dict()
    head = _classifier_prefix(model)
    ours = {key: next(iter(from_legacy({key: 0}))) for key in weights}
    notes: list[str] = []
    theirs = {n: weights[k].shape for k, n in ours.items() if n.startswith(head)}
    shape = theirs.get(f"{head}weight")  # a broken file may lack it, or have a number there
    if shape and theirs != {n: t.shape for n, t in own.items() if n.startswith(head)}:
        old, new = shape[0], own[f"{head}weight"].shape[0]
        notes.append(f"classifier replaced: {old} classes in {path}, {new} in the data")
        weights = {k: t for k, t in weights.items() if not ours[k].startswith(head)}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # sizes, or a legacy network that differs
        raise TrainError(f"--init-from {path}: not this model's weights: {error}") from None
    fresh = [name for name in missing if name.rpartition(".")[2] in ("alpha", "beta")]
    if fresh:
        notes.append(f"{len(fresh)} alpha and beta are not in {path}: left as they start")
    lacking = [n for n in missing if n not in fresh and not (notes and n.startswith(head))]
    if lacking or unexpected:
        problems = [f"lacks {n}" for n in lacking] + [f"has unknown {n}" for n in unexpected]
        shown = "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else "")
        raise TrainError(
            f"--init-from {path}: not this model's weights ({len(problems)} differences): {shown}"
        )
    return notes


def _check_geometry(config: Any, model: ResNet, path: str) -> None:
    """Refuse a checkpoint of this recipe whose network strides or pools elsewhere: its weights
    would fit, and be wrong. A state dict alone does not show it."""
    for name in ("stride_in_1x1", "pool"):
        if isinstance(config, dict) and name in config and config[name] != model.config[name]:
            raise TrainError(
                f"--init-from {path}: the weights are of a network with {name}={config[name]}, not "
                f"{model.config[name]}: they would fit and be wrong; give --model-args "
                f"{name}={config[name]}"
            )


def _state_dict(content: dict[str, Any], path: str) -> dict[str, Tensor]:
    """The tensors by name: of this recipe, or as others wrap them."""
    for key in ("weights", "state_dict", "model"):
        inner = content.get(key)
        if isinstance(inner, dict) and any(isinstance(v, Tensor) for v in inner.values()):
            content = inner
            break
    weights = {_bare(str(name)): t for name, t in content.items() if isinstance(t, Tensor)}
    if not weights:
        raise TrainError(f"--init-from {path}: no weights in it")
    return weights


def _bare(name: str) -> str:
    """Without what DDP and torch.compile put before it, in whatever order."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


_WRAPPERS = ("module.", "_orig_mod.")


def _classifier_prefix(model: ResNet) -> str:
    """How the names of the classifier's parameters begin."""
    classifier = model.get_classifier()
    names = [name for name, module in model.named_modules() if module is classifier]
    return f"{names[0]}."
