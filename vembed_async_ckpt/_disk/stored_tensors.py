"""Finds the tensors in a checkpoint's files without loading torch.

The tensors of safetensors files are found from their headers, all others from the manifest.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from .._format import safetensors
from .._format.manifest import Manifest
from ..errors import CorruptCheckpoint
from .filesystem import open_regular
from .manifests import refuse_linked_parents

_BYTES = {"float64": 8, "complex128": 16, "int64": 8}  # dtypes of optimizer.bin for which safetensors has no name


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor: its file, name, dtype (as safetensors names it), shape, and the place of its bytes in the file.

    `offset`, `nbytes`: in bytes. `strides`: empty if the tensor is contiguous.
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    strides: tuple[int, ...] = ()


def stored_tensors(directory: str, manifest: Manifest) -> Iterator[StoredTensor]:
    """Yield every tensor of a checkpoint, ordered by file and offset.

    Raises `CorruptCheckpoint` for an invalid description.
    """
    for file, record in sorted(manifest.files.items()):
        refuse_linked_parents(directory, file)
        path = os.path.join(directory, *file.split("/"))
        if file.endswith(".safetensors"):
            head = _head(path, record.size)
            entries = safetensors.parse(head, record.size, file=path)[0]
            for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
                yield StoredTensor(file, name, entry.dtype, entry.shape, entry.offset, entry.nbytes)
        try:
            yield from [
                _listed(file, record.size, name, *entry) for name, entry in manifest.tensors.get(file, {}).items()
            ]
        except (ValueError, TypeError, AttributeError) as error:
            raise CorruptCheckpoint(f"{path}: what the manifest says of its tensors cannot be used: {error}") from error


def _listed(file: str, size: int, name: str, dtype: Any, shape: Any, offset: Any, strides: Any = ()) -> StoredTensor:
    """Return a tensor from its description in the manifest, in a file of `size` bytes.

    Raises ValueError if that is invalid.
    """
    if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, offset, *strides)):
        raise ValueError(f"{name!r} is described as {str((dtype, shape, offset, strides))[:200]}")
    nbytes = math.prod(shape) * safetensors.BITS.get(dtype, 8 * _BYTES.get(dtype, 0)) // 8
    if offset + nbytes > size:
        raise ValueError(f"{name!r} ends behind the file, at {offset + nbytes} of {size}")
    return StoredTensor(file, name, dtype, tuple(shape), offset, nbytes, tuple(strides))


def _head(path: str, size: int) -> bytes:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            first = file.read(8)
            return first + file.read(safetensors.header_length(first, size, file=path))
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: cannot be read: {error.strerror}") from error


def digests(directory: str, manifest: Manifest) -> dict[tuple[str, str], str]:
    """Return the xxh3_128 of every tensor with its dtype, shape and strides, by (file, name).

    A file with several names counts once.
    """
    result = {}
    seen: set[tuple[int, int]] = set()
    open_file = ""
    data: mmap.mmap | bytes = b""
    for tensor in stored_tensors(directory, manifest):
        path = os.path.join(directory, *tensor.file.split("/"))
        if tensor.file != open_file:
            status = os.lstat(path)
            skip = (status.st_dev, status.st_ino) in seen
            seen.add((status.st_dev, status.st_ino))
            open_file = tensor.file
            data = b"" if skip else _mapped(path)
        if data:
            body = memoryview(data)[tensor.offset : tensor.offset + tensor.nbytes]
            digest = xxhash.xxh3_128(f"{tensor.dtype} {tensor.shape} {tensor.strides} ".encode())
            digest.update(body)
            body.release()
            result[tensor.file, tensor.name] = digest.hexdigest()
    return result


def _mapped(path: str) -> mmap.mmap:
    fd = open_regular(path)
    try:
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{path}: cannot be mapped: {error}") from error
    finally:
        os.close(fd)
