"""The disks for tests do what they say: one loses what was not synced, the other fails when told to."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, KeepLast, WriteError, latest, verify
from vembed_async_ckpt.testing import (
    Change,
    Choose,
    FailingFilesystem,
    Filesystem,
    LocalFilesystem,
    PowerCutFilesystem,
    at_random,
    kept,
    lost,
    names_only,
    use_filesystem,
)

BOUND = 20
SECTORS = bytes(range(256)) * 8  # four of them


@pytest.fixture
def disk(tmp_path: Path) -> PowerCutFilesystem:
    (tmp_path / "root").mkdir()
    return PowerCutFilesystem(tmp_path / "root")


def at(disk: PowerCutFilesystem, name: str) -> str:
    return os.path.join(disk.root, *name.split("/")) if name else disk.root


def put(disk: PowerCutFilesystem, name: str, data: bytes = b"new", *, sync: bool = True) -> None:
    """A new file, its data synced, its name not."""
    fd = disk.create(at(disk, name), direct=False)
    disk.write(fd, memoryview(data), 0)
    if sync:
        disk.sync(fd)
    disk.close(fd)


def durable(disk: PowerCutFilesystem, name: str, data: bytes = b"old") -> None:
    """A file that no power cut takes."""
    put(disk, name, data)
    disk.sync_directory(os.path.dirname(at(disk, name)))


def durable_directory(disk: PowerCutFilesystem, name: str) -> None:
    disk.make_directory(at(disk, name))
    disk.sync_directory(os.path.dirname(at(disk, name)))


def tree(directory: Path | str) -> dict[str, bytes | str | None]:
    """Everything below: files with their data, symbolic links with their text, directories with None."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(Path(directory).rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = None if path.is_dir() else path.read_bytes()
    return found


def found(disk: PowerCutFilesystem, tmp_path: Path, choose: Choose = lost) -> dict[str, bytes | str | None]:
    image = disk.image(tmp_path / f"image-{len(list(tmp_path.iterdir()))}", choose)
    return tree(image)


def fate(**of: str) -> Choose:
    """By the name of the call; everything else is kept."""
    return lambda change: of.get(change.call, "kept")  # type: ignore[return-value]


# -- what is lost, and what is not


def test_what_was_synced_is_there(disk: PowerCutFilesystem, tmp_path: Path):
    """Data by a sync of the file, the name by a sync of its directory; both are needed."""
    durable(disk, "both")
    put(disk, "name only synced", sync=False)
    disk.sync_directory(disk.root)
    put(disk, "data only synced")
    assert found(disk, tmp_path) == {"both": b"old", "name only synced": b""}
    assert found(disk, tmp_path, kept) == {"both": b"old", "name only synced": b"new", "data only synced": b"new"}


def test_what_was_there_before_counts_as_synced(disk: PowerCutFilesystem, tmp_path: Path):
    """Also what somebody else makes meanwhile, beside and inside of what is made through the disk."""
    Path(at(disk, "before")).write_bytes(b"1")
    durable_directory(disk, "directory")
    Path(at(disk, "directory/meanwhile")).write_bytes(b"2")
    os.symlink("before", at(disk, "link"))
    assert found(disk, tmp_path) == {"before": b"1", "directory": None, "directory/meanwhile": b"2", "link": "before"}


@pytest.mark.parametrize(
    ("how", "left"),
    [("lost", b""), ("kept", SECTORS), ("torn", SECTORS[:1024]), ("zero", bytes(len(SECTORS)))],
)
def test_data_that_was_not_synced(disk: PowerCutFilesystem, tmp_path: Path, how: str, left: bytes):
    """Lost, there by luck, torn at a sector, or zeros of the right length."""
    put(disk, "file", SECTORS, sync=False)
    disk.sync_directory(disk.root)
    assert found(disk, tmp_path, fate(write=how)) == {"file": left}


def test_names_only(disk: PowerCutFilesystem, tmp_path: Path):
    """The metadata were written, the data were not: the size is right, the content is zeros."""
    put(disk, "file", b"data", sync=False)
    assert found(disk, tmp_path, names_only) == {"file": bytes(4)}


def test_a_size_that_was_not_synced(disk: PowerCutFilesystem, tmp_path: Path):
    """The padding is back; what was written behind the old end is not."""
    fd = disk.create(at(disk, "file"), direct=False)
    disk.write(fd, memoryview(b"data and padding"), 0)
    disk.sync(fd)
    disk.truncate(fd, 4)
    disk.close(fd)
    disk.sync_directory(disk.root)
    assert found(disk, tmp_path) == {"file": b"data and padding"}
    assert found(disk, tmp_path, kept) == {"file": b"data"}


def test_the_names_of_a_file(disk: PowerCutFilesystem, tmp_path: Path):
    """Link, unlink and symbolic link are undone as long as their directory is not synced; a link shares its data."""
    durable(disk, "file")
    disk.link(at(disk, "file"), at(disk, "second"))
    disk.symlink("file", at(disk, "symbolic"))
    disk.unlink(at(disk, "file"))
    assert found(disk, tmp_path) == {"file": b"old"}
    disk.sync_directory(disk.root)
    assert found(disk, tmp_path) == {"second": b"old", "symbolic": "file"}


def test_links_stay_one_file(disk: PowerCutFilesystem, tmp_path: Path):
    """In the image as on the disk."""
    durable(disk, "file")
    disk.link(at(disk, "file"), at(disk, "second"))
    image = disk.image(tmp_path / "image", kept)
    assert (image / "file").samefile(image / "second")


def test_directories(disk: PowerCutFilesystem, tmp_path: Path):
    """A directory has the names that were synced in it; without its own name nothing of it is there."""
    durable_directory(disk, "empty")
    durable_directory(disk, "there")
    durable(disk, "there/a")
    put(disk, "there/b")
    disk.make_directory(at(disk, "gone"))
    durable(disk, "gone/c")
    disk.remove_directory(at(disk, "empty"))
    assert found(disk, tmp_path) == {"there": None, "there/a": b"old", "empty": None}


@pytest.mark.parametrize(
    ("how", "names"),
    [("lost", ["a/old"]), ("kept", ["b/new"]), ("half", ["a/old", "b/new"])],
)
def test_a_rename_of_a_file(disk: PowerCutFilesystem, tmp_path: Path, how: str, names: list[str]):
    """Undone, done, or half done: both names. Never none."""
    durable_directory(disk, "a")
    durable_directory(disk, "b")
    durable(disk, "a/old")
    disk.rename(at(disk, "a/old"), at(disk, "b/new"), "plain")
    assert [name for name, data in found(disk, tmp_path, fate(rename=how)).items() if data] == names


@pytest.mark.parametrize(("synced", "names"), [("a", ["b/new"]), ("b", ["a/old", "b/new"])])
def test_a_rename_of_which_one_directory_is_synced(
    disk: PowerCutFilesystem, tmp_path: Path, synced: str, names: list[str]
):
    """The new directory alone: the old name may be back. The old one alone: the new name is there, or nothing would be."""
    durable_directory(disk, "a")
    durable_directory(disk, "b")
    durable(disk, "a/old")
    disk.rename(at(disk, "a/old"), at(disk, "b/new"), "plain")
    disk.sync_directory(at(disk, synced))
    assert [name for name, data in found(disk, tmp_path).items() if data] == names


@pytest.mark.parametrize("synced", ["", "a"])
@pytest.mark.parametrize("how", ["lost", "kept", "half"])
def test_a_directory_has_one_name(disk: PowerCutFilesystem, tmp_path: Path, synced: str, how: str):
    """Whatever becomes of its rename; a sync on either side makes the rename last."""
    durable_directory(disk, "a")
    durable_directory(disk, "a/old")
    durable(disk, "a/old/file")
    disk.rename(at(disk, "a/old"), at(disk, "new"), "noreplace")
    before = {"a": None, "a/old": None, "a/old/file": b"old"}
    after = {"a": None, "new": None, "new/file": b"old"}
    assert found(disk, tmp_path, fate(rename=how)) == (before if how == "lost" else after)
    disk.sync_directory(at(disk, synced))
    assert found(disk, tmp_path, fate(rename=how)) == after


@pytest.mark.parametrize("synced", [None, "", "a"])
@pytest.mark.parametrize("how", ["lost", "kept", "half"])
def test_an_exchange_is_whole_or_undone(disk: PowerCutFilesystem, tmp_path: Path, synced: str | None, how: str):
    """Never is one of the two directories under both names."""
    durable_directory(disk, "a")
    for name in ("a/x", "y"):
        durable_directory(disk, name)
        durable(disk, f"{name}/file", name.encode())
    disk.rename(at(disk, "a/x"), at(disk, "y"), "exchange")
    if synced is not None:
        disk.sync_directory(at(disk, synced))
    left = found(disk, tmp_path, fate(rename=how))
    swapped = how != "lost" or synced is not None
    assert (left["a/x/file"], left["y/file"]) == ((b"y", b"a/x") if swapped else (b"a/x", b"y"))


def test_unsynced_names_every_change_at_risk(disk: PowerCutFilesystem):
    """With its call and path; nothing once all is synced."""
    put(disk, "file", sync=False)
    disk.make_directory(at(disk, "directory"))
    assert [(c.call, c.path) for c in disk.unsynced] == [("create", "file"), ("mkdir", "directory"), ("write", "file")]
    disk.sync_directory(disk.root)
    assert [(c.call, c.path) for c in disk.unsynced] == [("write", "file")]
    assert disk.calls == 4


def test_each_change_is_asked_for_once(disk: PowerCutFilesystem, tmp_path: Path):
    """So that a rename is not undone at one end and done at the other, and a seed gives the same image twice."""
    durable(disk, "a")
    disk.rename(at(disk, "a"), at(disk, "b"), "plain")
    put(disk, "c", SECTORS, sync=False)
    asked: list[Change] = []
    disk.image(tmp_path / "asked", lambda change: asked.append(change) or "kept")  # type: ignore[func-returns-value]
    assert sorted(change.call for change in asked) == ["create", "rename", "write"]
    assert found(disk, tmp_path, at_random(3)) == found(disk, tmp_path, at_random(3))
    assert len({str(found(disk, tmp_path, at_random(seed))) for seed in range(40)}) > 8


@pytest.mark.parametrize("seed", range(60))
def test_a_disk_that_keeps_everything_is_the_real_one(disk: PowerCutFilesystem, tmp_path: Path, seed: int):
    """Any sequence of calls: the image with all changes kept equals the directory, and so does the one after all syncs."""
    dice = random.Random(seed)
    names = ["a", "b", "d/a", "d/b", "d/e/a", "d", "d/e"]
    for _ in range(60):
        one, other = dice.choice(names), dice.choice(names)
        call: Callable[[], object] = dice.choice(
            [
                lambda one=one: put(disk, one, dice.randbytes(700), sync=dice.random() < 0.5),
                lambda one=one: disk.make_directory(at(disk, one)),
                lambda one=one, other=other: disk.rename(at(disk, one), at(disk, other), "plain"),
                lambda one=one, other=other: disk.rename(at(disk, one), at(disk, other), "noreplace"),
                lambda one=one, other=other: disk.rename(at(disk, one), at(disk, other), "exchange"),
                lambda one=one, other=other: disk.link(at(disk, one), at(disk, other)),
                lambda one=one: disk.symlink("text", at(disk, one)),
                lambda one=one: disk.unlink(at(disk, one)),
                lambda one=one: disk.remove_directory(at(disk, one)),
                lambda one=one: disk.sync_directory(os.path.dirname(at(disk, one))),
            ]
        )
        try:
            call()
        except OSError:
            pass  # the system refused it, so nothing changed
        if dice.random() < 0.2:
            assert found(disk, tmp_path, kept) == tree(disk.root)
    assert found(disk, tmp_path, kept) == tree(disk.root)
    for directory in (disk.root, *(str(p) for p in Path(disk.root).rglob("*") if p.is_dir() and not p.is_symlink())):
        disk.sync_directory(directory)
    assert set(found(disk, tmp_path)) == set(tree(disk.root))


# -- the cut


def test_after(disk: PowerCutFilesystem, tmp_path: Path):
    """The n-th call is not done, and none after it; what is open can be closed, and the image can be had."""
    durable(disk, "file")
    disk.after(2)
    fd = disk.create(at(disk, "other"), direct=False)
    assert not disk.off
    with pytest.raises(OSError, match="the power is off") as caught:
        disk.write(fd, memoryview(b"data"), 0)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, at(disk, "other"))
    assert disk.off
    with pytest.raises(OSError, match="the power is off"):
        disk.unlink(at(disk, "file"))
    disk.close(fd)
    assert found(disk, tmp_path) == {"file": b"old"}
    assert tree(disk.root) == {"file": b"old", "other": b""}


def test_cut(disk: PowerCutFilesystem):
    """At once."""
    disk.cut()
    with pytest.raises(OSError, match="the power is off"):
        disk.make_directory(at(disk, "directory"))
    assert tree(disk.root) == {}


def test_nothing_outside_of_the_root(disk: PowerCutFilesystem, tmp_path: Path):
    """A path elsewhere is a mistake of the caller's."""
    with pytest.raises(ValueError, match="outside"):
        disk.make_directory(str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


# -- errors


def calls(fs: Filesystem, directory: str) -> dict[str, Callable[[], object]]:
    """Every call by its name, each on a file or directory of its own."""

    def there(name: str) -> str:
        return os.path.join(directory, name)

    for name in ("renamed", "linked", "unlinked"):
        Path(there(name)).touch()
    os.mkdir(there("removed"))
    fds = [fs.create(there(f"open-{n}"), direct=False) for n in range(6)]
    return {
        "make_directory": lambda: fs.make_directory(there("made")),
        "create": lambda: fs.create(there("created"), direct=False),
        "write": lambda: fs.write(fds[0], memoryview(b"data"), 0),
        "set_buffered": lambda: fs.set_buffered(fds[1]),
        "truncate": lambda: fs.truncate(fds[2], 7),
        "set_mode": lambda: fs.set_mode(fds[3], 0o600),
        "sync": lambda: fs.sync(fds[4]),
        "close": lambda: fs.close(fds[5]),
        "sync_directory": lambda: fs.sync_directory(directory),
        "rename": lambda: fs.rename(there("renamed"), there("renamed-2"), "noreplace"),
        "link": lambda: fs.link(there("linked"), there("linked-2")),
        "symlink": lambda: fs.symlink("text", there("symbolic")),
        "unlink": lambda: fs.unlink(there("unlinked")),
        "remove_directory": lambda: fs.remove_directory(there("removed")),
    }


CALLS = [name for name in vars(LocalFilesystem) if not name.startswith("_")]


@pytest.mark.parametrize("call", CALLS)
def test_every_call_can_fail(tmp_path: Path, call: str):
    """With errno and path, and without having been done; the next one of its kind works."""
    fs = FailingFilesystem()
    made = calls(fs, str(tmp_path))
    before = tree(tmp_path)
    fs.fail(errno.ENOSPC, call)
    with pytest.raises(OSError, match="No space left") as caught:
        made[call]()
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value.filename).startswith(str(tmp_path))
    assert tree(tmp_path) == before
    assert fs.failed == [(call, caught.value.filename)]
    if call != "close":  # whose descriptor is gone, whatever it says
        made[call]()
    assert fs.calls[call] >= 1


@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_passed_on(tmp_path: Path, call: str):
    """To the file system below: here one that remembers."""
    (tmp_path / "root").mkdir()
    below = FailingFilesystem()
    fs = FailingFilesystem(below)
    made = calls(fs, str(tmp_path / "root"))
    before = below.calls[call]
    made[call]()
    assert below.calls[call] == before + 1


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_is_done_and_reported_as_failed(tmp_path: Path, call: str):
    """As on a network file system whose answer was lost: what it changes is changed."""
    (tmp_path / "root").mkdir()
    below = FailingFilesystem()
    fs = FailingFilesystem(below)
    made = calls(fs, str(tmp_path / "root"))
    before, descriptors = below.calls[call], len(os.listdir("/proc/self/fd"))
    fs.fail(errno.EIO, call, done=True)
    with pytest.raises(OSError, match="Input/output"):
        made[call]()
    assert below.calls[call] == before + 1
    assert len(os.listdir("/proc/self/fd")) == descriptors - (call == "close")


def test_which_calls_fail(tmp_path: Path):
    """`nth`, `times`, `path` and any kind of call; `heal` ends it."""
    fs = FailingFilesystem()

    def tries(count: int) -> list[bool]:
        done = []
        for _ in range(count):
            try:
                fs.make_directory(str(tmp_path / f"{len(list(tmp_path.iterdir()))}"))
                done.append(True)
            except PermissionError:
                done.append(False)
        return done

    fs.fail(errno.EACCES, nth=3)
    assert tries(5) == [True, True, False, True, True]
    fs.fail(errno.EACCES, nth=2, times=2)
    assert tries(5) == [True, False, False, True, True]
    fs.fail(errno.EACCES, times=None)
    assert tries(3) == [False, False, False]
    fs.heal()
    assert tries(1) == [True]
    fs.fail(errno.EACCES, "rename", times=None)
    assert tries(1) == [True]
    fs.fail(errno.EACCES, path="elsewhere", times=None)
    assert tries(1) == [True]


def test_a_failed_sync_loses_the_data(disk: PowerCutFilesystem, tmp_path: Path):
    """On a disk whose power can be cut it is as on Linux: the next sync of the same file succeeds and saves nothing."""
    fs = FailingFilesystem(disk)
    fd = fs.create(at(disk, "file"), direct=False)
    fs.write(fd, memoryview(b"data"), 0)
    fs.fail(errno.EIO, "sync")
    with pytest.raises(OSError, match="Input/output"):
        fs.sync(fd)
    fs.sync(fd)
    fs.close(fd)
    fs.sync_directory(disk.root)
    assert Path(at(disk, "file")).read_bytes() == b"data"
    assert found(disk, tmp_path, kept) == {"file": b""}


def test_set_mode(tmp_path: Path):
    """Sets the bits, through both disks."""
    disk = PowerCutFilesystem(tmp_path)
    fs = FailingFilesystem(disk)
    fd = fs.create(str(tmp_path / "file"), direct=False)
    fs.set_mode(fd, 0o640)
    fs.close(fd)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


# -- with a checkpointer


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Linear(3, 3)


def test_the_example_of_the_module(root: Path, tmp_path: Path, model: torch.nn.Module):
    """Power fails in the second save: its handle says so, and the reboot finds the first or the second, whole."""
    disk = PowerCutFilesystem(root)
    with use_filesystem(disk):
        checkpointer = AsyncCheckpointer(root, writer="thread", retention=KeepLast(2))
    checkpointer.save(1, model=model).result(BOUND)
    disk.after(9)
    error = checkpointer.save(2, model=model).exception(BOUND)
    assert "the power is off" in str(error)
    checkpointer.close()
    found = latest(disk.image(tmp_path / "reboot"))
    assert found is not None
    assert found.name == "checkpoint-1"
    verify(found)
    with AsyncCheckpointer(root):  # for the fixture's sake: what the cut left behind is swept
        pass


def test_only_checkpointers_made_inside(tmp_path: Path, model: torch.nn.Module):
    """Before and after the block the real file system is used; an inner block has its own."""
    outer, inner = FailingFilesystem(), FailingFilesystem()
    with use_filesystem(outer), use_filesystem(inner):
        pass
    with use_filesystem(outer):
        with use_filesystem(inner):
            pass
        first = AsyncCheckpointer(tmp_path / "first", writer="thread")
    with first, AsyncCheckpointer(tmp_path / "second", writer="thread") as second:
        second.save(1, model=model).result(BOUND)
        assert not outer.calls["rename"]
        first.save(1, model=model).result(BOUND)
        assert outer.calls["rename"] == 1
    assert not inner.calls


def test_a_writer_process_is_refused(tmp_path: Path):
    """It would have the real disk, and the test would test nothing."""
    with use_filesystem(FailingFilesystem()), pytest.raises(ValueError, match="writer='thread'"):
        AsyncCheckpointer(tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_disk_that_is_full_for_a_while(root: Path, model: torch.nn.Module):
    """The save fails and says why; once there is room, the next one works."""
    disk = FailingFilesystem()
    with use_filesystem(disk):
        checkpointer = AsyncCheckpointer(root, writer="thread")
    with checkpointer:
        disk.fail(errno.ENOSPC, "write", times=None)
        with pytest.raises(WriteError, match="No space left on device"):
            checkpointer.save(1, model=model).result(BOUND)
        disk.heal()
        checkpointer.save(2, model=model).result(BOUND)
    assert latest(root) == root / "checkpoint-2"
