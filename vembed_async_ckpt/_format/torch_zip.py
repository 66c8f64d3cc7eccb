"""The container format of `optimizer.bin`: an uncompressed zip that `torch.load` reads.

The file is laid out before any byte is moved. The storages come first, each on a 64-byte boundary. `data.pkl`,
`byteorder`, `version` and the central directory follow. So only the end of the file changes when the values in
`param_groups` change. torch itself writes `data.pkl` first; then every tensor would move when a number gets one more
digit. Format: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64
_ARCHIVE = "archive"
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_DESCRIPTOR32 = struct.Struct("<4s3I")
_DESCRIPTOR64 = struct.Struct("<4sI2Q")
_HAS_DESCRIPTOR = 1 << 3
_LIMIT = 0xFFFFFFFF
_PADDING_ID = 0x4246  # "FB": the extra field with which torch aligns records


@dataclass(frozen=True, slots=True)
class ZipLayout:
    """The layout of one zip file. All offsets are in bytes from the start of the file, unless said otherwise.

    `data`: offset of each storage.
    `sizes`: bytes of each storage.
    `pieces`: (offset, bytes) of the headers and descriptors.
    `locals`: where the CRC of each storage goes in its data descriptor.
    `centrals`: where the CRC of each storage goes in the central directory, from the start of that directory.
    `central`: the central directory entries of the storages.
    `end`: where the variable part starts (see `tail`).
    """

    data: tuple[int, ...]
    sizes: tuple[int, ...]
    pieces: tuple[tuple[int, bytes], ...]
    locals: tuple[int, ...]
    centrals: tuple[int, ...]
    central: bytes
    end: int

    def records(self) -> list[list[int]]:
        """Return [data, size, local, central] of each storage, as `protocol.Checksums` has them."""
        return [list(row) for row in zip(self.data, self.sizes, self.locals, self.centrals, strict=True)]


def layout(sizes: Sequence[int]) -> ZipLayout:
    """Lay out storages of `sizes` bytes as the records `data/0`, `data/1`, ...

    Their CRC fields are zero and must be filled in.
    """
    position = 0
    data, pieces, crcs, centrals, central = [], [], [], [], bytearray()
    for index, size in enumerate(sizes):
        name = f"{_ARCHIVE}/data/{index}".encode()
        large = size >= _LIMIT
        extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        header_end = position + _LOCAL.size + len(name) + len(extra) + 4
        padding = -header_end % ALIGNMENT
        extra += struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
        shown = _LIMIT if large else size
        header = _LOCAL.pack(
            b"PK\x03\x04", 45 if large else 20, _HAS_DESCRIPTOR, 0, 0, 0, 0, shown, shown, len(name), len(extra)
        )
        start = header_end + padding
        descriptor = (_DESCRIPTOR64 if large else _DESCRIPTOR32).pack(b"PK\x07\x08", 0, size, size)
        pieces += [(position, header + name + extra), (start + size, descriptor)]
        centrals.append(len(central) + 16)
        central += _central_entry(name, 0, size, position, _HAS_DESCRIPTOR)
        data.append(start)
        crcs.append(start + size + 4)
        position = start + size + len(descriptor)
    return ZipLayout(tuple(data), tuple(sizes), tuple(pieces), tuple(crcs), tuple(centrals), bytes(central), position)


def _central_entry(name: bytes, crc: int, size: int, header: int, flags: int) -> bytes:
    large = []
    if size >= _LIMIT:
        large += [size, size]
    if header >= _LIMIT:
        large.append(header)
    extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    shown = min(size, _LIMIT)
    fixed = _CENTRAL.pack(
        b"PK\x01\x02", 45, 45 if large else 20, flags, 0, 0, 0, crc, shown, shown,
        len(name), len(extra), 0, 0, 0, 0, min(header, _LIMIT),
    )  # fmt: skip
    return fixed + name + extra


def tail(plan: ZipLayout, data_pkl: bytes) -> tuple[bytes, int]:
    """Return the bytes from `plan.end` to the end of the file, and the offset of the central directory in the file.

    The CRC fields of the storages in it are zero. They lie at the offset of the central directory plus `plan.centrals`.
    """
    content = bytearray()
    central = bytearray(plan.central)
    records = (("data.pkl", data_pkl), ("byteorder", b"little"), ("version", b"3\n"))
    for short, body in records:
        name = f"{_ARCHIVE}/{short}".encode()
        crc = zlib.crc32(body)
        header = plan.end + len(content)
        content += _LOCAL.pack(b"PK\x03\x04", 20, 0, 0, 0, 0, crc, len(body), len(body), len(name), 0) + name + body
        central += _central_entry(name, crc, len(body), header, 0)
    start = plan.end + len(content)
    content += central + _end(len(plan.data) + len(records), len(central), start)
    return bytes(content), start


def _end(count: int, size: int, start: int) -> bytes:
    end = b""
    if count >= 0xFFFF or size >= _LIMIT or start >= _LIMIT:
        end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    shown = min(count, 0xFFFF)
    return end + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, shown, shown, min(size, _LIMIT), min(start, _LIMIT), 0)


def archive(data_pkl: bytes, storages: Sequence[bytes]) -> bytes:
    """Return a whole file with these storages."""
    plan = layout(list(map(len, storages)))
    file = bytearray(plan.end)
    for start, piece in (*plan.pieces, *zip(plan.data, storages, strict=True)):
        file[start : start + len(piece)] = piece
    end, central = tail(plan, data_pkl)
    file += end
    for storage, local, in_central in zip(storages, plan.locals, plan.centrals, strict=True):
        for position in (local, central + in_central):
            struct.pack_into("<I", file, position, zlib.crc32(storage))
    return bytes(file)


def room_for_tail(plan: ZipLayout, pickle_bytes: int) -> int:
    """Return the bytes to reserve after `plan.end`, so that `data.pkl` can grow beyond `pickle_bytes`."""
    return len(plan.central) + 2 * pickle_bytes + (64 << 10)
