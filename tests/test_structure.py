"""What may import what: the layers of CONTRIBUTING.md, and nothing newer than the oldest Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkout import ROOT, git, needs_git, tracked

PACKAGE = "senet_kernels"

#: From the user down. A module imports from its own layer and from later ones.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__", "selftest", "flops", "train", "workloads"),
    ("timing", "trial"),
    ("parity",),
    ("",),  # senet_kernels/__init__.py
    ("models",),
    ("autotune", "convert", "layers", "modules"),
    ("converted", "report"),
    ("recognise",),
    ("captured", "neighbours"),
    ("forms", "fuse"),
    ("words_asked",),
    ("parts",),
    ("namespaces",),
    ("watched",),
    ("public_kernels",),
    ("between",),
    ("api",),
    ("resolve",),
    ("settle",),
    ("dispatch", "autograd"),
    ("trust",),
    ("fallback", "validation"),
    ("features",),
    ("public_ops",),
    ("backends.native", "backends.triton"),
    ("ops",),
    ("reference",),
    ("pointwise", "tensors"),
    ("_after_import", "_command_line", "_libraries", "_version", "backends"),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
#: Loaded at the first call, when the layers above their own are long there.
EXCEPTIONS = {
    ("backends.triton.launch", "validation"),
    ("backends.triton.operands", "validation"),
}
#: Modules of the standard library that Python 3.10 lacks.
LATER = {"annotationlib", "compression", "tomllib"}


def _unit(module: str) -> str:
    """What stands in the table for a module: itself, or the package that it is in."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "backends" else 1])


def _modules(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """Names without the package's, and sources."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def _imports(package: Path) -> set[tuple[str, str]]:
    """Pairs of modules of the package, the importing one first."""
    modules = dict(_modules(package))
    found = set()
    for name, tree in modules.items():
        is_package = (package / name.replace(".", "/") / "__init__.py").exists()
        parts = [PACKAGE, *filter(None, name.split("."))]
        for node in ast.walk(tree):
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                up = node.level - is_package
                start = parts[: len(parts) - up] if node.level else []
                base = ".".join([*start, *filter(None, [node.module])])
                wanted = [f"{base}.{alias.name}" for alias in node.names]
            for target in wanted:
                if target.split(".")[0] != PACKAGE:
                    continue
                inner = target.partition(".")[2]
                while inner not in modules:  # a name in a module
                    inner = inner.rpartition(".")[0]
                found.add((name, inner))
    return found


def _wrong(package: Path) -> list[str]:
    wrong = []
    for name, target in sorted(_imports(package) - EXCEPTIONS):
        here, there = _unit(name), _unit(target)
        if here == there:
            continue
        both_backends = (
            LAYERS[LAYER[here]] == LAYERS[LAYER[there]] == LAYERS[LAYER["backends.native"]]
        )
        if LAYER[there] < LAYER[here] or both_backends:
            wrong.append(f"{name} imports {target}")
    return wrong


def test_every_module_has_a_layer() -> None:
    assert {_unit(name) for name, _ in _modules(ROOT / PACKAGE)} == set(LAYER)


def test_imports_go_down() -> None:
    assert _imports(ROOT / PACKAGE) >= EXCEPTIONS
    assert _wrong(ROOT / PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [("ops", "from .api import explain"), ("ops", "from . import api"),
     ("reference", f"import {PACKAGE}.ops"), ("backends/native", "from .triton import plan"),
     ("backends/triton/plan", f"from {PACKAGE} import dispatch"),
     ("models/resnet", "from .. import FusedSEBlock")],
)  # fmt: skip
def test_imports_that_go_up_are_seen(tmp_path: Path, module: str, line: str) -> None:
    for name in ("__init__", "api", "dispatch", "backends/__init__", "ops", "reference",
                 "backends/native", "backends/triton/__init__", "backends/triton/plan",
                 "models/__init__", "models/resnet"):  # fmt: skip
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line if name == module else "")
    assert len(_wrong(tmp_path / PACKAGE)) == 1


def test_long_files_say_why() -> None:
    folders = ("senet_kernels", "csrc", "benchmarks", "tools")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")
             if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu")]  # fmt: skip
    files += [ROOT / "setup.py", *ROOT.glob("docs/*.py")]
    assert len(files) > 100
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 500 or "More than 500 lines: " in "\n".join(lines[:30]), path


def _unguarded(path: Path) -> list[str]:
    """Imports at the top of a file that fail on Python 3.10; under an ``if`` they may stand."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        found += [f"{path.name}: {name}" for name in names if name.split(".")[0] in LATER]
    return found


def test_nothing_is_newer_than_the_oldest_python() -> None:
    folders = (PACKAGE, "benchmarks", "docs", "examples", "tests", "tools")
    files = [ROOT / "setup.py", *(p for f in folders for p in sorted((ROOT / f).rglob("*.py")))]
    assert [line for path in files for line in _unguarded(path)] == []


def _with_conflicts(root: Path) -> list[str]:
    """Tracked files in which a merge has left its markers."""
    marker = re.compile(rb"^(?:<{7}|>{7}|\|{7})(?: |$)", re.MULTILINE)
    return [name for name in tracked(root) if marker.search((root / name).read_bytes())]


@needs_git
def test_no_merge_conflict_is_committed(tmp_path: Path) -> None:
    assert _with_conflicts(ROOT) == []
    lines = ["<" * 7 + " HEAD", "ours", "=" * 7, "theirs", ">" * 7 + " branch", ""]
    (tmp_path / "merged.md").write_text("\n".join(lines))
    (tmp_path / "title.md").write_text("Title\n" + "=" * 7 + "\n")
    git("init", "-q", folder=tmp_path)
    git("add", ".", folder=tmp_path)
    assert _with_conflicts(tmp_path) == ["merged.md"]


def _hidden(tree: ast.Module) -> list[str]:
    """Parameters of the name of something that the module imports."""
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names}
    every = (node for node in ast.walk(tree) if isinstance(node, ast.arguments))
    return [a.arg for n in every for a in (*n.posonlyargs, *n.args, *n.kwonlyargs)
            if a.arg in names]  # fmt: skip


def test_no_parameter_hides_an_import() -> None:
    for folder in (PACKAGE, "benchmarks", "tools"):
        for name, tree in _modules(ROOT / folder):
            assert _hidden(tree) == [], f"{folder}: {name}"
