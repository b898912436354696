"""What a proof tries a kernel on, and what it notices: the C++ kernels on the CPU, spoiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from senet_kernels.backends import native
from senet_kernels.features import Call
from senet_kernels.pointwise import Options, pack
from senet_kernels.trust import kinds, proof, variations
from senet_kernels.trust.bands import Allocations
from senet_kernels.trust.problem import Problem, Results, batch_for, exact_products

pytestmark = pytest.mark.skipif(native.UNAVAILABLE is not None, reason="no compiled library")


def _kind(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (2, 16, 6, 5),
    hidden: int = 4,
    strided: bool = False,
    weighted: bool = False,
    options: Options = Options("relu", "sigmoid", "identity", "relu"),  # noqa: B008
) -> kinds.Kind:
    """A training step of the C++ kernels, with a residual and a ReLU after it."""
    call = Call(
        "cpu", dtype, dtype, options, "two layers", False, weighted, False, False, True, False
    )
    x = torch.empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    x = x if strided else x.contiguous()
    channels = shape[1]
    w1, w2 = x.new_empty(hidden, channels), x.new_empty(channels, hidden)
    return kinds.kind_of("native", call, x, w1, w2, channels, kinds.TRAINING)


def _spoil(
    monkeypatch: pytest.MonkeyPatch, do: Callable[[Problem, dict[str, Tensor]], Any]
) -> None:
    """Let the kernels of a problem do something more."""
    kernel = Problem._kernel

    def spoiled(self: Problem, x: Tensor | None, **watched: bool) -> Results:
        results = kernel(self, x, **watched)
        do(self, results.values)
        return results

    monkeypatch.setattr(Problem, "_kernel", spoiled)


def test_where_eager_overflows_it_is_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = _kind(torch.float16, (64, 64, 28, 28))
    assert proof.correct(kind) is None
    for name in ("d w1", "d b1", "d w2"):
        with monkeypatch.context() as patch:
            _spoil(patch, lambda problem, values, name=name: values[name].zero_())  # type: ignore[misc]
            wrong = proof.correct(kind)
            assert wrong is not None
            assert wrong.text.startswith(name)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_no_hidden_unit_is_off_in_all_images(batch: int) -> None:
    tensors = Problem(_kind(shape=(batch, 16, 6, 5), hidden=64), batch).tensors
    x, w1, b1 = (tensors[name] for name in ("x", "w1", "b1"))
    assert x is not None
    assert w1 is not None
    on = torch.nn.functional.linear(x.mean((2, 3)), w1, b1) > 0
    assert on.any(0).all()
    assert batch == 1 or not on.all(0).any()


@pytest.mark.parametrize(("off", "refused"), [(0.1, True), (2e-5, False)])
def test_far_off_once_is_wrong(monkeypatch: pytest.MonkeyPatch, off: float, refused: bool) -> None:
    """A little beyond the limits may be chance, as it is not in other problems."""
    problems: list[Problem] = []

    def once(problem: Problem, values: dict[str, Tensor]) -> None:
        problems[:] = problems or [problem]
        if problem is problems[0]:
            values["y"].add_(off * (values["y"] == values["y"].max()))

    _spoil(monkeypatch, once)
    first = Problem(_kind(), 2)
    assert proof._is_right(first) is not None
    problems.clear()
    assert (proof.correct(_kind()) is not None) == refused


def test_the_gradient_that_comes_in_is_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(problem: Problem, values: dict[str, Tensor]) -> None:
        assert problem.dy is not None
        problem.dy.mul_(values["y"] > 0)

    _spoil(monkeypatch, overwrite)
    assert proof.correct(_kind()) == ("wrote outside", "its input dy was overwritten")


def test_the_plan_of_the_call_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of fewer images, where it is another one."""
    kind = _kind(shape=(20, 16, 6, 5))
    monkeypatch.setattr("senet_kernels.trust.proof.MOST_BYTES", 4 * 3 * 16 * 6 * 5 * 4)
    tried: list[int] = []
    _spoil(monkeypatch, lambda problem, values: tried.append(problem.batch))
    assert proof.correct(kind) is None
    assert set(tried) == {12, 3, 2}  # in full, what else is tried, and one image less
    tried.clear()
    monkeypatch.setattr(proof, "plan_with", lambda kind, batch: f"{batch} images; {batch} images")
    assert proof.correct(kind._replace(plan="20 images; 20 images")) is None
    assert set(tried) == {20}


def test_an_interrupt_within_an_allocation_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Problem(_kind(), 2)

    def interrupted(*args: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(given.bands, "tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        given.kernel()


@pytest.mark.parametrize("strided", [False, True])
def test_the_compiled_library_allocates_between_bands(strided: bool) -> None:
    """All that its ops return lies there, and what they write behind it is noticed."""
    kind = _kind(shape=(2, 16, 6, 5), strided=strided)
    given = Problem(kind, 2)
    inputs = len(given.bands._buffers)
    results = given.kernel().values
    buffers = [buffer for buffer, _ in given.bands._buffers[inputs:]]
    inside = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    assert {t.untyped_storage().data_ptr() for t in results.values()} <= inside
    assert set(results) == {"y", "d x", "d w1", "d b1", "d w2", "d b2", "d residual"}
    assert given.bands.broken() is None
    y = results["y"]
    end = y.storage_offset() + y.numel()
    y.as_strided((1,), (1,), end).fill_(1.0)
    assert "behind a tensor" in str(given.bands.broken())
    outside = given.kernel_plainly().values["y"].untyped_storage()
    assert outside.nbytes() == y.numel() * 4


def test_what_a_call_may_leave_out_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen parameters and images that need no gradient, no biases, alpha and beta alone."""
    tried: list[tuple[frozenset[str], frozenset[str]]] = []

    def note(problem: Problem, values: dict[str, Tensor]) -> None:
        if not problem.variation.special and not problem.variation.dy:
            given = frozenset(name for name, t in problem.tensors.items() if t is not None)
            tried.append((given, frozenset(name[2:] for name in values if name != "y")))

    _spoil(monkeypatch, note)
    assert proof.correct(_kind(weighted=True)) is None
    images, weights, biases = {"x", "residual"}, {"w1", "w2"}, {"b1", "b2"}
    everything = images | weights | biases | {"alpha", "beta"}
    bare = images | weights | {"alpha"}
    assert set(tried) == {
        (frozenset(everything), frozenset(everything)),
        (frozenset(bare), frozenset(bare)),
        (frozenset(everything - {"alpha"}), frozenset(images)),
        (frozenset(everything), frozenset(everything - images)),
        (frozenset(everything), frozenset(everything - weights)),
    }


@pytest.mark.parametrize("spoiled", ["y", "d x", "d w1", "d b1"])
def test_a_fault_of_one_variation_is_noticed(monkeypatch: pytest.MonkeyPatch, spoiled: str) -> None:
    """A kernel that is wrong where biases are left out, or some gradients are not wanted."""

    def spoil(problem: Problem, values: dict[str, Tensor]) -> None:
        left_out = problem.variation.without
        where = {
            "y": "b1" in left_out, "d x": "d b1" in left_out, "d w1": "d x" in left_out,
            "d b1": "d w1" in left_out and "d b1" not in left_out,
        }  # fmt: skip
        if where[spoiled]:
            values[spoiled].mul_(1.01)

    _spoil(monkeypatch, spoil)
    wrong = proof.correct(_kind())
    assert wrong is not None
    assert wrong.fault == "wrong"
    assert wrong.text.startswith(spoiled)


def _recomputed(problem: Problem, y: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """y of images that are changed before the squeeze, and not for the scaling."""
    x, w1, b1, w2, b2, residual = (
        problem.tensors[n] for n in ("x", "w1", "b1", "w2", "b2", "residual")
    )
    assert x is not None
    assert w1 is not None
    assert w2 is not None
    assert residual is not None
    z = change(x.float()).mean((2, 3))
    hidden = torch.nn.functional.linear(z, w1.float(), None if b1 is None else b1.float()).relu()
    u = torch.nn.functional.linear(hidden, w2.float(), None if b2 is None else b2.float())
    y.copy_((x.float() * u.sigmoid()[..., None, None] + residual.float()).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["a tail", "none"])
def test_a_sum_that_ends_too_soon_is_noticed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fault: str
) -> None:
    """One position of 3,136 is below bfloat16's errors, but where all of an image lies there."""

    def tail(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., -1, -1] = 0
        return x

    def spoil(problem: Problem, values: dict[str, Tensor]) -> None:
        if problem.variation.tail:
            _recomputed(problem, values["y"], tail if fault == "a tail" else lambda x: x)

    _spoil(monkeypatch, spoil)
    kind = _kind(dtype, (3, 16, 56, 56))
    assert (proof.correct(kind) is None) == (fault == "none")


@pytest.mark.parametrize("role", ["before", "activation", "after"])
def test_a_bound_that_is_not_kept_is_noticed(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    """ReLU6 computed as ReLU differs beyond 6 alone."""
    options = Options("relu", "sigmoid", "identity", "relu")._replace(**{role: "relu6"})
    kind = _kind(options=options)
    op, right = Problem._op, pack(options)
    assert proof.correct(kind) is None
    wrong_code = pack(options._replace(**{role: "relu"}))

    def swapped(self: Problem, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            swap = [wrong_code if type(a) is int and a == right else a for a in args[:-1]]
            return op(self, name)(*swap, args[-1])

        return call

    monkeypatch.setattr(Problem, "_op", swapped)
    wrong = proof.correct(kind)
    assert wrong is not None
    assert wrong.fault == "wrong"


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 30])
def test_every_special_value_is_met(batch: int) -> None:
    """With biases and without, however few images there are; each in an image of its own."""
    kind = _kind(shape=(batch, 16, 6, 5))
    met: set[tuple[bool, str]] = set()
    for variation in variations.special(kind, batch):
        problem = Problem(kind, batch, variation)
        met |= {("b1" in variation.without, what) for what in problem.marked.values()}
        assert batch < 3 or len(problem.marked) < batch
    values = ("nan", "inf", "-inf", "large", "-large")
    assert met == {(bare, what) for bare in (False, True) for what in values}


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize(
    ("what", "name"), [("nan", "y"), ("large", "y"), ("nan", "d w1"), ("dy", "d x")]
)
def test_special_values_at_any_batch(
    monkeypatch: pytest.MonkeyPatch, batch: int, what: str, name: str
) -> None:
    """NaN and infinities that are swallowed, forward and backward; and NaN that overflow makes."""

    def spoil(problem: Problem, values: dict[str, Tensor]) -> None:
        if what == "dy" and problem.variation.dy:
            values[name].nan_to_num_()
        elif what == "large" and problem.are("large"):
            values[name][problem.are("large")] = torch.nan
        elif what == "nan" and problem.are("nan"):
            values[name].nan_to_num_()

    _spoil(monkeypatch, spoil)
    wrong = proof.correct(_kind(shape=(batch, 16, 6, 5)))
    assert wrong is not None
    assert wrong.fault == "special values"
    assert wrong.text.startswith(name)


@pytest.mark.parametrize("fault", ["dtype", "shape", "layout"])
def test_results_are_like_their_fakes(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def spoil(problem: Problem, values: dict[str, Tensor]) -> None:
        y = values["y"]
        values["y"] = {
            "dtype": y.double(), "shape": y[..., None],
            "layout": y.contiguous(memory_format=torch.channels_last),
        }[fault]  # fmt: skip

    _spoil(monkeypatch, spoil)
    wrong = proof.correct(_kind())
    assert wrong is not None
    assert wrong.fault == "unlike its fake"


def test_the_last_images_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what is compared in full, at the call's own size."""
    kind = _kind(shape=(64, 16, 6, 5))
    monkeypatch.setattr("senet_kernels.trust.proof.MOST_BYTES", 8 * 16 * 6 * 5 * 4)
    assert proof.prove(kind, speed=False).wrong is None

    inplace = kind._replace(call=kind.call._replace(inplace=True), direction=kinds.INFERENCE)
    assert proof.prove(inplace, speed=False).wrong is None

    def spoil(problem: Problem, values: dict[str, Tensor]) -> None:
        if problem.batch == 64:
            values["y"][63, 3].mul_(1.01)

    _spoil(monkeypatch, spoil)
    wrong = proof.prove(kind, speed=False).wrong
    assert wrong is not None
    assert wrong.text.startswith("y[63, 3, ")


@pytest.mark.parametrize("error", [OSError("No space left on device"), UserWarning("a warning")])
def test_what_is_not_the_kernels_fault_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(problem: Problem, values: dict[str, Tensor]) -> None:
        raise error

    _spoil(monkeypatch, fail)
    with pytest.raises(proof.NoVerdictError, match=str(error)):
        proof.correct(_kind())


@pytest.mark.parametrize("name", ["y", "d x"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_channel_that_is_off_is_noticed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str
) -> None:
    """By its mean error, where no number of it is far off."""
    kind = _kind(dtype, (4, 16, 28, 28))
    assert proof.correct(kind) is None
    _spoil(monkeypatch, lambda problem, values: values[name][1, 3].mul_(1.04))
    wrong = proof.correct(kind)
    assert wrong is not None
    assert wrong.text.startswith(name)


def test_backward_leaves_what_forward_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Problem._op

    def overwriting(self: Problem, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = op(self, name)(*args)
            if name == "backward":
                saved = args[len(self.form.names) + 1]
                saved.add_(1)
            return result

        return call

    monkeypatch.setattr(Problem, "_op", overwriting)
    wrong = proof.correct(_kind())
    assert wrong == ("wrote outside", "backward overwrote what forward keeps for it")


def test_between_the_elements_of_a_strided_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call in place that writes whole rows."""
    options = Options("relu", "sigmoid", "identity", "identity")
    call = Call(
        "cpu", torch.float32, torch.float32, options, "two layers",
        False, False, False, False, False, True,
    )  # fmt: skip
    x = torch.empty(2, 16, 6, 10)[..., ::2]
    w1, w2 = torch.empty(4, 16), torch.empty(16, 4)
    kind = kinds.kind_of("native", call, x, w1, w2, 16, kinds.INFERENCE)
    assert proof.correct(kind) is None

    def spoil(problem: Problem, values: dict[str, Tensor]) -> None:
        y = values["y"]
        y.as_strided((1,), (1,), y.storage_offset() + 1).fill_(0.0)

    _spoil(monkeypatch, spoil)
    wrong = proof.correct(kind)
    assert wrong is not None
    assert wrong.fault == "wrote outside"
    assert "between the elements" in wrong.text


def test_products_of_fewer_bits_are_no_measure() -> None:
    """Nor does the caller's setting change."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with exact_products("cpu"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
        # One that follows the setting for all backends still does.
        matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        with exact_products("cpu"):
            assert matmul.fp32_precision == "ieee"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"
        matmul.fp32_precision = before


def test_sums_of_fewer_bits_are_no_measure() -> None:
    products = torch.backends.cuda.matmul
    with exact_products("cuda"):
        assert not products.allow_bf16_reduced_precision_reduction
        assert not products.allow_fp16_reduced_precision_reduction
    assert products.allow_bf16_reduced_precision_reduction
    assert products.allow_fp16_reduced_precision_reduction


def test_a_proof_takes_images_that_lie_far_apart_for_as_large() -> None:
    """As what lies between them: between bands there is room for it."""
    kind = _kind()
    image = torch.Size(kind.shape[1:]).numel()
    far = kind._replace(shape=(64, *kind.shape[1:]), strides=(100 * image, *kind.strides[1:]))
    near = far._replace(strides=(image, *kind.strides[1:]))
    assert batch_for(near, 100 * image * 4 * 4) == 64
    assert batch_for(far, 100 * image * 4 * 4) == 16  # so that a tile is full


def test_a_child_of_a_proof_allocates_as_ever() -> None:
    """The count of proofs that are under way is of the process that proves."""
    given = Problem(_kind(), 2)

    def is_banded() -> bool:
        with Allocations(given.bands):
            y = given.kernel_plainly().values["y"]
        return y.untyped_storage().nbytes() > y.numel() * 4

    with native.dispatched_allocations():
        assert is_banded()
        child = os.fork()
        if not child:
            os._exit(int(is_banded()))
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert is_banded()
    assert not is_banded()
