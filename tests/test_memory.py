"""Where memory runs out or is not there: an exception, and never the end of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backend_cases import SIMULATED, BackendCase, require
from problems import Spec, build
from senet_kernels import channel_scale, squeeze, squeeze_excite

NATIVE = BackendCase("native", "cpu")
# The CUDA library, whose host code runs as it is on the simulation, has the same to refuse.
each_library = pytest.mark.parametrize("backend", [NATIVE, SIMULATED], indirect=True, ids=str)


_LIMITED = """
import resource, torch
from senet_kernels import squeeze_excite
torch.set_num_threads(2)

def call(x, w1, w2):
    return squeeze_excite(x, w1, None, w2, None, gate="identity", backend="native")

def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

small = [torch.ones(1, 4, 64, 64), torch.ones(2, 4), torch.ones(4, 2)]  # starts the threads
right = call(*small)
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
# Each above 32 MiB, up to which glibc may keep what was freed and hand it out again.
MODES = {  # channels, hidden, positions: what there is no memory for
    "forward": (64, 4, 400_000),  # y
    "strided": (64, 4, 400_000),  # a copy of x
    "scratch": (16_000_000, 2, 1),  # y, or z, h and u
    "backward": (64, 4, 400_000),  # a copy of dy, dx
}
for mode, (channels, hidden, positions) in MODES.items():
    x = torch.ones(1, channels, positions, requires_grad=mode == "backward")
    if mode == "strided":
        x = torch.ones(1, channels, 2 * positions)[..., ::2]
    w1, w2 = torch.ones(hidden, channels), torch.ones(channels, hidden)
    y = call(x, w1, w2) if mode == "backward" else None
    resource.setrlimit(resource.RLIMIT_AS, (used() + (8 << 20), hard))
    for _ in range(3):
        try:
            y.sum().backward(retain_graph=True) if mode == "backward" else call(x, w1, w2)
        except RuntimeError as error:
            print(mode, "raised:", str(error).splitlines()[0])
        else:
            print(mode, "no error")
    # And it was no harm to what follows.
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert torch.equal(call(*small), right)
    assert call(x, w1, w2).isfinite().all()
print("alive")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_out_of_memory() -> None:
    require(NATIVE)
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    *said, last = done.stdout.splitlines()
    assert last == "alive"
    assert len(said) == 12
    for line in said:
        assert " raised: " in line, done.stdout
        assert "out of memory: " in line, done.stdout


_NO_MEMORY = "out of memory: "
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@pytest.mark.skipif(
    _OVERCOMMIT.exists() and _OVERCOMMIT.read_text().strip() == "1",
    reason="this system promises memory that it does not have",
)
@each_library
def test_absurd_sizes(backend: BackendCase) -> None:
    """Views of one element that claim to have petabytes: what cannot be allocated raises."""
    one = torch.ones(1)
    w1, w2 = torch.ones(1, 1), torch.ones(1, 1)
    for shape in ((1 << 30, 1, 1 << 20), (1, 1, 1 << 50), (1 << 20, 1, 1 << 20, 1 << 10)):
        x = one.expand(shape)
        with pytest.raises(RuntimeError, match=_NO_MEMORY):
            squeeze_excite(x, w1, None, w2, None, backend=backend.name)
        with pytest.raises(RuntimeError, match=_NO_MEMORY):
            channel_scale(x, one.expand(shape[:2]), backend=backend.name)
    wide = one.expand(1, 1 << 40, 1)
    weight = one.expand(1, 1 << 40)
    with pytest.raises(RuntimeError, match=_NO_MEMORY):
        squeeze_excite(wide, weight, None, weight.T, None, backend=backend.name)
    with pytest.raises(RuntimeError, match=_NO_MEMORY):
        squeeze(wide, backend=backend.name)


FREED = ("x", "w1", "b1", "w2", "b2", "residual", "alpha", "beta", "affine_scale", "affine_shift")


@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("name", [*FREED, "lengths", "dy"])
@each_library
def test_freed_storage(backend: BackendCase, name: str, keep: int) -> None:
    """What FSDP does to parameters between uses. Eager PyTorch reads address 0 there."""
    spec = Spec(residual="contiguous", weighted=True, affine=True, lengths=True, after="silu")
    problem = build(spec)
    leaves = problem.leaves()
    if name == "dy":
        y = problem.call(squeeze_excite, leaves, backend=backend.name)
        problem.dy.untyped_storage().resize_(keep)
        with pytest.raises(RuntimeError, match="dy: expected a tensor with memory"):
            y.backward(problem.dy)
        return
    freed = problem.lengths if name == "lengths" else problem.tensors[name]
    assert freed is not None
    if name == "lengths":
        # Its values are looked at before any kernel is.
        dead = torch.ones_like(freed)
        dead.untyped_storage().resize_(keep)
        code = 0
        args = [problem.tensors[n] for n in FREED]
        with pytest.raises(RuntimeError, match="lengths: expected a tensor with memory"):
            torch.ops.senet_kernels.native_forward(*args, dead, code, False)
        return
    freed.untyped_storage().resize_(keep)
    shown = {"affine_scale": r"before_affine\[0\]", "affine_shift": r"before_affine\[1\]"}
    message = f"{shown.get(name, name)}: expected a tensor with memory for all of its elements"
    with pytest.raises(RuntimeError, match=message):
        problem.call(squeeze_excite, backend=backend.name)
    with pytest.raises(RuntimeError, match=message):
        problem.call(squeeze_excite, problem.leaves(), backend=backend.name)


@each_library
def test_freed_between_forward_and_backward(backend: BackendCase) -> None:
    problem = build(Spec())
    leaves = problem.leaves()
    y = problem.call(squeeze_excite, leaves, backend=backend.name)
    w2 = problem.tensors["w2"]
    assert w2 is not None
    w2.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="w2: expected a tensor with memory"):
        y.backward(problem.dy)


@each_library
def test_raw_ops_refuse_what_backward_was_not_given(backend: BackendCase) -> None:
    """Vectors and masks of another call, or of another kind."""
    problem = build(Spec(after="relu", residual="contiguous"))
    args = [problem.tensors[n] for n in FREED]
    from senet_kernels import pack_options

    code = pack_options(after="relu")
    y, saved, mask = torch.ops.senet_kernels.native_forward(*args, None, code, True)
    backward = torch.ops.senet_kernels.native_backward
    needs = 1
    backward(problem.dy, *args, None, saved, mask, code, needs)
    bad = {
        "saved": (saved[:-1], saved.double(), saved.repeat_interleave(2)[::2], saved.to("meta")),
        "mask": (mask[:-1], mask.int(), mask.repeat_interleave(2)[::2], mask.to("meta")),
    }
    for wrong in bad["saved"]:
        with pytest.raises((RuntimeError, NotImplementedError), match=r"saved|meta"):
            backward(problem.dy, *args, None, wrong, mask, code, needs)
    for wrong in bad["mask"]:
        with pytest.raises((RuntimeError, NotImplementedError), match=r"mask|meta"):
            backward(problem.dy, *args, None, saved, wrong, code, needs)
    for code in (-1, 1 << 16, 0xFFFF, 1 << 40):
        with pytest.raises(RuntimeError, match="options"):
            torch.ops.senet_kernels.native_forward(*args, None, code, True)
