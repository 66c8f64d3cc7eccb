"""The faults: SIGKILL at a given system call (strace), and a power cut (a loop-mounted file system shut down)."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from .nursery import PATIENCE, Child

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

# Every call by which CPython changes what is on a disk.
CALLS = (
    "openat,creat,mkdir,mkdirat,mknod,mknodat,write,pwrite64,writev,pwritev,pwritev2,copy_file_range,sendfile,truncate,ftruncate,"
    "fallocate,fsync,fdatasync,syncfs,sync_file_range,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,"
    "rmdir,chmod,fchmod,fchmodat,chown,fchown,fchownat,utimensat,setxattr,fsetxattr"
)
_LINE = re.compile(r"(?P<thread>\d+)\s+(?P<call>\w+)\((?P<arguments>.*)\)\s+= (?P<result>-?\d+)")


@dataclass(frozen=True)
class Call:
    """One system call of a trace: `paths` are the paths among its arguments, those of descriptors too, in order. By any of
    `watched` strace can pick it out: where a path is given by a directory's descriptor and a name, that is the directory."""

    thread: str
    name: str
    arguments: str
    paths: tuple[str, ...]
    succeeded: bool
    watched: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        return self.name != "openat" or "O_CREAT" in self.arguments


def parse_trace(text: str) -> list[Call]:
    """The calls of a `strace -f -y` log, in the order in which they ended."""
    calls, begun = [], {}
    for line in text.splitlines():
        thread = line.split(None, 1)[0]
        if line.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.search(r"<\.\.\. \w+ resumed>(.*)", line):
            line = begun.pop(thread, "") + resumed[1]
        if match := _LINE.match(line):
            name, arguments = match["call"], match["arguments"]
            found = list(_paths(name, arguments))
            calls.append(
                Call(
                    match["thread"],
                    name,
                    arguments,
                    tuple(path for path, _ in found),
                    not match["result"].startswith("-"),
                    tuple(watched for _, watched in found),
                )
            )
    return calls


def _paths(call: str, arguments: str) -> Iterator[tuple[str, str]]:
    """(path, what strace has to watch for it) of every path among the arguments of a call."""
    relative = ', "(?P<name>[^"/][^"]*)"' if re.search("at2?$", call) else "(?P<name>$^)"
    for found in re.finditer(rf'"(?P<path>/[^"]*)"|(?:\d+|AT_FDCWD)<(?P<fd>/[^>]*)>(?:{relative})?', arguments):
        if found["path"] or found["name"] or "AT_FDCWD" not in found[0]:
            watched = found["path"] or found["fd"]
            yield os.path.join(watched, found["name"]) if found["name"] else watched, watched


@dataclass(frozen=True)
class Point:
    """The moment before the `k`-th call `name` on `watched`, which is one on `path`; both are relative to the root."""

    name: str
    path: str
    k: int
    watched: str

    def __str__(self) -> str:
        return f"{self.name} #{self.k} {self.path}"


def points(calls: list[Call], root: str) -> list[Point]:
    """Every moment at which a call of a traced run was about to change something below `root`, in order.

    strace counts per thread, so that is done here too.
    """
    counts: Counter[tuple[str, str, str]] = Counter()
    found: dict[Point, None] = {}
    for call in calls:
        for path in set(call.watched):
            counts[call.thread, call.name, path] += 1
        if call.paths and call.changes and (call.paths[0] + "/").startswith(root + "/"):
            path, watched = call.paths[0], call.watched[0]
            k = counts[call.thread, call.name, watched]
            found[Point(call.name, os.path.relpath(path, root), k, os.path.relpath(watched, root))] = None
    return list(found)


def trace_options(log: str) -> list[str]:
    return ["-f", "-y", "-s", "64", "-o", log, "-e", f"trace={CALLS},sendto", "-e", "signal=none"]


def kill_options(point: Point, root: str) -> list[str]:
    return inject_options(point, root, f"signal=KILL:when={point.k}")


def inject_options(point: Point, root: str, what: str) -> list[str]:
    """Injects `what` into the calls like that of `point`, on what it watches."""
    path = os.path.normpath(os.path.join(root, point.watched))
    return ["-f", "-o", "/dev/null", "-P", path, "-e", f"trace={point.name}", "-e", f"inject={point.name}:{what}"]


@contextmanager
def attached(child: Child, options: list[str]) -> Iterator[None]:
    """strace watches `child`, which waits for a word, from before that word to its end."""
    with watched(child.pid, options) as strace:
        child.tell("go")
        yield
        strace.wait(PATIENCE)


@contextmanager
def watched(pid: int, options: list[str]) -> Iterator[subprocess.Popen[str]]:
    """strace watches a process, with all its threads, for as long as the block lasts."""
    strace = subprocess.Popen(["strace", *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    try:
        for line in strace.stderr:
            if "attached" in line:
                break
        else:
            raise AssertionError("strace did not attach")
        yield strace
        strace.terminate()  # it lets go of what it watches; killed, it would leave that stopped
        strace.wait(PATIENCE)
    finally:
        strace.kill()
        strace.wait()
        strace.stderr.close()


def tracer_script(directory: Path, options: list[str]) -> str:
    """A program that runs the interpreter under strace, and ends as the interpreter ended."""
    script = directory / "traced-python"
    command = ["strace", "-qq", *options, sys.executable]
    script.write_text("#!/bin/sh\nexec " + " ".join(f"'{word}'" for word in command) + ' "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


# -- power

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN, _IOR('X', 125, __u32)
POWER_CUTS = {"logflush": 1, "nologflush": 2}  # the journal reaches the disk, the data do not; neither does
_MKFS = {
    "ext4": (
        16,
        ["mkfs.ext4", "-q", "-F", "-m0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"],
    ),
    "ext4 without journal": (16, ["mkfs.ext4", "-q", "-F", "-m0", "-O", "^has_journal", "-E", "nodiscard"]),
    "xfs": (64, ["mkfs.xfs", "-q", "-f", "-K"]),
}


def missing(kind: str) -> str:
    """Why file systems of this kind cannot be made and mounted here; empty if they can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    if shutil.which(_MKFS[kind][1][0]) is None:
        return f"{_MKFS[kind][1][0]} is not installed"
    return ""


def megabytes(kind: str) -> int:
    """A size that file systems of this kind can have."""
    return _MKFS[kind][0]


def make_file_system(kind: str, image: str) -> None:
    # mkfs.xfs makes one below 300 MB only for the tests of xfs.
    small = {"TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"}
    run(*_MKFS[kind][1], image, env={**os.environ, **small})


@contextmanager
def mounted(kind: str, image: str, path: str, *options: str) -> Iterator[str]:
    """The file system in `image`, a file or a loop device, on `path`."""
    os.makedirs(path, exist_ok=True)
    loop = [] if stat.S_ISBLK(os.stat(image).st_mode) else ["loop"]
    mount = ["-o", ",".join([*loop, *options])] if loop or options else []
    run("mount", "-t", kind.split()[0], *mount, image, path)
    try:
        yield path
    finally:
        unmount(path)


def unmount(path: str) -> None:
    """Unmount; the last descriptor of a killed process closes late."""
    deadline = time.monotonic() + PATIENCE
    while (done := subprocess.run(["umount", path], capture_output=True, text=True)).returncode:
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.005)


class Disk:
    """A small file system of its own, mounted on `path`, whose power can be cut."""

    def __init__(self, directory: Path, kind: str, megabytes: int | None = None) -> None:
        self.path = str(directory / "mounted")
        self._megabytes = megabytes or _MKFS[kind][0]
        self._kind = kind
        self._memory = str(directory / "memory")  # the image lies in memory: a busy disk has no say in these tests
        self._image = os.path.join(self._memory, "image")
        self._loop = ""

    def __enter__(self) -> Disk:
        os.mkdir(self.path)
        os.mkdir(self._memory)
        run("mount", "-t", "tmpfs", "none", self._memory)
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        with open(self._image, "wb") as image:
            image.truncate(self._megabytes << 20)
        make_file_system(self._kind, self._image)
        self._loop = run("losetup", "-f", "--show", self._image)
        self._mount()

    def __exit__(self, *_: object) -> None:
        if os.path.ismount(self.path):
            unmount(self.path)
        if self._loop:
            run("losetup", "-d", self._loop)
        unmount(self._memory)

    def _mount(self) -> None:
        run("mount", "-t", self._kind.split()[0], self._loop, self.path)

    def cut_power(self, how: str) -> None:
        """What was not synced is lost; afterwards it is mounted again, as at the next boot."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", POWER_CUTS[how]))
        finally:
            os.close(fd)
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):  # else the power was not cut
            os.mkdir(os.path.join(self.path, "proof"))
        unmount(self.path)
        self._mount()

    def sync(self) -> None:
        run("sync", "-f", self.path)


def run(*command: str, **options: dict[str, str]) -> str:
    """What a command prints. Fails with what it said if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}"
    return done.stdout.strip()
