"""Records: reading, writing, their schema, and the same figures as CSV."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA_FILE = Path(__file__).with_name("schema.json")
DIGITS = 5  # significant ones; no measurement here has more
Record = dict[str, Any]


class InvalidRecord(ValueError):
    """A record that is not what ``schema.json`` says; the message names the place."""


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return None  # JSON has no word for it
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def dumps(record: Record) -> str:
    """JSON with one line per key, and one per entry of a list of objects: short, and diffable."""
    lines = []
    for key, value in _rounded(record).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            entries = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in value)
            lines.append(f" {json.dumps(key)}: [\n  {entries}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write(record: Record, path: Path) -> None:
    """Write a record at once, so that whoever reads it finds a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, dumps(record))


def replace(path: Path, text: str) -> None:
    """Write a file at once."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_json(path: Path) -> Record:
    """What a file has that somebody may just be writing; empty where there is none, or half."""
    try:
        found: Record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def read(path: Path) -> Record:
    """A record from a file.

    Raises:
        InvalidRecord: it is not JSON, or not what ``schema.json`` says.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidRecord(f"{path}: not JSON: {error}") from None
    try:
        validate(record)
    except InvalidRecord as error:
        raise InvalidRecord(f"{path}: {error}") from None
    return record


# -- the schema ------------------------------------------------------------------------------------

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
    "boolean": bool, "null": type(None),
}  # fmt: skip


def validate(record: Any) -> None:
    """Raise :class:`InvalidRecord` where a record departs from ``schema.json``.

    The keywords of JSON Schema that this schema uses and no others, so that a machine on which
    nothing can be installed checks its records too; an unknown keyword is an error.
    """
    schema = json.loads(SCHEMA_FILE.read_text())
    for place, fault in _faults(record, schema, schema, "record"):
        raise InvalidRecord(f"{place}: {fault}")


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool) and name != "boolean":
        return False
    return isinstance(value, _TYPES[name])


def _faults(value: Any, schema: Any, root: Any, place: str) -> Iterator[tuple[str, str]]:
    for keyword, want in schema.items():
        if keyword in ("$schema", "$defs", "title", "description", "then"):
            continue
        if keyword == "$ref":
            yield from _faults(value, root["$defs"][want.rpartition("/")[2]], root, place)
        elif keyword == "type":
            names = [want] if isinstance(want, str) else want
            if not any(_is(value, name) for name in names):
                yield place, f"expected {' or '.join(names)}, got {type(value).__name__}"
                return
        elif keyword == "const":
            if value != want:
                yield place, f"expected {want!r}, got {value!r}"
        elif keyword == "enum":
            if value not in want:
                yield place, f"expected one of {want}, got {value!r}"
        elif keyword == "minimum":
            if isinstance(value, (int, float)) and value < want:
                yield place, f"expected at least {want}, got {value}"
        elif keyword == "required":
            yield from ((place, f"{name!r} is missing") for name in want if name not in value)
        elif keyword == "properties":
            for name in want.keys() & value.keys():
                yield from _faults(value[name], want[name], root, f"{place}.{name}")
        elif keyword == "additionalProperties":
            for name in value.keys() - schema.get("properties", {}).keys():
                if want is False:
                    yield place, f"unexpected {name!r}"
                elif want is not True:
                    yield from _faults(value[name], want, root, f"{place}.{name}")
        elif keyword == "items":
            for index, item in enumerate(value):
                yield from _faults(item, want, root, f"{place}[{index}]")
        elif keyword == "allOf":
            for part in want:
                yield from _faults(value, part, root, place)
        elif keyword == "if":
            if not any(True for _ in _faults(value, want, root, place)):
                yield from _faults(value, schema["then"], root, place)
        else:
            raise NotImplementedError(f"schema keyword {keyword!r}")


# -- CSV -------------------------------------------------------------------------------------------

_WHAT = ("network", "layer", "mode", "dtype", "layout", "batch", "size", "bytes", "se_modules")
_FIGURES = ("samples", "median_us", "q1_us", "q3_us", "ci_low_us", "ci_high_us", "min_us",
            "over_limit")  # fmt: skip
_COSTS = ("saved_bytes", "peak_bytes", "dram_bytes")
_COUNTS = ("kernels", "copies", "operators")


def rows(record: Record) -> Iterator[dict[str, Any]]:
    """One row per case, provider and metric (wall, device, host)."""
    for entry in [*record["results"], *record.get("small_call", [])]:
        for name, provider in entry["providers"].items():
            start = {"kind": record["kind"], **{key: entry.get(key) for key in _WHAT}}
            start |= {
                "provider": name,
                "status": provider["status"],
                "reason": provider.get("reason"),
                "error": provider.get("error"),
                **{key: provider.get(key) for key in _COSTS},
                **{key: provider.get("launches", {}).get(key) for key in _COUNTS},
            }
            timed = [m for m in ("wall", "device", "host") if "median_us" in provider.get(m, {})]
            for metric in timed or [None]:
                figures = provider.get(metric, {}) if metric else {}
                yield {**start, "metric": metric, **{key: figures.get(key) for key in _FIGURES}}


def write_csv(record: Record, path: Path) -> None:
    """All figures of a record as a table, nothing for what it lacks."""
    found = [{key: "" if v is None else v for key, v in row.items()} for row in rows(record)]
    with path.open("w", newline="") as file:
        columns = found[0] if found else {}
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
