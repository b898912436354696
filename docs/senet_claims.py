"""The figures of docs/senet.md, each by a command: ``python docs/senet_claims.py size`` and so on.

``accuracy``, ``scale`` and ``gate`` train networks on scikit-learn's digits with
``senet_kernels.train`` (``pip install 'senet-kernels[train]'``); finished runs stay in
``build/senet`` and are not repeated. The page's figures are those of one thread: with another
number of threads sums are added in another order, and training goes another way.

With ``--record`` the figures go into docs/senet_claims.json, from which ``python -m
benchmarks.readme`` makes the page's tables; only the commands as the page has them are recorded.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from senet_kernels import FusedSEBlock, use_backend
from senet_kernels.flops import multiply_adds
from senet_kernels.models import create_model
from senet_kernels.train.api import evaluate

RUNS = Path("build/senet")
ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "senet_claims.json"
Rows = list[Any]

#: The paper's table 2 (re-implementation): GFLOPs, which are multiply-adds, plain and with SE. It
#: gives none of SENet-154.
PAPER = {
    "resnet50": (3.86, 3.87), "resnet101": (7.58, 7.60), "resnet152": (11.30, 11.32),
    "resnext50_32x4d": (4.24, 4.25), "resnext101_32x4d": (7.99, 8.00),
}  # fmt: skip


def _parameters(name: str, **options: Any) -> float:
    with torch.device("meta"):
        model = create_model(name, **options)
    return sum(p.numel() for p in model.parameters()) / 1e6


def _gmac(name: str, **options: Any) -> float:
    with torch.device("meta"):
        model = create_model(name, **options)
    return multiply_adds(model, (1, 3, 224, 224)) / 1e9


def size() -> dict[str, Rows]:
    """Parameters and multiply-adds at 224 pixels, beside the paper's."""
    rows: Rows = []
    forms: Rows = []
    print("| network | GMAC paper | GMAC here | with SE, paper | with SE, here | M parameters "
          "| with SE |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for name, (plain, with_se) in PAPER.items():
        options = {"stride_in_1x1": True} if name.startswith("resnet") else {}
        counted = [_gmac(n, **options) for n in (name, f"se_{name}")]
        millions = [_parameters(n, **options) for n in (name, f"se_{name}")]
        rows.append([name, plain, counted[0], with_se, counted[1], *millions])
        print(f"| {name} | {plain:.2f} | {counted[0]:.3f} | {with_se:.2f} | {counted[1]:.3f} "
              f"| {millions[0]:.2f} | {millions[1]:.2f} |")  # fmt: skip
    name, without = "senet154", "resnext152_64x4d"
    counted = [_gmac(without), _gmac(name)]
    millions = [_parameters(without), _parameters(name)]
    rows.append([name, None, counted[0], None, counted[1], *millions])
    print(f"| {name} | | {counted[0]:.3f} | | {counted[1]:.3f} "
          f"| {millions[0]:.2f} | {millions[1]:.2f} |")  # fmt: skip
    for form in ("two", "single", "tied"):
        options = {"excitation": form, "stride_in_1x1": True}
        found = [_parameters("se_resnet50", **options), _gmac("se_resnet50", **options)]
        forms.append([form, *found])
        print(f"se_resnet50 excitation={form}: {found[0]:.2f} M, {found[1]:.4f} GMAC")
    return {"rows": rows, "forms": forms}


@contextmanager
def _kept() -> Iterator[dict[int, int]]:
    """Bytes of the tensors autograd keeps for backward, by their storages."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield storages


def _training_bytes(name: str, backend: str, size: int, batch: int) -> tuple[float, float]:
    """MB kept for backward besides the parameters, and MB of parameters."""
    model = create_model(name)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    x = torch.randn(batch, 3, size, size)
    with use_backend(backend), _kept() as storages:
        loss = model(x).sum()
    kept = sum(n for pointer, n in storages.items() if pointer not in own)
    del loss
    return kept / 1e6, sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def memory() -> dict[str, Rows]:
    """What training keeps for backward, per image of 224 pixels, float32."""
    rows: Rows = []
    for name, backend in (
        ("resnet50", "reference"), ("se_resnet50", "reference"), ("se_resnet50", "native")
    ):  # fmt: skip
        kept, parameters = _training_bytes(name, backend, 224, 2)
        rows.append([name, backend, kept / 2, parameters])
        print(f"{name} ({backend}): {kept / 2:.1f} MB an image, {parameters:.1f} MB of parameters")
    return {"rows": rows}


def _median(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds, medians of interleaved rounds."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:  # the first warms up
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in taken.items()}


def step_time(rounds: int = 5, batch: int = 4) -> dict[str, Rows]:
    """Time of a training step and of inference, ResNet-50 at 224 pixels."""
    x = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    labels = torch.arange(batch)

    def calls(name: str, backend: str) -> dict[str, Callable[[], None]]:
        model = create_model(name).to(memory_format=torch.channels_last)

        def train() -> None:
            model.train()
            with use_backend(backend):
                F.cross_entropy(model(x), labels).backward()
            model.zero_grad()

        def infer() -> None:
            model.eval()
            with use_backend(backend), torch.no_grad():
                model(x)

        return {f"step {name} {backend}": train, f"inference {name} {backend}": infer}

    every = calls("resnet50", "reference")
    every |= calls("se_resnet50", "reference") | calls("se_resnet50", "native")
    print(f"batch {batch}, float32, channels-last, {torch.get_num_threads()} threads")
    taken = _median(every, rounds)
    for name, seconds in taken.items():
        print(f"{name}: {seconds * 1e3:.0f} ms")
    milliseconds = {name: seconds * 1e3 for name, seconds in taken.items()}
    networks = (("resnet50", "reference"), ("se_resnet50", "reference"), ("se_resnet50", "native"))
    rows: Rows = []
    for network in networks:
        name = " ".join(network)
        rows.append([*network, milliseconds[f"step {name}"], milliseconds[f"inference {name}"]])
    return {"rows": rows}


#: Name -> model and arguments of create_model.
FORMS = {
    "plain": ("resnet20", ""),
    "two": ("se_resnet20", ""),
    "tied": ("se_resnet20", "excitation=tied"),
    "single": ("se_resnet20", "excitation=single"),
    "article": ("se_resnet20", "excitation=tied formula=weighted"),
    "weighted": ("se_resnet20", "formula=weighted"),
    "literal": ("se_resnet20", "formula=literal"),
    "plain8": ("resnet8", ""),
    "two8": ("se_resnet8", ""),
}


def _folder(form: str, seed: int, fraction: float) -> Path:
    return RUNS / f"{form}-{fraction}-{seed}-threads{torch.get_num_threads()}"


def _epochs(fraction: float) -> int:
    """30 of 1438 training images; twice as many of few."""
    return 30 if fraction <= 0.5 else 60


def _train(*arguments: object) -> None:
    command = [sys.executable, "-m", "senet_kernels.train", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _run(form: str, seed: int, fraction: float) -> dict[str, Any]:
    """The summary of a training run, which is made if it is not there."""
    folder = _folder(form, seed, fraction)
    if not (folder / "summary.json").exists():
        model, arguments = FORMS[form]
        _train("--model", model, "--seed", seed, "--test-fraction", fraction,
               "--epochs", _epochs(fraction), "--out", folder,
               "--overwrite", "--measure-train", "--no-progress",
               *(["--model-args", *arguments.split()] if arguments else []))  # fmt: skip
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _three(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def accuracy(forms: list[str], seeds: int, fraction: float) -> dict[str, Rows]:
    """Test accuracy, and how far training accuracy is above it, in per cent over seeds."""
    rows: Rows = []
    print(f"test fraction {fraction}, {seeds} seeds, {torch.get_num_threads()} threads: "
          "median (lowest to highest)")  # fmt: skip
    print("| form | test | train minus test | train loss | test loss | parameters |")
    print("|---|---|---|---|---|---|")
    for form in forms:
        found = [_run(form, seed, fraction) for seed in range(seeds)]
        test = [100 * s["test_accuracy"] for s in found]
        gap = [100 * (s["train_accuracy"] - s["test_accuracy"]) for s in found]
        losses = [statistics.median(s[f"{part}_loss"] for s in found) for part in ("train", "test")]
        rows.append([form, _three(test), _three(gap), *losses, found[0]["parameters"]])
        print(f"| {form} | {_spread(test)} | {_spread(gap)} | {losses[0]:.4f} | {losses[1]:.4f} "
              f"| {found[0]['parameters']:,} |", flush=True)  # fmt: skip
    return {"rows": rows}


def _evaluate(folder: Path, **options: float) -> float:
    with redirect_stdout(None):  # it prints what it returns
        found = evaluate({"init_from": str(folder), **options})
    return 100 * float(found["test_accuracy"])


def scale(forms: list[str], seeds: int) -> dict[str, Rows]:
    """Test accuracy where the digit is zoomed on the same canvas, and where images are larger."""
    options: list[tuple[str, float]] = [("scale", s) for s in (0.75, 0.9, 1.0, 1.1, 1.25)]
    options += [("size", n) for n in (7, 9, 10, 12)]
    rows: Rows = []
    columns = [f"{name} {value}" for name, value in options]
    print("| form | " + " | ".join(columns) + " |")
    print("|---" * (len(options) + 1) + "|")
    for form in forms:
        cells, figures = [], []
        for name, value in options:
            values = []
            for seed in range(seeds):
                _run(form, seed, 0.2)
                values.append(_evaluate(_folder(form, seed, 0.2), **{f"test_{name}": value}))
            cells.append(_spread(values))
            figures.append(_three(values))
        rows.append([form, *figures])
        print(f"| {form} | {' | '.join(cells)} |", flush=True)
    return {"rows": rows, "columns": columns}


def _gates(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """The gate of every channel of every block, [B, C] each."""
    found = []

    def keep(block: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        z = args[0].mean((2, 3), keepdim=True)
        found.append(torch.sigmoid(block.fc2(F.relu(block.fc1(z)))).flatten(1))

    handles = [
        module.register_forward_hook(keep)
        for module in model.modules()
        if isinstance(module, FusedSEBlock)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def gate() -> dict[str, Rows]:
    """What the gate sees: a block with its positions permuted; then the gates of a trained model
    over test images."""
    said: Rows = []

    def say(line: str) -> None:
        said.append(line)
        print(line)

    torch.manual_seed(0)
    block = FusedSEBlock(64, 16).double()
    x = torch.randn(4, 64, 14, 14, dtype=torch.float64)
    order = torch.randperm(196)

    def permute(t: Tensor) -> Tensor:
        return t.flatten(2)[:, :, order].reshape(t.shape)

    off = (block(permute(x)) - permute(block(x))).abs().max()
    say(f"positions permuted before the block or after it: outputs differ by {off:.1e}")
    gates = (block(x) / x).flatten(2)
    say(f"a channel's gate over the 196 positions of an image: differs by "
        f"{(gates.amax(2) - gates.amin(2)).max():.1e}")  # fmt: skip

    from sklearn.datasets import load_digits

    _run("two", 0, 0.2)
    saved = torch.load(_folder("two", 0, 0.2) / "last.pt", weights_only=True)
    model = create_model("se_resnet20", 10, 1).eval()
    model.load_state_dict(saved["weights"])
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits.target)
    say("trained se_resnet20, test and training digits: mean of the gates; their standard")
    say("deviations between channels, between digits' means, among images of one digit")
    for i, g in enumerate(_gates(model, images)):
        means = torch.stack([g[labels == digit].mean(0) for digit in range(10)])
        within = torch.stack([g[labels == digit].std(0) for digit in range(10)]).mean()
        say(f"block {i + 1}: mean {g.mean():.2f}, channels {g.mean(0).std():.3f}, "
            f"digits {means.std(0).mean():.3f}, within a digit {within:.3f}")  # fmt: skip
    return {"rows": said}


def _keep(figures: dict[str, Rows]) -> None:
    """Put the figures of this command into the record, under the run that has the command.

    Raises:
        SystemExit: the page has no such command, or one with another number of threads.
    """
    sys.path.append(str(ROOT))  # the benchmarks know machines by name
    from benchmarks import environment, processors

    words = [word for word in sys.argv[1:] if word != "--record"]
    command = f"python docs/senet_claims.py {' '.join(words)}"
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    runs = [run for run in record["runs"].values() if run["command"].endswith(command)]
    if not runs:
        sys.exit(f"not recorded: the page has no `{command}`")
    env = environment.stamp(torch.device("cpu"))
    if runs[0]["command"].startswith("OMP_NUM_THREADS=1 ") and env["threads"] != 1:
        sys.exit(f"not recorded: the page's run is `{runs[0]['command']}`")
    threads = f"{env['threads']} thread{'s' * (env['threads'] != 1)}"
    machine = f"{processors.name(env)}, {threads}, torch {env['torch']}"
    status = ["git", "status", "--porcelain", "--", "csrc", "senet_kernels", __file__]
    changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True).stdout
    commit = f"{str(env['commit'])[:10]}{' and changes' * bool(changed)}"
    stamp = {"date": str(env["date"])[:10], "machine": machine, "commit": commit, "note": ["", ""]}
    runs[0].update({**stamp, **figures})
    RECORD.write_text(dumps(record), encoding="utf-8")


def dumps(record: dict[str, Any]) -> str:
    """As JSON, a list of figures on one line."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    flat = re.sub(r"\[\n[^\[\]{}]*\]", lambda m: re.sub(r"\n\s*", " ", m[0]), text)
    return flat.replace("[ ", "[").replace(" ]", "]") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(dest="what", required=True)
    for command in (size, memory, step_time, gate):
        what.add_parser(command.__name__.replace("_", "-"), help=command.__doc__)
    trained = what.add_parser("accuracy", help=accuracy.__doc__)
    trained.add_argument("--fraction", type=float, default=0.2, help="of the images, for testing")
    for sub in (trained, what.add_parser("scale", help=scale.__doc__)):
        sub.add_argument("--forms", nargs="+", default=["plain", "two"], choices=FORMS)
        sub.add_argument("--seeds", type=int, default=5)
    for sub in what.choices.values():
        sub.add_argument("--record", action="store_true", help=f"into {RECORD.name}, too")
    given = parser.parse_args()
    if given.what == "accuracy":
        figures = accuracy(given.forms, given.seeds, given.fraction)
    elif given.what == "scale":
        figures = scale(given.forms, given.seeds)
    else:
        plain = {"size": size, "memory": memory, "step-time": step_time, "gate": gate}
        figures = plain[given.what]()
    if given.record:
        _keep(figures)


if __name__ == "__main__":
    main()
