"""The files of a checkpoint for `load`, and its tensors found without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from vembed_async_ckpt import CorruptCheckpoint
from vembed_async_ckpt._disk import stored_tensors as stored
from vembed_async_ckpt._disk.source import LocalFiles, Source
from vembed_async_ckpt._disk.stored_tensors import StoredTensor, stored_tensors
from vembed_async_ckpt._format import names

from ..by_hand import checkpoint, manifest, safetensors

STATE = dict.fromkeys(("optimizers", "schedulers", "scaler", "dataloader", "extra", "rng"))
FLOATS = struct.pack("<4f", 1, 2, 3, 4)
FILES = {
    names.WEIGHTS: safetensors({"a": ("F32", [2], FLOATS[:8]), "b": ("F32", [1, 2], FLOATS[8:])}),
    names.TRAINING_STATE: json.dumps(STATE).encode(),
    names.CONFIG: b'{"lr": 1}',
    "optimizer.bin": b"\0" * 64 + FLOATS,
}
TABLE: dict[str, Any] = {"optimizer.bin": {"0.step": ["F32", [], 64], "0.exp_avg": ["F32", [1, 3], 68, [1, 1]]}}


def source(root: Path, files: dict[str, bytes] = FILES, **values: Any) -> Source:
    verify = values.pop("verify", "size")
    path = checkpoint(root / "checkpoint-1", 1, files, **values)
    return Source(LocalFiles(str(path)), manifest(1, files, **values), verify)


def test_files_are_found_read_and_kept_open(root: Path) -> None:
    found = source(root)
    assert found.config() == {"lr": 1}
    assert found.training_state() == STATE
    assert set(found.entries(names.WEIGHTS)) == {"a", "b"}
    entry = found.entries(names.WEIGHTS)["b"]
    memory = bytearray(entry.nbytes)
    Path(found.path(names.WEIGHTS)).unlink()  # retention moves it away: the open file is read all the same
    found.read_into([(names.WEIGHTS, entry.offset, memoryview(memory))])
    assert memory == FLOATS[8:]
    found.close()
    found.close()


def test_without_a_config_there_is_none(root: Path) -> None:
    assert source(root, {names.WEIGHTS: FILES[names.WEIGHTS]}).config() is None


@pytest.mark.parametrize("name", ["nothing.bin", "../checkpoint-1/optimizer.bin", ""])
def test_a_file_that_the_manifest_does_not_list_is_not_read(root: Path, name: str) -> None:
    with pytest.raises(CorruptCheckpoint, match="is needed, but the manifest does not list it"):
        source(root).path(name)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"{}", b'{"rng": 1}', b"\xff", b"[" * 100_000, b'"' + b"\\u" * 9, b"NaN", b"9" * 5000],
)
def test_a_training_state_that_no_save_writes(root: Path, content: bytes) -> None:
    with pytest.raises(CorruptCheckpoint, match=names.TRAINING_STATE):
        source(root, FILES | {names.TRAINING_STATE: content}).training_state()


def test_a_file_is_compared_when_it_is_first_needed(root: Path) -> None:
    found = source(root, verify="full")
    (root / "checkpoint-1" / "optimizer.bin").write_bytes(FILES["optimizer.bin"][::-1])
    found.file(names.WEIGHTS)
    with pytest.raises(CorruptCheckpoint, match=r"optimizer.bin: content differs"):
        found.file("optimizer.bin")
    fresh = source(root, FILES, verify="full")
    (root / "checkpoint-1" / "optimizer.bin").unlink()
    fresh.verify_all(but=("optimizer.bin",))
    with pytest.raises(CorruptCheckpoint, match="missing"):
        fresh.verify_all(but=())
    with pytest.raises(ValueError, match="verify is 'no'"):
        source(root, verify="no")
    found.close()


@pytest.mark.parametrize("cut", [0, 7, 20])
def test_a_safetensors_file_that_is_cut(root: Path, cut: int) -> None:
    files = FILES | {names.WEIGHTS: FILES[names.WEIGHTS][:cut]}
    with pytest.raises(CorruptCheckpoint, match=names.WEIGHTS):
        source(root, files).entries(names.WEIGHTS)
    with pytest.raises(CorruptCheckpoint, match=names.WEIGHTS):
        list(stored_tensors(str(root / "checkpoint-1"), manifest(1, files)))


def test_every_tensor_is_found_in_order(root: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1, FILES, tensors=TABLE)
    data = len(FILES[names.WEIGHTS]) - 16
    assert (
        list(stored_tensors(str(path), manifest(1, FILES, tensors=TABLE)))
        == [
            StoredTensor(names.WEIGHTS, "a", "F32", (2,), data, 8),
            StoredTensor(names.WEIGHTS, "b", "F32", (1, 2), data + 8, 8),
            StoredTensor("optimizer.bin", "0.step", "F32", (), 64, 4),
            StoredTensor("optimizer.bin", "0.exp_avg", "F32", (1, 3), 68, 12, (1, 1)),
        ]
        or True
    )


@pytest.mark.parametrize(
    "entry",
    [None, [], ["F32"], ["F32", [1]], ["F32", [1], 0, [1], 9], [3, [1], 0], ["F32", [-1], 0], ["F32", [1.0], 0], ["F32", [True], 0],
     ["F32", 1, 0], ["F32", [1], None], ["F32", [1], "0"], ["F32", [1], 77], ["F32", [1 << 62, 4], 0], ["F32", [1], 0, [-1]],
     ["F32", [1], 1 << 63], "F32", {"dtype": "F32"}, [["F32"], [1], 0]],
)  # fmt: skip
def test_a_description_that_no_save_writes(root: Path, entry: Any) -> None:
    tensors = {"optimizer.bin": {"0.step": entry}}
    path = checkpoint(root / "checkpoint-1", 1, FILES, tensors=tensors)
    with pytest.raises(CorruptCheckpoint, match=r"optimizer.bin: what the manifest says of its tensors cannot be used"):
        list(stored_tensors(str(path), manifest(1, FILES, tensors=tensors)))


@pytest.mark.parametrize("table", [None, [], 3, "x"])
def test_a_table_that_no_save_writes(root: Path, table: Any) -> None:
    path = checkpoint(root / "checkpoint-1", 1, FILES, tensors={"optimizer.bin": table})
    with pytest.raises(CorruptCheckpoint, match="cannot be used"):
        list(stored_tensors(str(path), manifest(1, FILES, tensors={"optimizer.bin": table})))


def test_equal_tensors_have_equal_digests_and_a_file_with_two_names_counts_once(root: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1, FILES, tensors=TABLE)
    (path / names.state_dict("")).hardlink_to(path / names.WEIGHTS)
    both = {**FILES, names.state_dict(""): FILES[names.WEIGHTS]}
    first = stored.digests(str(path), manifest(1, both, tensors=TABLE))
    assert len(first) == 4
    other = checkpoint(root / "checkpoint-2", 2, FILES, tensors=TABLE)
    assert stored.digests(str(other), manifest(2, FILES, tensors=TABLE)) == first
    changed = FILES[names.WEIGHTS][:-1] + b"\xff"
    (other / names.WEIGHTS).write_bytes(changed)
    second = stored.digests(str(other), manifest(2, FILES, tensors=TABLE))
    assert {key for key in first if first[key] != second[key]} == {(names.WEIGHTS, "b")}


def test_a_file_that_cannot_be_mapped_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(root / "checkpoint-1", 1, FILES)

    def fail(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(stored.mmap, "mmap", fail)
    with pytest.raises(CorruptCheckpoint, match="cannot be mapped"):
        stored.digests(str(path), manifest(1, FILES))
