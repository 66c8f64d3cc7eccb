"""The checkpoint on this machine that is shipped, held by the descriptor of its directory.

Another save may take its name meanwhile, or the user may delete it. Its files are still read from the same directory,
so what is shipped never mixes two saves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import TracebackType

import xxhash

from .._disk.manifests import read
from .._format import names
from .._format.manifest import FileRecord, Manifest
from ..errors import CheckpointError, CorruptCheckpoint

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Gone(CheckpointError):
    """The checkpoint is no longer there, or another save has its name: nothing is to be shipped."""


class Damaged(CheckpointError):
    """A file of the checkpoint is not what the manifest says, so it cannot be shipped."""


class LocalCheckpoint:
    """A committed checkpoint, opened for reading. A context manager."""

    def __init__(self, path: str, save_id: str) -> None:
        """Open the checkpoint that save `save_id` made. Raises `Gone`."""
        self.path = path
        try:
            self._fd = os.open(path, _FLAGS | os.O_DIRECTORY)
        except OSError as error:
            raise Gone(f"{path}: is gone") from error
        try:
            self.manifest: Manifest = read(self._in_process(""))
            if self.manifest.save_id != save_id:
                raise Gone(f"{path}: another save has replaced it")
        except CorruptCheckpoint as error:
            os.close(self._fd)
            raise Gone(f"{path}: is gone") from error
        except Gone:
            os.close(self._fd)
            raise

    def __enter__(self) -> LocalCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def _in_process(self, name: str) -> str:
        return f"/proc/self/fd/{self._fd}/{name}"

    def file(self, name: str) -> str:
        """Return a path of a file that stays valid while this is open, whatever becomes of the directory's name."""
        return self._in_process(name)

    def manifest_bytes(self) -> bytes:
        return b"".join(self._read(names.MANIFEST, 1 << 20, lambda: None))

    def chunks(self, name: str, size: int, between: Callable[[], None]) -> Iterator[bytes]:
        """Yield a file's bytes in chunks of `size` bytes. `between` is called before each chunk.

        Raises `Damaged` instead of ending if the bytes do not have the size and the hash in the manifest, and `Gone`.
        """
        record: FileRecord = self.manifest.files[name]
        digest, count = xxhash.xxh3_128(), 0
        for chunk in self._read(name, size, between):
            digest.update(chunk)
            count += len(chunk)
            if count < record.size:
                yield chunk
                continue
            if count > record.size or digest.hexdigest() != record.xxh3_128:
                break
            yield chunk
            return
        if count == record.size == 0:
            return
        raise Damaged(f"{self.path}/{name}: is not what was saved: its hash or its size ({count} bytes) has changed")

    def _read(self, name: str, size: int, between: Callable[[], None]) -> Iterator[bytes]:
        try:
            fd = self._open(name)
        except FileNotFoundError as error:
            raise Gone(f"{self.path}/{name}: is gone") from error
        try:
            offset = 0
            while True:
                between()
                chunk = os.pread(fd, size, offset)
                if not chunk:
                    return
                offset += len(chunk)
                yield chunk
        finally:
            os.close(fd)

    def _open(self, name: str) -> int:
        """Open a file below the directory. No symbolic link on the way is followed."""
        *parents, last = name.split("/")
        at = os.dup(self._fd)
        try:
            for parent in parents:
                inner = os.open(parent, _FLAGS | os.O_DIRECTORY, dir_fd=at)
                os.close(at)
                at = inner
            return os.open(last, _FLAGS | os.O_NONBLOCK, dir_fd=at)
        finally:
            os.close(at)
