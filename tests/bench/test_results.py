"""Result files: units in their keys, a schema, and older ones that are still read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from vembed_async_ckpt.bench import results
from vembed_async_ckpt.bench.figures import of

from .made_up import FAST, SLOW, result

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("bench-*.json"))
SCHEMA = json.loads(results.SCHEMA.read_text())


def problems(found: dict[str, Any]) -> list[str]:
    """What the schema says against a result of its own format; of `oneOf` alone nobody could tell."""
    part = next(each for each in SCHEMA["oneOf"] if each["properties"]["format"]["const"] == found["format"])
    validator = jsonschema.Draft202012Validator({**part, "$defs": SCHEMA["$defs"]})
    return [error.message[:200] for error in validator.iter_errors(found)]


def test_the_schema_is_one():
    """Of the draft that it names."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_result_is_as_the_schema_says(file: Path):
    """And is read, old ones too: figures come out of it where its measures have some."""
    found = json.loads(file.read_text())
    assert problems(found) == []
    read = results.read(file)
    assert of(read).engines or list(read["measures"]) == ["scaling"]


def test_what_is_written_is_as_the_schema_says(tmp_path: Path):
    """Keys say seconds or bytes, and reading gives back what was written."""
    found = result({"ours": FAST, "dcp": SLOW})
    results.write(tmp_path / "x.json", found)
    raw = json.loads((tmp_path / "x.json").read_text())
    assert problems(raw) == []
    assert "blocked_s" in raw["measures"]["cost"]["samples"][0]["saves"][0]
    assert results.read(tmp_path / "x.json") == json.loads(json.dumps(found))


@pytest.mark.parametrize("spoil", ["unit", "missing", "type", "extra"])
def test_the_schema_refuses_what_is_not_so(tmp_path: Path, spoil: str):
    """A key without its unit, one that is missing, a number that is text, one that nobody knows."""
    results.write(tmp_path / "x.json", result({"ours": FAST}))
    raw = json.loads((tmp_path / "x.json").read_text())
    visit = raw["measures"]["cost"]["samples"][0]
    if spoil == "unit":
        visit["saves"][0]["blocked"] = visit["saves"][0].pop("blocked_s")
    elif spoil == "missing":
        del visit["alone"]
    elif spoil == "type":
        visit["loads"][0]["warm_s"] = "0.1"
    else:
        raw["measures"]["speed"] = {"seconds": 1, "samples": []}
    assert problems(raw) != []


def test_units_come_and_go_for_every_key():
    """No two names have the same key in a file, and a list or an object without a number has none."""
    assert len(results.NAMES) == len(results.UNITS)
    assert not set(results.NAMES) & set(results.UNITS)
    value = dict.fromkeys(results.UNITS, 1.5) | {"engine": "x", "direct": True}
    assert set(results.with_units(value)) == {*results.UNITS.values(), "engine", "direct"}
    assert results.without_units(results.with_units(value)) == value
    nested = {"blocked": [{"blocked": 1.0, "gpu": {"training": 3}}], "quiet": [1.0, 2.0], "beside": [], "gpu": None}
    assert results.with_units(nested) == {
        "blocked": [{"blocked_s": 1.0, "gpu": {"training_bytes": 3}}],
        "quiet_s": [1.0, 2.0],
        "beside": [],
        "gpu": None,
    }
    assert results.without_units(results.with_units(nested)) == nested
