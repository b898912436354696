"""The options of ``python -m senet_kernels.train``, each in one place."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from senet_kernels._command_line import Parser
from senet_kernels.models import list_models

from .errors import TrainError

FREEZE = ("none", "backbone", "se")
PRECISIONS = ("fp32", "fp64", "bf16", "fp16")


def _option(default: Any, help: str, *, free: bool = False, **argparse_keywords: Any) -> Any:
    """A field and its command-line option. ``free``: does not influence the weights, and so may
    change when a run is resumed."""
    metadata = {"help": help, "free": free, "argparse": argparse_keywords}
    return dataclasses.field(default=default, metadata=metadata)


class Stage(NamedTuple):
    """A part of a run: what is frozen, for how many epochs, at which peak learning rate."""

    freeze: str
    epochs: int
    lr: float


@dataclass(frozen=True)
class Options:
    """Everything a run depends on; ``--help`` prints the meaning of each field.

    Raises:
        TrainError: a value is not legal; the message names the option.
    """

    data: str = _option(
        "digits", "'digits', or a folder with a folder of images for each class, see below",
        free=True, metavar="FOLDER",
    )  # fmt: skip
    classes: str = _option(
        "", "comma-separated names of the classes to use (all)", metavar="NAME,..."
    )
    test_fraction: float = _option(0.2, "share of each class kept for testing, if not split yet")
    image_size: int = _option(0, "training images are this many pixels wide and high (8 or 224)")
    test_size: int = _option(0, "the same for test images (as for training)", free=True)
    test_scale: float = _option(1.0, "zoom test images about their centre", free=True)
    augment: str = _option(
        "auto", "of training images: random shift, or random crop and flip (auto: as fits the "
        "data)", choices=("auto", "none", "shift", "crop"),
    )  # fmt: skip
    check: str = _option(
        "full", "what to read of each image file before training, to skip corrupt ones",
        choices=("full", "header", "none"),
    )  # fmt: skip
    workers: int = _option(
        -1, "processes that load images (none for digits, else up to 4)", free=True
    )

    model: str = _option("se_resnet20", "a name of the list below", metavar="NAME")
    model_args: str = _option(
        "", "further arguments of create_model, such as excitation=tied formula=weighted",
        nargs="*", action="extend", metavar="NAME=VALUE",
    )  # fmt: skip
    init_from: str = _option(
        "", "weights to start from: a run's folder, a checkpoint or a state dict (.pt, "
        ".safetensors)", free=True, metavar="PATH",
    )  # fmt: skip

    epochs: int = _option(30, "times through the training images")
    batch_size: int = _option(64, "images per step, all processes together")
    lr: float = _option(0.1, "peak learning rate")
    momentum: float = _option(0.9, "of SGD")
    nesterov: bool = _option(True, "Nesterov's form of momentum")
    weight_decay: float = _option(
        5e-4, "of convolution and linear weights only: biases, BatchNorm, alpha and beta get none"
    )
    schedule: str = _option("cosine", "of the learning rate", choices=("cosine", "step"))
    warmup_epochs: float = _option(1.0, "the learning rate rises linearly for this long")
    min_lr: float = _option(0.0, "where the cosine ends")
    step_epochs: float = _option(8.0, "epochs between the steps of --schedule step")
    step_factor: float = _option(0.1, "what each step multiplies the learning rate by")
    label_smoothing: float = _option(0.1, "of the cross-entropy, in training")
    clip: float = _option(0.0, "largest norm of the gradient (0: no clipping)")
    precision: str = _option(
        "fp32", "bf16 and fp16 by autocast, fp16 with a gradient scaler", choices=PRECISIONS
    )
    channels_last: bool = _option(True, "memory format (parameters too, except under FSDP)")
    seed: int = _option(0, "of initial weights, data order and augmentation")

    freeze: str = _option(
        "none", "backbone: train the classifier alone; se: keep the squeeze-and-excitation "
        "weights and biases, train the rest, alpha and beta included", choices=FREEZE,
    )  # fmt: skip
    stages: str = _option(
        "", "one after the other, such as backbone:5,se:10", metavar="FREEZE:EPOCHS[:LR],..."
    )
    freeze_bn: bool = _option(False, "freeze every BatchNorm: parameters and statistics")

    device: str = _option(
        "auto", "cpu, cuda, cuda:N (auto: cuda where there is one)", free=True, metavar="DEVICE"
    )
    parallel: str = _option(
        "auto", "how processes of torchrun share the work (auto: ddp)",
        choices=("auto", "none", "ddp", "fsdp2"),
    )  # fmt: skip
    backend: str = _option(
        "auto", "of the fused operation: auto, native, triton or reference", metavar="NAME"
    )
    deterministic: bool = _option(False, "torch.use_deterministic_algorithms")

    out: str = _option("", "folder of the run (runs/MODEL-DATA-SEED)", free=True, metavar="FOLDER")
    overwrite: bool = _option(False, "replace a run that is there", free=True)
    checkpoint_every: int = _option(0, "steps between checkpoints within an epoch", free=True)
    log_every: int = _option(10, "steps between lines of the log", free=True)
    measure_train: bool = _option(
        False, "at the end, test on the training images too, without augmentation", free=True
    )
    stop_after: int = _option(0, "end with a checkpoint after this many steps", free=True)
    tensorboard: bool = _option(True, "write TensorBoard's files too, where installed", free=True)
    progress: bool = _option(True, "show a progress bar", free=True)

    def __post_init__(self) -> None:
        self._check_numbers()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise TrainError(
                    f"{_flag(name)}: expected one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.nesterov and self.momentum == 0:
            raise TrainError("--nesterov: needs --momentum above 0 (or give --no-nesterov)")
        self.plan()
        self.model_arguments()

    def _check_numbers(self) -> None:
        for name, (lowest, highest) in _RANGES.items():
            value = getattr(self, name)
            if not lowest <= value <= highest or not math.isfinite(value):
                legal = f"at least {lowest:g}" if highest == _ANY else f"{lowest:g} to {highest:g}"
                raise TrainError(f"{_flag(name)}: expected {legal}, got {value:g}")

    @staticmethod
    def of(given: Mapping[str, Any]) -> Options:
        """The defaults, except for what is given by name; paths may be ``Path`` objects.

        Raises:
            TrainError: no such option, or a value is of the wrong type or not legal.
        """
        fields = {field.name: str(field.type) for field in dataclasses.fields(Options)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in fields:
                close = difflib.get_close_matches(name, fields, 1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise TrainError(f"there is no option {name!r}{hint}")
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            legal = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
            wanted = legal[fields[name]]
            if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
                raise TrainError(
                    f"{_flag(name)}: expected {fields[name]}, got {type(value).__name__}"
                )
            values[name] = value
        return Options(**values)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.out or f"runs/{self.model}-{Path(self.data).name}-{self.seed}")

    def plan(self) -> list[Stage]:
        """The stages of the run."""
        if not self.stages:
            return [Stage(self.freeze, self.epochs, self.lr)]
        stages = []
        for text in self.stages.split(","):
            freeze, *numbers = text.strip().split(":")
            try:
                epochs = int(numbers[0])
                lr = float(numbers[1]) if len(numbers) > 1 else self.lr
                if freeze not in FREEZE or len(numbers) > 2 or epochs < 1 or not 0 <= lr < _ANY:
                    raise ValueError
            except (ValueError, IndexError):
                raise TrainError(
                    f"--stages: expected FREEZE:EPOCHS[:LR] with FREEZE one of "
                    f"{', '.join(FREEZE)}, got {text!r}"
                ) from None
            stages.append(Stage(freeze, epochs, lr))
        return stages

    def model_arguments(self) -> dict[str, Any]:
        """``--model-args`` as keyword arguments: Python literals, anything else a string."""
        arguments: dict[str, Any] = {}
        for text in self.model_args.split():
            name, equals, value = text.partition("=")
            if not name.isidentifier() or not equals:
                raise TrainError(f"--model-args: expected NAME=VALUE, got {text!r}")
            try:
                arguments[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                arguments[name] = value
        return arguments


# Which option begins a group of --help.
_GROUPS = {
    "data": "data", "model": "network", "epochs": "recipe", "freeze": "fine-tuning",
    "device": "machine", "out": "run",
}  # fmt: skip
_ANY = float("inf")
_RANGES: dict[str, tuple[float, float]] = {
    "test_fraction": (0.01, 0.99), "image_size": (0, 2**14), "test_size": (0, 2**14),
    "test_scale": (0.01, 100), "workers": (-1, _ANY), "epochs": (1, _ANY), "batch_size": (1, _ANY),
    "lr": (0, 1e6), "momentum": (0, 1), "weight_decay": (0, _ANY), "warmup_epochs": (0, _ANY),
    "min_lr": (0, 1e6), "step_epochs": (1e-6, _ANY), "step_factor": (0, 1),
    "label_smoothing": (0, 1), "clip": (0, _ANY), "checkpoint_every": (0, _ANY),
    "log_every": (1, _ANY), "stop_after": (0, _ANY), "seed": (0, 2**63 - 1),
}  # fmt: skip
_CHOICES: dict[str, Sequence[str]] = {
    field.name: field.metadata["argparse"]["choices"]
    for field in dataclasses.fields(Options)
    if "choices" in field.metadata["argparse"]
}
FREE = frozenset(field.name for field in dataclasses.fields(Options) if field.metadata["free"])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


_EPILOG = """\
a folder of images (for --data), split already or not:
  flowers/train/rose/1.jpg  flowers/val/rose/7.jpg      flowers/rose/1.jpg

examples:
  python -m senet_kernels.train --epochs 5
  python -m senet_kernels.train --data flowers --model se_resnet50 --epochs 90 \\
      --precision bf16 --out runs/flowers
  python -m senet_kernels.train --data flowers --model se_resnet50 \\
      --init-from seresnet50.pt --stages backbone:5,se:20:0.01 --out runs/tuned
  python -m senet_kernels.train --resume runs/flowers
  python -m senet_kernels.train --evaluate --init-from runs/flowers --test-size 320
  torchrun --nproc-per-node 4 -m senet_kernels.train --parallel fsdp2 --data flowers

networks:
{models}
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was given on the command line: ``given`` (of the options), ``resume``, ``evaluate``."""
    parser = Parser(
        prog="python -m senet_kernels.train",
        usage="%(prog)s [options]",
        description="Train a network of the SENet family. Defaults are in brackets; without\n"
        "options a small network learns handwritten digits. Under torchrun the same\n"
        "command trains in parallel.",
        epilog=_EPILOG.format(models=textwrap.fill(
            ", ".join(list_models()), 78, initial_indent="  ", subsequent_indent="  "
        )),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for field in dataclasses.fields(Options):
        if field.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[field.name])
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
        if field.type == "bool":
            keywords["action"] = argparse.BooleanOptionalAction
        elif "nargs" not in field.metadata["argparse"]:
            keywords["type"] = {"int": int, "float": float, "str": str}[str(field.type)]
            if "choices" not in field.metadata["argparse"]:
                keywords["metavar"] = {"int": "N", "float": "X", "str": "TEXT"}[str(field.type)]
        group.add_argument(_flag(field.name), **{**keywords, **field.metadata["argparse"]})
    group.add_argument(
        "--resume", nargs="?", const="auto", metavar="PATH",
        help="go on with a run: its folder or checkpoint; other options need not be repeated. "
        "Without PATH: what is in --out, or a new run",
    )  # fmt: skip
    group.add_argument(
        "--evaluate", action="store_true", help="only measure --init-from on the test images"
    )
    given = vars(parser.parse_args(argv))
    resume, evaluate = given.pop("resume"), given.pop("evaluate")
    if "model_args" in given:
        given["model_args"] = " ".join(given["model_args"])
    if "stages" in given and ("freeze" in given or "epochs" in given):
        raise TrainError("--stages: gives freeze and epochs itself, without --freeze, --epochs")
    return argparse.Namespace(given=given, resume=resume, evaluate=evaluate)


def _help(field: dataclasses.Field[Any]) -> str:
    text: str = field.metadata["help"]
    if field.type == "bool":
        return f"{text} [{'yes' if field.default else 'no'}]"
    if field.default in ("", -1) or "(" in text:
        return text
    return f"{text} [{field.default}]"
