"""A directory is compared with its manifest: every way in which a file can be wrong is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vembed_async_ckpt import CorruptCheckpoint
from vembed_async_ckpt._disk import manifests
from vembed_async_ckpt._format import names

from ..by_hand import FILES, checkpoint, manifest, write_files


def test_a_whole_checkpoint_is_read_and_passes_every_check(root: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1)
    found = manifests.read(str(path))
    assert found == manifest(1)
    hashed: list[int] = []
    for how in ("none", "size", "full"):
        manifests.check(str(path), found, how, hashed.append)  # type: ignore[arg-type]
    assert sum(hashed) == sum(map(len, FILES.values()))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def to_link(path: Path) -> None:
    moved = path.rename(path.parent.parent / "moved")
    path.symlink_to(moved)


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (Path.unlink, "missing; the manifest lists it with"),
    (cut, "bytes, the manifest says"),
    (flip, "content differs: xxh3_128"),
    (to_link, "cannot be read"),
    (to_pipe, "cannot be read"),
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_a_damaged_file_is_named(root: Path, damage: Callable[[Path], object], said: str, name: str) -> None:
    path = checkpoint(root / "checkpoint-1", 1)
    found = manifests.read(str(path))
    damage(path / name)
    with pytest.raises(CorruptCheckpoint, match=said) as raised:
        manifests.check(str(path), found, "full")
    assert str(raised.value).startswith(str(path / name))
    manifests.check(str(path), found, "none")
    manifests.check(str(path), found, "full", files=[other for other in FILES if other != name])


def test_a_size_check_does_not_read_the_content(root: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1)
    flip(path / "optimizer.bin")
    manifests.check(str(path), manifests.read(str(path)), "size", lambda count: pytest.fail("it was read"))


def test_a_directory_inside_that_is_a_link_is_not_followed(root: Path, tmp_path: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1)
    found = manifests.read(str(path))
    (path / "inner").rename(tmp_path / "inner")
    (path / "inner").symlink_to(tmp_path / "inner")
    with pytest.raises(CorruptCheckpoint, match=r"inner: is a symbolic link"):
        manifests.check(str(path), found, "size")


def test_another_word_for_how_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="verify is 'fast'; use one of 'none', 'size', 'full'"):
        manifests.check(str(root), manifest(1), "fast")  # type: ignore[arg-type]


def test_an_error_of_the_disk_is_no_content(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(root / "checkpoint-1", 1)
    found = manifests.read(str(path))

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "read", fail)
    with pytest.raises(CorruptCheckpoint, match="cannot be read: Input/output error"):
        manifests.check(str(path), found, "full")


def test_what_is_no_checkpoint(root: Path, tmp_path: Path) -> None:
    write_files(root / "checkpoint-1", FILES)
    with pytest.raises(CorruptCheckpoint, match=f"incomplete: it has no {names.MANIFEST}"):
        manifests.read(str(root / "checkpoint-1"))
    (root / "file").touch()
    with pytest.raises(CorruptCheckpoint, match="incomplete"):
        manifests.read(str(root / "file"))
    checkpoint(tmp_path / "real", 1)
    (root / "checkpoint-2").symlink_to(tmp_path / "real")
    with pytest.raises(CorruptCheckpoint, match="is a symbolic link; links are not followed"):
        manifests.read(str(root / "checkpoint-2"))
    (root / "checkpoint-3").mkdir()
    os.mkfifo(root / "checkpoint-3" / names.MANIFEST)
    with pytest.raises(CorruptCheckpoint, match="cannot be read: not a regular file"):
        manifests.read(str(root / "checkpoint-3"))
