"""Real disks that are full, broken, or refuse: the save says so once, what was there stays, and on a disk that is well again saves
work as ever."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from . import checks
from .conftest import Tally
from .faults import Disk, make_file_system, megabytes, missing, mounted, run, unmount
from .fuse_disk import FuseDisk
from .nursery import Nursery
from .process import Process, process, said_wrongly, unexpected

pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(missing("ext4")), reason=missing("ext4"))]
needs_fuse = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="the kernel has no FUSE")
needs_xfs = pytest.mark.skipif(bool(missing("xfs")), reason=missing("xfs"))
BROKEN = (os.strerror(errno.EIO), os.strerror(errno.ENOSPC), os.strerror(errno.EROFS), os.strerror(errno.EUCLEAN))
DIRECT = [pytest.param(True, id="direct"), pytest.param(False, id="buffered")]


def suffer(trainer: Process, fault: Callable[[], object], heal: Callable[[], object], *reasons: str) -> list[str]:
    """What is wrong with a save on a disk that has the `fault`, and with the one after `heal`."""
    trainer.good_save()
    trainer.good_save()
    fault()
    said = trainer.save()
    problems = said_wrongly(said, trainer.root, *reasons)
    if not said[0].startswith("ERR"):
        problems.append(f"saved on a broken disk: {said}")
    problems += checks.after_fault(trainer.root, trainer.newest(said))
    heal()
    said = trainer.save()
    if said != [f"ACK {trainer.n}"]:
        problems.append(f"afterwards: {said}")
    return [*problems, *checks.after_fault(trainer.root, trainer.n), *unexpected(trainer.root)]


def fill(path: str, *, inodes: bool = False) -> Callable[[], None]:
    """Take all that is left of the file system on `path`; returns what gives it back."""
    ballast = os.path.join(path, "ballast")
    os.mkdir(ballast)
    size = 1 << 20
    for n in range(100_000):
        try:
            with open(os.path.join(ballast, str(n)), "wb", buffering=0) as file:
                if not inodes:
                    os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            if inodes or size == 4096:
                return lambda: shutil.rmtree(ballast)
            size = max(size // 16, 4096)
    raise AssertionError("it does not get full")


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[str]:
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", options, "none", str(path))
    try:
        yield str(path)
    finally:
        unmount(str(path))


@pytest.mark.parametrize(
    ("options", "inodes"), [("size=1m", False), ("size=8m,nr_inodes=40", True)], ids=["bytes", "inodes"]
)
def test_a_full_tmpfs(victims: Nursery, tally: Tally, tmp_path: Path, options: str, inodes: bool) -> None:
    """No bytes left, or no inodes."""
    with tmpfs(tmp_path / "disk", options) as path, process(victims, os.path.join(path, "root")) as trainer:
        freed: list[Callable[[], None]] = []
        problems = suffer(
            trainer,
            lambda: freed.append(fill(path, inodes=inodes)),
            lambda: freed[0](),
            os.strerror(errno.ENOSPC),
        )
    tally.fault(options, problems)
    tally.settle(at_least=1)


@pytest.mark.parametrize("direct", DIRECT)
def test_a_full_ext4(victims: Nursery, tally: Tally, tmp_path: Path, direct: bool) -> None:
    """No blocks left; freed, the next save works."""
    with Disk(tmp_path, "ext4") as disk:
        options = {} if direct else {"writer": "thread", "direct": False}
        with process(victims, os.path.join(disk.path, "root"), **options) as trainer:
            freed: list[Callable[[], None]] = []
            problems = suffer(
                trainer, lambda: freed.append(fill(disk.path)), lambda: freed[0](), os.strerror(errno.ENOSPC)
            )
    tally.fault("ext4", problems)
    tally.settle(at_least=1)


def test_checkpoints_fill_the_disk(victims: Nursery, tally: Tally, tmp_path: Path) -> None:
    """Nothing that was acknowledged is given up for what does not fit any more."""
    with tmpfs(tmp_path / "disk", "size=500k") as path:
        root = os.path.join(path, "root")
        with process(victims, root, keep=99) as trainer:
            said = trainer.save()
            while said[0].startswith("ACK"):
                said = trainer.save()
            problems = said_wrongly(said, root, os.strerror(errno.ENOSPC))
            tally.fault(trainer.n, [*problems, *checks.after_fault(root, trainer.n - 1), *unexpected(root)])
        kept = [name for name in os.listdir(root) if name.startswith("checkpoint-")]
        assert len(kept) == trainer.n - 1 > 3
    tally.settle(at_least=1)


def test_an_immutable_root(victims: Nursery, tally: Tally, tmp_path: Path) -> None:
    """chattr +i: EPERM even for root."""
    with Disk(tmp_path, "ext4") as disk:
        root = os.path.join(disk.path, "root")
        with process(victims, root) as trainer:
            problems = suffer(
                trainer,
                lambda: run("chattr", "+i", root),
                lambda: run("chattr", "-i", root),
                os.strerror(errno.EPERM),
            )
    tally.fault("chattr +i", problems)
    tally.settle(at_least=1)


def test_no_descriptors_left(victims: Nursery, tally: Tally, tmp_path: Path) -> None:
    """EMFILE in the writer process."""
    with process(victims, str(tmp_path / "root")) as trainer:
        before = resource.prlimit(trainer.writer, resource.RLIMIT_NOFILE)

        def fault() -> None:
            taken = len(os.listdir(f"/proc/{trainer.writer}/fd"))
            resource.prlimit(trainer.writer, resource.RLIMIT_NOFILE, (taken + 1, before[1]))

        problems = suffer(
            trainer,
            fault,
            lambda: resource.prlimit(trainer.writer, resource.RLIMIT_NOFILE, before),
            os.strerror(errno.EMFILE),
        )
    tally.fault("EMFILE", problems)
    tally.settle(at_least=1)


# -- disks that must be mounted anew before they can be used again


def suffer_and_remount(
    victims: Nursery,
    disk: Callable[[], object],
    path: str,
    fault: Callable[[], object],
    heal: Callable[[], object],
    *,
    direct: bool,
) -> list[str]:
    """What is wrong with a save on a disk that breaks, and with what is there when the disk was repaired and mounted again.

    `disk()` is a context manager that mounts it on `path`. How a file system looks while it is broken is its own affair.
    """
    root = os.path.join(path, "root")
    options = {} if direct else {"writer": "thread", "direct": False}
    with disk():
        # All are kept: what is freed could be used again without asking the storage below.
        with process(victims, root, keep=9, **options) as trainer:
            trainer.good_save()
            trainer.good_save()
            run("sync", "-f", path)
            fault()
            said = trainer.save()
            problems = said_wrongly(said, root, *BROKEN)
            if not said[0].startswith("ERR"):
                problems.append(f"saved on a broken disk: {said}")
        heal()
    with disk():
        problems += checks.after_fault(root, 2)
        problems += checks.next_start(victims, root, 1)
    return problems


@pytest.mark.parametrize("direct", DIRECT)
@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=needs_xfs)])
def test_a_thin_disk_runs_out(victims: Nursery, tally: Tally, tmp_path: Path, kind: str, direct: bool) -> None:
    """The file system has room, the storage below has none: writes or syncs fail, and a later sync of the same file succeeds
    though its data are gone."""
    with tmpfs(tmp_path / "storage", f"size={megabytes(kind)}m") as storage:
        image = os.path.join(storage, "image")
        with open(image, "wb") as file:
            file.truncate(megabytes(kind) << 20)
        make_file_system(kind, image)
        path = str(tmp_path / "mounted")
        freed: list[Callable[[], None]] = []
        problems = suffer_and_remount(
            victims,
            lambda: mounted(kind, image, path),
            path,
            lambda: freed.append(fill(storage)),
            lambda: freed[0](),
            direct=direct,
        )
    tally.fault(kind, problems)
    tally.settle(at_least=1)


@needs_fuse
@pytest.mark.parametrize("direct", DIRECT)
@pytest.mark.parametrize("what", ["write", "flush"])
@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=needs_xfs)])
def test_a_disk_with_errors(victims: Nursery, tally: Tally, tmp_path: Path, kind: str, what: str, direct: bool) -> None:
    """The device refuses to write, or to flush its cache."""
    with FuseDisk(tmp_path, megabytes(kind)) as device:
        make_file_system(kind, device.path)
        path = str(tmp_path / "mounted")
        problems = suffer_and_remount(
            victims,
            lambda: mounted(kind, device.path, path),
            path,
            lambda: device.fail(what),
            lambda: device.fail(""),
            direct=direct,
        )
    tally.fault((kind, what), problems)
    tally.settle(at_least=1)


@needs_fuse
@pytest.mark.parametrize("direct", DIRECT)
@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=needs_xfs)])
def test_a_write_that_fails_once(victims: Nursery, tally: Tally, tmp_path: Path, kind: str, direct: bool) -> None:
    """The save is made by its second try, in new files: a second sync of the old ones would succeed, but their data are gone."""
    with FuseDisk(tmp_path, megabytes(kind)) as device:
        make_file_system(kind, device.path)
        path = str(tmp_path / "mounted")
        root = os.path.join(path, "root")
        options = {} if direct else {"writer": "thread", "direct": False}
        with mounted(kind, device.path, path), process(victims, root, **options) as trainer:
            trainer.good_save()
            run("sync", "-f", path)
            device.fail(struct.pack("<I", 2).hex())  # what the weights of save 2 are full of
            trainer.good_save()
            assert device.failures() == 1
        with mounted(kind, device.path, path):
            tally.fault(kind, [*checks.after_fault(root, 2), *checks.next_start(victims, root, 1)])
    tally.settle(at_least=1)


@contextmanager
def zram(megabytes: int) -> Iterator[tuple[str, Callable[[str], object]]]:
    """A disk in compressed memory; the function sets how much memory it may take."""
    number = Path("/sys/class/zram-control/hot_add").read_text().strip()
    settings = Path(f"/sys/block/zram{number}")
    try:
        (settings / "disksize").write_text(f"{megabytes}M")
        yield f"/dev/zram{number}", (settings / "mem_limit").write_text
    finally:
        (settings / "reset").write_text("1")
        Path("/sys/class/zram-control/hot_remove").write_text(number)


@pytest.mark.skipif(not os.path.exists("/sys/class/zram-control"), reason="the kernel has no zram")
@pytest.mark.parametrize("direct", DIRECT)
def test_a_disk_in_memory_that_runs_out(victims: Nursery, tally: Tally, tmp_path: Path, direct: bool) -> None:
    """Its memory is limited to what it has: writing back fails (EIO)."""
    with zram(megabytes("ext4")) as (device, limit):
        make_file_system("ext4", device)
        path = str(tmp_path / "mounted")
        problems = suffer_and_remount(
            victims, lambda: mounted("ext4", device, path), path, lambda: limit("4K"), lambda: limit("0"), direct=direct
        )
    tally.fault("zram", problems)
    tally.settle(at_least=1)


def test_a_file_system_that_went_read_only(victims: Nursery, tally: Tally, tmp_path: Path) -> None:
    """ext4 after an error in its metadata: EROFS."""
    with tmpfs(tmp_path / "storage", "size=16m") as storage:
        image = os.path.join(storage, "image")
        with open(image, "wb") as file:
            file.truncate(16 << 20)
        make_file_system("ext4", image)
        path = str(tmp_path / "mounted")

        def fault() -> None:
            device = run("findmnt", "-n", "-o", "SOURCE", path).removeprefix("/dev/")
            Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")

        problems = suffer_and_remount(
            victims,
            lambda: mounted("ext4", image, path, "errors=remount-ro"),
            path,
            fault,
            lambda: None,
            direct=True,
        )
    tally.fault("EROFS", problems)
    tally.settle(at_least=1)


# -- without a journal


@pytest.mark.skipif(shutil.which("e2fsck") is None, reason="e2fsck is not installed")
def test_ext4_without_a_journal(victims: Nursery, tally: Tally, tmp_path: Path) -> None:
    """The image is copied while it is in use, right after an acknowledgement; repaired, it has what was acknowledged."""
    kind = "ext4 without journal"
    with ExitStack() as stack:
        storage = stack.enter_context(tmpfs(tmp_path / "storage", "size=64m"))
        image, copy = os.path.join(storage, "image"), os.path.join(storage, "copy")
        with open(image, "wb") as file:
            file.truncate(megabytes(kind) << 20)
        make_file_system(kind, image)
        path = stack.enter_context(mounted(kind, image, str(tmp_path / "mounted")))
        child = stack.enter_context(victims.child("obey", root=os.path.join(path, "root")))
        for n in range(1, 13):
            child.tell(f"save {n} {n - n % 2}")  # every second one replaces the one before
            child.expect(f"ACK {n}")
            run("cp", "--sparse=always", image, copy)
            child.expect("TIDIED")
            assert subprocess.run(["e2fsck", "-fy", copy], capture_output=True).returncode < 4
            with mounted(kind, copy, str(tmp_path / "found")) as found:
                root = os.path.join(found, "root")
                tally.fault(n, [*checks.after_fault(root, n), *checks.next_start(victims, root, 1)])
    tally.settle(at_least=12)
