"""A disk whose power fails: what was not synced may be lost, kept or torn."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from .._disk.filesystem import LocalFilesystem, RenameMode, read_regular

_Result = TypeVar("_Result")
_SECTOR = 512  # a disk writes a sector completely or not at all


Fate = Literal["lost", "kept", "torn", "zero", "half"]


@dataclass(frozen=True)
class Change:
    """One change to the disk that is not synced yet.

    `number`: the number of the call among all calls. `call`: its kind. `path`: relative to the root.
    """

    number: int
    call: str
    path: str


Choose = Callable[[Change], Fate]


def lost(change: Change) -> Fate:
    """A choice for `image`: nothing unsynced reached the disk."""
    return "lost"


def kept(change: Change) -> Fate:
    """A choice for `image`: everything unsynced reached the disk."""
    return "kept"


def names_only(change: Change) -> Fate:
    """A choice for `image`: names and sizes reached the disk, but the data did not. Files are full of zeros."""
    return "zero" if change.call == "write" else "kept"


def at_random(seed: int) -> Choose:
    """Return a choice for `image` that decides at random for each change."""
    dice = random.Random(seed)

    def choose(change: Change) -> Fate:
        fates: dict[str, tuple[Fate, ...]] = {
            "write": ("lost", "kept", "torn", "zero"),
            "rename": ("lost", "kept", "half"),
        }
        return dice.choice(fates.get(change.call, ("lost", "kept")))

    return choose


@dataclass(frozen=True)
class _Write:
    change: Change
    offset: int
    data: bytes | None  # None: the size was set to `offset`

    def apply(self, content: bytearray, fate: Fate) -> None:
        if self.data is None:
            if fate != "lost":
                del content[self.offset :]
                content.extend(bytes(self.offset - len(content)))
            return
        data = self.data
        if fate == "torn":
            data = data[: len(data) // 2 // _SECTOR * _SECTOR]
        elif fate == "zero":
            data = bytes(len(data))
        if fate != "lost":
            content.extend(bytes(max(self.offset - len(content), 0)))
            content[self.offset : self.offset + len(data)] = data


@dataclass(eq=False)
class _File:
    synced: bytes = b""
    unsynced: list[_Write] = field(default_factory=list)

    def content(self, choose: Choose = kept) -> bytes:
        content = bytearray(self.synced)
        for write in self.unsynced:
            write.apply(content, choose(write.change))
        return bytes(content)


@dataclass(frozen=True, eq=False)
class _Symlink:
    text: str


@dataclass(eq=False)
class _Entry:
    """A name in a directory that now refers to `node`, or was removed if `node` is None.

    `needs`: the other half of a rename. If this half reaches the disk, the other one does too.
    """

    change: Change
    order: int
    directory: _Directory
    name: str
    node: _Node | None
    needs: _Entry | None = None


@dataclass(eq=False)
class _Directory:
    # name: (order in which the name was made, node)
    synced: dict[str, tuple[int, _Node]] = field(default_factory=dict)
    live: dict[str, _Node] = field(default_factory=dict)
    unsynced: list[_Entry] = field(default_factory=list)

    def settle(self, entry: _Entry) -> None:
        """Apply `entry` to the synced state, together with the change that it needs."""
        if entry not in self.unsynced:
            return
        if entry.node is None:
            self.synced.pop(entry.name, None)
        else:
            self.synced[entry.name] = (entry.order, entry.node)
        at = self.unsynced.index(entry)
        self.unsynced = [e for n, e in enumerate(self.unsynced) if n > at or e.name != entry.name]
        if entry.needs is not None:
            entry.needs.directory.settle(entry.needs)


_Node = _File | _Directory | _Symlink


class _Image:
    """One state after a crash: the entries of every directory, according to the chosen fates."""

    def __init__(self, nodes: list[_Node], choose: Choose) -> None:
        self._choose = choose
        self._fates: dict[Change, Fate] = {}
        self._entries = {node: self._entries_of(node) for node in nodes if isinstance(node, _Directory)}
        # A directory has only one name: the last one.
        self._last: dict[_Node, int] = {}
        for entries in self._entries.values():
            for order, node in entries.values():
                self._last[node] = max(self._last.get(node, -1), order)
        self._written: dict[_File, Path] = {}

    def _fate(self, change: Change) -> Fate:
        if change not in self._fates:
            self._fates[change] = self._choose(change)
        return self._fates[change]

    def _entries_of(self, directory: _Directory) -> dict[str, tuple[int, _Node]]:
        entries = dict(directory.synced)
        for entry in directory.unsynced:
            fate = self._fate(entry.change)
            if fate == "lost" or (fate == "half" and entry.node is None):
                continue
            if entry.node is None:
                entries.pop(entry.name, None)
            else:
                entries[entry.name] = (entry.order, entry.node)
        return entries

    def lay_out(self, path: Path, directory: _Directory) -> None:
        path.mkdir()
        for name, (order, node) in self._entries[directory].items():
            inner = path / name
            if isinstance(node, _Directory):
                if self._last[node] == order:
                    self.lay_out(inner, node)
            elif isinstance(node, _Symlink):
                inner.symlink_to(node.text)
            elif node in self._written:
                inner.hardlink_to(self._written[node])
            else:
                inner.write_bytes(node.content(self._fate))
                self._written[node] = inner


class PowerCutFilesystem(LocalFilesystem):
    """A disk that remembers what was synced, and can show the state that a power cut would leave.

    Every call changes the real directory `root` at once. `image` writes to another place what may be found when the
    power is back. What was synced is there. Of the rest, any part may be there, because file systems persist changes in
    any order. Unsynced data is lost, torn or zero. An unsynced change of a name happened or did not. A rename may be
    undone. A rename of a file may also be half done: then both names exist. A directory never has two names or none,
    and an exchange is never half done.

    What was not made through this object counts as synced. Contents are kept in memory, so use small checkpoints. Modes
    and times are not tracked. All methods are thread-safe.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.realpath(root)
        self.calls = 0
        self._lock = threading.RLock()
        self._left: int | None = None
        self._off = False
        self._order = 0
        self._top = _Directory()
        self._files: dict[int, tuple[str, _File]] = {}  # by descriptor

    # -- cutting

    def after(self, calls: int) -> None:
        """Let the power fail at call number `calls` from now.

        That call is not done; it and all later ones raise OSError(EIO).
        """
        with self._lock:
            self._left = calls

    def cut(self) -> None:
        """Let the power fail now."""
        with self._lock:
            self._off = True

    @property
    def off(self) -> bool:
        """Whether the power has failed."""
        return self._off

    @property
    def unsynced(self) -> list[Change]:
        """The changes that a power cut could undo at this moment."""
        with self._lock:
            self._look_around(self._top, self.root)
            found: dict[Change, None] = {}
            for node in self._nodes():
                if isinstance(node, _File):
                    found.update((write.change, None) for write in node.unsynced)
                elif isinstance(node, _Directory):
                    found.update((entry.change, None) for entry in node.unsynced)
            return list(found)

    def image(self, target: str | os.PathLike[str], choose: Choose = lost) -> Path:
        """Write to `target` the root as it may be found if the power fails (or failed) now. Return `target`.

        `target` must not exist. `choose` decides what happened to each unsynced change; it is called once for each. A
        fate that makes no sense for a change counts as kept.
        """
        with self._lock:
            self._look_around(self._top, self.root)
            _Image(self._nodes(), choose).lay_out(Path(target), self._top)
            return Path(target)

    def forget(self, fd: int) -> None:
        """A sync of `fd` failed. As on Linux, its data counts as synced from now on, but never reaches the disk."""
        with self._lock:
            self._files[fd][1].unsynced.clear()

    def _nodes(self) -> list[_Node]:
        """Return every node that may still be visible after a crash."""
        found: dict[_Node, None] = {}

        def visit(node: _Node) -> None:
            if node in found:
                return
            found[node] = None
            if isinstance(node, _Directory):
                for inner in (*node.live.values(), *(n for _, n in node.synced.values())):
                    visit(inner)
                for entry in node.unsynced:
                    if entry.node is not None:
                        visit(entry.node)

        visit(self._top)
        return list(found)

    # -- the tree

    def _look_around(self, directory: _Directory, path: str) -> None:
        """Add files and directories that were not made through this object. They count as synced."""
        if not os.path.isdir(path):
            return
        for name in os.listdir(path):
            inner = os.path.join(path, name)
            node = directory.live.get(name) or self._adopt(directory, name, inner)
            if isinstance(node, _Directory):
                self._look_around(node, inner)

    def _adopt(self, directory: _Directory, name: str, path: str) -> _Node:
        node: _Node
        if os.path.islink(path):
            node = _Symlink(os.readlink(path))
        elif os.path.isdir(path):
            node = _Directory()
        else:
            node = _File(read_regular(path))
        directory.live[name] = node
        directory.synced[name] = (0, node)
        return node

    def _directory(self, path: str) -> _Directory:
        if path == self.root:
            return self._top
        node = self._node(path)
        if not isinstance(node, _Directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node

    def _node(self, path: str) -> _Node:
        """Return the node at `path`. Raises the system's OSError if nothing is there."""
        parent, name = os.path.split(path)
        directory = self._directory(parent)
        return directory.live.get(name) or self._adopt(directory, name, path)

    def _relative(self, path: str) -> str:
        relative = os.path.relpath(path, self.root)
        if relative.startswith(".."):
            raise ValueError(f"{path} is outside of {self.root}")
        return relative

    def _enter(self, change: Change, path: str, node: _Node | None) -> _Entry:
        parent, name = os.path.split(path)
        directory = self._directory(parent)
        self._order += 1
        entry = _Entry(change, self._order, directory, name, node)
        directory.unsynced.append(entry)
        if node is None:
            directory.live.pop(name, None)
        else:
            directory.live[name] = node
        return entry

    # -- the calls

    @contextlib.contextmanager
    def _call(self, call: str, path: str) -> Iterator[Change]:
        with self._lock:
            if self._left is not None and not self._off:
                self._left -= 1
                self._off = self._left <= 0
            if self._off:
                raise OSError(errno.EIO, "the power is off", path)
            self.calls += 1
            yield Change(self.calls, call, self._relative(path))

    def make_directory(self, path: str) -> None:
        with self._call("mkdir", path) as change:
            super().make_directory(path)
            self._enter(change, path, _Directory())

    def create(self, path: str, *, direct: bool) -> int:
        with self._call("create", path) as change:
            fd = super().create(path, direct=direct)
            file = _File()
            self._enter(change, path, file)
            self._files[fd] = (path, file)
            return fd

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        path, file = self._files[fd]
        with self._call("write", path) as change:
            count = super().write(fd, data, offset)
            file.unsynced.append(_Write(change, offset, bytes(data[:count])))
            return count

    def truncate(self, fd: int, size: int) -> None:
        path, file = self._files[fd]
        with self._call("truncate", path) as change:
            super().truncate(fd, size)
            file.unsynced.append(_Write(change, size, None))

    def set_mode(self, fd: int, mode: int) -> None:
        with self._call("set_mode", self._files[fd][0]):
            super().set_mode(fd, mode)

    def sync(self, fd: int) -> None:
        path, file = self._files[fd]
        with self._call("sync", path):
            super().sync(fd)
            file.synced, file.unsynced = file.content(), []

    def close(self, fd: int) -> None:
        with self._lock:
            self._files.pop(fd)
            super().close(fd)

    def sync_directory(self, path: str) -> None:
        with self._call("sync_directory", path):
            super().sync_directory(path)
            directory = self._directory(path)
            for entry in list(directory.unsynced):
                directory.settle(entry)

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        with self._call("rename", source) as change:
            moved = self._node(source)
            replaced = self._node(target) if mode == "exchange" else None
            super().rename(source, target, mode)
            away, there = self._enter(change, source, replaced), self._enter(change, target, moved)
            away.needs = there  # else the node would have no name
            if replaced is not None or isinstance(moved, _Directory):
                there.needs = away

    def link(self, source: str, target: str) -> None:
        with self._call("link", target) as change:
            file = self._node(source)
            super().link(source, target)
            self._enter(change, target, file)

    def symlink(self, text: str, path: str) -> None:
        with self._call("symlink", path) as change:
            super().symlink(text, path)
            self._enter(change, path, _Symlink(text))

    def unlink(self, path: str) -> None:
        with self._call("unlink", path) as change:
            self._node(path)  # adopt it if it was not made through this object
            super().unlink(path)
            self._enter(change, path, None)

    def remove_directory(self, path: str) -> None:
        with self._call("rmdir", path) as change:
            self._node(path)
            super().remove_directory(path)
            self._enter(change, path, None)
