"""Reads the manifest of a checkpoint directory, and checks the files against it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import xxhash

from .._format import names
from .._format.manifest import MAX_BYTES, FileRecord, Manifest, parse
from ..errors import CorruptCheckpoint
from . import filesystem as fs

Verify = Literal["none", "size", "full"]

_HASH_CHUNK = 4 << 20  # bytes


def read(directory: str) -> Manifest:
    """Return the manifest of a checkpoint directory.

    Raises `CorruptCheckpoint` if there is none or it cannot be read or used.
    """
    path = os.path.join(directory, names.MANIFEST)
    if os.path.islink(directory):
        raise CorruptCheckpoint(f"{directory}: is a symbolic link; links are not followed")
    try:
        content = fs.read_regular(path, MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptCheckpoint(f"{directory}: incomplete: it has no {names.MANIFEST}") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: cannot be read: {error.strerror}") from error
    return parse(content, file=path)


def check(
    directory: str,
    manifest: Manifest,
    verify: Verify,
    hashed: Callable[[int], object] = lambda count: None,
    files: Iterable[str] | None = None,
) -> None:
    """Compare the files with the manifest: their sizes, and with `full` also their hashes.

    `hashed` is called with the number of bytes after each chunk that was hashed. `files`: compare only these files.
    Raises `CorruptCheckpoint` that names the file and what is wrong with it.
    """
    if verify not in get_args(Verify):
        raise ValueError(f"verify is {verify!r}; use one of {', '.join(map(repr, get_args(Verify)))}")
    if verify == "none":
        return
    for name in manifest.files if files is None else files:
        record = manifest.files[name]
        path = os.path.join(directory, *name.split("/"))
        try:
            refuse_linked_parents(directory, name)
            fd = fs.open_regular(path)
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"{path}: missing; the manifest lists it with {record.size} bytes") from error
        except OSError as error:
            raise CorruptCheckpoint(f"{path}: cannot be read: {error.strerror}") from error
        try:
            size = os.fstat(fd).st_size
            if size != record.size:
                raise CorruptCheckpoint(f"{path}: has {size} bytes, the manifest says {record.size}")
            if verify == "full" and (digest := _hash(fd, path, hashed)) != record.xxh3_128:
                raise CorruptCheckpoint(f"{path}: content differs: xxh3_128 {digest}, expected {record.xxh3_128}")
        finally:
            os.close(fd)


def record_of(path: str) -> FileRecord:
    """Return the size and the hash of a file as it is now. Raises `CorruptCheckpoint` if it cannot be read."""
    fd = fs.open_regular(path)
    try:
        return FileRecord(os.fstat(fd).st_size, _hash(fd, path, lambda count: None))
    finally:
        os.close(fd)


def refuse_linked_parents(directory: str, name: str) -> None:
    """Raise `CorruptCheckpoint` if a directory on the way to the file `name` is a symbolic link: it leads elsewhere."""
    parent = directory
    for part in name.split("/")[:-1]:
        parent = os.path.join(parent, part)
        if os.path.islink(parent):
            raise CorruptCheckpoint(f"{parent}: is a symbolic link; links are not followed")


def _hash(fd: int, path: str, hashed: Callable[[int], object]) -> str:
    digest = xxhash.xxh3_128()
    try:
        while chunk := os.read(fd, _HASH_CHUNK):
            digest.update(chunk)
            hashed(len(chunk))
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()
