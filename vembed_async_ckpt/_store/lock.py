"""One lock per root: a single flocked open file description that trainer and writer share.

It is held as long as either of them lives, so a writer that finishes its jobs after the trainer's death still owns the root,
and a respawned writer never loses it. Only its holder sweeps.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from dataclasses import dataclass

from ..errors import CheckpointerBusy, CheckpointError
from ..events import logger
from . import names
from .fs import make_directories_durable

ORPHAN_PATIENCE = 60.0  # seconds to wait for a writer whose trainer is dead
_GRACE = 2.0  # seconds a living holder gets: a reader that probes the lock has it for an instant
_POLL = 0.05


@dataclass(frozen=True, slots=True)
class Process:
    """A process id with its start time in clock ticks since boot (proc(5), stat field 22), so that ids may be reused."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The living process `pid`, or None. A zombie is dead: it runs nothing any more."""
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
    """Who a lock file names: the trainer, its writer process if there is one, and where their process ids mean something."""

    trainer: Process
    writer: Process | None
    where: str

    def __str__(self) -> str:
        ids = f"trainer {self.trainer.pid}" + (f", writer {self.writer.pid}" if self.writer else "")
        return ids if self.where == _here() else f"{ids} in {self.where}"

    def may_live(self) -> bool:
        """Whether the trainer lives, or is where it cannot be seen from here: another host or container."""
        return self.where != _here() or self.trainer.alive()


def _here() -> str:
    """Host and process id namespace of this process."""
    return f"{os.uname().nodename} {os.readlink('/proc/self/ns/pid')}"


class RootLock:
    """The lock of one root, held. `fd` is what a writer process inherits."""

    def __init__(self, root: str, fd: int) -> None:
        self.root = root
        self.fd = fd

    @classmethod
    def acquire(cls, root: str, patience: float = ORPHAN_PATIENCE) -> RootLock:
        """Take the lock of `root`, creating the work directory if need be.

        Waits up to `patience` seconds for the writer of a dead trainer to finish its jobs, and says so.
        Raises `CheckpointerBusy` naming the holder.
        """
        make_directories_durable(root)
        make_directories_durable(names.work_directory(root))
        fd = _open(root, os.O_RDWR | os.O_CREAT)
        try:
            _wait(fd, root, fcntl.LOCK_EX, patience)
            lock = cls(root, fd)
            lock.name(None)
        except BaseException:
            os.close(fd)
            raise
        return lock

    def name(self, writer_pid: int | None) -> None:
        """Write down who holds the lock: this process and its writer."""
        holders = [Process.of(pid) for pid in (os.getpid(), writer_pid) if pid is not None]
        processes = [[holder.pid, holder.start] for holder in holders if holder is not None]
        content = json.dumps({"where": _here(), "processes": processes}).encode()
        os.pwrite(self.fd, content, 0)
        os.ftruncate(self.fd, len(content))

    def close(self) -> None:
        """Let go of this process's share; the lock is free once the writer's is gone too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def wait_for_orphan(root: str, patience: float = ORPHAN_PATIENCE) -> None:
    """If a writer whose trainer is dead still works on `root`, wait for it, up to `patience` seconds, and say so.

    Returns at once when nobody holds the lock or the holder's trainer lives. Raises `CheckpointerBusy` when the orphan is
    still at work afterwards.
    """
    try:
        fd = _open(root, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        holder = _holder(fd)
        if holder is not None and holder.may_live():
            return
        _wait(fd, root, fcntl.LOCK_SH, patience)
    finally:
        os.close(fd)


def _open(root: str, flags: int) -> int:
    """Open the lock file. Raises `CheckpointError` for what is no lock file of ours, or cannot be opened."""
    work, path = names.work_directory(root), names.lock_file(root)
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
                return  # a reader needs no lock where there are none
            raise CheckpointError(
                f"{root}: this file system has no locks ({error.strerror}), so nothing keeps two trainings apart; "
                "mount it with locks (Lustre: -o flock), or save to another one"
            ) from error
        holder = _holder(fd)
        if mode == fcntl.LOCK_SH and holder is not None and holder.may_live():
            return  # its name was being written when it was looked for
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


def _holder(fd: int) -> Holder | None:
    try:
        content = json.loads(os.pread(fd, 4096, 0))
        trainer, *writer = (Process(int(pid), int(start)) for pid, start in content["processes"])
        return Holder(trainer, writer[0] if writer else None, str(content["where"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None  # being rewritten this very moment
