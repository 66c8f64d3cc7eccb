"""The files of one committed checkpoint, for the code that restores it: checked against the manifest and held open."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable
from typing import Any, Protocol

from .._format import bounded_json, names, safetensors
from .._format.manifest import Manifest
from .._format.plan import is_safe_relative
from ..errors import CorruptCheckpoint
from . import manifests
from .filesystem import read_regular
from .manifests import Verify
from .reading import Fillable, OpenFile, Tuning, read_into


class File(Fillable, Protocol):
    """A file with tensors that is held open. `size` in bytes."""

    @property
    def size(self) -> int: ...

    def read(self, count: int, offset: int = 0) -> bytes:
        """Return the `count` bytes from `offset` on. Raises `CorruptCheckpoint` if the file ends before."""

    def close(self) -> None: ...


class Files(Protocol):
    """Where the files of one checkpoint are. `tuning`: how to read from there."""

    @property
    def where(self) -> str:
        """Its directory or URL."""

    @property
    def tuning(self) -> Tuning | None: ...

    def path(self, name: str) -> str:
        """Return the place of a file, for errors. Raises `CorruptCheckpoint` if it lies elsewhere."""

    def check(self, manifest: Manifest, verify: Verify, files: Iterable[str] | None = None) -> None:
        """Compare the files with the manifest, as `manifests.check` does."""

    def read(self, name: str) -> bytes:
        """Return all bytes of a file. Raises OSError or `CheckpointError`."""

    def open(self, name: str) -> File:
        """Open a file. Raises `CorruptCheckpoint` if it cannot be opened."""


class LocalFiles:
    """The files in a directory."""

    tuning = None

    def __init__(self, directory: str) -> None:
        self.where = directory

    def path(self, name: str) -> str:
        manifests.refuse_linked_parents(self.where, name)
        return os.path.join(self.where, *name.split("/"))

    def check(self, manifest: Manifest, verify: Verify, files: Iterable[str] | None = None) -> None:
        manifests.check(self.where, manifest, verify, files=files)

    def read(self, name: str) -> bytes:
        return read_regular(self.path(name))

    def open(self, name: str) -> OpenFile:
        return OpenFile(self.path(name))


class Source:
    """A checkpoint's files. A file with tensors is opened when it is first needed and stays open until `close()`.

    Each file is compared with the manifest, as `verify` says, when it is first needed. So a file that is not needed may
    be missing.
    """

    def __init__(
        self, files: Files, manifest: Manifest, verify: Verify = "none", hashed_here: Container[str] | None = None
    ) -> None:
        """`hashed_here`: with `verify="full"`, the files that this process hashes. Others hash the rest, so of those only
        the sizes are compared. None: all files.
        """
        files.check(manifest, verify, files=())  # raises ValueError for an invalid `verify`
        self.directory = files.where
        self.manifest = manifest
        self._place = files
        self._verify: Verify = verify
        self._hashed_here = hashed_here
        self._verified: set[str] = set()
        self._files: dict[str, File] = {}
        self._entries: dict[str, dict[str, safetensors.Entry]] = {}

    def path(self, name: str) -> str:
        if name not in self.manifest.files or not is_safe_relative(name):
            raise CorruptCheckpoint(f"{self.directory}: {name!r} is needed, but the manifest does not list it")
        path = self._place.path(name)
        if name not in self._verified:
            self._verified.add(name)
            elsewhere = self._verify == "full" and self._hashed_here is not None and name not in self._hashed_here
            self._place.check(self.manifest, "size" if elsewhere else self._verify, files=(name,))
        return path

    def verify_all(self, *, but: Container[str]) -> None:
        """Compare the files that were not needed so far too, except those in `but`."""
        for name in self.manifest.files:
            if name not in but:
                self.path(name)

    def json(self, name: str) -> Any:
        path = self.path(name)
        try:
            return bounded_json.loads(self._place.read(name))
        except (ValueError, RecursionError, OSError) as error:
            raise CorruptCheckpoint(f"{path}: cannot be read: {error}") from error

    def config(self) -> Any:
        return self.json(names.CONFIG) if names.CONFIG in self.manifest.files else None

    def training_state(self) -> dict[str, Any]:
        state = self.json(names.TRAINING_STATE)
        needed = ("optimizers", "schedulers", "scaler", "dataloader", "extra", "rng")
        if not isinstance(state, dict) or any(key not in state for key in needed):
            raise CorruptCheckpoint(f"{self.path(names.TRAINING_STATE)}: does not hold {', '.join(needed)}")
        return state

    def entries(self, file: str) -> dict[str, safetensors.Entry]:
        """Return the tensors of a safetensors file, read from its header."""
        if file not in self._entries:
            opened = self.file(file)
            length = safetensors.header_length(opened.read(min(8, opened.size)), opened.size, file=opened.path)
            self._entries[file] = safetensors.parse(opened.read(8 + length), opened.size, file=opened.path)[0]
        return self._entries[file]

    def file(self, name: str) -> File:
        if name not in self._files:
            self.path(name)
            self._files[name] = self._place.open(name)
        return self._files[name]

    def read_into(self, parts: Iterable[tuple[str, int, memoryview]]) -> None:
        """Fill each memory with the bytes of the named file from the offset on. Raises as `reading.read_into` does."""
        read_into(((self.file(name), offset, memory) for name, offset, memory in parts), self._place.tuning)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()
