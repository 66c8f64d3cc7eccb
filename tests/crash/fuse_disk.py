"""A block store in user space: one file, `disk`, in a FUSE file system that notes every write and flush, and fails when told to.

Run as a script it is the server (`fuse_disk.py DEVICE_FD MEGABYTES LOG`); imported, `FuseDisk` is the way to it. A loop device on
the file is then a disk whose every block write is known. The kernel's means for this, device-mapper targets, are often not there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# linux/fuse.h, protocol 7.31
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _RELEASE, _FSYNC, _FLUSH = (
    1,
    2,
    3,
    4,
    14,
    15,
    16,
    18,
    20,
    25,
)
_INIT, _INTERRUPT, _DESTROY, _BATCH_FORGET = 26, 36, 38, 42
_KEEP_CACHE = 2
# A block request is one write: of several, the loop driver takes the failure of all but the first for success.
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
_ROOT, _DISK = 1, 2
_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_MAX_WRITE = 1 << 17
_PAGE = 4096
_RECORD = struct.Struct("<cQI")


class _Server:
    def __init__(self, device: int, size: int, log: Path) -> None:
        self._device = device
        self._size = size
        self._data = bytearray(size)
        self._log = log.open("wb", buffering=0)
        self._fault = ""

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, _MAX_WRITE + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return  # unmounted
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                raise
            _, code, unique, node, *_ = _IN.unpack_from(request)
            if code in (_FORGET, _INTERRUPT, _BATCH_FORGET):
                continue
            try:
                answer, error_code = self._answer(code, node, request[_IN.size :]), 0
            except OSError as error:
                answer, error_code = b"", error.errno or errno.EIO
            try:
                os.write(self._device, _OUT.pack(_OUT.size + len(answer), -error_code, unique) + answer)
            except FileNotFoundError:
                pass  # whoever asked does not wait any more
            if code == _DESTROY:
                return

    def _answer(self, code: int, node: int, body: bytes) -> bytes:
        if code == _INIT:
            _, _, readahead, _ = struct.unpack_from("<IIII", body)
            return struct.pack(
                "<IIIIHHIIHHI28x", 7, 31, readahead, _BIG_WRITES | _MAX_PAGES, 16, 12, _MAX_WRITE, 1, 32, 0, 0
            )
        if code == _LOOKUP:
            return self._lookup(body.rstrip(b"\0").decode())
        if code in (_GETATTR, _SETATTR):
            return struct.pack("<QII", 300, 0, 0) + self._attributes(node)
        if code == _OPEN:
            return struct.pack("<QII", 1, _KEEP_CACHE, 0)
        if code == _READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return bytes(self._data[offset : offset + size])
        if code == _WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            self._fail_if("write")
            data = body[40 : 40 + size]
            if self._fault not in ("", "flush") and bytes.fromhex(self._fault) * (_PAGE // 4) in data:
                self._fault = ""
                self._note(b"E", offset)
                raise OSError(errno.EIO, "told to, once")
            self._data[offset : offset + size] = data
            self._note(b"W", offset, data)
            return struct.pack("<II", size, 0)
        if code == _FSYNC:
            self._fail_if("flush")
            self._note(b"F", 0)
            return b""
        if code in (_RELEASE, _FLUSH, _DESTROY):
            return b""
        raise OSError(errno.ENOSYS, "not needed")

    def _lookup(self, name: str) -> bytes:
        """Also how the server is told things: `mark-N` is noted, `fault-KIND` sets what fails."""
        what, _, value = name.partition("-")
        if what == "mark":
            self._note(b"M", int(value))
        elif what == "fault":
            self._fault = value
        if name != "disk":
            raise OSError(errno.ENOENT, "not there")
        return struct.pack("<QQQQII", _DISK, 0, 300, 300, 0, 0) + self._attributes(_DISK)

    def _attributes(self, node: int) -> bytes:
        size = self._size if node == _DISK else 0
        mode = stat.S_IFREG | 0o600 if node == _DISK else stat.S_IFDIR | 0o700
        return struct.pack("<6Q3I7I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _fail_if(self, what: str) -> None:
        if self._fault == what:
            raise OSError(errno.EIO, "told to")

    def _note(self, kind: bytes, number: int, data: bytes = b"") -> None:
        self._log.write(_RECORD.pack(kind, number, len(data)) + data)


@dataclass(frozen=True)
class Record:
    """One entry of the log: a write ("W", offset and data), one that failed ("E"), a flush ("F"), or a mark ("M", its number)."""

    kind: str
    offset: int
    data: bytes


class FuseDisk:
    """The file `path`, of `megabytes`, served by a process of its own."""

    def __init__(self, directory: Path, megabytes: int) -> None:
        self._mount = directory / "fuse"
        self._log = directory / "blocks"
        self._megabytes = megabytes
        self.path = str(self._mount / "disk")

    def __enter__(self) -> FuseDisk:
        self._mount.mkdir()
        device = os.open("/dev/fuse", os.O_RDWR)
        try:
            options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mount(b"vembed-test", os.fsencode(self._mount), b"fuse", 0, options):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(self._mount))
            command = [sys.executable, "-S", __file__, str(device), str(self._megabytes), str(self._log)]
            self._server = subprocess.Popen(command, pass_fds=[device])
        finally:
            os.close(device)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self._mount)], capture_output=True)
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()  # with it the connection ends, and whoever waits for it gets an error
            self._server.wait()
            subprocess.run(["umount", "-l", str(self._mount)], capture_output=True)

    def mark(self, number: int) -> None:
        """Note `number` in the log: what was noted before happened before."""
        self._tell(f"mark-{number}")

    def fail(self, what: str) -> None:
        """From now on every "write" or "flush" fails (EIO); or once only, the write of a page full of the four bytes that `what` is
        in hexadecimal; nothing with ""."""
        self._tell(f"fault-{what}")

    def failures(self) -> int:
        """How many writes of a certain page have failed so far."""
        return sum(entry.kind == "E" for entry in self.log())

    def _tell(self, word: str) -> None:
        try:
            os.stat(self._mount / word)
        except FileNotFoundError:
            pass

    def log(self) -> Iterator[Record]:
        """All that was noted so far."""
        raw, at = self._log.read_bytes(), 0
        while at < len(raw):
            kind, offset, size = _RECORD.unpack_from(raw, at)
            at += _RECORD.size
            yield Record(kind.decode(), offset, raw[at : at + size])
            at += size


if __name__ == "__main__":
    _Server(int(sys.argv[1]), int(sys.argv[2]) << 20, Path(sys.argv[3])).serve()
