"""Uploads one checkpoint: its files, then its manifest, then the marker that makes it visible."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError

from .._format import names
from .._format.manifest import FileRecord, parse
from ..errors import CheckpointError
from .checkpoint import LocalCheckpoint
from .stores import open_store

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

HASH = "xxh3_128"  # the metadata of an object that holds the hash of its bytes
_PART = 16 << 20  # bytes of each part of a multipart upload
_PARTS = 9_000  # of one upload at most; S3 allows 10,000
_IN_FLIGHT = 4  # parts, or small files


@dataclass(frozen=True)
class Uploading:
    """The upload of one checkpoint to one URL.

    `sent`: the finished objects, as {file name: e_tag}; some stores drop the metadata that would tell. `finished` is
    called with (file name, e_tag, bytes) after each object. `between` is called before each part and may raise.
    """

    url: str
    local: LocalCheckpoint
    key: str
    sent: Mapping[str, str]
    finished: Callable[[str, str, int], None]
    between: Callable[[], None]

    def run(self) -> None:
        """Upload what is not there yet.

        When this returns, the checkpoint is complete and the marker names it. Raises what obstore raises, OSError,
        `Gone` and `Damaged`; then the marker does not exist.
        """
        store = open_store(self.url, create=True)
        there = {found["path"]: found for found in obstore.list(store, self.key).collect()}
        manifest = self.local.manifest
        missing = {
            name: record
            for name, record in manifest.files.items()
            if not self._is_there(store, name, record, there.get(f"{self.key}/{name}"))
        }
        copies = self._copies(missing)
        small = [name for name, record in missing.items() if record.size <= _PART]
        errors = []
        with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="vembed-ckpt-upload") as threads:
            puts = {threads.submit(self._put_small, store, name): name for name in small}
            for put in as_completed(puts):
                if (error := put.exception()) is not None:
                    errors.append(error)
                else:
                    self.finished(puts[put], put.result(), missing[puts[put]].size)
        if errors:
            raise errors[0]
        for name, record in missing.items():
            if record.size > _PART and name not in copies:
                self.finished(name, self._put_large(store, name, record), record.size)
        for name, source in copies.items():
            self._copy(store, source, name)
        self._put_manifest(store)
        self._put_marker(store)

    def _is_there(self, store: ObjectStore, name: str, record: FileRecord, found: ObjectMeta | None) -> bool:
        if found is None or found["size"] != record.size:
            return False
        if self.sent.get(name) == found["e_tag"] is not None:
            return True
        head = obstore.get(store, found["path"], options={"head": True})
        return head.attributes.get(HASH) == record.xxh3_128

    def _copies(self, missing: Mapping[str, FileRecord]) -> dict[str, str]:
        """Return which of the missing large files the store can copy from another one, as {name: source}.

        The weights may have a second name.
        """
        source = {record: name for name, record in reversed(list(self.local.manifest.files.items()))}
        source |= {record: name for name, record in self.local.manifest.files.items() if name not in missing}
        return {name: source[r] for name, r in missing.items() if r.size > _PART and source[r] != name}

    def _copy(self, store: ObjectStore, source: str, name: str) -> None:
        record = self.local.manifest.files[name]
        try:
            obstore.copy(store, f"{self.key}/{source}", f"{self.key}/{name}")
            found = obstore.head(store, f"{self.key}/{name}")
        except Exception:  # S3 copies at most 5 GB at once
            self.finished(name, self._put_large(store, name, record), record.size)
            return
        self._sync(f"{self.key}/{name}")
        self.finished(name, found["e_tag"] or "", 0)

    def _put_small(self, store: ObjectStore, name: str) -> str:
        data = b"".join(self.local.chunks(name, _PART, self.between))
        return self._put(store, name, data, use_multipart=False)

    def _put_large(self, store: ObjectStore, name: str, record: FileRecord) -> str:
        part = max(_PART, -(-record.size // _PARTS >> 20 << 20) + (1 << 20) if record.size > _PARTS * _PART else 0)
        # An iterator that raises ends the upload: an object whose bytes have another hash never comes to be.
        chunks = self.local.chunks(name, part, self.between)
        return self._put(store, name, chunks, use_multipart=True, chunk_size=part, max_concurrency=_IN_FLIGHT)

    def _put(self, store: ObjectStore, name: str, data: Any, **how: Any) -> str:
        if not self._is_folder:
            how["attributes"] = {HASH: self.local.manifest.files[name].xxh3_128}
        put = obstore.put(store, f"{self.key}/{name}", data, **how)
        self._sync(f"{self.key}/{name}")
        return put["e_tag"] or ""

    def _put_manifest(self, store: ObjectStore) -> None:
        key = f"{self.key}/{names.MANIFEST}"
        content = self.local.manifest_bytes()
        try:
            obstore.put(store, key, content, mode="create")
        except AlreadyExistsError:
            found = parse(bytes(obstore.get(store, key).bytes()), file=key)
            if found.save_id != self.local.manifest.save_id:
                raise CheckpointError(f"{self.url}/{key}: belongs to another save, {found.save_id}") from None
        self._sync(key)

    def _put_marker(self, store: ObjectStore) -> None:
        """Make the checkpoint the newest below the URL.

        It is that even if the numbers of the saves began anew, as they do on another machine: so the order of the
        markers is that in which the checkpoints arrived.
        """
        found = [
            parsed
            for m in obstore.list(store, names.MARKERS).collect()
            if (parsed := names.parse_remote_marker(m["path"]))
        ]
        if any(key == self.key for _, key in found):
            return
        marker = names.remote_marker(1 + max((order for order, _ in found), default=0), self.key)
        obstore.put(store, marker, b"")
        self._sync(marker)

    @property
    def _is_folder(self) -> bool:
        return self.url.startswith("file:")

    def _sync(self, key: str) -> None:
        """Make an object in a folder survive a power cut, and the directories on the way to it. A store does that itself."""
        if not self._is_folder:
            return
        path = os.path.join(unquote(urlsplit(self.url).path), *key.split("/"))
        for _ in range(2 + key.count("/")):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            path = os.path.dirname(path)
