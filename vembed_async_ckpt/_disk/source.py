"""The files of one committed checkpoint, for the code that restores it: checked against the manifest and held open."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable
from typing import Any

from .._format import bounded_json, names, safetensors
from .._format.manifest import Manifest
from .._format.plan import is_safe_relative
from ..errors import CorruptCheckpoint
from . import manifests
from .filesystem import read_regular
from .manifests import Verify
from .reading import OpenFile, read_into


class Source:
    """A checkpoint's files. A file with tensors is opened when it is first needed and stays open until `close()`.

    Each file is compared with the manifest, as `verify` says, when it is first needed. So a file that is not needed may
    be missing.
    """

    def __init__(
        self, directory: str, manifest: Manifest, verify: Verify = "none", hashed_here: Container[str] | None = None
    ) -> None:
        """`hashed_here`: with `verify="full"`, the files that this process hashes. Others hash the rest, so of those only
        the sizes are compared. None: all files.
        """
        manifests.check(directory, manifest, verify, files=())  # raises ValueError for an invalid `verify`
        self.directory = directory
        self.manifest = manifest
        self._verify: Verify = verify
        self._hashed_here = hashed_here
        self._verified: set[str] = set()
        self._files: dict[str, OpenFile] = {}
        self._entries: dict[str, dict[str, safetensors.Entry]] = {}

    def path(self, name: str) -> str:
        if name not in self.manifest.files or not is_safe_relative(name):
            raise CorruptCheckpoint(f"{self.directory}: {name!r} is needed, but the manifest does not list it")
        manifests.refuse_linked_parents(self.directory, name)
        if name not in self._verified:
            self._verified.add(name)
            elsewhere = self._verify == "full" and self._hashed_here is not None and name not in self._hashed_here
            manifests.check(self.directory, self.manifest, "size" if elsewhere else self._verify, files=(name,))
        return os.path.join(self.directory, *name.split("/"))

    def verify_all(self, *, but: Container[str]) -> None:
        """Compare the files that were not needed so far too, except those in `but`."""
        for name in self.manifest.files:
            if name not in but:
                self.path(name)

    def json(self, name: str) -> Any:
        path = self.path(name)
        try:
            return bounded_json.loads(read_regular(path))
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

    def file(self, name: str) -> OpenFile:
        if name not in self._files:
            self._files[name] = OpenFile(self.path(name))
        return self._files[name]

    def read_into(self, parts: Iterable[tuple[str, int, memoryview]]) -> None:
        """Fill each memory with the bytes of the named file from the offset on. Raises as `reading.read_into` does."""
        read_into((self.file(name), offset, memory) for name, offset, memory in parts)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()
