"""What ``make gpu`` brought home, for its tests."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

import pretended

needs_card = pytest.mark.skipif(pretended.why_not() is not None, reason=str(pretended.why_not()))


def home(path: Path) -> dict[str, str]:
    """The texts in the file, by name; the summary is the first."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert members[0].name == "summary.txt"
        texts = {}
        for member in members:
            file = tar.extractfile(member)
            assert file is not None
            texts[member.name] = file.read().decode(errors="replace")
        return texts


def lines(path: Path) -> dict[str, dict[str, Any]]:
    """The stages of the summary, by name."""
    stages = json.loads(home(path)["summary.json"])["stages"]
    return {line["stage"]: line for line in stages}
