"""The simulation of CUDA threads in ``tests/simt`` proves itself: planted faults are caught."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "simt"))

import build

pytestmark = pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")

SEEDS = 30
NUMBERS = "wrong"

# What each planted fault looks like: to the plain build, at least so many times in SEEDS orders of
# execution, and to the build with AddressSanitizer and UndefinedBehaviorSanitizer. None: not at
# all, or not reliably.
FAULTS: dict[str, tuple[tuple[str, int] | None, str]] = {
    "missing_barrier": ((NUMBERS, 25), NUMBERS),
    "missing_second_barrier": ((NUMBERS, 25), NUMBERS),
    "missing_cluster_sync": ((NUMBERS, 10), NUMBERS),
    "out_of_bounds_write": (None, "heap-buffer-overflow"),
    "past_shared_memory": (("written past the end of its shared memory", 30),
                           "heap-buffer-overflow"),
    "past_an_array": (None, r"faults.cpp:\d+:\d+: runtime error: index \d+ out of bounds"),
    "into_a_red_zone": (None, "use-after-poison"),
    "misaligned_access": (None, r"faults.cpp:\d+:\d+: runtime error: .* misaligned address"),
    "misaligned_vector": (("a 16-byte access to an address that is no multiple of 16", 30),
                          "a 16-byte access to an address that is no multiple of 16"),
    "barrier_in_divergent_code": (("__syncthreads in divergent code: thread", 30),
                                  "__syncthreads in divergent code"),
    "barriers_in_two_branches": ((r"waits at another one, faults.cpp:\d+ \(faults.cpp:\d+\)", 30),
                                 "__syncthreads in divergent code"),
    "wrong_shuffle_mask": (("with mask 0xffffffff|whose mask names lane", 30),
                           "with mask 0xffffffff|whose mask names lane"),
    "shuffle_mask_without_caller": ((r"lane 31(, which)? is not in it", 30),
                                    r"lane 31(, which)? is not in it"),
    "shuffle_from_outside_the_mask": (("lane 0 reads lane 8, which is not in it", 30),
                                      "lane 0 reads lane 8, which is not in it"),
    "vote_in_divergent_code": (("is in another call|lane . waits at|exits while", 30),
                               "is in another call|lane . waits at|exits while"),
    "exit_while_a_peer_reads": ((f"{NUMBERS}|which has exited", 10),
                                "use-after-poison|which has exited"),
    "bulk_copy_not_awaited": ((f"{NUMBERS}|exits while copies", 10),
                              "use-after-poison|exits while copies"),
    "missing_proxy_fence": (("has not executed the proxy fence since its last barrier", 30),
                            "has not executed the proxy fence since its last barrier"),
    "wrong_number_of_bytes": (
        ("deadlock; block 0: threads 0-95 wait at an mbarrier .* 384 bytes to come", 30),
        "deadlock",
    ),
    "mbarrier_not_initialised": (("an mbarrier that is not initialised", 20),
                                 "an mbarrier that is not initialised"),
    "async_copy_not_awaited": ((NUMBERS, 25), "use-after-poison"),
    "flag_not_awaited": ((NUMBERS, 20), NUMBERS),
    "flag_never_set": ((r"deadlock; .*wait at a flag in global memory \(faults.cpp:\d+\)", 30),
                       "deadlock"),
    "missing_grid_sync": ((NUMBERS, 10), NUMBERS),
    "early_exit_before_barrier": (("__syncthreads in divergent code: thread", 30),
                                  "__syncthreads in divergent code"),
}  # fmt: skip

Run = Callable[..., list[str]]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "sanitized"])
def run_faults(request: pytest.FixtureRequest) -> Run:
    """Runs the program of test kernels; its lines, standard error's too."""
    program = build.build("faults", [(build.HERE / "faults.cpp", [])], sanitize=request.param)
    prefix = build.without_randomised_addresses() if request.param else []
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}

    def run(*arguments: object) -> list[str]:
        command = [*prefix, str(program), *map(str, arguments)]
        stdout, stderr = subprocess.PIPE, subprocess.STDOUT
        done = subprocess.run(
            command, stdout=stdout, stderr=stderr, env=environment, text=True, timeout=120
        )
        return done.stdout.splitlines()

    run.sanitized = request.param  # type: ignore[attr-defined]
    return run


def test_every_fault_is_listed(run_faults: Run) -> None:
    assert run_faults() == list(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_right_kernels_pass_in_any_order(run_faults: Run, name: str) -> None:
    assert run_faults(name, "right", SEEDS) == ["right"] * SEEDS


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(run_faults: Run, name: str) -> None:
    plain, sanitized = FAULTS[name]
    if run_faults.sanitized:  # type: ignore[attr-defined]
        lines = run_faults(name, "faulty", SEEDS)
        assert any(re.search(sanitized, line) for line in lines), "\n".join(lines)
    elif plain is not None:
        pattern, times = plain
        lines = run_faults(name, "faulty", SEEDS)
        assert sum(bool(re.search(pattern, line)) for line in lines) >= times, "\n".join(lines)


def test_same_seed_same_order(run_faults: Run) -> None:
    once, again = (run_faults("missing_cluster_sync", "faulty", SEEDS) for _ in range(2))
    assert once == again
    assert len(set(once)) > 1
