"""Writes and parses the safetensors format. No other module does.

A file is an 8-byte little-endian header length, a JSON header padded with spaces to a multiple of 8, and the tensors'
bytes back to back (https://github.com/huggingface/safetensors#format). The layout equals that of safetensors 0.8, byte
for byte, for the same tensors and metadata.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptCheckpoint, PlanError

# The order of tensors in a file: safetensors sorts them by dtype, in this order, and then by name.
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

MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors
_METADATA = "__metadata__"
_MAX_METADATA = 1 << 16  # keys
_MAX_ENTRY = 4096  # characters; a tensor with 64 dimensions needs a tenth of this
_END = r"\Z"
_TOKENS = {token: re.compile(r"[ \t\n\r]*" + token) for token in ("{", "}", ":", ",", '"', _END)}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, safetensors dtype and shape of one tensor. For F4 the shape counts 4-bit elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of one safetensors file.

    `prefix`: the length field and the header.
    `offsets`: position of each tensor by name, in bytes from the start of the file.
    `size`: bytes of the whole file.
    """

    prefix: bytes
    offsets: Mapping[str, int]
    size: int


def layout(tensors: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None, *, file: str) -> Layout:
    """Lay out one file. `file` is its name in errors.

    Raises `PlanError` for a dtype that the format does not know, a name that cannot be read back, two equal names, or a
    header that is too large.
    """
    header: dict[str, Any] = {}
    if metadata:
        # safetensors writes the keys in hash map order; we sort them.
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
    """One tensor found in a file.

    `offset` is in bytes from the start of the file. `nbytes` was checked against the shape.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def parse(head: bytes, size: int, *, file: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse the start of a file of `size` bytes. `head` must contain at least the length field and the header.

    Returns the tensors by name, and the metadata. Raises `CorruptCheckpoint` unless the tensors cover the data exactly,
    with no gap and no overlap, and the byte range of each tensor agrees with its shape.
    """
    length = header_length(head[:8], size, file=file)
    try:
        entries, metadata = _read(_Scanner(str(memoryview(head)[8 : 8 + length], "utf-8")), 8 + length)
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
    """Return the length of the header in bytes. Raises `CorruptCheckpoint` if the file is too short for it."""
    if len(first) < 8:
        raise CorruptCheckpoint(f"{file}: {len(first)} bytes are too short for a safetensors file")
    (length,) = struct.unpack("<Q", first[:8])
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CorruptCheckpoint(f"{file}: the header claims {length} bytes in a file of {size}")
    return int(length)


def _read(header: _Scanner, data_start: int) -> tuple[dict[str, Entry], dict[str, str]]:
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] | None = None
    for name in header.members():
        if name in entries or (name == _METADATA and metadata is not None):
            raise ValueError(f"{name[:200]!r} stands twice")
        if name != _METADATA:
            entries[name] = _entry(header.flat_object(), data_start)
            continue
        metadata = {}
        for key in header.members():
            if key in metadata or len(metadata) == _MAX_METADATA:
                raise ValueError(f"{_METADATA} has a key twice, or more than {_MAX_METADATA}")
            metadata[key] = header.text()
    header.end()
    return entries, metadata or {}


def _entry(value: dict[str, Any], data_start: int) -> Entry:
    begin, end = value["data_offsets"]
    dtype, shape = value["dtype"], tuple(value["shape"])
    if dtype not in BITS or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"unusable entry {value!r}")
    if math.prod(n or 1 for n in shape) >= 1 << 63 or math.prod(shape[-1:]) * BITS[dtype] % 8:
        raise ValueError(f"no tensor has the shape {shape} of {dtype}")
    spec = TensorSpec("", sys.intern(dtype), shape)
    if end - begin != spec.nbytes:
        raise ValueError(f"shape {shape} of {dtype} does not fill {end - begin} bytes")
    return Entry(spec.dtype, shape, data_start + begin, end - begin)


class _Scanner:
    """Reads a header one part at a time and stops at the first part that is wrong.

    Malformed input therefore takes no more memory than a good header. A general JSON parser would need up to 30 times
    the size of the input.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def members(self) -> Iterator[str]:
        """Yield the names in an object. The caller must read each value before it asks for the next name."""
        self._expect("{")
        if self._take("}"):
            return
        while True:
            name = self.text()
            self._expect(":")
            yield name
            if not self._take(","):
                self._expect("}")
                return

    def text(self) -> str:
        self._expect('"')
        found, self._at = _DECODER.raw_decode(self._text, self._at - 1)
        return str(found)

    def flat_object(self) -> Any:
        """Read an object that contains no other object and has at most `_MAX_ENTRY` characters."""
        self._expect("{")
        end = self._text.find("}", self._at, self._at + _MAX_ENTRY) + 1
        if not end:
            raise ValueError(f"a tensor is described by more than {_MAX_ENTRY} characters")
        found, end = _DECODER.raw_decode(self._text[self._at - 1 : end])
        self._at += end - 1
        return found

    def end(self) -> None:
        if not self._take(_END):
            raise ValueError(f"it goes on behind its end, with {self._next()!r}")

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise ValueError(f"{self._next()!r} is where {token} belongs")

    def _take(self, token: str) -> bool:
        """Skip `token` and return True if it comes next; else return False."""
        found = _TOKENS[token].match(self._text, self._at)
        if found is None:
            return False
        self._at = found.end()
        return True

    def _next(self) -> str:
        return self._text[self._at : self._at + 20]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)
