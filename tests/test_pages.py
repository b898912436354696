"""The HTML report and the documentation in a real browser, on a telephone and on a desk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import browser
from checkout import ROOT

DOCS = ("index", "performance", "measurements", "losses", "tutorial", "install", "tuning",
        "tuning-log", "senet.zh-CN")  # fmt: skip


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Browser]:
    if browser.executable() is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} on the path")
    with browser.browser() as opened:
        yield opened


def _fits(tab: browser.Browser, page: Path) -> None:
    for width in browser.WIDTHS:
        found = tab.measure(page, width)
        assert found["room"] == width
        assert found["found"] == [], f"{page.name} at {width}"
        assert found["width"] <= width, f"{page.name} at {width}"


@pytest.mark.slow  # a browser
def test_what_sticks_out_is_found(tab: browser.Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    head = '<!doctype html><meta name="viewport" content="width=device-width">'
    page.write_text(
        head + '<p>all right<div style="overflow-x: auto"><pre>' + 300 * "x" + "</pre></div>"
    )
    _fits(tab, page)
    page.write_text(head + "<pre>" + 300 * "x" + "</pre>")
    found = tab.measure(page, 400, tmp_path / "page.png")
    assert found["width"] > 1000
    assert any(text.startswith("pre ") for text in found["found"]) or found["width"] > found["room"]
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # all plots are drawn, and a browser
def test_report_fits(tab: browser.Browser, tmp_path: Path) -> None:
    for library in ("jinja2", "matplotlib"):
        pytest.importorskip(library)
    from benchmarks.page import main

    assert main(["--quiet", "--out", str(tmp_path)]) == 0
    _fits(tab, tmp_path / "report.html")


@pytest.mark.slow  # builds the documentation
def test_documentation_fits(tab: browser.Browser, tmp_path: Path) -> None:
    for library in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(library)
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "docs", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in DOCS:
        _fits(tab, tmp_path / f"{name}.html")
