"""The system calls: each follows no link, names the path it failed on, and keeps what its contract says."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from vembed_async_ckpt._disk import filesystem as fs
from vembed_async_ckpt._disk.filesystem import NO_DIRECT, LocalFilesystem

local = LocalFilesystem()


def create(path: Path, content: bytes = b"", *, direct: bool = False) -> None:
    fd = local.create(str(path), direct=direct)
    if content:
        assert local.write(fd, memoryview(content), 0) == len(content)
    local.close(fd)


def test_a_file_is_made_written_cut_and_synced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = local.create(str(path), direct=False)
    assert local.write(fd, memoryview(b"abcdef"), 2) == 6
    local.truncate(fd, 5)
    local.set_mode(fd, 0o640)
    local.sync(fd)
    local.close(fd)
    local.sync_directory(str(tmp_path))
    assert path.read_bytes() == b"\0\0abc"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_nothing_that_exists_is_opened_for_writing(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("theirs")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "dangling"):
        with pytest.raises(FileExistsError):
            local.create(str(tmp_path / name), direct=False)
    assert (tmp_path / "there").read_text() == "theirs"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("code", NO_DIRECT, ids=errno.errorcode.get)
def test_a_file_system_without_direct_io_leaves_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Some kernels create the name before they refuse the flag."""
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **named: int) -> int:
        fd = real(path, flags & ~os.O_DIRECT, *rest, **named)
        if flags & os.O_DIRECT:
            os.close(fd)
            raise OSError(code, "no O_DIRECT", path)
        return fd

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="no O_DIRECT") as raised:
        local.create(str(tmp_path / "file"), direct=True)
    assert raised.value.errno == code
    assert raised.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_direct_io_can_be_turned_off(tmp_path: Path) -> None:
    try:
        fd = local.create(str(tmp_path / "file"), direct=True)
    except OSError:  # tmpfs before Linux 6.6
        return
    local.set_buffered(fd)
    assert local.write(fd, memoryview(b"three"), 1) == 5  # neither aligned nor a whole block
    local.close(fd)
    assert (tmp_path / "file").read_bytes() == b"\0three"


def test_a_write_of_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise whoever writes the rest would try for ever."""
    fd = local.create(str(tmp_path / "file"), direct=False)
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="took nothing") as raised:
        local.write(fd, memoryview(b"data"), 0)
    assert raised.value.filename == str(tmp_path / "file")
    assert local.write(fd, memoryview(b""), 0) == 0
    local.close(fd)


@pytest.mark.parametrize("call", ["write", "truncate", "sync", "set_mode"])
def test_an_error_of_a_descriptor_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    fd = local.create(str(tmp_path / "file"), direct=False)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    names = {"write": "pwrite", "truncate": "ftruncate", "sync": "fsync", "set_mode": "fchmod"}
    arguments = {"write": (memoryview(b"x"), 0), "truncate": (1,), "sync": (), "set_mode": (0o600,)}
    monkeypatch.setattr(os, names[call], fail)
    with pytest.raises(OSError, match="broken") as raised:
        getattr(local, call)(fd, *arguments[call])
    assert raised.value.filename == str(tmp_path / "file")
    local.close(fd)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_a_sandbox_without_fsync_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, "refused")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="nothing would survive a power cut") as raised:
        local.sync_directory(str(tmp_path))
    assert raised.value.errno == code
    assert raised.value.filename == str(tmp_path)


def test_renames(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    (a / "of a").touch()
    local.rename(str(a), str(b), "noreplace")
    assert (b / "of a").exists()
    a.mkdir()
    with pytest.raises(FileExistsError) as raised:
        local.rename(str(a), str(b), "noreplace")
    assert (raised.value.filename, raised.value.filename2) == (str(a), str(b))
    local.rename(str(a), str(b), "exchange")
    assert (a / "of a").exists()
    assert not list(b.iterdir())
    local.rename(str(a), str(b), "plain")
    assert (b / "of a").exists()
    with pytest.raises(FileNotFoundError):
        local.rename(str(a), str(b), "exchange")


def test_without_renameat2_the_caller_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        """A C library before 2.28."""

    monkeypatch.setattr(fs.ctypes, "CDLL", lambda *_, **__: Old())
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="renameat2") as raised:
        local.rename(str(tmp_path / "a"), str(tmp_path / "b"), "exchange")
    assert raised.value.errno == errno.ENOSYS
    local.rename(str(tmp_path / "a"), str(tmp_path / "b"), "plain")


def test_links_are_given_and_taken_themselves(tmp_path: Path) -> None:
    create(tmp_path / "file", b"data")
    local.link(str(tmp_path / "file"), str(tmp_path / "second"))
    assert os.path.samefile(tmp_path / "file", tmp_path / "second")
    local.symlink("file", str(tmp_path / "soft"))
    local.link(str(tmp_path / "soft"), str(tmp_path / "soft2"))  # of the link, not of what it leads to
    assert (tmp_path / "soft2").is_symlink()
    local.unlink(str(tmp_path / "soft"))
    assert (tmp_path / "file").read_bytes() == b"data"
    with pytest.raises(FileExistsError):
        local.symlink("x", str(tmp_path / "file"))


CALLS: list[Callable[[str], object]] = [
    lambda path: local.make_directory(path),
    lambda path: local.create(path, direct=False),
    lambda path: local.unlink(path),
    lambda path: local.remove_directory(path),
    lambda path: local.sync_directory(path),
    lambda path: local.symlink("x", path),
    lambda path: local.rename(path, path + "2", "plain"),
    lambda path: local.rename("/dev/null", path, "plain"),
    lambda path: local.link(path, path + "2"),
]


@pytest.mark.parametrize("call", CALLS)
def test_no_call_follows_a_link_on_the_way(tmp_path: Path, call: Callable[[str], object]) -> None:
    """A directory that was replaced by a link leads nowhere, whoever put it there."""
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "inner" / "file").write_text("theirs")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "planted").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(OSError, match="links are not followed") as raised:
        call(str(tmp_path / "root" / "planted" / "inner"))
    assert raised.value.errno == errno.ELOOP
    assert raised.value.filename == str(tmp_path / "root" / "planted")
    assert sorted(outside.rglob("*")) == before


def test_the_whole_path_is_in_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "no" / "such" / "file")
    with pytest.raises(FileNotFoundError) as raised:
        local.create(path, direct=False)
    assert raised.value.filename == path
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as raised2:
        local.unlink(str(tmp_path / "file" / "x"))
    assert raised2.value.filename == str(tmp_path / "file" / "x")


def test_no_descriptor_is_left_by_errors(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        for call in CALLS:
            with pytest.raises(OSError, match="No such"):
                call(str(tmp_path / "no" / "such" / "file"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    assert fs.read_regular(str(tmp_path / "file")) == b"0123456789"
    assert fs.read_regular(str(tmp_path / "file"), 4) == b"0123"
    assert fs.read_regular(str(tmp_path / "file"), 1 << 40) == b"0123456789"
    for name, code in (("link", errno.ELOOP), ("pipe", errno.EINVAL), ("directory", errno.EINVAL)):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match=name) as raised:
            fs.read_regular(str(tmp_path / name))  # the pipe would block for ever
        assert raised.value.errno == code
        assert len(os.listdir("/proc/self/fd")) == before


def test_directories_are_made_durable_up_to_the_first_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(LocalFilesystem, "sync_directory", lambda _, path: synced.append(path))
    fs.make_directories_durable(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    assert synced[-2:] == [str(tmp_path), str(tmp_path / "a")]
    synced.clear()
    fs.make_directories_durable(str(tmp_path / "a" / "b"))
    assert synced == [str(tmp_path / "a")]  # somebody else may have made it just now


def test_a_directory_that_somebody_makes_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, *rest: (real(path, *rest), real(path, *rest)))
    fs.make_directories_durable(str(tmp_path / "new"))
    assert (tmp_path / "new").is_dir()
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        fs.make_directories_durable(str(tmp_path / "file"))


@pytest.mark.parametrize(("code", "passes"), [(errno.EACCES, True), (errno.EIO, False)])
def test_a_parent_of_somebody_else_need_not_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, passes: bool
) -> None:
    """Who may not open it cannot have made a directory in it. Every other error counts."""

    def fail(_: object, path: str) -> None:
        raise OSError(code, "refused", path)

    monkeypatch.setattr(LocalFilesystem, "sync_directory", fail)
    if passes:
        fs.make_directories_durable(str(tmp_path))
        return
    with pytest.raises(OSError, match="refused"):
        fs.make_directories_durable(str(tmp_path))


def test_walks_list_links_and_do_not_follow_them(tmp_path: Path) -> None:
    for path in ("a/b/file", "a/file", "z"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [name for name, _ in fs.walk_files(str(tmp_path))] == ["a/b/file", "a/file", "loop", "z"]
    assert list(fs.walk_directories(str(tmp_path))) == [str(tmp_path / "a/b"), str(tmp_path / "a"), str(tmp_path)]
