"""Reads uploaded checkpoints. Only the ranges that are needed are read."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, get_args
from urllib.parse import unquote, urlsplit

import obstore
import xxhash

from .._disk.manifests import Verify
from .._disk.reading import Tuning
from .._format import names
from .._format.manifest import MAX_BYTES, Manifest, parse
from ..errors import CheckpointError, CorruptCheckpoint
from .stores import open_store, said

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

_T = TypeVar("_T")
_CHUNK = 8 << 20  # bytes that are hashed at once
_MANIFESTS = 8  # manifests that are read at the same time
_TUNING = Tuning(size=8 << 20, gap=256 << 10, threads=8)


@dataclass(frozen=True)
class RemoteFile:
    """An object of a checkpoint. `size` in bytes. `path`: its URL."""

    path: str
    size: int
    _store: ObjectStore
    _key: str

    def read(self, count: int, offset: int = 0) -> bytes:
        data = bytearray(count)
        self.fill(offset, [memoryview(data)])
        return bytes(data)

    def fill(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, with the bytes from `offset` on, by one request."""
        count = sum(map(len, buffers))
        if not count:
            return
        if offset + count > self.size:
            raise CorruptCheckpoint(f"{self.path}: ends at {self.size}; bytes up to {offset + count} are needed")
        with memoryview(
            _asked(self.path, lambda: obstore.get_range(self._store, self._key, start=offset, length=count))
        ) as data:
            if len(data) != count:
                raise CorruptCheckpoint(f"{self.path}: {len(data)} bytes came instead of {count}")
            at = 0
            for buffer in buffers:
                buffer[:] = data[at : at + len(buffer)]
                at += len(buffer)

    def close(self) -> None:
        pass


class RemoteFiles:
    """The files of one uploaded checkpoint: a `source.Files`."""

    tuning = _TUNING

    def __init__(self, url: str, sizes: Mapping[str, int] | None = None) -> None:
        """`sizes`: the size of each object, if they were listed already.

        Raises `CheckpointError` if the URL cannot be used. Nothing is read yet.
        """
        self.where = url.rstrip("/")
        self._listed = sizes
        self._store = open_store(self.where) if exists(self.where) else None

    @property
    def store(self) -> ObjectStore:
        if self._store is None:
            raise CheckpointError(f"{self.where}: does not exist")
        return self._store

    def manifest(self) -> Manifest:
        """Return the manifest. If the URL is not that of a checkpoint, raises `CheckpointError` that says what it is."""
        path = self.path(names.MANIFEST)
        try:
            found = _asked(path, lambda: obstore.get(self.store, names.MANIFEST))
        except CorruptCheckpoint:
            if any(True for _ in _markers(self.store, self.where)):
                raise CheckpointError(
                    f"{self.where}: is no checkpoint, but a run that holds some; use latest(), or name one of them"
                ) from None
            raise CheckpointError(f"{self.where}: is no checkpoint: it has no {names.MANIFEST}") from None
        if found.meta["size"] > MAX_BYTES:
            raise CorruptCheckpoint(f"{path}: has {found.meta['size']} bytes; at most {MAX_BYTES} can be read")
        return parse(_asked(path, lambda: bytes(found.bytes())), file=path)

    @functools.cached_property
    def _sizes(self) -> Mapping[str, int]:
        if self._listed is not None:
            return self._listed
        listed = _asked(self.where, lambda: obstore.list(self.store).collect())
        return {found["path"]: found["size"] for found in listed}

    def path(self, name: str) -> str:
        return f"{self.where}/{name}"

    def check(
        self,
        manifest: Manifest,
        verify: Verify,
        files: Iterable[str] | None = None,
        hashed: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Compare the objects with the manifest: their sizes by one list, and with `full` also their hashes.

        `hashed` is called with the number of bytes after each chunk that was hashed. Raises as `manifests.check`.
        """
        if verify not in get_args(Verify):
            raise ValueError(f"verify is {verify!r}; use one of {', '.join(map(repr, get_args(Verify)))}")
        if verify == "none":
            return
        for name in manifest.files if files is None else files:
            record, path = manifest.files[name], self.path(name)
            if name not in self._sizes:
                raise CorruptCheckpoint(f"{path}: missing; the manifest lists it with {record.size} bytes")
            if self._sizes[name] != record.size:
                raise CorruptCheckpoint(f"{path}: has {self._sizes[name]} bytes, the manifest says {record.size}")
            if verify == "full" and (digest := self._hash(name, hashed)) != record.xxh3_128:
                raise CorruptCheckpoint(f"{path}: content differs: xxh3_128 {digest}, expected {record.xxh3_128}")

    def _hash(self, name: str, hashed: Callable[[int], object]) -> str:
        digest = xxhash.xxh3_128()

        def run() -> None:
            for chunk in obstore.get(self.store, name).stream(min_chunk_size=_CHUNK):
                digest.update(chunk)
                hashed(len(chunk))

        _asked(self.path(name), run)
        return digest.hexdigest()

    def read(self, name: str) -> bytes:
        return _asked(self.path(name), lambda: bytes(obstore.get(self.store, name).bytes()))

    def open(self, name: str) -> RemoteFile:
        size = self._sizes.get(name)
        if size is None:
            raise CorruptCheckpoint(f"{self.path(name)}: missing")
        return RemoteFile(self.path(name), size, self.store, name)


@dataclass(frozen=True)
class Uploaded:
    """An uploaded checkpoint, as its marker names it.

    `url`: where it is. `order`: the newest has the largest. `manifest`: None if it cannot be used; then `error` has the
    reason. `error` is also set if files are missing or have other sizes.
    """

    url: str
    order: int
    manifest: Manifest | None
    error: CheckpointError | None = None


def uploaded(url: str) -> list[Uploaded]:
    """Return the checkpoints that were uploaded below the URL of a run, newest first.

    None is among them before its upload was complete. Sizes are compared, by one list of the run. Raises
    `CheckpointError` if the store cannot be read.
    """
    if not exists(url):
        return []
    store = open_store(url)
    sizes: dict[str, dict[str, int]] = {}
    for found in _asked(url, lambda: obstore.list(store).collect()):
        key, _, name = found["path"].partition("/")
        sizes.setdefault(key, {})[name] = found["size"]
    with ThreadPoolExecutor(_MANIFESTS) as threads:
        return list(threads.map(lambda marker: _look(url, marker, "size", sizes.get(marker[1], {})), markers(url)))


def markers(url: str) -> Iterator[tuple[int, str]]:
    """Yield (order, key) of the checkpoints that were uploaded below the URL of a run, newest first."""
    if exists(url):
        yield from _markers(open_store(url), url)


def _look(url: str, marker: tuple[int, str], verify: Verify, sizes: Mapping[str, int] | None = None) -> Uploaded:
    order, key = marker
    files = RemoteFiles(f"{url.rstrip('/')}/{key}", sizes)
    manifest = None
    try:
        manifest = files.manifest()
        files.check(manifest, verify)
    except Unreachable:
        raise
    except CheckpointError as error:
        return Uploaded(files.where, order, manifest, error)
    return Uploaded(files.where, order, manifest)


def latest(url: str, verify: Verify = "size") -> str | None:
    """Return the URL of the newest complete checkpoint below the URL of a run.

    Broken ones are skipped with a warning. None means that nothing was uploaded there. Raises `CorruptCheckpoint` if
    every checkpoint is broken.
    """
    broken = []
    for marker in markers(url):
        found = _look(url, marker, verify)
        if found.error is None:
            return found.url
        broken.append(str(found.error))
        warnings.warn(f"skipped a broken checkpoint: {found.error}", stacklevel=3)
    if broken:
        raise CorruptCheckpoint(
            f"{url}: none of the {len(broken)} checkpoints is complete; newest first: {'; '.join(broken)}"
        )
    return None


class Unreachable(CheckpointError):
    """The store did not answer, or refused: what is there is unknown."""


def exists(url: str) -> bool:
    """Return whether the URL may lead to something: False only for a folder that is not there."""
    return not url.startswith("file:") or os.path.isdir(unquote(urlsplit(url).path))


def _markers(store: ObjectStore, url: str) -> Iterator[tuple[int, str]]:
    """Yield (order, key) of the uploaded checkpoints, newest first. Of a long run only the first page is read at first."""
    pages: Iterator[Sequence[ObjectMeta]]
    if url.startswith("file:"):  # its list has no order
        pages = iter([sorted(obstore.list(store, names.MARKERS).collect(), key=lambda found: found["path"])])
    else:
        pages = iter(obstore.list(store, names.MARKERS, chunk_size=1000))
    while (page := _asked(url, lambda: next(pages, None))) is not None:
        for found in page:
            if (parsed := names.parse_remote_marker(found["path"])) is not None:
                yield parsed


def _asked(path: str, ask: Callable[[], _T]) -> _T:
    """Return what `ask` returns. Raises `CorruptCheckpoint` if the object is missing, and `Unreachable`."""
    try:
        return ask()
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise Unreachable(f"{path}: {said(error)}") from None
        raise CorruptCheckpoint(f"{path}: missing") from None
    except Exception as error:  # obstore raises its own kinds
        raise Unreachable(f"{path}: cannot be read: {said(error)}") from None
