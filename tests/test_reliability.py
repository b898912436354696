"""docs/reliability.md: every hazard has a promise and tests, each test exists, the page is true."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tools import mutate, reliability, sanitize
from tools.mutation_sites import FILES, Mutant, sites, text_hash

ROOT = reliability.ROOT
ROWS: list[dict[str, Any]] = json.loads(reliability.DATA.read_text())["rows"]
_NAMES = [row["hazard"] for row in ROWS]


@cache
def _functions(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", ROWS, ids=_NAMES)
def test_no_row_is_empty_and_every_test_exists(row: dict[str, Any]) -> None:
    assert row.keys() == {"hazard", "evidence", "promise", "tests"}
    assert row["hazard"]
    assert len(row["promise"]) > 40
    for issue in filter(None, row["evidence"].split(", ")):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", issue), issue
    assert row["tests"]
    for place, tests in row["tests"].items():
        assert place in reliability.PLACES
        assert tests
        assert len(set(tests)) == len(tests)
        for test in tests:
            path, _, function = test.partition("::")
            assert function in _functions(path), test


def test_rows_are_different() -> None:
    assert len(set(_NAMES)) == len(_NAMES) >= 34


@pytest.mark.slow
@pytest.mark.parametrize("place", reliability.PLACES)
def test_every_test_has_a_case_in_its_place(place: str) -> None:
    """As pytest collects them there."""
    keyword, environment = reliability.PLACES[place]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q"]
    command += ["-m", reliability.marks(place, slow=True), *(["-k", keyword] if keyword else [])]
    tests = reliability.tests_of(place)
    done = subprocess.run(
        [*command, *tests], capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    found = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert [test for test in tests if test not in found] == [], done.stdout[-500:] + done.stderr


def test_the_page_is_what_is_generated() -> None:
    assert reliability.PAGE.read_text() == reliability.page(), "python -m tools.reliability"


def test_nothing_failed_when_last_run() -> None:
    results = json.loads(reliability.RESULTS.read_text()) if reliability.RESULTS.exists() else {}
    failed = [t for place in results.values() for t, n in place["tests"].items() if "failed" in n]
    assert failed == []


def test_no_test_is_named_where_it_is_always_skipped() -> None:
    """What a device lacks may skip GPU tests; elsewhere a skipped test holds no promise."""
    results = json.loads(reliability.RESULTS.read_text())
    empty = [
        (place, test)
        for place in results.keys() - {"GPU"}
        for test in reliability.tests_of(place)
        if results[place]["tests"].get(test, {}).keys() == {"skipped"}
    ]
    assert empty == []


@pytest.mark.parametrize("row", ROWS, ids=_NAMES)
def test_some_test_of_every_row_ran(row: dict[str, Any]) -> None:
    """On a GPU none has: what only it would tell is not known."""
    results = json.loads(reliability.RESULTS.read_text())
    assert set(reliability.places_run(row, results)) - {"GPU"}


def test_skipped_is_no_result() -> None:
    row = {"tests": {place: ["a", "b"] for place in reliability.PLACES}}
    tests = {"CPU": {"a": {"skipped": 2}}, "simulated CUDA": {"a": {"skipped": 2, "passed": 1}}}
    results = {place: {"tests": counts} for place, counts in tests.items()}
    assert [reliability.outcome(row, place, results) for place in reliability.PLACES] == [
        "not run", "1 passed, 2 skipped, 1 not run", "not recorded", "not yet run on a GPU",
    ]  # fmt: skip
    assert reliability.places_run(row, results) == ["simulated CUDA"]


def test_records_are_of_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With changes that are not committed nothing runs; changes of documents do not matter."""

    def git(*arguments: str) -> None:
        command = ["git", "-c", "user.name=a", "-c", "user.email=b", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    for name in ("PAGE", "RESULTS"):
        monkeypatch.setattr(reliability, name, tmp_path / getattr(reliability, name).name)
    ran: list[str] = []

    def run(place: str, slow: bool) -> dict[str, Any]:
        ran.append(reliability.commit())
        record = {"command": "c", "date": "d", "commit": ran[-1], "kernels": reliability.kernels()}
        return {**record, "tests": {}}

    monkeypatch.setattr(reliability, "ROOT", tmp_path)
    monkeypatch.setattr(reliability, "run", run)
    monkeypatch.setattr(reliability, "kernels", lambda: dict.fromkeys(FILES, "text"))
    monkeypatch.setattr(sys, "argv", ["reliability", "--run", "--place", "CPU", "simulated CUDA"])
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "c")
    assert reliability.main() == 0  # although the first place's record is written by then
    assert len(ran) == 2
    assert not any("dirty" in commit for commit in ran)
    for name in ("test_a.py", "test_b.py"):  # changed, and not even added
        (tmp_path / "tests" / name).write_text("pass")
        with pytest.raises(SystemExit, match=f"commit or stash first\n.*tests/{name}"):
            reliability.main()
        assert reliability.commit().endswith("-dirty")
        git("add", ".")
        git("commit", "-q", "-m", "d")
    assert len(ran) == 2


def test_mutants_are_killed_or_explained() -> None:
    found = json.loads(reliability.MUTANTS.read_text())["mutants"]
    killed = [m for m in found if m["killed"]]
    assert len(killed) >= mutate.LEAST * len(found)
    assert all(m.get("explanation") for m in found if not m["killed"])


# -- which kernels a record is of ------------------------------------------------------------------


def _mutant_rows(page: str) -> dict[str, str]:
    table = page[page.index("| backend | mutants | killed | these are |") :]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2 : 2 + len(FILES)]]
    return {cells[0]: cells[-1].strip(" |") for cells in rows}


def test_the_page_says_of_which_kernels_the_mutants_were() -> None:
    found = json.loads(reliability.MUTANTS.read_text())["mutants"]
    said = _mutant_rows(reliability.PAGE.read_text())
    assert said.keys() == FILES.keys()
    for backend, words in said.items():
        texts = {m["text"] for m in found if m["backend"] == backend}
        if not texts:
            assert words == "not recorded"
        elif texts == {text_hash(backend)}:
            assert words == "of the kernels as they are"
        else:
            assert words.endswith("of earlier kernels: stale")


def test_a_change_of_the_kernels_makes_records_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page tells, ``--check`` warns, and neither is a failure."""
    for name in ("PAGE", "MUTANTS", "SANITIZERS", "RESULTS"):
        monkeypatch.setattr(reliability, name, tmp_path / getattr(reliability, name).name)
    mutant = {
        "id": "a:1:1:b>c",
        "before": "b",
        "after": "c",
        "kind": "sum",
        "killed": True,
        "by": "d",
    }
    record = {"command": "e", "date": "f", "commit": "g", "compiler": "h", "discarded": []}
    record["mutants"] = [mutant | {"backend": b, "text": text_hash(b)} for b in FILES]
    reliability.MUTANTS.write_text(json.dumps(record))
    clean = sanitize.Outcome("3 tests", f"FAILED: {reliability.ROOT}/i | j")
    for kind in sanitize.KINDS:
        sanitize.write_down(kind, clean, "k", "")
    result = {"command": "l", "date": "m", "commit": "n", "tests": {}}
    result["kernels"] = reliability.kernels()
    reliability.RESULTS.write_text(json.dumps(dict.fromkeys(reliability.PLACES, result)))
    monkeypatch.setattr(sys, "argv", ["reliability"])
    assert reliability.main() == 0
    fresh = reliability.PAGE.read_text()
    assert str(reliability.ROOT) not in fresh
    assert set(_mutant_rows(fresh).values()) == {"of the kernels as they are"}
    assert reliability.stale() == []
    monkeypatch.setattr(sys, "argv", ["reliability", "--check"])
    assert reliability.main() == 0
    assert "warning" not in capsys.readouterr().err

    for name in ("text_hash", "source_hash"):
        before = {backend: getattr(reliability, name)(backend) for backend in FILES}
        now = {backend: h if backend == "cuda" else h + "!" for backend, h in before.items()}
        monkeypatch.setattr(reliability, name, now.__getitem__)
    assert reliability.main() == 1  # not what would be generated
    assert reliability.PAGE.read_text() == fresh
    warnings = capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["reliability"])
    assert reliability.main() == 0
    assert _mutant_rows(reliability.PAGE.read_text()) == {
        "triton": "of earlier kernels: stale",
        "cuda": "of the kernels as they are",
        "cpu": "of earlier kernels: stale",
    }
    for line in ("mutants of triton: of earlier", "mutants of cpu: of", "sanitizers, thread: of",
                 "results, CPU: of earlier"):  # fmt: skip
        assert f"warning: {line}" in warnings
    assert "mutants of cuda" not in warnings
    assert "simulated" not in warnings


def test_every_run_of_the_fuzzer_says_of_which_kernels() -> None:
    for run in json.loads(reliability.FUZZ.read_text())["runs"]:
        assert run["kernels"].keys() == FILES.keys()


def test_the_record_of_sanitizers() -> None:
    assert reliability.SANITIZED.keys() == sanitize.KINDS.keys()
    record = json.loads(reliability.SANITIZERS.read_text())
    assert record.keys() <= sanitize.KINDS.keys()
    for kind, entry in record.items():
        assert not entry["result"].startswith("FAILED"), kind
        assert all(entry[key] for key in ("over", "command", "date", "commit", "tools", "kernels"))


@pytest.mark.parametrize(("tool", "option"), [(reliability, "--run"), (sanitize, "--record")],
                         ids=["reliability", "sanitize"])  # fmt: skip
def test_a_record_is_of_a_commit(tool: Any, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With uncommitted changes nothing is run for it, and nothing written."""
    monkeypatch.setattr(reliability, "uncommitted", lambda: [" M csrc/cpu/kernels.cpp"])
    monkeypatch.setattr(reliability, "run", lambda *_: pytest.fail("it runs"))
    monkeypatch.setattr(sanitize, "KINDS", {"address": lambda _: pytest.fail("it runs")})
    monkeypatch.setattr(sys, "argv", ["tool", option])
    with pytest.raises(SystemExit, match="commit or stash first\n M csrc/cpu"):
        tool.main()


# -- the generator of mutants ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", FILES)
def test_mutants_are_what_they_say(backend: str) -> None:
    found = sites(backend)
    assert len({m.id for m in found}) == len(found) > 500
    texts = {path: (ROOT / path).read_text() for path in FILES[backend]}
    for mutant in found[::17]:
        text = texts[mutant.path]
        changed = mutant.applied(text)
        assert changed != text
        assert changed.count("\n") <= text.count("\n")
        if backend == "triton":
            ast.parse(changed)


def test_the_same_seed_draws_the_same() -> None:
    def drawn(seed: int) -> list[Mutant]:
        mutants = mutate.draw("cuda", seed)
        return [next(mutants) for _ in range(40)]

    first = drawn(5)
    assert first == drawn(5) != drawn(6)
    assert {m.path for m in first} == set(FILES["cuda"])
    assert len({m.kind for m in first}) == 8


def test_sites_in_a_text(tmp_path: Path) -> None:
    """In C++ no comment, no string, no template; in Triton no docstring, no annotation."""
    for path in (*FILES["cpu"], *FILES["triton"]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    (tmp_path / "csrc/cpu/mlp.h").write_text(
        "// 1 + 2\n#if 3 < 4\ntemplate <int k = 5>\nvoid f() {\n  int a = b * 6;\n  g(a);\n"
        '  const char* s = "7 + 8";\n  if (a < b) h();\n}\n'
    )
    found = {(m.kind, m.before, m.after) for m in sites("cpu", tmp_path)}
    assert found == {
        ("arithmetic", "*", "+"), ("constant", "6", "7"), ("statement", "g(a);", ";"),
        ("comparison", "<", "<="), ("mask", "a < b", "true"),
    }  # fmt: skip
    (tmp_path / FILES["triton"][0]).write_text(
        '@triton.jit\ndef f(x, N: tl.constexpr = 3):\n    """1 + 1"""\n'
        "    ok = (x < N) & (x >= 0)\n    tl.store(x, 1.0, mask=ok)\n"
    )
    found = {(m.kind, m.before, m.after) for m in sites("triton", tmp_path)}
    assert ("mask", "ok", "True") in found
    assert ("mask", "(x < N) & (x >= 0)", "(x < N)") in found
    assert ("constant", "1.0", "(2 * 1.0)") in found
    assert ("statement", "tl.store(x, 1.0, mask=ok)", "pass") in found
    assert not any(before in ("3", "1") for _, before, _ in found)
