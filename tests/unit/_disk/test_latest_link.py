"""The link `latest`: moved in one step, and nothing of others is touched."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from vembed_async_ckpt._disk import latest_link, link_update
from vembed_async_ckpt._disk.filesystem import LocalFilesystem, RenameMode
from vembed_async_ckpt._format import names
from vembed_async_ckpt.testing import FailingFilesystem

from ..by_hand import checkpoint, save_id

fs = LocalFilesystem()


@pytest.fixture(autouse=True)
def two(root: Path) -> None:
    for number in (1, 2):
        checkpoint(root / f"checkpoint-{number}", number)


def left(root: Path) -> list[str]:
    return sorted(path.name for path in (root / names.WORK).iterdir())


def test_it_is_made_moved_and_read(root: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-2"):
        assert link_update.point(fs, str(root), name, save_id(1)) == ""
        assert (root / names.LATEST).readlink() == Path(name)
        assert latest_link.target(str(root)) == name
        assert latest_link.resolve(root / names.LATEST) == str(root / name)
    assert left(root) == []


@pytest.mark.parametrize("text", ["..", ".", "/etc", "../outside", "checkpoint-1/inner", "somewhere"])
def test_a_link_to_elsewhere_is_not_ours(root: Path, text: str) -> None:
    (root / names.LATEST).symlink_to(text)
    assert latest_link.target(str(root)) is None
    assert latest_link.resolve(root / names.LATEST) == str(root / names.LATEST)
    assert "not a link of ours" in link_update.point(fs, str(root), "checkpoint-1", save_id(1))
    link_update.heal(fs, str(root), "checkpoint-1", save_id(1))
    assert (root / names.LATEST).readlink() == Path(text)
    assert left(root) == []


def test_a_file_of_that_name_stays(root: Path) -> None:
    (root / names.LATEST).write_text("theirs")
    assert "not a link of ours" in link_update.point(fs, str(root), "checkpoint-1", save_id(1))
    assert (root / names.LATEST).read_text() == "theirs"


def test_other_names_are_not_resolved(root: Path) -> None:
    assert latest_link.resolve(root / "checkpoint-1") == str(root / "checkpoint-1")
    assert latest_link.resolve("latest") == "latest"
    (root / "newest").symlink_to("checkpoint-1")
    assert latest_link.resolve(root / "newest") == str(root / "newest")


@pytest.mark.parametrize("before", [None, "checkpoint-1"])
def test_what_somebody_puts_there_just_before_stays(root: Path, before: str | None) -> None:
    class Racing(LocalFilesystem):
        def rename(self, source: str, target: str, mode: RenameMode) -> None:
            if not (root / "raced").exists():
                (root / "raced").touch()
                Path(target).unlink(missing_ok=True)
                Path(target).write_text("theirs")
            super().rename(source, target, mode)

    if before:
        (root / names.LATEST).symlink_to(before)
    assert "not a link of ours" in link_update.point(Racing(), str(root), "checkpoint-2", save_id(2))
    assert (root / names.LATEST).read_text() == "theirs"
    assert left(root) == []


@pytest.mark.parametrize("before", [None, "checkpoint-1"])
def test_where_names_cannot_be_exchanged_it_is_renamed_over(root: Path, before: str | None) -> None:
    if before:
        (root / names.LATEST).symlink_to(before)
    disk = FailingFilesystem()
    disk.fail(errno.ENOSYS, "rename")
    assert link_update.point(disk, str(root), "checkpoint-2", save_id(2)) == ""
    assert (root / names.LATEST).readlink() == Path("checkpoint-2")
    assert left(root) == []


@pytest.mark.parametrize("call", ["symlink", "rename", "sync_directory"])
def test_an_error_leaves_the_old_link_or_the_new_one(root: Path, call: str) -> None:
    (root / names.LATEST).symlink_to("checkpoint-1")
    disk = FailingFilesystem()
    disk.fail(errno.EIO, call)
    with pytest.raises(OSError, match="Input/output"):
        link_update.point(disk, str(root), "checkpoint-2", save_id(2))
    assert latest_link.target(str(root)) == ("checkpoint-2" if call == "sync_directory" else "checkpoint-1")
    assert left(root) == []


def test_one_left_by_a_writer_that_died_is_no_obstacle(root: Path) -> None:
    Path(names.new_link(str(root), save_id(2))).symlink_to("checkpoint-9")
    assert link_update.point(fs, str(root), "checkpoint-2", save_id(2)) == ""
    assert latest_link.target(str(root)) == "checkpoint-2"


def test_after_a_deletion_it_points_to_the_newest_or_goes(root: Path) -> None:
    (root / names.LATEST).symlink_to("checkpoint-9")
    link_update.heal(fs, str(root), "checkpoint-2", save_id(3))
    assert latest_link.target(str(root)) == "checkpoint-2"
    link_update.heal(fs, str(root), "checkpoint-1", save_id(4))
    assert latest_link.target(str(root)) == "checkpoint-2", "what it points to is there"
    (root / names.LATEST).unlink()
    (root / names.LATEST).symlink_to("checkpoint-9")
    link_update.heal(fs, str(root), None, save_id(5))
    assert not (root / names.LATEST).is_symlink()
