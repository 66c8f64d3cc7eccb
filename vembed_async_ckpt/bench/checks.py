"""What can be said before torch is loaded: whether the device, the folders, the disk and the memory will do."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from .._memory.arena import available_memory
from .options import MIB, Options, Refused

# How often a visit holds the state in memory: itself, what an engine stages (DCP's process two), the raw ceiling's source.
COPIES = {"cost": 4.0, "stall": 3.5, "durable": 4.0, "memory": 3.5, "scaling": 3.5, "restore": 4.0}
ON_DISK = 2.2  # how often it is on disk: a checkpoint and what is read or written beside it
BASE = 1 << 30  # torch, the training beside, and room for the rest of the machine


def device_for(asked: str | None) -> str:
    """The device to measure on: the one asked for, else CUDA if there is some. Raises `Refused` if CUDA is asked for and
    cannot be."""
    if asked is None:
        return "cuda" if _why_no_cuda() is None else "cpu"
    kind, _, number = asked.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or (kind == "cpu" and number):
        raise Refused(f"--device {asked}: write it as cpu, cuda or cuda:1")
    if kind == "cuda":
        why = _why_no_cuda()
        if why is None and int(number or 0) >= _devices():
            why = f"there are {_devices()} devices"
        if why is not None:
            raise Refused(f"--device {asked}: {why}")
    return asked


def _why_no_cuda() -> str | None:
    """What torch would say, without loading it: its build is in its version file, the devices are known to the driver."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return "torch is not installed"
    version = Path(found.origin).with_name("version.py")
    if version.exists() and re.search(r"^cuda\b.*=\s*None\s*$", version.read_text(), re.MULTILINE):
        return "this torch is built without CUDA"
    return None if _devices() else "there is no CUDA device, or no driver for it"


def _devices() -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@contextlib.contextmanager
def folders(options: Options, directory: Path, out: Path) -> Iterator[None]:
    """Make `directory` and `out` if they do not exist, and see that they can be written to and that there is room. Raises
    `Refused`.

    If that or anything in the block raises, those that were made and are empty are removed.
    """
    made = [folder for path in (directory, out) for folder in (path, *path.parents) if not folder.exists()]
    try:
        _make(directory, "--dir")
        _make(out, "--out")
        room_for(options, directory, options.nbytes)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # it was not made, or holds something
                folder.rmdir()
        raise


def _make(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise Refused(f"{option} {path}: {(error.strerror or str(error)).lower()}") from error


def room_for(options: Options, directory: Path, size: int | None) -> None:
    """Raises `Refused`, with the numbers, if disk or memory is too small for a state of `size` bytes; None is not known yet."""
    sizes = [(name, size or 0) for name in options.measures]
    if "scaling" in options.measures and options.model is None:
        sizes.append(("scaling", max(options.sizes)))
    disk = int(ON_DISK * max(found for _, found in sizes)) + 64 * MIB
    free = shutil.disk_usage(directory).free
    if disk > free:
        raise Refused(f"{directory} has {_size(free)} left; {_size(disk)} are needed. Use --dir or {_smaller(options)}")
    room = int(max(COPIES[name] * found for name, found in sizes)) + BASE // 2
    available = available_memory()
    if room > available:
        raise Refused(
            f"{_size(available)} of memory are available; engines need up to {_size(room)} for a state of "
            f"{_size(max(found for _, found in sizes))}. Use {_smaller(options)}"
            + (", or leave `scaling` out" if "scaling" in options.measures else "")
        )


def _smaller(options: Options) -> str:
    if options.model is not None:
        return "a smaller model"
    return "a smaller --scale" if options.size is None else "a smaller --size"


def _size(size: int) -> str:
    """As rich writes sizes: 2.1 GB."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.1f} {unit}" if unit != "bytes" else f"{size} bytes"
        value /= 1000
    return f"{value:.1f} TB"


def file_system(directory: str) -> tuple[str, str]:
    """Type and device of the mount that holds `directory`."""
    best, found = "", ("", "")
    with open("/proc/self/mounts") as file:
        for line in file:
            device, point, kind = line.split()[:3]
            inside = os.path.realpath(directory) + "/"
            if inside.startswith(point.rstrip("/") + "/") and len(point) >= len(best):
                best, found = point, (kind, device)
    return found


def on_memory(directory: Path) -> bool:
    """Whether `directory` is no disk at all."""
    return file_system(os.fspath(directory))[0] in ("tmpfs", "ramfs")
