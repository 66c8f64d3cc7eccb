"""The notes that say what is still to be shipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vembed_async_ckpt import CorruptCheckpoint, KeepLast
from vembed_async_ckpt._disk import deletion, notes
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._disk.manifests import read as read_manifest
from vembed_async_ckpt._disk.notes import Note, Target
from vembed_async_ckpt._format import names

from ..by_hand import checkpoint, save_id

FS = LocalFilesystem()


def note(number: int, *, most: int | None = None, begun: bool = False) -> Note:
    targets = Target({"kind": "upload", "url": "s3://bucket/run"}, begun=begun), Target({"kind": "push"})
    return Note(save_id(number), f"checkpoint-{number}", number, number, targets, most)


def committed(root: Path, *numbers: int) -> list[tuple[str, object]]:
    paths = [str(checkpoint(root / f"checkpoint-{number}", number)) for number in numbers]
    return [(path, read_manifest(path)) for path in paths]


def test_a_note_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Also after it was changed; removing it twice is no error."""
    first = note(1, most=3).with_target(0, begun=True, sent={"model.safetensors": '"e tag"'})
    notes.put(FS, str(tmp_path), note(1))
    notes.put(FS, str(tmp_path), first)
    assert notes.read(str(tmp_path), save_id(1)) == first
    assert first.begun
    assert first.targets[1] == note(1).targets[1]
    assert notes.waiting(str(tmp_path)) == {save_id(1)}
    for _ in range(2):
        notes.remove(FS, str(tmp_path), save_id(1))
        assert notes.read(str(tmp_path), save_id(1)) is None
        assert notes.waiting(str(tmp_path)) == set()


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"format": "other"}', b"\xff", "other save", "path", "version"],
    ids=repr,
)
def test_a_damaged_note_is_reported_and_still_holds_its_checkpoint(tmp_path: Path, damage: bytes | str) -> None:
    """Nothing proves that its checkpoint was shipped, so retention leaves it alone."""
    root = str(tmp_path)
    changes = {"other save": {"save_id": save_id(7)}, "path": {"name": "../checkpoint-1"}, "version": {}}
    if isinstance(damage, bytes):
        content = damage
    else:
        content = notes._render(replace(note(1), **changes[damage]))
        content = content.replace(b'"version": 1', b'"version": 2') if damage == "version" else content
    notes.put(FS, root, note(1))
    Path(names.shipping_note(root, save_id(1))).write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="cannot be used"):
        notes.read(root, save_id(1))
    problems: list[str] = []
    assert notes.readable(root, problems) == []
    assert len(problems) == 1
    there = committed(tmp_path, 1, 2)
    assert deletion.prune(FS, root, KeepLast(1), there, lambda: None) == []  # type: ignore[arg-type]
    assert notes.drop_unpublished(FS, root) == []


def test_retention_waits_until_a_checkpoint_is_shipped(tmp_path: Path) -> None:
    root, there = str(tmp_path), committed(tmp_path, 1, 2, 3)
    for number in (1, 3):
        notes.put(FS, root, note(number))
    assert deletion.prune(FS, root, KeepLast(1), there, lambda: None) == ["checkpoint-2"]  # type: ignore[arg-type]
    notes.remove(FS, root, save_id(1))
    assert deletion.expendable(KeepLast(1), there) == [str(tmp_path / "checkpoint-1")]  # type: ignore[arg-type]
    assert deletion.prune(FS, root, KeepLast(1), committed(tmp_path, 1, 3), lambda: None) == ["checkpoint-1"]  # type: ignore[arg-type]


def test_the_oldest_that_nobody_has_begun_give_way(tmp_path: Path) -> None:
    """What retention keeps anyway does not count."""
    root, there = str(tmp_path), committed(tmp_path, *range(1, 7))
    for number in range(1, 7):
        notes.put(FS, root, note(number, most=2, begun=number == 1))
    given_up: list[Note] = []
    gone = deletion.prune(FS, root, KeepLast(2), there, lambda: None, given_up.append)  # type: ignore[arg-type]
    assert [each.name for each in given_up] == ["checkpoint-2", "checkpoint-3"]
    assert gone == ["checkpoint-3", "checkpoint-2"]
    assert [each.name for each in notes.readable(root)] == [f"checkpoint-{n}" for n in (1, 4, 5, 6)]
    assert notes.giving_way(notes.readable(root)[:1]) == []


def test_notes_without_their_checkpoint_are_dropped(tmp_path: Path) -> None:
    """Gone, replaced or never published; one with a checkpoint that cannot be read stays."""
    root = str(tmp_path)
    for number in range(1, 5):
        notes.put(FS, root, note(number))
    checkpoint(tmp_path / "checkpoint-1", 1)
    checkpoint(tmp_path / "checkpoint-2", 9)
    (checkpoint(tmp_path / "checkpoint-4", 4) / names.MANIFEST).write_bytes(b"damaged")
    half = Path(names.shipping_note(root, save_id(5)) + ".new")
    half.write_bytes(b"{")
    assert {each.name for each in notes.drop_unpublished(FS, root)} == {"checkpoint-2", "checkpoint-3"}
    assert not half.exists()
    assert notes.waiting(root) == {save_id(1), save_id(4)}
