"""Several calls at once: in threads, in forked workers, on several backends."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import oracle
from backend_cases import BackendCase, require
from problems import Problem, Spec, build, check, magnitudes
from random_calls import RandomCall, build_call, calls, check_call
from senet_kernels import squeeze_excite, use_backend

NATIVE, REFERENCE = BackendCase("native", "cpu"), BackendCase("reference", "cpu")


@pytest.fixture(autouse=True)
def _native() -> None:
    require(NATIVE)


def _at_once(works: list[RandomCall], repeats: int) -> None:
    """Each in a thread of its own; results as the same thread alone had them."""
    problems = [build_call(call) for call in works]
    failures: list[BaseException] = []
    start = threading.Barrier(len(works))

    def work(call: RandomCall, problem: Problem | None) -> None:
        try:
            if problem is None:
                start.wait()
                return
            right = problem.run(squeeze_excite, call.asked, backend=call.backend)
            start.wait()
            for _ in range(repeats):
                again = problem.run(squeeze_excite, call.asked, backend=call.backend)
                for name, value in right.items():
                    same = torch.equal(again[name].nan_to_num(), value.nan_to_num())
                    assert same, f"{name} of {call.to_json()}"
        except BaseException as error:
            start.abort()
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(works, problems, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


_PLAIN = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def _threads(examples: int, repeats: int) -> None:
    drawn = st.lists(
        st.one_of(calls("native"), calls("native"), calls("reference")), min_size=8, max_size=8
    )

    @settings(_PLAIN, max_examples=examples)
    @given(drawn)
    def run(works: list[RandomCall]) -> None:
        # Autocast and in place are other threads' business as little as the rest is.
        works = [replace(w, float32=(), inplace=False, threads=2) for w in works]
        _at_once(works, repeats)
        for call in works[:2]:
            check_call(call)

    run()


def test_eight_threads_with_any_calls() -> None:
    """Eight different calls, shapes, options and backends, at once: the bits of each alone."""
    _threads(examples=8, repeats=3)


@pytest.mark.slow
def test_eight_threads_with_any_calls_long() -> None:
    _threads(examples=150, repeats=10)


def test_backends_in_turn() -> None:
    """Two backends in one graph, and in turn in one thread, whatever ``use_backend`` says."""
    first, second = build(Spec(seed=1)), build(Spec(residual="contiguous", after="relu", seed=2))
    for outer, inner in (("native", "reference"), ("reference", "native")):
        for _ in range(3):
            check(first, squeeze_excite, backend=outer)
            with use_backend(inner):
                check(second, squeeze_excite)
                check(first, squeeze_excite, backend=outer)
    leaves = first.leaves()
    y = first.call(squeeze_excite, leaves, backend="native")
    y = first.call(squeeze_excite, leaves | {"x": y}, backend="reference")
    y = first.call(squeeze_excite, leaves | {"x": y}, backend="native")
    exact = first.double().leaves()
    right = exact
    z = first.call(oracle.block, right)
    z = first.call(oracle.block, right | {"x": z})
    z = first.call(oracle.block, right | {"x": z})
    torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=1e-5)
    y.backward(first.dy)
    z.backward(first.dy.double())
    for name in first.given:
        got, due = leaves[name], exact[name]
        assert got is not None
        assert due is not None
        torch.testing.assert_close(got.grad.double(), due.grad, rtol=1e-4, atol=1e-4)


class _Calls(Dataset[Tensor]):
    """What a worker computes of its index; forward and backward."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        spec = Spec((2, 16 + index, 24, 25), 4, seed=index, residual="contiguous", after="relu")
        results = build(spec).run(squeeze_excite, backend=self.backend)
        return torch.cat([t.double().flatten() for t in results.values()])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_data_loader_with_forked_workers(backend: str) -> None:
    """After the parent's threads have started, and while they go on."""
    dataset = _Calls(backend)
    big = build(Spec((4, 32, 40, 40), 8))
    check(big, squeeze_excite, backend=backend)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    seen = 0
    for index, got in enumerate(loader):
        check(big, squeeze_excite, backend=backend)
        # A worker has one thread, so other sums.
        torch.testing.assert_close(got, dataset[index], rtol=1e-4, atol=1e-4)
        seen += 1
    assert seen == len(dataset)
    spec = Spec((2, 16, 24, 25), 4, residual="contiguous", after="relu")
    problem = build(spec)
    results = problem.run(squeeze_excite, backend=backend)
    oracle.assert_like_oracle(results, problem.expected(), magnitudes(problem), spec.dtype)


def test_the_number_of_threads_changes_during_calls() -> None:
    """``torch.set_num_threads`` in one thread, calls in another."""
    problem = build(Spec((4, 32, 40, 40), 8))
    expected = problem.expected()
    sizes = magnitudes(problem)
    stop = threading.Event()

    def change() -> None:
        n = 0
        while not stop.is_set():
            n = n % 4 + 1
            torch.set_num_threads(n)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(40):
            results = problem.run(squeeze_excite, backend="native")
            oracle.assert_like_oracle(results, expected, sizes, torch.float32)
    finally:
        stop.set()
        changer.join()
