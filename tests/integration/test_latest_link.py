"""`latest_link=True`: a link for shell scripts, moved after each commit; what is not ours is never touched."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, KeepLast, checkpoints, delete, latest, load, verify
from vembed_async_ckpt._disk import deletion as removal
from vembed_async_ckpt._disk import link_update
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._format import names

ID = "0" * 32


def save(root: Path, *steps: int, **options: Any) -> None:
    with AsyncCheckpointer(root, writer="thread", **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, model=torch.nn.Linear(2, 2), extra={"step": step}).result(60)


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_it_points_to_the_newest_when_result_returns(root: Path, writer: Any):
    """Relative, so that a moved or mounted root keeps it; after a rollback to the newer save of the smaller step."""
    with AsyncCheckpointer(root, latest_link=True, retention=KeepLast(1), writer=writer) as checkpointer:
        for step in (10, 20, 5, 5):
            checkpointer.save(step, extra={"step": step}).result(60)
            assert os.readlink(root / "latest") == f"checkpoint-{step}"
            verify(os.path.realpath(root / "latest"))
    assert latest(root) == root / "checkpoint-5"
    assert [entry.path.name for entry in checkpoints(root)] == ["checkpoint-5"]


def test_it_is_off_unless_asked_for(root: Path):
    """Stock accelerate cannot live with one in its folder."""
    save(root, 1)
    assert not os.path.lexists(root / "latest")


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_directory(path: Path) -> None:
    path.mkdir()
    (path / "mine").touch()


OTHERS: list[Callable[[Path], Any]] = [
    make_file,
    make_directory,
    lambda path: path.symlink_to("/etc"),
    lambda path: path.symlink_to(path.parent / "checkpoint-1"),  # absolute
    lambda path: path.symlink_to("elsewhere"),
    lambda path: path.symlink_to("../checkpoint-1"),
    lambda path: path.symlink_to("."),
    os.mkfifo,
]


def status(path: Path) -> Any:
    found = os.lstat(path)
    text = os.readlink(path) if os.path.islink(path) else None
    return found.st_ino, found.st_mode, found.st_mtime_ns, text


@pytest.mark.parametrize("make", OTHERS)
def test_what_is_not_ours_is_never_touched(root: Path, make: Callable[[Path], Any], caplog: pytest.LogCaptureFixture):
    """A file, a directory, a link that leads elsewhere; said once, and the saves are as good as ever."""
    root.mkdir()
    make(root / "latest")
    before = status(root / "latest")
    save(root, 1, 2, latest_link=True)
    assert status(root / "latest") == before
    assert latest(root) == root / "checkpoint-2"
    assert caplog.text.count("latest is not a link of ours to a checkpoint; it was left alone") == 1
    with pytest.raises((CheckpointError, OSError)):
        verify(root / "latest")


class Meddler(LocalFilesystem):
    """Somebody else puts a file in the place of the link just before it is moved."""

    def __init__(self, root: Path) -> None:
        self._link = root / "latest"

    def rename(self, source: str, target: str, mode: Any) -> None:
        if target == str(self._link) and not self._link.is_file():
            self._link.unlink(missing_ok=True)
            self._link.write_text("mine")
        super().rename(source, target, mode)


@pytest.mark.parametrize("there", [False, True])
def test_what_comes_in_between_is_not_touched_either(root: Path, there: bool):
    """Between the look and the move: with no link before, and with one of ours."""
    save(root, 1, 2, latest_link=there)
    os.makedirs(root / names.WORK, exist_ok=True)
    if there:
        (root / "latest").unlink()
        (root / "latest").symlink_to("checkpoint-1")
    assert "left alone" in link_update.point(Meddler(root), str(root), "checkpoint-2", ID)
    assert (root / "latest").read_text() == "mine"
    assert not (root / names.WORK).exists() or os.listdir(root / names.WORK) in ([], [names.LOCK])


class Old(LocalFilesystem):
    """NFS or FUSE: neither NOREPLACE nor EXCHANGE."""

    def rename(self, source: str, target: str, mode: Any) -> None:
        if mode != "plain":
            raise OSError(errno.EINVAL, "no such flag", target)
        super().rename(source, target, mode)


def test_where_names_cannot_be_exchanged_it_is_renamed_over(root: Path):
    """In one step as well."""
    save(root, 1, 2)
    os.makedirs(root / names.WORK, exist_ok=True)
    for name in ("checkpoint-1", "checkpoint-2"):
        assert link_update.point(Old(), str(root), name, ID) == ""
        assert os.readlink(root / "latest") == name


class NoLinks(LocalFilesystem):
    def symlink(self, text: str, path: str) -> None:
        raise OSError(errno.EPERM, "no links here", path)


def test_a_file_system_without_links_costs_no_save(root: Path, caplog: pytest.LogCaptureFixture):
    """A warning, once; the checkpoints are there."""
    from vembed_async_ckpt.testing import use_filesystem

    with use_filesystem(NoLinks()):
        save(root, 1, 2, latest_link=True)
    assert latest(root) == root / "checkpoint-2"
    assert caplog.text.count("latest could not be moved") == 1


def test_a_link_in_the_making_is_swept(root: Path):
    """The writer died between making it and giving it its name."""
    save(root, 1)
    os.makedirs(root / names.WORK, exist_ok=True)
    os.symlink("checkpoint-1", names.new_link(str(root), ID))
    removal.sweep(LocalFilesystem(), str(root))
    assert not os.path.lexists(names.new_link(str(root), ID))
    os.symlink("checkpoint-1", names.new_link(str(root), ID))
    assert link_update.point(LocalFilesystem(), str(root), "checkpoint-1", ID) == ""
    assert os.readlink(root / "latest") == "checkpoint-1"


def test_our_readers_follow_ours(root: Path, tmp_path: Path):
    """load, verify and the commands that take a checkpoint; a relative path and a slash at the end too."""
    save(root, 1, 2, latest_link=True)
    assert load(root / "latest").step == 2
    assert load(f"{root}/latest/").extra == {"step": 2}
    verify(root / "latest")
    for arguments in (
        ["verify", "latest"],
        ["inspect", "latest"],
        ["diff", "latest", "checkpoint-2"],
        ["export", "latest", "out"],
    ):
        result = subprocess.run(
            [sys.executable, "-m", "vembed_async_ckpt", *arguments],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, (arguments, result.stdout, result.stderr)
    assert (root / "out" / "model.safetensors").exists()


def test_deleting_what_it_points_to_moves_it_back(root: Path):
    """To the newest that is left; with the last checkpoint it goes."""
    save(root, 1, 2, latest_link=True)
    delete(root / "checkpoint-2")
    assert os.readlink(root / "latest") == "checkpoint-1"
    delete(root / "checkpoint-1")
    assert not os.path.lexists(root / "latest")


def test_deleting_leaves_a_link_of_somebody_else(root: Path):
    """Also one that leads nowhere."""
    save(root, 1)
    (root / "latest").symlink_to("../elsewhere/checkpoint-1")
    delete(root / "checkpoint-1")
    assert os.readlink(root / "latest") == "../elsewhere/checkpoint-1"


def test_the_link_moves_in_one_step(root: Path):
    """Whoever looks while it moves finds one checkpoint or the next."""
    save(root, 1, 2)
    os.makedirs(root / names.WORK, exist_ok=True)
    seen = set()

    class Looker(LocalFilesystem):
        def __getattribute__(self, name: str) -> Any:
            if os.path.lexists(root / "latest"):
                seen.add(os.readlink(root / "latest"))
                assert (root / "latest" / names.MANIFEST).exists()
            else:
                seen.add("")
            return super().__getattribute__(name)

    for number in range(4):
        assert link_update.point(Looker(), str(root), f"checkpoint-{1 + number % 2}", ID) == ""
    assert seen == {"", "checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_other_values_are_refused(tmp_path: Path, value: Any):
    """By name."""
    with pytest.raises(TypeError, match="latest_link"):
        AsyncCheckpointer(tmp_path / "root", latest_link=value)
