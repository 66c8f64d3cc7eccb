"""The commit: what is visible afterwards, and what is not when a call of it fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vembed_async_ckpt import CommitError, WriteError, verify
from vembed_async_ckpt._disk import commit as commits
from vembed_async_ckpt._disk.commit import commit
from vembed_async_ckpt._disk.filesystem import LocalFilesystem, RenameMode
from vembed_async_ckpt._format import manifest as manifest_format
from vembed_async_ckpt._format import names
from vembed_async_ckpt._format.manifest import Manifest
from vembed_async_ckpt.testing import FailingFilesystem

from ..by_hand import FILES, checkpoint, contents, manifest, save_id, write_files


class NoExchange(LocalFilesystem):
    """NFS and FUSE: two names cannot be exchanged, nor a rename be refused where the name exists."""

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        if mode != "plain":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), source)
        super().rename(source, target, mode)


def built(root: Path, number: int, files: dict[str, bytes] = FILES) -> tuple[str, Manifest]:
    """A work directory with the files of save `number`, and its manifest, which is not written yet."""
    work = write_files(Path(names.save_directory(str(root), save_id(number), 0)), files)
    return str(work), manifest(number, files)


@pytest.fixture(params=[LocalFilesystem, NoExchange])
def fs(request: pytest.FixtureRequest) -> LocalFilesystem:
    made: LocalFilesystem = request.param()
    return made


def test_a_new_name_is_published(root: Path, fs: LocalFilesystem) -> None:
    work, described = built(root, 1)
    assert commit(fs, str(root), "checkpoint-1", work, described) is None
    assert verify(root / "checkpoint-1") == described
    assert not Path(work).exists()


def test_a_replaced_directory_is_returned_whole(root: Path, fs: LocalFilesystem) -> None:
    checkpoint(root / "checkpoint-1", 1)
    work, described = built(root, 2, {"model.safetensors": b"new"})
    replaced = commit(fs, str(root), "checkpoint-1", work, described)
    assert verify(root / "checkpoint-1").save_id == save_id(2)
    assert replaced is not None
    assert verify(replaced).save_id == save_id(1)


def test_files_of_others_are_carried_over(root: Path, fs: LocalFilesystem) -> None:
    """Notes and links are; what a plan could make, and what the new checkpoint has itself, is not."""
    old = checkpoint(root / "checkpoint-1", 1)
    write_files(old, {"notes/run.txt": b"theirs", "scheduler.bin": b"of another run", "README.md": b"old"})
    (old / "link").symlink_to("nowhere")
    work, described = built(root, 2, {"model.safetensors": b"new", "README.md": b"ours"})
    commit(fs, str(root), "checkpoint-1", work, described)
    found = contents(root / "checkpoint-1")
    del found[names.MANIFEST]
    assert found == {"model.safetensors": b"new", "README.md": b"ours", "notes/run.txt": b"theirs", "link": b"nowhere"}


def test_without_hard_links_files_of_others_are_copied_with_their_mode(root: Path) -> None:
    disk = FailingFilesystem()
    disk.fail(errno.EPERM, "link", times=None)
    old = checkpoint(root / "checkpoint-1", 1)
    write_files(old, {"run.sh": b"#!/bin/sh\n" * 1000})
    (old / "run.sh").chmod(0o750)
    (old / "link").symlink_to("run.sh")
    os.mkfifo(old / "pipe")
    work, described = built(root, 2)
    replaced = commit(disk, str(root), "checkpoint-1", work, described)
    copied = root / "checkpoint-1" / "run.sh"
    assert copied.read_bytes() == b"#!/bin/sh\n" * 1000
    assert copied.stat().st_mode & 0o777 == 0o750
    assert (root / "checkpoint-1" / "link").readlink() == Path("run.sh")
    assert replaced is not None
    assert (Path(replaced) / "pipe").is_fifo(), "a pipe cannot be copied: it stays where it was"


@pytest.mark.parametrize(
    "make", [Path.touch, lambda path: path.symlink_to("elsewhere"), lambda path: path.symlink_to(".")]
)
def test_what_is_no_directory_is_not_replaced(root: Path, make: Callable[[Path], object]) -> None:
    make(root / "checkpoint-1")
    before = contents(root)
    work, described = built(root, 1)
    with pytest.raises(WriteError, match="exists and is not a directory; move it away"):
        commit(LocalFilesystem(), str(root), "checkpoint-1", work, described)
    assert {name: data for name, data in contents(root).items() if not name.startswith(names.WORK)} == before


def test_a_manifest_that_could_not_be_read_is_not_published(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, described = built(root, 1)
    monkeypatch.setattr(manifest_format, "MAX_BYTES", 100)
    with pytest.raises(WriteError, match=r"its manifest would have .* bytes; at most 100"):
        commit(LocalFilesystem(), str(root), "checkpoint-1", work, described)
    assert not (root / "checkpoint-1").exists()
    assert not (Path(work) / names.MANIFEST).exists()


def test_a_file_that_went_meanwhile_is_noticed_before_anything_is_published(root: Path) -> None:
    work, described = built(root, 1)
    (Path(work) / "optimizer.bin").unlink()
    with pytest.raises(WriteError, match=r"somebody else changed .* nothing was published: .*optimizer.bin: missing"):
        commit(LocalFilesystem(), str(root), "checkpoint-1", work, described)
    assert not (root / "checkpoint-1").exists()


def test_a_file_that_goes_while_it_is_published_is_no_success(root: Path) -> None:
    class Interfering(LocalFilesystem):
        def rename(self, source: str, target: str, mode: RenameMode) -> None:
            super().rename(source, target, mode)
            os.unlink(os.path.join(target, "optimizer.bin"))

    work, described = built(root, 1)
    with pytest.raises(CommitError, match="somebody else changed it while it was published"):
        commit(Interfering(), str(root), "checkpoint-1", work, described)


def test_a_directory_that_becomes_a_link_while_it_is_published_is_no_success(root: Path) -> None:
    class Interfering(LocalFilesystem):
        def rename(self, source: str, target: str, mode: RenameMode) -> None:
            super().rename(source, target, mode)
            os.rename(target, target + ".moved")
            os.symlink(target + ".moved", target)

    work, described = built(root, 1)
    with pytest.raises(CommitError, match="it is a symbolic link"):
        commit(Interfering(), str(root), "checkpoint-1", work, described)


@pytest.mark.parametrize("answer_lost", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_rename_that_fails_leaves_the_old_one_and_one_whose_answer_is_lost_counts(
    root: Path, there: bool, answer_lost: bool
) -> None:
    if there:
        checkpoint(root / "checkpoint-1", 1)
    work, described = built(root, 2)
    disk = FailingFilesystem()
    disk.fail(errno.EIO, "rename", done=answer_lost)
    if answer_lost:
        replaced = commit(disk, str(root), "checkpoint-1", work, described)
        assert verify(root / "checkpoint-1").save_id == save_id(2)
        assert (replaced is not None) == there
        return
    with pytest.raises(OSError, match="Input/output error"):
        commit(disk, str(root), "checkpoint-1", work, described)
    assert (root / "checkpoint-1").exists() == there
    if there:
        assert verify(root / "checkpoint-1").save_id == save_id(1)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("answer_lost", [False, True])
def test_without_exchange_the_old_one_comes_back_when_a_rename_fails(root: Path, nth: int, answer_lost: bool) -> None:
    """Of the two renames the first or the second fails. The exchange is refused before."""

    class Failing(FailingFilesystem):
        def rename(self, source: str, target: str, mode: RenameMode) -> None:
            if mode != "plain":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), source)
            super().rename(source, target, mode)

    checkpoint(root / "checkpoint-1", 1)
    work, described = built(root, 2)
    disk = Failing()
    disk.fail(errno.EIO, "rename", nth=nth, done=answer_lost)
    if nth == 2 and answer_lost:
        replaced = commit(disk, str(root), "checkpoint-1", work, described)
        assert replaced is not None
        assert verify(replaced).save_id == save_id(1)
        assert verify(root / "checkpoint-1").save_id == save_id(2)
        return
    with pytest.raises(OSError, match="Input/output error"):
        commit(disk, str(root), "checkpoint-1", work, described)
    assert verify(root / "checkpoint-1").save_id == save_id(1)


def test_somebody_takes_the_name_just_before_the_rename(root: Path) -> None:
    """`noreplace` refuses, and the directory that came in between is exchanged, not lost."""

    class Racing(LocalFilesystem):
        def rename(self, source: str, target: str, mode: RenameMode) -> None:
            if mode == "noreplace":
                checkpoint(Path(target), 9)
            super().rename(source, target, mode)

    work, described = built(root, 1)
    replaced = commit(Racing(), str(root), "checkpoint-1", work, described)
    assert replaced == work
    assert verify(replaced).save_id == save_id(9)
    assert verify(root / "checkpoint-1").save_id == save_id(1)


def test_a_published_checkpoint_that_may_not_be_durable_is_a_commit_error(root: Path) -> None:
    work, described = built(root, 1)
    disk = FailingFilesystem()
    syncs = 1 + len(list(commits.files.walk_directories(work)))
    disk.fail(errno.EIO, "sync_directory", nth=syncs)
    with pytest.raises(CommitError, match="published, but its parent could not be synced"):
        commit(disk, str(root), "checkpoint-1", work, described)


def test_everything_is_synced_before_the_rename_and_the_parents_after_it(root: Path) -> None:
    order: list[str] = []

    class Noting(LocalFilesystem):
        def sync(self, fd: int) -> None:
            order.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
            super().sync(fd)

        def sync_directory(self, path: str) -> None:
            order.append("names of " + os.path.relpath(path, root))
            super().sync_directory(path)

        def rename(self, source: str, target: str, mode: RenameMode) -> None:
            order.append(mode)
            super().rename(source, target, mode)

    work, described = built(root, 1)
    commit(Noting(), str(root), "checkpoint-1", work, described)
    inside = os.path.relpath(work, root)
    before = [f"sync {names.MANIFEST}", f"names of {inside}/inner", f"names of {inside}"]
    assert order == [*before, "noreplace", "names of .", f"names of {names.WORK}"]
