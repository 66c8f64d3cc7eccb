"""The safetensors format, made and parsed only here.

Format: an 8-byte little-endian header length, a JSON header padded with spaces to a multiple of 8, the tensors' bytes back
to back (https://github.com/huggingface/safetensors#format). For the same tensors and metadata the layout here is the one
that safetensors 0.8 itself writes, byte for byte.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptCheckpoint, PlanError

# (bits of one element, rank in the file): safetensors writes tensors by descending rank of their dtype, then by name.
_DTYPE_ORDER = [
    "U64",
    "I64",
    "F64",
    "C64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E5M2FNUZ",
    "F8_E4M3FNUZ",
    "F8_E8M0",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "F4",
    "BOOL",
]
RANK = {name: rank for rank, name in enumerate(_DTYPE_ORDER)}
BITS = dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
BITS |= dict.fromkeys(("F32", "U32", "I32"), 32)
BITS |= dict.fromkeys(("BF16", "F16", "U16", "I16"), 16)
BITS |= {name: 8 for name in _DTYPE_ORDER if name.startswith("F8") or name in ("I8", "U8", "BOOL")}
BITS |= {"F4": 4}

MAX_HEADER_BYTES = 100_000_000  # what safetensors accepts
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, safetensors dtype and shape of one tensor (F4: the shape counts 4-bit elements)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Layout:
    """One safetensors file: `prefix` (length and header), then each tensor at its offset from the start of the file."""

    prefix: bytes
    offsets: Mapping[str, int]
    size: int


def layout(tensors: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None, *, file: str) -> Layout:
    """Lay out one file. `file` only names it in errors.

    Raises `PlanError` for a dtype the format does not know, a name that cannot be read back, or two equal names.
    """
    header: dict[str, Any] = {}
    if metadata:
        # With several keys safetensors' own order is that of a hash map; ours is sorted.
        header[_METADATA] = dict(sorted(metadata.items()))
    offset = 0
    starts: dict[str, int] = {}
    for tensor in sorted(_checked(tensors, file), key=lambda t: (RANK[t.dtype], t.name)):
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        starts[tensor.name] = offset
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise PlanError(f"{file}: a header of {len(text)} bytes is more than safetensors reads ({MAX_HEADER_BYTES})")
    prefix = struct.pack("<Q", len(text)) + text
    return Layout(prefix, {name: len(prefix) + start for name, start in starts.items()}, len(prefix) + offset)


def _checked(tensors: Iterable[TensorSpec], file: str) -> list[TensorSpec]:
    names = set()
    result = list(tensors)
    for tensor in result:
        if tensor.dtype not in RANK:
            raise PlanError(f"{file}: tensor {tensor.name!r} has dtype {tensor.dtype}, which safetensors cannot hold")
        if tensor.name == _METADATA:
            raise PlanError(f"{file}: a tensor cannot be named {_METADATA!r}; the file could not be read back")
        if tensor.name in names:
            raise PlanError(f"{file}: two tensors are named {tensor.name!r}")
        try:
            tensor.name.encode()
        except UnicodeEncodeError as error:
            raise PlanError(f"{file}: the tensor name {tensor.name!r} is not valid Unicode text") from error
        names.add(tensor.name)
    return result


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor found in a file: `offset` counts from the start of the file, `nbytes` is checked against the shape."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def parse(head: bytes, size: int, *, file: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse the start of a file of `size` bytes; `head` must hold at least length and header.

    Returns its tensors by name, and its metadata. Raises `CorruptCheckpoint` unless the tensors cover the data exactly, with
    no hole and no overlap, and every offset agrees with its shape.
    """
    length = header_length(head[:8], size, file=file)
    try:
        header = json.loads(head[8 : 8 + length], object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise TypeError("the header is not an object")
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError(f"{_METADATA} does not map text to text")
        entries = {str(name): _entry(value, 8 + length) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file}: bad safetensors header: {error}") from error
    expected = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != expected:
            raise CorruptCheckpoint(f"{file}: tensor {name!r} starts at {entry.offset}, expected {expected}")
        expected += entry.nbytes
    if expected != size:
        raise CorruptCheckpoint(f"{file}: the tensors end at {expected}, the file at {size}")
    return entries, metadata


def header_length(first: bytes, size: int, *, file: str) -> int:
    """The header's length, checked against the file's size. Raises `CorruptCheckpoint`."""
    if len(first) < 8:
        raise CorruptCheckpoint(f"{file}: {len(first)} bytes are too short for a safetensors file")
    (length,) = struct.unpack("<Q", first[:8])
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CorruptCheckpoint(f"{file}: the header claims {length} bytes in a file of {size}")
    return int(length)


def _entry(value: dict[str, Any], data_start: int) -> Entry:
    begin, end = value["data_offsets"]
    spec = TensorSpec("", value["dtype"], tuple(value["shape"]))
    if spec.dtype not in RANK or not all(type(n) is int and n >= 0 for n in (*spec.shape, begin, end)):
        raise ValueError(f"unusable entry {value!r}")
    if math.prod(max(n, 1) for n in spec.shape) >= 1 << 63 or math.prod(spec.shape[-1:]) * BITS[spec.dtype] % 8:
        raise ValueError(f"no tensor has the shape {spec.shape} of {spec.dtype}")
    if end - begin != spec.nbytes:
        raise ValueError(f"shape {spec.shape} of {spec.dtype} does not fill {end - begin} bytes")
    return Entry(spec.dtype, spec.shape, data_start + begin, spec.nbytes)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result
