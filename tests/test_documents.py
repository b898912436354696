"""README and docs do what they say: code runs, commands parse, tables are current, links lead
somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

pytest.importorskip("markdown_it")

import markdown_blocks as markdown
from benchmarks import claims
from tools import support_table

ROOT = markdown.ROOT
DOCUMENTS = markdown.documents()
of_every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=[path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
)


@of_every_document
def test_code_runs(path: Path, tmp_path: Path) -> None:
    """One namespace per document: blocks build on the ones before."""
    session = markdown.Session(path)
    with markdown.inside(tmp_path):
        for block in markdown.blocks(path):
            if block.language == "python":
                session.python(block)
            elif block.language == "pycon":
                session.pycon(block)
    for reason in session.left_out:
        print("left out:", reason)


@pytest.fixture(scope="module")
def readers_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with what is installed here, made ready as ``make`` does it: no
    help from the tests with libraries that do not import."""
    for library in ("timm", "torchvision"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"not installed: {library}")
    folder = tmp_path_factory.mktemp("reader") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    Path(own.stdout.strip(), "installed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([python, ROOT / "tools" / "torchvision_ops.py"], check=True)
    return python


@pytest.mark.slow  # an environment, and processes that import everything
@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "docs/index.md"])
def test_snippets_run_without_our_help(name: str, readers_python: Path, tmp_path: Path) -> None:
    blocks = [b for b in markdown.blocks(ROOT / name) if b.language == "python"]
    assert blocks
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(block.text for block in blocks), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([readers_python, script], cwd=tmp_path, env=environment, check=True)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@of_every_document
def test_commands_are_understood(path: Path) -> None:
    for block in markdown.blocks(path):
        if block.language == "sh":
            for line in markdown.commands(block):
                markdown.check_command(line)


@of_every_document
def test_excerpts_are_of_the_sources(path: Path) -> None:
    """What is shown of C++ and CUDA stands so in the tree. Diffs are applied in
    ``test_worked_example.py``; there is no other kind of block."""
    known = {"python", "pycon", "sh", "cpp", "diff", *markdown.PLAIN}
    files = [path for glob in ("csrc/**/*", "examples/*.cu", "examples/**/*.cpp")
             for path in ROOT.glob(glob)]  # fmt: skip
    sources = [_folded(f.read_text(encoding="utf-8")) for f in files if f.is_file()]
    for block in markdown.blocks(path):
        assert block.language in known or block.language.startswith("{"), block
        if block.language == "cpp":
            for part in block.text.split("// ...\n"):
                assert any(_folded(part) in source for source in sources), part


def _folded(text: str) -> str:
    return " ".join(text.split())


# ---- figures ----

#: A number with a unit of what is measured, in English and Chinese.
_NUMBER = r"(?<![\w.])\d[\d.,]*"
_UNITS = (
    "µs", "us", "ns", "ms", "s", "[KMGT]i?B(?:/s)?", "(?:micro|milli|nano)?seconds?", "minutes?",
    "hours?", "instructions", "times", "per cent",
)  # fmt: skip
FIGURE = re.compile(
    rf"{_NUMBER}[ \u00a0]?(?:(?:{'|'.join(_UNITS)})(?!\w)|x(?![\w²])|×(?!\s*\d)|%|倍|微秒|毫秒|秒)"
    r"|(?:(?:ten|[a-z]+ty)[ -])+(?:to [a-z]+ )?per cent"
    rf"|{_NUMBER} \({_NUMBER} (?:to|至) [\d.]+\)"  # a median, and what it lies between
)
#: Pages that are let through, whole.
LEFT_OUT = {
    "cuda-kernels.md": "a program writes it",
    "reliability.md": "a program writes it",
    "cost.md": "of a model: outside of its blocks are the times that it assumes",
    "tuning-log.md": "a log of what was measured by hand, with the commands",
}
#: What is no measurement, though it has a unit: where, and why.
ALLOWED = {
    ("README.md", "95 %"): "the level of an interval",
    ("README.zh-CN.md", "95 %"): "the level of an interval",
    ("backends.md", "64 MiB"): "trust.problem.MOST_BYTES: what a proof takes at most",
    ("backends.md", "30 seconds"): "how long a process waits for another one's verdict at most",
    ("backends.md", "15 seconds"): "how often make gpu writes its file",
    ("kernels.md", "16 KB"): "the size of a block in csrc/cpu",
    ("losses.md", "5 %"): "summary.LOSS: from which on a comparison is lost",
    ("performance.md", "5 %"): "summary.LOSS: from which on a comparison is lost",
    ("tuning.md", "4 MiB"): "the bound of a regime, in benchmarks/regimes.py",
    ("senet.md", "209 ms"): "the paper's",
    ("senet.zh-CN.md", "190 ms"): "the paper's",
    ("senet.zh-CN.md", "164 ms"): "the paper's",
}


def _typed(text: str) -> list[str]:
    """Figures with a unit outside of blocks that are generated, of code and of links' targets."""
    text = re.sub(r"<!-- (\w+):begin .*?<!-- \1:end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "", text, flags=re.DOTALL)
    return [found[0] for found in FIGURE.finditer(_folded(text))]


PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_measured_figure_is_typed(path: Path) -> None:
    """Each comes from a record, by a program: ``python -m benchmarks.readme`` and others."""
    if path.name in LEFT_OUT:
        return
    typed = set(_typed(path.read_text(encoding="utf-8")))
    allowed = {figure for name, figure in ALLOWED if name == path.name}
    assert typed - allowed == set(), "take it from a record, or move it to docs/tuning-log.md"
    assert allowed - typed == set(), "no longer there: take it out of ALLOWED"


def test_typed_figures_are_found() -> None:
    wrong = {
        "it takes 27 µs": "27 µs", "in 0.9 microseconds.": "0.9 microseconds", "12 MB": "12 MB",
        "1.08× the speed": "1.08×", "1.9x": "1.9x", "2.5 times as fast": "2.5 times",
        "a third (33 %)": "33 %", "at 1,200 GB/s": "1,200 GB/s",
        "about 7,000 instructions": "7,000 instructions",
        "between a few and some thirty per cent": "thirty per cent", "快 1.5 倍": "1.5 倍",
        "98.89 (98.61 to 99.44) with SE": "98.89 (98.61 to 99.44)", "3 s": "3 s",
        "which takes 15\nms": "15 ms", "4 毫秒": "4 毫秒",
    }  # fmt: skip
    for text, figure in wrong.items():
        assert _typed(text) == [figure]
    right = (
        "3x3 convolutions, 160x160 images, batch 4 of 160², sm_90, 2N bytes, torch 2.13.0, R = 16",
        "three times as long, 28 layers, `12 MB`, [a](b%20c) 5 networks, 1x1, 8x128 images",
        "```text\n12 ms\n```", "<!-- benchmark:begin a b -->\n12 ms\n<!-- benchmark:end -->",
    )  # fmt: skip
    for text in right:
        assert _typed(text) == [], text


# ---- the claims about SENet ----

CLAIMS = ROOT / "docs" / "senet_claims.json"


def test_record_of_the_claims(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is as its program writes it, its commands are ones, and a command renews its run alone."""
    text = CLAIMS.read_text(encoding="utf-8")
    names = runpy.run_path(str(ROOT / "docs" / "senet_claims.py"))
    record = json.loads(text)
    assert names["dumps"](record) == text
    for run in record["runs"].values():
        markdown.check_command(run["command"])
        assert run["date"] or all("2026-11-24" in note for note in run["note"])
    copy = tmp_path / CLAIMS.name
    copy.write_text(text, encoding="utf-8")
    monkeypatch.setitem(names["_keep"].__globals__, "RECORD", copy)
    monkeypatch.setattr(sys, "argv", ["senet_claims.py", "memory", "--record"])
    names["_keep"]({"rows": [["resnet50", "reference", 1.0, 2.0]]})
    renewed = json.loads(copy.read_text(encoding="utf-8"))
    run = renewed["runs"].pop("memory")
    assert run["rows"] == [["resnet50", "reference", 1.0, 2.0]]
    assert run["machine"]
    assert record["runs"].pop("memory")["command"] == run["command"]
    assert renewed == record
    monkeypatch.setattr(sys, "argv", ["senet_claims.py", "accuracy", "--seeds", "1", "--record"])
    with pytest.raises(SystemExit, match=r"the page has no `python docs/senet_claims\.py acc"):
        names["_keep"]({"rows": []})
    monkeypatch.setattr(sys, "argv", ["senet_claims.py", "scale", "--record"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit, match="the page's run is `OMP_NUM_THREADS=1 python docs"):
        names["_keep"]({"rows": []})
    assert json.loads(copy.read_text(encoding="utf-8"))["runs"]["scale"] == record["runs"]["scale"]


@pytest.mark.parametrize("table", claims.TABLES)
def test_both_pages_show_each_table_of_the_claims(table: str) -> None:
    """With the same figures; that they are the record's another test sees."""
    shown = []
    for page, suffix in (("senet.md", ""), ("senet.zh-CN.md", "-zh")):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        _, _, rest = text.partition(f"<!-- benchmark:begin {table}{suffix} senet_claims.json -->")
        block, end, _ = rest.partition("<!-- benchmark:end -->")
        assert end, f"{page} does not show {table}"
        lines = block.strip().splitlines()[1:]  # without command, date and machine
        shown.append(re.findall(r"\d[\d.,]*", "\n".join(lines)))
    assert shown[0] == shown[1]
    assert len(shown[0]) >= 6
    with pytest.raises(ValueError, match="table: expected one of claims-size"):
        claims.render({"runs": {}}, f"{table}-of-nothing", lambda lines: [], chinese=False)


def test_messages_of_the_faq_are_compared() -> None:
    """In headings and text, too: they stand in a session of their section, which runs."""
    sections = re.split(r"^## ", (ROOT / "docs" / "faq.md").read_text("utf-8"), flags=re.MULTILINE)
    compared = 0
    for section in sections:
        sessions = "".join(re.findall(r"```pycon\n(.*?)```", section, re.DOTALL))
        text = re.sub(r"```.*?```", "", section, flags=re.DOTALL)
        for code, quoted in re.findall(r"`([^`]*)`|\"([^\"]*)\"", text):
            said = (code or quoted).removesuffix(" ...")
            if " " not in said or said.startswith(("python ", "pip ", "import ")):
                continue
            compared += 1
            if said == "operator torchvision::nms does not exist":
                with pytest.raises(RuntimeError) as error:
                    torch.library.register_fake("torchvision::missing")(lambda: None)
                assert said in str(error.value).replace("missing", "nms")
            else:
                assert _folded(said) in _folded(sessions), said
    assert compared == 3


@of_every_document
def test_links_lead_somewhere(path: Path) -> None:
    broken = [markdown.broken_link(path, target) for target in markdown.links(path)]
    assert not any(broken), [reason for reason in broken if reason]


#: Written by commands, and not always there.
GENERATED = ("benchmarks/results/local", "docs/reliability_results.json")


def _missing_files(path: Path) -> list[str]:
    """What a document names in backticks of the repository's folders, and is not there."""
    folders = [
        f.name for f in ROOT.iterdir() if f.is_dir() and f.name not in (".git", "build", "dist")
    ]
    word = re.compile(
        rf"(?<![\w./-])(?:{'|'.join(map(re.escape, folders))})/[\w.{{}},*/-]*[\w}}*/]"
    )
    named = [name for text in markdown.inline_code(path) for name in word.findall(text)]
    return [
        name
        for name in named
        if not name.startswith(GENERATED)
        and not all(list(ROOT.glob(one.rstrip("/"))) for one in _alternatives(name))
    ]


def _alternatives(name: str) -> list[str]:
    """``{a,b}`` written out."""
    found = re.search(r"\{([^{}]*)\}", name)
    if not found:
        return [name]
    return [
        whole
        for one in found[1].split(",")
        for whole in _alternatives(name[: found.start()] + one + name[found.end() :])
    ]


@of_every_document
def test_files_named_in_backticks_exist(path: Path) -> None:
    if path.name != "CHANGELOG.md":  # which names what was there
        assert _missing_files(path) == []


def test_files_that_are_gone_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`csrc/cuda/block.cuh`, `csrc/cuda/{plan,block}.cpp`, `python tests/test_gone.py -k x`,"
        " `tools/gone_*.py`; but `csrc/cuda/plan.{cpp,h}`, `csrc/cuda/*.cuh`, `csrc/cpu/`,"
        " `x/docs/y`, `benchmarks/results/local`, `python -m benchmarks`"
    )
    assert _missing_files(page) == [
        "csrc/cuda/block.cuh", "csrc/cuda/{plan,block}.cpp", "tests/test_gone.py",
        "tools/gone_*.py",
    ]  # fmt: skip


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    table = page.partition("\n## Environment variables\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"SENET_KERNELS_[A-Z_]+", row)}
    files = [ROOT / "setup.py", ROOT / "Makefile"]
    files += [*(ROOT / "senet_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    read = {
        name
        for path in files
        for name in re.findall(r"SENET_KERNELS_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8"))
    }
    assert read == documented


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_support_table_is_what_dispatch_says(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert support_table.renewed(text) == text, "run python -m tools.support_table"


def test_support_table_tells_what_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    column = support_table.features.COLUMNS.index(("native", "cuda"))
    changed = dict(support_table.features.FEATURES)
    for row in ("gate tanh", "squeeze alone", "channel_scale alone"):
        cells = list(changed[row])
        cells[column] = support_table.features.FALLS_BACK
        changed[row] = tuple(cells)
    monkeypatch.setattr(support_table.features, "FEATURES", changed)
    table = support_table.table("en")
    assert "| fused | fused but for gate tanh | fused |" in table
    assert "| fused | falls back | fused |" in table
    with pytest.raises(ValueError, match="expected one of en, zh, got 'fr'"):
        support_table.table("fr")


@pytest.mark.parametrize(
    "line",
    ["python -m senet_kernels.train --no-such-option", "python -m senet_kernels.nothing",
     "make nothing-of-the-kind", "pip install -e .[nothing]", "pytest tests/test_nothing.py",
     "frobnicate"],
)  # fmt: skip
def test_wrong_commands_are_found(line: str) -> None:
    with pytest.raises(AssertionError):
        markdown.check_command(line)


def test_drawings_are_those_of_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    docs = ROOT / "docs"
    monkeypatch.syspath_prepend(str(docs))
    names = runpy.run_path(str(docs / "kernel_drawing.py"))
    monkeypatch.setitem(names["main"].__globals__, "__file__", str(tmp_path / "drawing.py"))
    names["main"]()
    drawn = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert drawn == ["backward.svg", "cpu.svg", "forward.svg", "traffic.svg"]
    page = (docs / "how-it-works.md").read_text(encoding="utf-8")
    for name in drawn:
        assert (tmp_path / name).read_bytes() == (docs / name).read_bytes(), name
        assert f"({name})" in page


def test_one_version() -> None:
    from senet_kernels import __version__

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == __version__  # type: ignore[index]
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["test.yml", "wheels.yml"])
def test_workflows_are_yaml_and_name_what_is_there(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    text = (ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")
    for job in yaml.safe_load(text)["jobs"].values():
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                if line.startswith("make "):
                    markdown.check_command(re.sub(r"\$\{\{.*?\}\}", "x", line))
    assert (ROOT / ".ci" / "run").exists()
    assert ("run: .ci/run" in text) == (name == "test.yml")
