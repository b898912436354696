"""Git, for tests of the tree itself: which files it tracks, and whether a patch applies."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")


def git(*arguments: str, folder: Path, text: str | None = None) -> str:
    """What a command of git prints; it has to succeed."""
    done = subprocess.run(
        ["git", *arguments], cwd=folder, input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked(folder: Path = ROOT) -> list[str]:
    """The tracked files that are there, by their paths within the folder."""
    names = git("ls-files", "-z", folder=folder).split("\0")
    return [name for name in names if (folder / name).is_file()]
