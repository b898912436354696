"""``python -m senet_kernels``: the report, the self-test, and the trial of a model; and how every
command line of the project ends."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import senet_kernels.__main__
from senet_kernels import __version__, backends, converted, parity, selftest, use_backend
from senet_kernels.__main__ import main
from senet_kernels.pointwise import POINTWISE
from training import needs_images


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert f"senet_kernels {__version__}" in out
    assert f"torch {torch.__version__}" in out
    assert "reference: available" in out


def test_selftest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest"]) == 0
    assert "reference on cpu, float32" in capsys.readouterr().out


def test_selftest_can_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sigmoid = POINTWISE["sigmoid"]

    def broken(x: Tensor) -> Tensor:
        return torch.sigmoid(x) * (1 if x.dtype == torch.float64 else 1.2)

    monkeypatch.setitem(POINTWISE, "sigmoid", sigmoid._replace(fn=broken))
    results = {r.dtype: r.ok for r in selftest.run() if r.backend == "reference"}
    assert results == {d: d == torch.float64 for d in results}
    assert main(["selftest"]) == 1
    assert "FAILED  reference on cpu, float32: error" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (("--batch", "0"), "expected a positive integer, got '0'"),
    (("--size", "big"), "expected a positive integer, got 'big'"),
    (("--seconds", "-1"), "expected a number of seconds, got '-1'"),
    (("--device", "abacus"), "expected cpu, cuda or cuda:N, got 'abacus'"),
    (("--device", "meta"), "expected cpu, cuda or cuda:N, got 'meta'"),
    (("--device", "cpu:x"), "'cpu:x' cannot be used"),
    (("--device", "cuda:99"), "'cuda:99' cannot be used"),
], ids=str)  # fmt: skip
def test_wrong_arguments(
    arguments: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fuse", "timm:resnet18", *arguments])
    assert message in capsys.readouterr().err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(senet_kernels.__main__, "selftest", interrupted)
    try:
        assert main(["selftest"]) == 130
    except KeyboardInterrupt:  # would end pytest
        pytest.fail("a traceback")
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("words", [
    ("senet_kernels",), ("benchmarks", "report", "--help"),
    # It trains for seconds before.
    pytest.param(("senet_kernels.train", "--model", "se_resnet8"),
                 marks=[needs_images, pytest.mark.slow]),
], ids=lambda words: words[0])  # fmt: skip
def test_an_output_closed_early(words: tuple[str, ...], tmp_path: Path) -> None:
    """As by ``| head -1`` that has what it wants."""
    reading, writing = os.pipe()
    os.close(reading)
    # Buffered, as without a terminal: argparse would pass over the error of its own print.
    env = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "PYTHONUNBUFFERED": ""}
    with open(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", *words], stdout=closed, stderr=subprocess.PIPE, cwd=tmp_path,
            env=os.environ | env, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


_ENDS = """
import os, sys
from senet_kernels._command_line import command

@command
def main(argv):
    {body}

sys.exit(main([]))
"""
_OTHER_PIPE = "ends = os.pipe(); os.close(ends[0]); os.write(ends[1], b'x')"


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize(("body", "unbuffered", "closed", "code"), [
    ("print('x' * 100_000)", "", True, 141),
    ("print('x')", "1", True, 141),
    (_OTHER_PIPE, "1", False, 1),
    (f"print('x'); {_OTHER_PIPE}", "", False, 1),
], ids=["long", "unbuffered", "another, unbuffered", "another"])  # fmt: skip
def test_only_a_closed_output_ends_in_silence(
    body: str, unbuffered: str, closed: bool, code: int
) -> None:
    reading, writing = os.pipe()
    if closed:
        os.close(reading)
    env = {
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "PYTHONUNBUFFERED": unbuffered,
    }
    with open(writing, "w") as output:
        done = subprocess.run(
            [sys.executable, "-c", _ENDS.format(body=body)], stdout=output, stderr=subprocess.PIPE,
            env=os.environ | env, text=True, check=False, timeout=120,
        )  # fmt: skip
    if not closed:
        os.close(reading)
    assert done.returncode == code
    assert ("BrokenPipeError" in done.stderr) == (code == 1)


def test_the_difference_of_outputs() -> None:
    nan, inf = math.nan, math.inf
    before = torch.tensor([nan, inf, -4.0, 0.0])
    for change, difference in (
        ([nan, inf, -4.0, 0.0], 0), ([nan, inf, -3.0, 0.0], 0.25), ([nan, inf, -4.0, inf], inf),
        ([nan, -inf, -4.0, 0.0], inf), ([nan, inf, nan, 0.0], nan), ([0.0, inf, -4.0, 0.0], nan),
    ):  # fmt: skip
        found = parity.difference(before, torch.tensor(change))
        assert found == pytest.approx(difference, nan_ok=True)
    assert parity.difference(torch.zeros(2, dtype=torch.half), before[3:]) == inf
    assert parity.difference(*torch.zeros(2, 3, dtype=torch.half)) == 0


_MODEL = """
from torch import nn
from senet_kernels import FusedSEBlock

class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)  # it is for images, and captured for nothing else
        self.fc1, self.act, self.fc2 = nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)

    def forward(self, x):
        u = self.fc2(self.act(self.fc1(self.pool(x).flatten(1))))
        return x * u.sigmoid()[:, :, None, None]

def with_se():
    return nn.Sequential(nn.Conv2d(5, 8, 3), Gate(), nn.Flatten(), nn.LazyLinear(3))

def with_act():
    return nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU(), Gate())

def hidden():  # by its last norm, as timm's and torchvision's ResNets start
    model = nn.Sequential(nn.Conv2d(5, 8, 3), Gate(), nn.BatchNorm2d(8))
    nn.init.zeros_(model[2].weight)
    return model

def pooled():  # its norm has a variance of one position over several images only
    return nn.Sequential(nn.Conv2d(5, 8, 3), Gate(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))

def without():
    return nn.Conv2d(3, 8, 3)

def number():
    return 3

def needs(argument):
    return without()

def fails():
    return {}["key"]

def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 3))
"""


def test_fuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_models.py").write_text(_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--size", "12", "--batch", "2", "--seconds", "0"]
    assert main(["fuse", "my_models:with_se", *options]) == 0
    out = capsys.readouterr().out
    assert "1 SE block fused\n" in out
    assert "my_models.Gate" in out
    assert "output: largest difference" in out
    assert ("runs on: native" if backends()["native"] else "not on native: ") in out
    assert "training step:" in out
    with use_backend("reference"):
        assert main(["fuse", "my_models:with_se", *options]) == 0
    assert "runs on: reference" in capsys.readouterr().out
    assert main(["fuse", "my_models:with_act", *options, "--neighbours"]) == 0
    assert "neighbours: before relu" in capsys.readouterr().out
    assert main(["fuse", "my_models:pooled", *options]) == 0
    assert "training step: does not run" not in capsys.readouterr().out
    assert main(["fuse", "my_models:pooled", *options, "--batch", "1"]) == 0
    assert "training step: does not run: ValueError" in capsys.readouterr().out
    assert main(["fuse", "my_models:without", *options]) == 1
    capsys.readouterr()
    # A block that is off by a hundredth shows, whatever stands behind it.
    excite = converted._excite
    for factor, shown in ((1.01, "1.0e-02"), (math.nan, "nan")):
        monkeypatch.setattr(converted, "_excite", lambda *a, f=factor, **k: f * excite(*a, **k))
        assert main(["fuse", "my_models:hidden", *options]) == 1
        out = capsys.readouterr().out
        assert f"output: largest difference {shown}" in out
        assert "WRONG: expected a difference of at most 1.0e-03" in out
        assert "inference" not in out
    with pytest.raises(SystemExit, match=r"does not run on .*, 10000000"):
        main(["fuse", "my_models:with_se", "--size", "10000000"])
    for wrong in (
        "seresnet50", "no_such_module:x",
        *(f"my_models:{name}" for name in ("nothing", "number", "needs", "fails", "fixed")),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match="model: "):
            main(["fuse", wrong, *options])
