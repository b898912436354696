"""Fixtures shared by the suite."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Read when torch loads OpenMP. Spinning at barriers makes the suite many times slower wherever
# something else uses the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read by the compiled library at first use: every output and scratch buffer starts as NaN, so that
# an element nobody wrote cannot pass for a right one.
os.environ.setdefault("SENET_KERNELS_POISON", "1")

# Tests are of the kernels themselves: none is tried before it is called, on no card.
os.environ.setdefault("SENET_KERNELS_GPU", "trust")

# Or cuBLAS refuses matrix products under use_deterministic_algorithms, see `poisoned_empty`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Eager in float32 is a yardstick: not with the ten bits of mantissa that cuDNN is allowed.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

# Inductor's vectors are its own business: to find out which there are, and to compile their
# headers, takes most of a minute.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

import torch

import pretended
import senet_kernels
import triton_on_cpu
from backend_cases import PLAIN, BackendCase, require
from operations import CountOperations
from senet_kernels import dispatch, resolve
from senet_kernels.backends import triton
from senet_kernels.trust import store, verdicts, worker

THREADS = 2

# What Triton's interpreter runs: of Triton alone, and, as the simulation of CUDA, of every backend.
TRITON_TESTS = (
    "test_plain_kernels.py", "test_triton.py", "test_triton_arguments.py",
    "test_triton_first_calls.py", "test_triton_ptx.py",
)  # fmt: skip
KERNEL_TESTS = (
    "test_accuracy.py", "test_addressing.py", "test_autocast.py", "test_budgets.py", "test_gpu.py",
    "test_gradcheck.py", "test_guard_pages.py", "test_layouts.py", "test_memory.py", "test_ops.py",
    "test_pointwise.py", "test_properties.py", "test_public_op.py", "test_special_values.py",
)  # fmt: skip
# Cases of a test function that the gate runs under Triton's interpreter, evenly spread.
INTERPRETED_CASES = {
    "test_pairs_of_choices": 32,
    "test_odd_shapes": 10,
    "test_against_torch": 12,
    "test_blocks": 4,
    "test_long_sums": 0,  # test_triton.py has fewer images
    # Nine pairs of dtypes each, which are promoted before any kernel.
    "test_autocast_gives_eagers_dtype": 0,
    "test_autocast_of_halves_gives_eagers_dtype": 0,
    # Hundreds of evaluations each.
    "test_first_and_second_derivatives": 0,
    "test_second_derivative_with_some_inputs_frozen": 0,
    # Two processes that import everything.
    "test_same_bits_in_fresh_processes": 0,
    # Of host code alone, which opcheck compares with the fakes.
    "test_fakes_have_the_real_strides": 0,
    "test_fakes_of_halves_have_the_real_strides": 0,
    "test_any_call": 0,  # what pairs of choices are, at random: CPU and CUDA have it
    "others": 1,
}
# What runs on the interpreter and, compiled, in test_triton_ptx.py.
TRITON_CASES = {"test_every_cut_gives_the_result": 9, "test_split_images": 6}
# Of tests that capture or compile graphs or start processes, a second and more each: for the CPU's
# kernels, and for plain PyTorch, in whose graphs nothing is opaque.
CAPTURED_CASES = {
    "test_citizenship.py": ({}, {"test_fork": 0, "test_same_bits_in_another_process": 0}),
    "test_compile.py": (
        {"test_one_graph_with_gradients": 6, "test_inplace": 4, "test_halves_with_code_between": 3},
        {"test_one_graph_with_gradients": 3, "test_inplace": 5, "test_halves_with_code_between": 3,
         "test_export": 3, "test_one_tensor_as_two_arguments": 3},
    ),
    "test_public_op.py": (
        {"test_opcheck": 7, "test_first_and_second_derivatives": 7},
        {"test_first_and_second_derivatives": 3},
    ),
}  # fmt: skip
# The same for the simulation of CUDA, which takes about a fiftieth of a second for a call.
SIMULATED_CASES = {
    "test_pairs_of_choices": 100,
    "test_odd_shapes": 50,
    "test_blocks": 24,
    "test_empty_extents": 49,
    # About threads of a CPU, and processes.
    "test_thread_counts": 0,
    "test_same_bits_in_fresh_processes": 0,
    # Hundreds of evaluations each.
    "test_first_and_second_derivatives": 3,
    "others": 6,
}
# Products of parameters, of which the gate runs cases that have each value of each parameter once;
# the slow tests have all of them.
COVERED = {
    "test_accuracy.py": ("test_thread_counts",),
    "test_capture.py": (
        "test_autocast_inside", "test_gradient_penalty_of_a_compiled_network", "test_make_fx",
    ),
    "test_capture_tools.py": ("test_pipelined",),
    "test_compile.py": (
        "test_export", "test_halves_with_code_between", "test_inplace",
        "test_one_graph_with_gradients",
    ),
    "test_convert.py": ("test_captured_at_every_width", "test_captured_forms"),
    "test_convert_calls.py": (
        "test_a_class_of_a_child_that_is_patched_after_fusing",
        "test_attributes_that_hide_or_change", "test_changes_after_fusing",
        "test_flags_that_a_forward_asks_for", "test_modules_that_leave_autocast",
    ),
    "test_cost_kernels.py": ("test_loops_are_as_long_as_in_ptx",),
    "test_cuda_on_cpu.py": (
        "test_bits_of_several_stretches", "test_bytes_moved",
        "test_kept_weights_are_not_read_again", "test_same_bits_in_any_order",
        "test_what_is_not_legal_is_refused", "test_what_is_read_is_asked_for",
    ),
    "test_fused_models.py": ("test_compiled_in_one_graph", "test_export"),
    "test_graph_models.py": ("test_networks_of_others",),
    "test_memory_model.py": ("test_kernels_follow_the_protocols",),
    "test_onnx.py": ("test_small_networks",),
    "test_ops.py": (
        "test_fakes_have_the_real_strides", "test_fakes_of_halves_have_the_real_strides",
        "test_opcheck", "test_opcheck_halves", "test_opcheck_inplace",
    ),
    "test_public_op_graphs.py": ("test_make_fx_graphs_train",),
    "test_tensor_likes.py": (
        "test_fx_traces_every_block", "test_transforms_while_compiling",
        "test_weights_of_another_class",
    ),
    "test_watched_functions.py": ("test_what_a_forward_asks_of_its_children",),
}  # fmt: skip


def pytest_report_header() -> list[str]:
    shown = str(senet_kernels.backends()).splitlines()
    return [f"senet_kernels {senet_kernels.__version__}, torch {torch.__version__}", *shown[:4]]


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)
    if triton.INTERPRETED and (capability := triton_on_cpu.capability()):
        triton_on_cpu.install(capability)
    elif triton.INTERPRETED:
        import interpreter

        interpreter.install()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Of files that have nothing for Triton's interpreter nothing is imported there."""
    name = collection_path.name
    if triton.INTERPRETED and name.startswith("test_") and name.endswith(".py"):
        return True if name not in (*TRITON_TESTS, *KERNEL_TESTS) else None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what needs a GPU. Under Triton's interpreter its tests alone are left, most of them
    marked slow: it takes a tenth of a second and more for what a device does in microseconds."""
    for item in items:
        case = _case_of(item)
        if case is not None and case.device == "cuda":
            item.add_marker(pytest.mark.gpu)
    wanted = _is_of_triton if triton.INTERPRETED else _is_no_simulation_in_vain
    dropped = [item for item in items if not wanted(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if wanted(item)]
    # test_triton.py is as small as it can be.
    if triton.INTERPRETED:
        _thin_out([item for item in items if _is_on(item, "cpu")], INTERPRETED_CASES)
        if not triton_on_cpu.capability():
            _thin_out([item for item in items if item.path.name == "test_triton.py"], TRITON_CASES)
    else:
        _thin_out([item for item in items if _is_simulated(item)], SIMULATED_CASES)
        for file, tables in CAPTURED_CASES.items():
            cases = [i for i in items if i.path.name == file and _is_on(i, "cpu")
                     and not i.get_closest_marker("slow")]  # fmt: skip
            for plain, few in enumerate(tables):
                _thin_out([i for i in cases if (_case_of(i).name in PLAIN) == bool(plain)], few)
        _cover(items)


def _thin_out(items: list[pytest.Item], few: dict[str, int]) -> None:
    """Marks all but an evenly spread sample of each test function's cases slow."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, cases in functions.items():
        n = min(len(cases), few.get(name.split("::")[-1], few.get("others", len(cases))))
        sample = {i * len(cases) // n for i in range(n)}
        for i, item in enumerate(cases):
            if i not in sample:
                item.add_marker(pytest.mark.slow)


def _cover(items: list[pytest.Item]) -> None:
    """Marks those cases of the functions in COVERED slow that have no value of a parameter which
    others, of the gate too, lack."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        name = item.nodeid.split("[")[0].split("::")[-1]
        if name in COVERED.get(item.path.name, ()) and not (
            item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        ):
            functions.setdefault(f"{item.path.name}::{name}", []).append(item)
    for cases in functions.values():
        left = {i: {(k, repr(v)) for k, v in case.callspec.params.items()}
                for i, case in enumerate(cases)}  # fmt: skip
        used: Counter[tuple[str, str]] = Counter()
        missing = set().union(*left.values())
        while missing:
            # Of those that have as many, the one whose other values have had fewer turns.
            best = max(left, key=lambda i: (len(left[i] & missing), -sum(used[v] for v in left[i])))
            used.update(left[best])
            missing -= left.pop(best)
        for i in left:
            cases[i].add_marker(pytest.mark.slow)


def _case_of(item: pytest.Item) -> BackendCase | None:
    case = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    return case if isinstance(case, BackendCase) else None


def _is_on(item: pytest.Item, device: str) -> bool:
    case = _case_of(item)
    return case is not None and case.device == device


def _is_simulated(item: pytest.Item) -> bool:
    case = _case_of(item)
    return case is not None and case.simulated


def _is_no_simulation_in_vain(item: pytest.Item) -> bool:
    # What a backend must do beside computing is not the simulation's business.
    return not _is_simulated(item) or item.path.name in KERNEL_TESTS


def _is_of_triton(item: pytest.Item) -> bool:
    case = _case_of(item)
    if case is None:
        return item.path.name in TRITON_TESTS
    # What else a backend must do is not the interpreter's business: on CPU tensors Triton is never
    # chosen automatically, and processes and threads are not what they are on a device.
    return case.name == "triton" and item.path.name in KERNEL_TESTS


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[BackendCase]:
    """The backend a test is parametrised with, known to run here."""
    case: BackendCase = request.param
    require(case)
    with case.running(seed=zlib.crc32(request.node.nodeid.encode())):
        yield case


@pytest.fixture
def automatic(backend: BackendCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that name no backend run on this one, which others may be preferred to, or which runs
    only when asked for by name."""
    monkeypatch.setattr(dispatch, "ORDER", (backend.name, "fallback"))
    monkeypatch.setattr(dispatch, "AUTOMATIC", {backend.device: (backend.name,)})
    monkeypatch.setattr(resolve, "_RESOLVED", {})


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A pretended card that has proven something before, see :mod:`pretended`; the folder of its
    verdicts."""
    missing = pretended.why_not()
    if missing is not None:
        pytest.skip(missing)
    tests = Path(__file__).parent
    monkeypatch.setenv("SENET_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests.parent), str(tests)]))
    monkeypatch.delenv(pretended.FAULT, raising=False)
    pretended.pretend(monkeypatch.setattr)
    pretended.as_new_process()
    monkeypatch.setattr(store.Folder, "has_right", lambda *args: True)
    monkeypatch.setattr(verdicts, "LEAST_SPEED", 0.0)  # who knows what else runs here
    yield tmp_path
    worker.stop()
    monkeypatch.undo()
    pretended.as_new_process()


@pytest.fixture(autouse=True)
def _clean_slate(request: pytest.FixtureRequest) -> Iterator[None]:
    """Same random numbers for every test; process-wide settings as they were afterwards."""
    torch.manual_seed(0)
    # Where Triton's PTX is executed: the order of threads, and the errors of approximate functions.
    triton_on_cpu.launches.seed = zlib.crc32(request.node.nodeid.encode())
    triton_on_cpu.launches.approximations = triton_on_cpu.launches.seed
    yield
    assert torch.is_grad_enabled()
    torch.set_num_threads(THREADS)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Every ``torch.empty`` comes filled with NaN (integers: their maximum). The compiled library
    has allocations of its own: SENET_KERNELS_POISON, above."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def set_threads() -> Callable[[int], None]:
    """``torch.set_num_threads`` for one test; put back by ``_clean_slate``."""
    return torch.set_num_threads


@pytest.fixture
def record_ops() -> Iterator[Callable[[], set[str]]]:
    """Calling it gives the names of the raw ops that ran since the last call."""
    with CountOperations() as counted:

        def take() -> set[str]:
            names = {name for name in counted.calls if name.startswith("senet_kernels::")}
            counted.calls.clear()
            return names

        yield take
