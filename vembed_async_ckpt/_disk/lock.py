"""One lock per root: a single open file description with a flock, which trainer and writer share.

The lock is held as long as either of them lives. So a writer that finishes its jobs after the trainer's death still
owns the root, and a restarted writer never loses it. Only the holder sweeps. The process that ends last removes the
lock file and the empty work directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
import weakref
from dataclasses import dataclass

from .. import _signals
from .._format import names
from ..errors import CheckpointerBusy, CheckpointError, CommitError
from ..events import logger
from .filesystem import LocalFilesystem, make_directories_durable, parent_of

ORPHAN_PATIENCE = 60.0  # seconds to wait for the writer of a dead trainer
# seconds that a living holder gets: a reader that tests the lock holds it for a moment
_GRACE = 2.0
_POLL = 0.05
_REMOVALS = 100  # times that a lock file may vanish while it is being taken


@dataclass(frozen=True, slots=True)
class Process:
    """A process id with its start time in clock ticks since boot (proc(5), stat field 22).

    So a reused id is noticed.
    """

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the living process `pid`, or None. A zombie counts as dead: it runs nothing any more."""
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in (b"Z", b"X") else cls(pid, int(fields[19]))

    def alive(self) -> bool:
        return Process.of(self.pid) == self


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder that a lock file names.

    `trainer`, `writer`: its processes; `writer` is None if there is none. `where`: the host and the process id
    namespace in which their ids are valid.
    """

    trainer: Process
    writer: Process | None
    where: str

    def __str__(self) -> str:
        ids = f"trainer {self.trainer.pid}" + (f", writer {self.writer.pid}" if self.writer else "")
        return ids if self.where == _here() else f"{ids} in {self.where}"

    def may_live(self) -> bool:
        """Return whether the trainer lives or may live.

        It may live if it cannot be seen from here, because it is on another host or in another container.
        """
        return self.where != _here() or self.trainer.alive()


def _here() -> str:
    """Return the host and the process id namespace of this process."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = "unknown"  # a sandbox without /proc
    return f"{os.uname().nodename} {namespace}"


class Taken(CommitError):
    """Another process has taken the root. This one may neither publish nor delete there any more."""


class RootLock:
    """The held lock of one root. A writer process inherits `fd`.

    The lock file may be removed: by its holder at the end (`release`), or by somebody who cleans up. So a process that
    takes the lock checks that the file it has locked still has the name. The holder checks the same before every
    operation that depends on the lock (`secure`).
    """

    def __init__(self, root: str, fd: int) -> None:
        """`fd`: the lock file of `root`, locked by this process or by the process that handed it over."""
        self.root = root
        self.work = names.work_directory(root)
        self.fd = fd
        self._device = os.fstat(fd).st_dev
        _HELD.add(self)

    @classmethod
    def acquire(cls, root: str, patience: float = ORPHAN_PATIENCE, *, create: bool = True) -> RootLock:
        """Take the lock of `root`. Creates the work directory if need be, and also the root unless `create` is False.

        Waits up to `patience` seconds for the writer of a dead trainer to finish its jobs, and logs that. Raises
        `CheckpointerBusy` that names the holder, and FileNotFoundError if the root does not exist and is not created.
        """
        if create:
            make_directories_durable(root)
        lock = cls(root, _take(root, names.work_directory(root), patience))
        lock.name(None)
        return lock

    def name(self, writer_pid: int | None) -> None:
        """Write into the lock file who holds it: this process and its writer."""
        holders = [Process.of(pid) for pid in (os.getpid(), writer_pid) if pid is not None]
        processes = [[holder.pid, holder.start] for holder in holders if holder is not None]
        _write(self.fd, json.dumps({"where": _here(), "processes": processes}).encode())

    def secure(self) -> str:
        """Check that the locked file still has the name, before something is published or deleted.

        The lock file, the work directory or the root may have been removed or moved away. Then it is made again and
        locked, unless somebody else has done so. Returns a message about what was done, else "". If the root was moved
        and a symbolic link leads to the new place, `root` has the new path afterwards. Raises `Taken` if another
        process holds the root. Raises `CommitError` if the root is on another file system now, or if a symbolic link
        leads to anything else.
        """
        if self.is_held():
            return ""
        root = os.path.realpath(self.root)
        work = os.path.join(os.path.dirname(root) if self._is_beside() else root, os.path.basename(self.work))
        if self._is_at(work):
            done = f"was moved to {root}; goes on there"
        elif root != self.root:
            raise CommitError(f"{self.root}: a symbolic link leads to {root} now; links are not followed, move it away")
        else:
            done = self._take_again(work)
        self.root, self.work = root, work
        return done

    def _take_again(self, work: str) -> str:
        """Make what is missing and lock it. Returns a message that names it."""
        self._refuse_other_file_system()
        if os.path.islink(work):
            raise CommitError(f"{work}: is a symbolic link now; links are not followed, move it away")
        here = {self.root: "it", work: "its work directory"}
        missing = next((what for path, what in here.items() if not os.path.lexists(path)), "its lock file")
        ours = _holder(self.fd)
        try:
            make_directories_durable(self.root)
            fd = _take(self.root, work, 0.0)
        except CheckpointerBusy as error:
            raise Taken(
                f"{error}. This is {ours or 'a process without a name'}, whose lock file was removed"
            ) from error
        except CheckpointError as error:
            raise CommitError(str(error)) from error
        _write(fd, os.pread(self.fd, 4096, 0))
        self.replace(fd)
        return f"{missing} was removed, and was made again"

    def is_held(self) -> bool:
        """Return whether the locked file still has the name, so that nobody else can hold the lock."""
        return self._is_at(self.work)

    def refuse_if_lost(self) -> None:
        """Raise `CommitError` before something is deleted, if the locked file no longer has its name.

        The lock file is not made again here: somebody may still be removing the root.
        """
        if not self.is_held():
            raise CommitError("its lock file is gone or is another one, so nothing is deleted")

    def _is_beside(self) -> bool:
        return os.path.dirname(self.work) != self.root

    def _refuse_other_file_system(self) -> None:
        """Raise `CommitError` if the root is on another file system than before.

        An unmounted disk leaves an empty directory or none. Nothing may be written to the disk below it.
        """
        there, device = self.root, None
        while device is None:
            try:
                device = os.stat(there).st_dev
            except (FileNotFoundError, NotADirectoryError):
                there = os.path.dirname(there)
            except OSError as error:
                raise CommitError(f"{there}: cannot be read ({error.strerror}); nothing was written there") from error
        if device != self._device:
            raise CommitError(
                f"{self.root}: {there} is on another file system than when the training began; was a disk unmounted? "
                "Nothing was written there"
            )

    def _is_at(self, work: str) -> bool:
        path = os.path.join(work, names.LOCK)
        try:
            with parent_of(path) as (parent, name):
                return os.path.samestat(os.stat(name, dir_fd=parent, follow_symlinks=False), os.fstat(self.fd))
        except OSError:
            return False

    def replace(self, fd: int) -> None:
        """Hold the lock file behind `fd` instead of the present one. `fd` is closed."""
        if self.fd >= 0:
            os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)

    def release(self) -> None:
        """Give up the lock, and remove the work directory if it is empty. No other process may share this lock then."""
        if self.fd >= 0:
            self.clear()
        self.close()

    def clear(self) -> None:
        """Remove the lock file and the work directory, if nothing else is in it and this lock is still valid."""
        if not self.is_held():
            return
        replaced = os.path.join(self.work, names.REPLACED)
        try:
            if os.path.isdir(replaced) and not os.path.islink(replaced):
                os.rmdir(replaced)
            if os.listdir(self.work) == [names.LOCK]:
                # a process that waits for the file sees that it lost its name
                os.unlink(os.path.join(self.work, names.LOCK))
                os.rmdir(self.work)
        except OSError as error:
            logger.debug("%s stays: %s", self.work, error)  # something is in it, or was put into it just now

    def close(self) -> None:
        """Give up this process's share. The lock is free once the writer's share is gone too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_HELD: weakref.WeakSet[RootLock] = weakref.WeakSet()


def _close_in_child() -> None:
    """Close the locks in a forked child. Otherwise it would hold its parent's lock."""
    for lock in list(_HELD):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)


def _take(root: str, work: str, patience: float) -> int:
    """Lock the file in `work` and return its descriptor.

    Makes `work` if it is missing. Raises as `RootLock.acquire`.
    """
    path = os.path.join(work, names.LOCK)
    for _ in range(_REMOVALS):
        if not os.path.isdir(work):
            _make_directory(work)
        try:
            fd = _open(work, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue  # the last holder has just removed the work directory
        try:
            _wait(fd, root, fcntl.LOCK_EX, patience)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(path), os.fstat(fd)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        # the last holder removed the file while this process waited: the name now belongs to another file
        os.close(fd)
    raise CheckpointerBusy(f"{path}: was removed again and again while it was being locked; find out who removes it")


def _make_directory(work: str) -> None:
    """Make the work directory durably. Raises FileNotFoundError if its parent does not exist."""
    try:
        os.mkdir(work)
    except FileExistsError:
        if not os.path.isdir(work):
            raise
    LocalFilesystem().sync_directory(os.path.dirname(work))


def _write(fd: int, content: bytes) -> None:
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, len(content))


def wait_for_orphan(root: str, patience: float = ORPHAN_PATIENCE) -> None:
    """If the writer of a dead trainer still works on `root`, wait for it, up to `patience` seconds, and log that.

    Returns at once if nobody holds the lock or the holder's trainer lives. Raises `CheckpointerBusy` if the writer is
    still working afterwards.
    """
    try:
        fd = _open(names.work_directory(root), os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        holder = _holder(fd)
        if holder is not None and holder.may_live():
            return
        _wait(fd, root, fcntl.LOCK_SH, patience)
    finally:
        os.close(fd)


def _open(work: str, flags: int) -> int:
    """Open the lock file in `work`. Raises `CheckpointError` if it is not a lock file of ours or cannot be opened."""
    path = os.path.join(work, names.LOCK)
    if os.path.islink(work):
        raise CheckpointError(f"{work}: is a symbolic link; links are not followed, move it away")
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        reason = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be opened ({error.strerror})"
        raise CheckpointError(f"{path}: {reason}: who saves there is unknown") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: is not a regular file; move it away")
    return fd


def _wait(fd: int, root: str, mode: int, patience: float) -> None:
    begun = time.monotonic()
    announced = False
    while True:
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            if mode == fcntl.LOCK_SH:
                return  # a file system without locks: a reader needs none
            raise CheckpointError(
                f"{root}: flock is refused here ({error.strerror}), so nothing keeps two trainings apart; mount the file system "
                "with locks (Lustre: -o flock), save to another one, or allow the call in the sandbox"
            ) from error
        holder = _holder(fd)
        if mode == fcntl.LOCK_SH and holder is not None and holder.may_live():
            return  # the holder was just writing its name when it was read before
        waited = time.monotonic() - begun
        if holder is None or holder.may_live():
            if waited > _GRACE:
                raise CheckpointerBusy(
                    f"{root}: another process saves here ({holder or 'its name is not written yet'}); "
                    "wait for it to end, stop it, or use another directory"
                )
        elif waited > patience:
            raise CheckpointerBusy(
                f"{root}: the writer of a dead trainer ({holder}) is still at work after {waited:.0f} s"
            )
        elif not announced:
            logger.warning("%s: waiting for the writer of a dead trainer (%s) to finish what was staged", root, holder)
            announced = True
        time.sleep(_POLL)
        _signals.deliver()


def _holder(fd: int) -> Holder | None:
    try:
        content = json.loads(os.pread(fd, 4096, 0))
        trainer, *writer = (Process(int(pid), int(start)) for pid, start in content["processes"])
        return Holder(trainer, writer[0] if writer else None, str(content["where"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None  # it is being rewritten at this moment
