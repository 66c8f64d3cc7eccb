"""What is deleted is what we wrote, and after a failure in the middle the deletion goes on."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from vembed_async_ckpt import KeepLast, verify
from vembed_async_ckpt._disk import deletion
from vembed_async_ckpt._disk.catalog import scan
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._format import names
from vembed_async_ckpt._format.manifest import Manifest
from vembed_async_ckpt.testing import FailingFilesystem

from ..by_hand import FILES, checkpoint, contents, manifest, save_id, write_files

fs = LocalFilesystem()


def work(root: Path, name: str) -> Path:
    return root / names.WORK / name


def left(root: Path) -> list[str]:
    return sorted(path.name for path in (root / names.WORK).iterdir())


def committed(root: Path) -> list[tuple[str, Manifest]]:
    return [(entry.path, entry.manifest) for entry in scan(str(root)) if entry.manifest]


# -- one directory


def test_a_directory_of_ours_is_deleted_whole(root: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1)
    deletion.discard(fs, str(root), "checkpoint-1", save_id(1))
    assert not path.exists()
    assert not (root / names.WORK).exists(), "nobody else uses it"


def test_files_of_others_are_kept_aside(root: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1)
    write_files(path, {"notes.txt": b"theirs", "inner/more.txt": b"theirs too"})
    deletion.discard(fs, str(root), "checkpoint-1", save_id(1))
    kept = Path(names.kept_directory(str(root), save_id(1), "checkpoint-1"))
    assert contents(kept) == {"notes.txt": b"theirs", "inner/more.txt": b"theirs too"}


def test_a_link_inside_leads_to_no_deletion_elsewhere(root: Path, tmp_path: Path) -> None:
    outside = write_files(tmp_path / "outside", {"config.json": b"theirs"})
    path = checkpoint(root / "checkpoint-1", 1)
    (path / "inner" / "config.json").unlink()
    (path / "inner").rmdir()
    (path / "inner").symlink_to(outside)
    deletion.discard(fs, str(root), "checkpoint-1", save_id(1))
    assert contents(outside) == {"config.json": b"theirs"}


def test_without_a_manifest_nothing_proves_that_a_file_is_ours(root: Path) -> None:
    path = write_files(work(root, f"trash-{save_id(1)}"), FILES)
    deletion.dispose(fs, str(root), str(path), "checkpoint-1", save_id(1))
    assert contents(Path(names.kept_directory(str(root), save_id(1), "checkpoint-1"))) == FILES


@pytest.mark.parametrize("call", ["unlink", "remove_directory", "sync_directory", "rename", "make_directory"])
def test_after_a_failure_at_any_call_the_next_sweep_ends_the_deletion(root: Path, call: str) -> None:
    """The manifest goes last: so what is left is known to be ours."""
    for nth in range(1, 12):
        path = checkpoint(root / "checkpoint-1", nth)
        write_files(path, {"notes.txt": b"theirs"})
        disk = FailingFilesystem()
        disk.fail(errno.EIO, call, nth=nth)
        try:
            deletion.discard(disk, str(root), "checkpoint-1", save_id(nth))
        except OSError:
            if (path / names.MANIFEST).exists():
                assert verify(path).save_id == save_id(nth), "visible and not whole"
                deletion.discard(fs, str(root), "checkpoint-1", save_id(nth))
        deletion.sweep(fs, str(root))
        assert [name for name in left(root) if name != names.REPLACED] == []
        (kept,) = (root / names.WORK / names.REPLACED).glob(
            f"kept-{save_id(nth)}.*"
        )  # the sweep has no better name for it
        assert contents(kept) == {"notes.txt": b"theirs"}
        if not disk.failed:
            return
    pytest.fail(f"{call} was called more than eleven times")


def test_files_that_were_carried_over_are_not_kept_twice(root: Path) -> None:
    """As a hard link, as a copy, and one that differs from what it became."""
    new = checkpoint(root / "checkpoint-1", 2)
    old = checkpoint(work(root, f"work-{save_id(2)}.0"), 1)
    write_files(old, {"linked.txt": b"a", "copied.txt": b"b", "differs.txt": b"c", "scheduler.bin": b"of us perhaps"})
    os.link(old / "linked.txt", new / "linked.txt")
    write_files(new, {"copied.txt": b"b", "differs.txt": b"d", "scheduler.bin": b"of us perhaps"})
    deletion.dispose(fs, str(root), str(old), "checkpoint-1", save_id(2), carried_to=str(new))
    kept = Path(names.kept_directory(str(root), save_id(2), "checkpoint-1"))
    assert contents(kept) == {"differs.txt": b"c", "scheduler.bin": b"of us perhaps"}
    assert {"linked.txt", "copied.txt", "differs.txt"} <= contents(new).keys()


def test_a_work_directory_that_holds_another_save_is_left_alone(root: Path) -> None:
    """Then an exchange took place although an error was reported."""
    path = checkpoint(work(root, f"work-{save_id(2)}.0"), 1)
    deletion.remove_work(fs, str(path), save_id(2))
    assert verify(path).save_id == save_id(1)
    deletion.remove_work(fs, str(path), save_id(1))
    assert not path.exists()


def test_what_trainer_wrote_goes_whole_and_its_name_first(root: Path) -> None:
    write_files(root / "checkpoint-3", {"model.safetensors": b"x", "global_step3/a": b"y"})
    disk = FailingFilesystem()
    disk.fail(errno.EIO, "unlink")
    with pytest.raises(OSError, match="Input/output"):
        deletion.remove_rotated(disk, str(root), "checkpoint-3", save_id(3))
    assert not (root / "checkpoint-3").exists(), "nobody may resume from half of it"
    assert deletion.sweep(fs, str(root)) == [f"finished deleting rotated-{save_id(3)}"]
    assert left(root) == []


def test_a_work_directory_made_for_one_deletion_goes_too(root: Path) -> None:
    (root / names.WORK).rmdir()
    write_files(root / "checkpoint-3", {"model.safetensors": b"x"})
    deletion.remove_rotated(fs, str(root), "checkpoint-3", save_id(3))
    assert list(root.iterdir()) == []


# -- retention


def test_all_but_the_newest_go_and_one_failure_does_not_keep_the_others(root: Path) -> None:
    for number in (1, 2, 3, 4):
        checkpoint(root / f"checkpoint-{number}", number)
    disk = FailingFilesystem()
    disk.fail(errno.EBUSY, "rename", path="checkpoint-2")
    with pytest.raises(OSError, match="busy"):
        deletion.prune(disk, str(root), KeepLast(1), committed(root), lambda: None)
    assert [Path(path).name for path, _ in committed(root)] == ["checkpoint-2", "checkpoint-4"]
    assert deletion.prune(fs, str(root), KeepLast(1), committed(root), lambda: None) == ["checkpoint-2"]


def test_nothing_goes_once_the_lock_is_lost(root: Path) -> None:
    for number in (1, 2, 3):
        checkpoint(root / f"checkpoint-{number}", number)

    def lost() -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        deletion.prune(fs, str(root), KeepLast(1), committed(root), lost)
    assert len(committed(root)) == 3


def test_what_is_broken_in_use_or_not_ours_is_neither_counted_nor_deleted(root: Path) -> None:
    for number in range(1, 6):
        checkpoint(root / f"checkpoint-{number}", number)
    (root / "checkpoint-5" / "optimizer.bin").unlink()  # the newest, and not whole
    checkpoint(root / "best", 0)
    with open(root / "checkpoint-2" / names.MANIFEST, "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        found = deletion.expendable(KeepLast(1), committed(root))
        assert [Path(path).name for path in found] == ["checkpoint-3", "checkpoint-1"]
        assert deletion.in_use(str(root / "checkpoint-2"))
    assert not deletion.in_use(str(root / "checkpoint-2"))
    assert not deletion.in_use(str(root / "nothing"))
    assert deletion.expendable(KeepLast(9), committed(root)) == []


# -- the sweep


def test_an_unfinished_save_is_dropped_and_a_finished_deletion_ended(root: Path) -> None:
    checkpoint(root / "checkpoint-1", 1)
    write_files(work(root, f"work-{save_id(2)}.0"), {"model.safetensors": b"half"})
    checkpoint(work(root, f"trash-{save_id(3)}"), 3)
    checkpoint(work(root, f"work-{save_id(1)}.1"), 9)  # what checkpoint-1 replaced by an exchange
    work(root, f"scratch-{save_id(4)}").mkdir()
    work(root, f"latest-{save_id(5)}").symlink_to("checkpoint-1")
    done = deletion.sweep(fs, str(root))
    assert sorted(done) == sorted([
        f"dropped the unfinished save work-{save_id(2)}.0", f"finished deleting trash-{save_id(3)}",
        f"finished deleting work-{save_id(1)}.1", f"finished deleting scratch-{save_id(4)}",
    ])  # fmt: skip
    assert left(root) == []
    assert verify(root / "checkpoint-1").save_id == save_id(1)
    assert deletion.sweep(fs, str(root)) == []


def test_entries_of_others_stay(root: Path, tmp_path: Path) -> None:
    write_files(work(root, "theirs"), {"file": b"x"})
    write_files(tmp_path / "outside", {"file": b"x"})
    work(root, f"work-{save_id(1)}.0").symlink_to(tmp_path / "outside")
    work(root, f"trash-{save_id(2)}").touch()
    work(root, f"latest-{save_id(3)}").touch()
    before = left(root)
    assert deletion.sweep(fs, str(root)) == []
    assert left(root) == before
    assert contents(tmp_path / "outside") == {"file": b"x"}


def test_scratch_of_a_living_process_stays(root: Path) -> None:
    path = work(root, f"scratch-{save_id(4)}")
    write_files(path, {"file": b"x"})
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert deletion.sweep(fs, str(root)) == []
    os.close(fd)
    assert deletion.sweep(fs, str(root)) == [f"finished deleting {path.name}"]


def test_a_replaced_checkpoint_whose_replacement_cannot_be_read_is_kept(root: Path) -> None:
    checkpoint(root / "checkpoint-1", 2)
    (root / "checkpoint-1" / names.MANIFEST).write_bytes(b"damaged")
    checkpoint(work(root, f"work-{save_id(2)}.0"), 1)
    (line,) = deletion.sweep(fs, str(root))
    assert line.startswith(f"kept the replaced checkpoint in work-{save_id(2)}.0")
    assert verify(names.kept_directory(str(root), save_id(2), "checkpoint")).save_id == save_id(1)


def test_where_a_checkpoint_cannot_be_read_no_work_is_dropped(root: Path) -> None:
    """Nothing proves that the work directory is not what that checkpoint replaced."""
    checkpoint(root / "checkpoint-1", 2)
    (root / "checkpoint-1" / names.MANIFEST).write_bytes(b"damaged")
    write_files(work(root, f"work-{save_id(2)}.0"), {"model.safetensors": b"x"})
    (line,) = deletion.sweep(fs, str(root))
    assert "left" in line
    assert contents(work(root, f"work-{save_id(2)}.0")) == {"model.safetensors": b"x"}


def test_a_replacement_that_was_never_published_is_undone(root: Path) -> None:
    swap = Path(names.swap_directory(str(root), save_id(2), "checkpoint-1"))
    checkpoint(swap, 1)
    assert deletion.sweep(fs, str(root)) == ["brought checkpoint-1 back, whose replacement was never published"]
    assert verify(root / "checkpoint-1").save_id == save_id(1)


def test_a_replacement_that_was_published_is_finished(root: Path) -> None:
    swap = Path(names.swap_directory(str(root), save_id(2), "checkpoint-1"))
    checkpoint(swap, 1)
    checkpoint(root / "checkpoint-1", 2)
    assert deletion.sweep(fs, str(root)) == ["finished replacing checkpoint-1"]
    assert verify(root / "checkpoint-1").save_id == save_id(2)
    assert not swap.exists()


def test_a_deleted_checkpoint_does_not_come_back_as_its_predecessor(root: Path) -> None:
    checkpoint(Path(names.swap_directory(str(root), save_id(2), "checkpoint-1")), 1)
    checkpoint(root / "checkpoint-1", 2)
    deletion.discard(fs, str(root), "checkpoint-1", save_id(2))
    assert deletion.sweep(fs, str(root)) == []
    assert not (root / "checkpoint-1").exists()


def test_what_a_dead_trainers_writer_could_not_save_is_told_once(root: Path) -> None:
    work(root, names.ORPHAN_LOG).write_text("first\nsecond\n")
    assert deletion.sweep(fs, str(root)) == ["first", "second"]
    assert deletion.sweep(fs, str(root)) == []
    work(root, names.ORPHAN_LOG).mkdir()
    assert deletion.sweep(fs, str(root)) == ["left orphan.log alone: it cannot be read (not a regular file)"]


def test_one_entry_that_cannot_be_swept_does_not_keep_the_others(root: Path) -> None:
    for number in (1, 2, 3):
        write_files(work(root, f"work-{save_id(number)}.0"), {"model.safetensors": b"x"})
    disk = FailingFilesystem()
    disk.fail(errno.EIO, "unlink", path=save_id(1))
    with pytest.raises(OSError, match="Input/output"):
        deletion.sweep(disk, str(root))
    assert left(root) == [f"work-{save_id(1)}.0"]


def test_foreign_files_are_those_the_manifest_does_not_name(root: Path) -> None:
    path = write_files(checkpoint(root / "checkpoint-1", 1), {"inner/notes.txt": b"x"})
    assert [name for name, _ in deletion.foreign_files(str(path))] == ["inner/notes.txt"]
    assert list(deletion.foreign_files(str(root / "nothing"))) == []
    assert manifest(1).files.keys() == FILES.keys()
