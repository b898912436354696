"""What Markdown files show to be typed, run or compared: code blocks and links."""

from __future__ import annotations

import argparse
import ast
import contextlib
import doctest
import importlib.util
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest import mock

from markdown_it import MarkdownIt

from senet_kernels import _command_line, _libraries

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).parent.parent

#: Blocks that are no code: what a program prints, a figure, a reference.
PLAIN = ("", "text", "json", "bibtex")
#: Libraries that a block may need and a reader need not have.
OPTIONAL = (
    "timm", "torchvision", "transformers", "matplotlib", "sklearn", "triton", "onnxruntime",
    "onnxscript",
)  # fmt: skip


class Block(NamedTuple):
    """A fenced block and the line it begins at."""

    language: str
    text: str
    line: int


def documents() -> list[Path]:
    """Every Markdown file of the project."""
    folders = (ROOT, ROOT / "docs", ROOT / "examples", ROOT / "benchmarks", ROOT / "tests" / "simt")
    return sorted(path for folder in folders for path in folder.glob("*.md"))


def _tokens(path: Path) -> Iterator[Any]:
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a file in their order."""
    return [
        Block(token.info.split(" ")[0], token.content, token.map[0] + 1)
        for token in _tokens(path)
        if token.type == "fence"
    ]


def inline_code(path: Path) -> list[str]:
    """What stands in backticks inside the text."""
    return [token.content for token in _tokens(path) if token.type == "code_inline"]


# ---- links ----


def links(path: Path) -> list[str]:
    """Targets of links and images."""
    return [
        str(token.attrs["href" if token.type == "link_open" else "src"])
        for token in _tokens(path)
        if token.type in ("link_open", "image")
    ]


def anchors(path: Path) -> set[str]:
    """The names by which GitHub and Sphinx know the headings of a file."""
    tokens = list(_tokens(path))
    headings = [t.content for before, t in itertools.pairwise(tokens)
                if before.type == "heading_open"]  # fmt: skip
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_link(path: Path, target: str) -> str | None:
    """What is wrong with a link inside the project; None for what is right or outside."""
    if re.match(r"[a-z]+:", target):
        return None
    file, _, anchor = urllib.parse.unquote(target).partition("#")
    other = (path.parent / file).resolve() if file else path
    if not other.exists():
        return f"{target}: no such file"
    if anchor and anchor not in anchors(other):
        return f"{target}: no such heading"
    return None


# ---- Python ----


def _imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


class Session:
    """Runs the Python blocks of one document, one after the other, in one namespace."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.left_out: list[str] = []  # why blocks were left out

    def _missing(self, tree: ast.AST) -> str | None:
        for library in sorted(_imported(tree).intersection(OPTIONAL)):
            if importlib.util.find_spec(library) is None:
                return library
            _libraries.load(library)
        return None

    def python(self, block: Block) -> None:
        """Execute a block, unless it needs a library that is not here."""
        tree = ast.parse(block.text)
        missing = self._missing(tree)
        if missing is None:
            code = compile("\n" * block.line + block.text, str(self.path), "exec")
            try:
                exec(code, self.names)
            except NameError as error:
                if not self.left_out:
                    raise
                missing = f"what an earlier block makes ({error})"
        if missing is not None:
            self.left_out.append(f"{self.path.name}:{block.line}: needs {missing}")

    def pycon(self, block: Block) -> None:
        """Check a session at the prompt, errors included, as doctest does."""
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        test = doctest.DocTestParser().get_doctest(
            block.text, self.names, self.path.name, str(self.path), block.line
        )
        said: list[str] = []
        runner = doctest.DocTestRunner(verbose=False, optionflags=flags)
        runner.run(test, out=said.append, clear_globs=False)
        self.names.update(test.globs)
        assert not runner.failures, "".join(said)


# ---- commands ----


class _Parsed(BaseException):
    """Thrown where a program has understood its arguments. Nothing catches it by accident."""


def _stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
    namespace, rest = self.parse_known_args(*args, **kwargs)
    assert not rest, f"unknown arguments {rest}"
    raise _Parsed(namespace)


def _dry_run(words: list[str]) -> None:
    """A Python program up to where it has parsed its arguments; one that takes none is read."""
    if words[:2] == ["-m", "build"]:  # a folder of tests has a module of that name
        return
    if words[0] == "-m":
        spec = importlib.util.find_spec(words[1])
        assert spec is not None, f"no module {words[1]}"
        if spec.submodule_search_locations:
            spec = importlib.util.find_spec(f"{words[1]}.__main__")
        assert spec is not None, f"{words[1]} cannot be run"
        assert spec.origin is not None
        name, file, arguments = words[1], Path(spec.origin), words[2:]
    else:
        name, file, arguments = "", ROOT / words[0], words[1:]
    if ROOT not in file.resolve().parents:
        return  # of another project: that it is there must do
    source = file.read_text(encoding="utf-8")
    if not name and "argparse" not in source:
        assert not arguments, f"{file.name} takes no arguments, got {arguments}"
        compile(source, file, "exec")
        return
    with (
        mock.patch.object(sys, "argv", [str(file), *arguments]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", _stop),
        mock.patch.object(_command_line.Parser, "parse_args", _stop),
    ):
        try:
            if name:
                runpy.run_module(name, run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(str(file), run_name="__main__")
        except _Parsed:
            return
        except SystemExit as error:  # it has no parser, and has run
            if error.code:
                raise AssertionError(f"{' '.join(words)}: {error}") from error


def _check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        for wanted in re.findall(r"^\.\[([\w,]+)\]$", word):
            unknown = set(wanted.split(",")) - set(extras["optional-dependencies"])
            assert not unknown, f"pyproject.toml has no extra {unknown}"
        if word.startswith((".", "dist/")) or "senet" in word:
            assert "install" in words or "wheel" in words


def _check_pytest(words: list[str]) -> None:
    files = [ROOT / word.split("::")[0] for word in words if not word.startswith("-")]
    existing = [path for path in files if path.exists()]
    for word, path in zip((w for w in words if not w.startswith("-")), files, strict=True):
        assert path.exists() or "/" not in word, f"{word}: no such file"
    if "-k" in words:
        wanted = re.findall(r"\w+", words[words.index("-k") + 1])
        text = "".join(
            file.read_text(encoding="utf-8")
            for path in existing
            for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))
        )
        for name in set(wanted) - {"and", "or", "not"}:
            assert name in text, f"-k {name}: nothing of that name"


def _check_make(words: list[str]) -> None:
    done = subprocess.run(
        ["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def check_command(line: str) -> None:
    """A line of a shell block: Python programs parse their arguments, ``make`` says what it would
    do, files and extras exist.

    Raises:
        AssertionError: it would fail, or nothing is known of such commands.
    """
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables set for the command
        words.pop(0)
    if not words:
        return
    program, rest = words[0], words[1:]
    if program == "torchrun":
        while rest[0].startswith("--"):
            rest = rest[1:] if "=" in rest[0] or rest[0] == "--standalone" else rest[2:]
    if program in ("python", "torchrun") and rest[:2] == ["-m", "pytest"]:
        program, rest = "pytest", rest[2:]
    if program in ("python", "torchrun"):
        _dry_run(rest)
    elif program == "make":
        _check_make(rest)
    elif program == "pip":
        _check_pip(rest)
    elif program == "pytest":
        _check_pytest(rest)
    else:
        known = ("git", "cd", "cmake", "nvcc", "compute-sanitizer", "run_package")
        assert Path(program).name in known, f"unknown command: {line}"


def commands(block: Block) -> Iterator[str]:
    """The lines of a shell block, continued ones joined."""
    yield from re.sub(r"\\\n\s*", " ", block.text).splitlines()


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Another current folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
