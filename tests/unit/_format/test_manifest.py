"""The manifest: what is written comes back, and nothing else is read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import xxhash

from vembed_async_ckpt import CorruptCheckpoint
from vembed_async_ckpt._format import manifest as manifests
from vembed_async_ckpt._format.manifest import FileRecord, Manifest, parse, too_large

FULL = Manifest(
    save_id="0f" * 16,
    step=7,
    sequence=3,
    world_size=4,
    ranks=(0, 2),
    time=1.5,
    versions={"torch": "2.13"},
    metrics={"loss": 0.25, "steps": 3},
    names={"model.safetensors": {"w": "m.w", "ü": "ü"}},
    tensors={"optimizer.bin": {"0.exp_avg": ["float32", [2, 3], 64]}},
    files={"model.safetensors": FileRecord(10, "aa" * 16), "inner/x.json": FileRecord(0, "bb" * 16)},
)


def signed(**changes: Any) -> bytes:
    """The manifest of FULL with other values (... removes a key), and a hash that fits."""
    body = {key: value for key, value in {**json.loads(FULL.to_bytes()), **changes}.items() if value is not ...}
    del body["self"]
    before = json.dumps(body, ensure_ascii=False)[:-1].encode() + b","
    return before + b'"self":"' + xxhash.xxh3_128_hexdigest(before).encode() + b'"}'


def test_what_is_written_comes_back() -> None:
    assert parse(FULL.to_bytes(), file="m") == FULL
    bare = Manifest(save_id="0" * 32, step=None, sequence=0)
    assert parse(bare.to_bytes(), file="m") == bare
    assert parse(signed(), file="m") == FULL


def test_metrics_that_json_has_no_numbers_for_come_back() -> None:
    """As strict JSON: no reader meets NaN as a number."""
    found = Manifest("0" * 32, 1, 1, metrics={"a": math.nan, "b": math.inf, "c": -math.inf}).to_bytes()

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    json.loads(found, parse_constant=refuse)
    metrics = parse(found, file="m").metrics
    assert math.isnan(metrics["a"])
    assert (metrics["b"], metrics["c"]) == (math.inf, -math.inf)


def test_the_newest_is_the_largest() -> None:
    older, newer = (Manifest("0" * 32, step, sequence) for step, sequence in ((None, 1), (0, 1)))
    assert older.order < newer.order < Manifest("0" * 32, None, 2).order


def test_no_byte_can_change() -> None:
    """Every flip of a bit and every cut is noticed."""
    content = FULL.to_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 7
        with pytest.raises(CorruptCheckpoint, match=r"^m: unusable manifest"):
            parse(bytes(flipped), file="m")
        with pytest.raises(CorruptCheckpoint):
            parse(content[:at], file="m")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"format": "other"}, "format is 'other'"),
    ({"version": 2}, "format version 2"),
    ({"save_id": "../../etc"}, "save_id is"),
    ({"save_id": None}, "save_id is None"),
    ({"save_id": ...}, "key 'save_id' is missing"),
    ({"files": ...}, "key 'files' is missing"),
    ({"step": "many"}, "step is 'many'"),
    ({"step": []}, "step is '[]'"),
    ({"step": 1.5}, "step is '1.5'"),
    ({"step": True}, "step is 'True'"),
    ({"sequence": -1}, "sequence is '-1'"),
    ({"sequence": "3"}, "sequence is '3'"),
    ({"sequence": None}, "sequence is 'None'"),
    ({"sequence": 1 << 70}, "sequence is"),
    ({"world_size": 0}, "world_size is '0'"),
    ({"world_size": 2.0}, "world_size is '2.0'"),
    ({"ranks": [0, "1"]}, "a rank is '1'"),
    ({"ranks": [-1]}, "a rank is '-1'"),
    ({"ranks": 3}, "ranks is '3'"),
    ({"time": "noon"}, "time is 'noon'"),
    ({"time": 10**400}, "too large"),
    ({"versions": []}, "versions is"),
    ({"metrics": [1]}, "metrics is"),
    ({"metrics": {"loss": "low"}}, "a metric is 'low'"),
    ({"metrics": {"loss": True}}, "a metric is 'True'"),
    ({"metrics": {"loss": {"$float": "1.5"}}}, "a metric is"),
    ({"metrics": {"loss": 10**400}}, "too large"),
    ({"names": None}, "names is 'None'"),
    ({"tensors": 3}, "tensors is '3'"),
    ({"files": []}, "files is '[]'"),
    ({"files": {"/etc/passwd": {"size": 1, "xxh3_128": ""}}}, "leaves the directory"),
    ({"files": {"../x": {"size": 1, "xxh3_128": ""}}}, "leaves the directory"),
    ({"files": {"x": {"size": -1, "xxh3_128": ""}}}, "unusable file record"),
    ({"files": {"x": {"size": True, "xxh3_128": ""}}}, "unusable file record"),
    ({"files": {"x": {"size": 1.0, "xxh3_128": ""}}}, "unusable file record"),
    ({"files": {"x": {"size": 1, "xxh3_128": 7}}}, "unusable file record"),
    ({"files": {"x": {"size": 1}}}, "key 'xxh3_128' is missing"),
    ({"files": {"x": None}}, "NoneType"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_a_value_that_no_save_writes_is_refused_though_the_hash_fits(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"^m: unusable manifest: ") as raised:
        parse(signed(**changes), file="m")
    assert said in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"1", b"{}", b"\xff\xfe", b"[" * 100_000, b'"self"'])
def test_what_is_no_manifest_at_all(content: bytes) -> None:
    with pytest.raises(CorruptCheckpoint):
        parse(content, file="m")


def test_a_manifest_that_could_not_be_read_back_is_known_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    content = FULL.to_bytes()
    assert too_large(content) is None
    monkeypatch.setattr(manifests, "MAX_BYTES", len(content) - 1)
    assert f"at most {len(content) - 1}" in str(too_large(content))
    with pytest.raises(CorruptCheckpoint, match="can be read back"):
        parse(content, file="m")
