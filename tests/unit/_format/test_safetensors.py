"""The safetensors layout is safetensors' own, byte for byte; what it cannot hold is refused, what is hostile is not read."""

from __future__ import annotations

import json
import re
import struct
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vembed_async_ckpt import CorruptCheckpoint, PlanError
from vembed_async_ckpt._capture.dtypes import FROM_TORCH, TO_TORCH, spec
from vembed_async_ckpt._format.safetensors import (
    BITS,
    MAX_HEADER_BYTES,
    Entry,
    TensorSpec,
    header_length,
    layout,
    parse,
)

ODD_NAMES = [
    '"',
    "\\",
    "a b",
    "\b\t\n\f\r",
    "\x01\x1f",
    "\x7f",
    "\u2028",
    "é",
    "\ue000",
    "🤖",
    "../../etc/passwd",
    "a\0b",
    "",
]
NAMES = st.one_of(st.sampled_from(ODD_NAMES), st.text(st.characters(exclude_categories=["Cs"]), max_size=12)).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DICTS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(TO_TORCH)), SHAPES), max_size=8)


def make(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A tensor of random bits; a bool's are 0 and 1. For F4 the last dimension counts pairs of elements."""
    kind = TO_TORCH[dtype]
    count = kind.itemsize
    for n in shape:
        count *= n
    bits = torch.randint(
        0, 2 if dtype == "BOOL" else 256, (count,), dtype=torch.uint8, generator=torch.manual_seed(seed)
    )
    return bits.view(kind).view(shape) if count else torch.empty(shape, dtype=kind)


def image(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> bytes:
    """The file as the arena would hold it."""
    placed = layout([spec(name, t, file="f") for name, t in tensors.items()], metadata, file="f")
    content = bytearray(placed.size)
    content[: len(placed.prefix)] = placed.prefix
    for name, tensor in tensors.items():
        raw = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        content[placed.offsets[name] : placed.offsets[name] + len(raw)] = raw
    return bytes(content)


def test_every_dtype_that_torch_and_safetensors_share_is_known():
    """safetensors' own table of dtypes and ours name the same ones."""
    assert set(safetensors.torch._TYPES.values()) <= set(FROM_TORCH)
    assert all(TO_TORCH[name] is dtype for name, dtype in safetensors.torch._TYPES.items())
    for name, dtype in TO_TORCH.items():
        assert BITS[name] == (4 if name == "F4" else 8 * dtype.itemsize)


@settings(max_examples=150, deadline=None)
@given(DICTS, st.sampled_from([None, {"format": "pt"}]))
@example({}, None)
@example({name: (dtype, (2, 1)) for name, dtype in zip("tsrqponmlkjihgfedcba", sorted(TO_TORCH), strict=True)}, None)
@example(dict.fromkeys(ODD_NAMES, ("U8", (1,))), {"format": "pt"})
@example({"scalar": ("F32", ()), "none": ("F32", (0,)), "b": ("BOOL", ()), "f": ("BF16", (3, 0))}, {"format": "pt"})
def test_layout_and_bytes_equal_what_safetensors_writes(described, metadata):
    """Header, order, padding and data are the file that safetensors.torch.save makes."""
    described = {  # a 0-dim F4 does not exist
        name: (dtype if shape or dtype != "F4" else "U8", shape) for name, (dtype, shape) in described.items()
    }
    tensors = {name: make(*what, seed) for seed, (name, what) in enumerate(described.items())}
    ours = image(tensors, metadata)
    if tensors or metadata is None:  # safetensors writes an unreadable header for metadata without tensors
        assert ours == safetensors.torch.save(tensors, metadata)
    entries, found = parse(ours, len(ours), file="f")
    assert found == (metadata or {})
    assert {n: (e.dtype, e.shape) for n, e in entries.items()} == {
        n: (s.dtype, s.shape) for n, s in ((n, spec(n, t, file="f")) for n, t in tensors.items())
    }
    for name, tensor in tensors.items():
        data = ours[entries[name].offset : entries[name].offset + entries[name].nbytes]
        assert data == (bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b"")


def test_metadata_of_several_keys_is_sorted_and_read_back():
    """safetensors' own order of several keys is random; ours is always the same."""
    one = layout([TensorSpec("a", "U8", (1,))], {"z": "1", "a": "2"}, file="f").prefix
    other = layout([TensorSpec("a", "U8", (1,))], {"a": "2", "z": "1"}, file="f").prefix
    assert one == other
    assert parse(one + b"x", len(one) + 1, file="f")[1] == {"a": "2", "z": "1"}


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ([TensorSpec("a", "C128", (1,))], "C128"),
        ([TensorSpec("a", "F32", (1,)), TensorSpec("a", "F32", (2,))], "two tensors are named 'a'"),
        ([TensorSpec("__metadata__", "F32", (1,))], "__metadata__"),
        ([TensorSpec("lone \ud800", "F32", (1,))], "not valid Unicode"),
    ],
)
def test_what_could_not_be_read_back_is_refused(specs, reason):
    """An unknown dtype, a name twice, the metadata's name and a lone surrogate are PlanErrors that name the file."""
    with pytest.raises(PlanError, match=rf"weights\.safetensors.*{reason}"):
        layout(specs, file="weights.safetensors")


def test_a_header_longer_than_safetensors_reads_is_refused(monkeypatch):
    """The limit of safetensors' reader is a PlanError at save, not a surprise at load."""
    monkeypatch.setattr("vembed_async_ckpt._format.safetensors.MAX_HEADER_BYTES", 48)
    layout([], file="f")
    with pytest.raises(PlanError, match="header"):
        layout([TensorSpec("name", "F32", (1,))], file="f")
    assert MAX_HEADER_BYTES == 100_000_000


@pytest.mark.parametrize("dtype", [torch.complex128, torch.bits16])
def test_a_torch_dtype_without_a_name_is_refused(dtype):
    """The error names tensor and dtype."""
    with pytest.raises(PlanError, match=rf"'w'.*{re.escape(str(dtype))}"):
        spec("w", torch.empty(2, dtype=dtype), file="f")


def raw(header: bytes | dict | list, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWICE = json.dumps(entry()).encode()
HOSTILE = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header length 0": struct.pack("<Q", 0),
    "all zeros, as after a lost page cache": bytes(4096),
    "header longer than the file": raw(b"{}", b"", 1 << 20),
    "header length 2^64-1": raw(b"{}", b"", 2**64 - 1),
    "header length beyond the cap": raw(b"{" + b" " * 64, b"", 100_000_001),
    "header not JSON": raw(b"x" * 16),
    "header is a list": raw([]),
    "header is a number": raw(b"1"),
    "invalid UTF-8": raw(b'{"\xff\xfe":1}'),
    "truncated data": raw({"a": entry()}, b"\0" * 4),
    "trailing bytes": raw({"a": entry()}, b"\0" * 9),
    "hole between tensors": raw({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20),
    "does not start at 0": raw({"a": entry(offsets=(4, 12))}, b"\0" * 12),
    "overlapping tensors": raw({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
    "two names, same bytes": raw({"a": entry(), "b": entry()}),
    "end before begin": raw({"a": entry(offsets=(8, 0))}),
    "shape does not fill the offsets": raw({"a": entry(shape=(3,))}),
    "shape overflows 2^63": raw({"a": entry(shape=(2**62, 4))}),
    "offsets beyond 2^64": raw({"a": entry(shape=(2**64,), offsets=(0, 2**66))}),
    "negative shape": raw({"a": entry(shape=(-1,))}),
    "two negative dimensions": raw({"a": entry(shape=(-1, -2))}),
    "negative offsets": raw({"a": entry(offsets=(-8, 0))}),
    "fractional shape": raw({"a": entry(shape=(2.0,))}),
    "bool as a dimension": raw({"a": entry(shape=(True, 2))}),
    "unknown dtype": raw({"a": entry(dtype="EVIL")}),
    "dtype is a list": raw({"a": entry(dtype=["F32"])}),
    "entry is a number": raw({"a": 1}),
    "entry without offsets": raw({"a": {"dtype": "F32", "shape": [2]}}),
    "three offsets": raw({"a": entry(offsets=(0, 4, 8))}),
    "duplicate key": raw(b'{"a":%s,"a":%s}' % (TWICE, TWICE)),
    "nested 100000 deep": raw(b'{"a":' * 100_000),
    "number of 5000 digits": raw(b'{"a":' + b"9" * 5000 + b"}"),
    "nested in an entry": raw({"a": {**entry(), "more": {"b": 1}}}),
    "an entry of 5000 dimensions": raw({"a": entry(shape=[1] * 5000, offsets=(0, 4))}, b"\0" * 4),
    "an entry without an end": raw(b'{"a":{"dtype":"F32"'),
    "an object without an end": raw(b'{"a":%s' % TWICE),
    "a comma at the end": raw(b'{"a":%s,}' % TWICE),
    "a comma at the start": raw(b'{,"a":%s}' % TWICE),
    "no comma": raw(b'{"a":%s "b":%s}' % (TWICE, TWICE)),
    "no colon": raw(b'{"a"%s}' % TWICE),
    "a name without an end": raw(b'{"a'),
    "a name that is none": raw(b"{1:%s}" % TWICE),
    "two objects": raw(b'{"a":%s}{}' % TWICE),
    "UTF-16": raw(json.dumps({"a": entry()}).encode("utf-16")),
    "a key twice in an entry": raw(b'{"a":{"dtype":"U8",%s}' % TWICE[1:]),
    "metadata twice": raw(b'{"__metadata__":{},"__metadata__":{},"a":%s}' % TWICE),
    "metadata of numbers": raw({"__metadata__": {"k": 1}, "a": entry()}),
    "a key twice in the metadata": raw(b'{"__metadata__":{"k":"","k":""},"a":%s}' % TWICE),
    "metadata of 100000 keys": raw({"__metadata__": {str(n): "" for n in range(100_000)}, "a": entry()}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_corrupt_and_nothing_else(content):
    """Whatever a file claims of itself, reading it ends with CorruptCheckpoint naming the file."""
    with pytest.raises(CorruptCheckpoint, match=r"some\.safetensors"):
        parse(content, len(content), file="some.safetensors")


METADATA = b",".join(b'"%x":""' % n for n in range(1 << 18))
DENSE = {
    "lists": b'{"a":[' + b"[]," * (1 << 20) + b"0]}",
    "objects": b'{"a":[' + b'{"":0},' * (1 << 19) + b"0]}",
    "objects in an entry": b'{"a":{"dtype":' + b'{"":0},' * (1 << 19) + b"0}}",
    "numbers": b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[' + b"0," * (1 << 20) + b"0]}}",
    "metadata": b'{"__metadata__":{' + METADATA + b"}}",
    "metadata that is a list": b'{"__metadata__":[' + b"[]," * (1 << 20) + b"0]}",
}


@pytest.mark.parametrize("what", DENSE)
def test_a_hostile_header_takes_no_more_memory_than_its_own(what):
    """What no tensor is described by is refused before Python objects are made of it, which are 30 times as large."""
    content = raw(DENSE[what], b"")
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpoint, match="f: bad safetensors header"):
            parse(content, len(content), file="f")
        assert tracemalloc.get_traced_memory()[1] < 5 * len(content) + (1 << 20)
    finally:
        tracemalloc.stop()


def test_a_header_of_many_tensors_takes_as_much_memory_as_they_need():
    """The smallest description of a tensor, many times: what is kept is the tensors, and not what they were read from."""
    one = b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    content = raw(b"{" + b",".join(one % n for n in range(20_000)) + b"}", b"")
    tracemalloc.start()
    try:
        entries, _ = parse(content, len(content), file="f")
        assert len(entries) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 9 * len(content)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("indent", [None, 1])
def test_a_header_may_be_written_in_any_way_that_json_knows(indent):
    """Space, escapes, and keys in another order: it is the same header."""
    described = {'\u00e9"}': dict(reversed(entry().items())), "b": {**entry((2, 1), (8, 16)), "note": "x"}}
    header = {"__metadata__": {"a": "\u2028", "b": "}"}, **described}
    content = raw(json.dumps(header, indent=indent).encode() + b" \t\r\n", b"\0" * 16)
    entries, metadata = parse(content, len(content), file="f")
    assert metadata == header["__metadata__"]
    assert entries == {
        'é"}': Entry("F32", (2,), len(content) - 16, 8),
        "b": Entry("F32", (2, 1), len(content) - 8, 8),
    }


@pytest.mark.parametrize(
    "content", [raw({"a": entry()}), raw({}, b""), raw({"a": entry(shape=(0,), offsets=(0, 0))}, b"")]
)
def test_the_rejected_files_differ_from_accepted_ones_only_in_their_fault(content):
    """The builder of the hostile files makes good ones too."""
    parse(content, len(content), file="f")


def test_entries_come_with_offsets_from_the_start_of_the_file():
    """A name that looks like a path is only a name; offsets count from the first byte of the file."""
    content = raw({"../../etc/x": entry()})
    assert parse(content, len(content), file="f")[0] == {"../../etc/x": Entry("F32", (2,), len(content) - 8, 8)}


def test_the_header_length_is_checked_before_a_byte_of_it_is_read():
    """`header_length` needs eight bytes and the file's size only."""
    assert header_length(struct.pack("<Q", 100), 108, file="f") == 100
    with pytest.raises(CorruptCheckpoint, match="claims"):
        header_length(struct.pack("<Q", 101), 108, file="f")
