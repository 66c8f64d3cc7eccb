"""A small interface to the operating system: every call that changes a checkpoint goes through a `Filesystem`.

Each method documents what it guarantees. Nothing here makes decisions. Errors are `OSError` with errno and path.

Two kinds of calls do not go through it. The trainer makes the root, its work directory and the lock file in it before a
writer exists (`make_directories_durable`, `RootLock`). And files on which no checkpoint depends are written directly:
the log of failures (`ORPHAN_LOG`) and scratch files.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import stat
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, Protocol

RenameMode = Literal["noreplace", "exchange", "plain"]

# errors with which a file system or a sandbox says that it has no O_DIRECT
NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)

_COPY_CHUNK = 16 << 20
_RENAME_FLAGS = {"noreplace": 1, "exchange": 2}  # from linux/fs.h: RENAME_NOREPLACE, RENAME_EXCHANGE


class Filesystem(Protocol):
    """The operating system calls that writing and committing need."""

    def make_directory(self, path: str) -> None:
        """Create one directory. Raises FileExistsError if anything has the name."""

    def create(self, path: str, *, direct: bool) -> int:
        """Create a new file for writing and return its descriptor.

        Never opens or follows something that exists already.

        `direct` asks for O_DIRECT: then writes must be whole blocks of `DIRECT_ALIGNMENT` bytes from aligned memory.
        Raises OSError with one of `NO_DIRECT` where the file system or a sandbox has no O_DIRECT.
        """

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """Write at `offset`. Returns how many bytes the system took (at least one)."""

    def set_buffered(self, fd: int) -> None:
        """Turn O_DIRECT off for a descriptor."""

    def truncate(self, fd: int, size: int) -> None:
        """Set the file's size in bytes."""

    def set_mode(self, fd: int, mode: int) -> None:
        """Set the permission bits of a file."""

    def sync(self, fd: int) -> None:
        """Make data, size and mode survive a power cut.

        After an error they may not survive, and must be written again to a new file.
        """

    def close(self, fd: int) -> None:
        """Close a descriptor from `create`."""

    def sync_directory(self, path: str) -> None:
        """Make the names in the directory survive a power cut."""

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        """Rename atomically. `noreplace` raises FileExistsError, `exchange` swaps two names, `plain` is rename(2).

        Raises OSError(EINVAL or ENOSYS) where the file system does not support the mode.
        """

    def link(self, source: str, target: str) -> None:
        """Give a file a second name (hard link)."""

    def symlink(self, text: str, path: str) -> None:
        """Create a symbolic link with the target `text`. Raises FileExistsError if anything has the name."""

    def unlink(self, path: str) -> None:
        """Remove one name of a file. Of a symbolic link, removes the link, never its target."""

    def remove_directory(self, path: str) -> None:
        """Remove an empty directory."""


@contextlib.contextmanager
def _naming(fd: int) -> Iterator[None]:
    """Add the file's path to an OSError of a call that has only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            try:
                error.filename = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                pass  # no path can be found
        raise


@contextlib.contextmanager
def parent_of(path: str) -> Iterator[tuple[int, str]]:
    """Yield (descriptor of the directory that holds `path`, last name of `path`), to be used together.

    Opens every directory on the way without following symbolic links. So if somebody else renames one of them or
    replaces it by a link meanwhile, the operation cannot end up in another place.

    Raises OSError(ELOOP) if a directory on the way is a symbolic link. Every other OSError, also one of the block, gets
    the whole path.
    """
    directory, name = os.path.split(path)
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    at = "/" if os.path.isabs(directory) else "."
    fd = os.open(at, flags)
    try:
        for part in directory.split("/"):
            if part:
                at = os.path.join(at, part)
                inner = os.open(part, flags, dir_fd=fd)
                os.close(fd)
                fd = inner
        at = ""
        yield fd, name or "."
    except OSError as error:
        if at and error.errno == errno.ENOTDIR and os.path.islink(at):
            raise OSError(errno.ELOOP, "is a symbolic link; links are not followed", at) from error
        if at or not os.path.isabs(error.filename or ""):
            error.filename = path
        raise
    finally:
        os.close(fd)


class LocalFilesystem:
    """The real file system. It follows no symbolic link in any part of a path, even one that was put there just now.

    So paths must be absolute and resolved.
    """

    def make_directory(self, path: str) -> None:
        with parent_of(path) as (parent, name):
            os.mkdir(name, dir_fd=parent)

    def create(self, path: str, *, direct: bool) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with parent_of(path) as (parent, name):
            if not direct:
                return os.open(name, flags, 0o666, dir_fd=parent)
            try:
                return os.open(name, flags | os.O_DIRECT, 0o666, dir_fd=parent)
            except OSError as error:
                if error.errno in NO_DIRECT:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=parent)  # some kernels create the name before they refuse the flag
                raise

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        with _naming(fd):
            count = os.pwrite(fd, data, offset)
            if not count and len(data):
                raise OSError(errno.EIO, "the system took nothing and did not say why")
            return count

    def set_buffered(self, fd: int) -> None:
        import fcntl  # not on Windows, where checkpoints can be read but not written

        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)

    def truncate(self, fd: int, size: int) -> None:
        with _naming(fd):
            os.ftruncate(fd, size)

    def set_mode(self, fd: int, mode: int) -> None:
        with _naming(fd):
            os.fchmod(fd, mode)

    def sync(self, fd: int) -> None:
        with _naming(fd):
            _fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def sync_directory(self, path: str) -> None:
        with parent_of(path) as (parent, name):
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            with _naming(fd):
                _fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        with parent_of(target) as (there, new), parent_of(source) as (here, old):
            if mode == "plain":
                os.rename(old, new, src_dir_fd=here, dst_dir_fd=there)
                return
            libc = ctypes.CDLL(None, use_errno=True)
            if not hasattr(libc, "renameat2"):
                raise OSError(errno.ENOSYS, "renameat2 is not available", source)
            if libc.renameat2(here, os.fsencode(old), there, os.fsencode(new), _RENAME_FLAGS[mode]):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), source, None, target)

    def link(self, source: str, target: str) -> None:
        with parent_of(target) as (there, new), parent_of(source) as (here, old):
            os.link(old, new, src_dir_fd=here, dst_dir_fd=there, follow_symlinks=False)

    def symlink(self, text: str, path: str) -> None:
        with parent_of(path) as (parent, name):
            os.symlink(text, name, dir_fd=parent)

    def unlink(self, path: str) -> None:
        with parent_of(path) as (parent, name):
            os.unlink(name, dir_fd=parent)

    def remove_directory(self, path: str) -> None:
        with parent_of(path) as (parent, name):
            os.rmdir(name, dir_fd=parent)


def _fsync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            why = f"fsync is refused by this kernel or sandbox ({error.strerror}), so nothing would survive a power cut"
            raise OSError(error.errno, why) from error
        raise


# The file system that thread writers started in this context use instead of the real one. `testing.use_filesystem` sets
# it.
FILESYSTEM_OVERRIDE: ContextVar[Filesystem | None] = ContextVar("vembed_async_ckpt_filesystem", default=None)


def make_directories(fs: Filesystem, path: str) -> None:
    """Create a directory and its missing parents, durably."""
    if os.path.islink(path) or not os.path.isdir(path):
        make_directories(fs, os.path.dirname(path))
        fs.make_directory(path)
        fs.sync_directory(os.path.dirname(path))


def write_synced(fs: Filesystem, path: str, content: bytes | io.RawIOBase, mode: int | None = None) -> None:
    """Write a new file and sync it. Its name is durable only when its directory is synced too.

    `mode`: its permission bits; None leaves what the umask gives.
    """
    fd = fs.create(path, direct=False)
    try:
        if mode is not None:
            fs.set_mode(fd, mode)
        at = 0
        for chunk in [content] if isinstance(content, bytes) else iter(lambda: content.read(_COPY_CHUNK) or b"", b""):
            done = 0
            while done < len(chunk):
                done += fs.write(fd, memoryview(chunk)[done:], at + done)
            at += done
        fs.sync(fd)
    finally:
        fs.close(fd)


def read_regular(path: str, limit: int | None = None) -> bytes:
    """Return the first `limit` bytes (all, if None) of a regular file.

    Never follows a symbolic link in the last component, and never blocks on a FIFO or device. Raises OSError(EINVAL)
    for anything that is not a regular file, and any OSError of open(2).
    """
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        return file.read(-1 if limit is None else min(limit, os.fstat(fd).st_size))


def open_regular(path: str) -> int:
    """Return a descriptor for reading a regular file, under the conditions of `read_regular`. The caller closes it."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    fd = os.open(path, flags | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return fd


def make_directories_durable(path: str) -> None:
    """Create a directory and its missing parents. Afterwards their names survive a power cut.

    Otherwise a checkpoint could be durable in a directory that is not.
    """
    parent = os.path.dirname(path)
    if not os.path.isdir(path):
        if parent != path:
            make_directories_durable(parent)
        try:
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
    try:
        LocalFilesystem().sync_directory(parent)
    except OSError as error:
        if error.errno != errno.EACCES:  # the parent belongs to somebody else, so we cannot have made this directory
            raise


def walk_files(directory: str, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield every entry below `directory` that is not a directory, as (relative name, entry).

    Links are not followed.
    """
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(entry.path, name + "/")
        else:
            yield name, entry


def walk_directories(directory: str) -> Iterator[str]:
    """Yield every directory below `directory`: children before their parents, `directory` itself last.

    Links are not followed.
    """
    with os.scandir(directory) as entries:
        children = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    for child in children:
        yield from walk_directories(child)
    yield directory
