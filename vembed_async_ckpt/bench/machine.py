"""What the machine is, what it can do at best, and what a process tree takes of it."""

from __future__ import annotations

import ctypes
import datetime
import errno
import mmap
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .checks import file_system

CHUNK, IN_FLIGHT = 16 << 20, 4  # the raw write: this many bytes each, this many at once
PACKAGES = (
    *("vembed-async-ckpt", "torch", "safetensors", "transformers", "xxhash"),
    *("torch-checkpointing", "torchsnapshot", "lightning", "accelerate", "moonclip", "dlrover"),
)


def facts(directory: str) -> dict[str, Any]:
    """Machine, file system and versions, for the result file."""
    kind, device = file_system(directory)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "file_system": kind,
        "device": device,
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _field(path: str, name: str) -> str:
    with open(path) as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith(name)), "")


class CopyCeiling:
    """The best this machine can do to copy these tensors to warm host memory; pinned where they are on a GPU."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._sources = list(tensors)
        self._cuda = any(tensor.is_cuda for tensor in tensors)
        self._warm = [torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=self._cuda) for tensor in tensors]

    def seconds(self) -> float:
        """Of the fastest copy known: one `_foreach_copy_` with torch's threads, or memcpy in two."""
        return self._foreach() if self._cuda else min(self._foreach(), self._memcpy(2))

    def _foreach(self) -> float:
        with torch.no_grad():
            begun = time.perf_counter()
            torch._foreach_copy_(self._warm, self._sources, non_blocking=True)
            if self._cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - begun

    def _memcpy(self, threads: int) -> float:
        pairs = [(to.data_ptr(), of.data_ptr(), of.nbytes) for to, of in zip(self._warm, self._sources, strict=True)]

        def copy(share: int) -> None:
            for pair in pairs[share::threads]:
                ctypes.memmove(*pair)

        return _together(copy, threads)


class Disk:
    """The best this disk can do with `size` bytes: several large transfers in flight past the page cache.

    `direct`: whether the file system has O_DIRECT; without it the page cache is used, and writes are synced all the same.
    """

    def __init__(self, directory: str, size: int) -> None:
        self._path = os.path.join(directory, "raw.bin")
        self._size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, self._size)
        block = os.urandom(1 << 20)
        for start in range(0, self._size, len(block)):
            self._memory[start : start + len(block)] = block[: self._size - start]
        self.direct = True
        try:
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            self.direct = False
        with suppress(FileNotFoundError):
            os.unlink(self._path)

    def write(self, *, keep: bool = False) -> float:
        """Seconds to write a new file and fsync it."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | self._flag)
        try:
            begun = time.perf_counter()
            self._transfer(lambda view, start: os.pwrite(fd, view, start))
            os.fsync(fd)
            return time.perf_counter() - begun
        finally:
            os.close(fd)
            if not keep:
                os.unlink(self._path)

    def read(self) -> float:
        """Seconds to read the file that `write(keep=True)` made, none of it from the page cache."""
        drop_cache([self._path])
        fd = os.open(self._path, os.O_RDONLY | self._flag)
        try:
            begun = time.perf_counter()
            self._transfer(lambda view, start: os.preadv(fd, [view], start))
            return time.perf_counter() - begun
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Delete the file that `write(keep=True)` made."""
        os.unlink(self._path)

    @property
    def _flag(self) -> int:
        return os.O_DIRECT if self.direct else 0

    def _transfer(self, move: Callable[[memoryview, int], int]) -> None:
        starts = iter(range(0, self._size, CHUNK))
        lock, view = threading.Lock(), memoryview(self._memory)
        errors: list[BaseException] = []

        def work(_: int) -> None:
            try:
                while True:
                    with lock:
                        start = next(starts, None)
                    if start is None:
                        return
                    part = view[start : start + CHUNK]
                    if move(part, start) != len(part):
                        raise OSError("the kernel transferred less than it was asked to")
            except BaseException as error:
                errors.append(error)

        _together(work, IN_FLIGHT)
        if errors:
            raise errors[0]


def drop_cache(paths: Iterable[str]) -> None:
    """Have the page cache forget these files, which have been synced."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def files_of(path: str) -> list[str]:
    """Every file below `path`."""
    return [os.path.join(base, name) for base, _, names in os.walk(path) for name in names]


class NewBytes:
    """What is put below `path` from now on, whatever the engine names its files."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._before = self._look()

    def count(self) -> int:
        """Bytes in files that are new or were written again, and those that files grew by; a file with two names once."""
        found = 0
        for inode, (size, changed) in self._look().items():
            old, then = self._before.get(inode, (0, 0))
            if changed != then:
                found += size - old if size > old else size
        return found

    def _look(self) -> dict[int, tuple[int, int]]:
        looked = {}
        for file in files_of(self._path):
            with suppress(FileNotFoundError):  # an engine may delete an old one meanwhile
                status = os.lstat(file)
                looked[status.st_ino] = (status.st_size, status.st_mtime_ns)
        return looked


def _together(work: Callable[[int], None], threads: int) -> float:
    """Seconds that `work(0)`, `work(1)`, ... take side by side."""
    others = [threading.Thread(target=work, args=(n,)) for n in range(1, threads)]
    begun = time.perf_counter()
    for thread in others:
        thread.start()
    work(0)
    for thread in others:
        thread.join()
    return time.perf_counter() - begun


def sync_tree(path: str) -> None:
    """fsync every file and directory of `path`, and the directory that holds it: what an engine without fsync leaves out."""
    for each in [*files_of(path), *(base for base, _, _ in os.walk(path)), os.path.dirname(path)]:
        fd = os.open(each, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


# -- what processes take


def process_tree(pid: int) -> Iterator[int]:
    """`pid` and every process below it."""
    yield pid
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                children = file.read().split()
        except OSError:
            continue
        for child in children:
            yield from process_tree(int(child))


def proportional_memory(pid: int) -> int:
    """Bytes of memory of the tree, a page shared by several counted once (Pss)."""
    return sum(_kilobytes(f"/proc/{each}/smaps_rollup", "Pss:") for each in process_tree(pid))


def peak_resident(pid: int) -> int:
    """Sum of the peaks of each process (VmHWM): a page shared by two counts twice."""
    return sum(_kilobytes(f"/proc/{each}/status", "VmHWM:") for each in process_tree(pid))


def reset_peaks(pid: int) -> None:
    for each in process_tree(pid):
        with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{each}/clear_refs", "w") as file:
            file.write("5")


def _kilobytes(path: str, name: str) -> int:
    try:
        with open(path) as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith(name)), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it ended meanwhile


class Others:
    """How much of the machine other people's processes used."""

    def __init__(self) -> None:
        self._begun = self._read()

    def share(self) -> float:
        """Since the construction: CPU time not ours, of all CPU time."""
        total, busy, own = (now - then for now, then in zip(self._read(), self._begun, strict=True))
        return max(busy - own, 0) / max(total, 1)

    def _read(self) -> tuple[int, int, int]:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
        own = 0
        for pid in process_tree(os.getpid()):
            try:
                with open(f"/proc/{pid}/stat") as file:
                    own += sum(map(int, file.read().rpartition(")")[2].split()[11:15]))
            except FileNotFoundError:
                continue
        waiting = (
            ticks[3] + ticks[4] + ticks[7]
        )  # idle, for the disk, for the host: virtual disks take the guest's own share
        return sum(ticks), sum(ticks) - waiting, own
