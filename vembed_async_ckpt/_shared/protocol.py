"""The messages between trainer and writer over one SOCK_STREAM pair.

The trainer sends commands of constant size, so a send never blocks for long. A job is JSON in its arena. Descriptors
are sent beside the command. The writer sends JSON replies, each after a 4-byte length.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypedDict

from .._format.plan import START

PROGRESS = struct.Struct("<Q")  # at byte 0 of an arena: how many bytes of its job have been written
# at byte 8: which use of the arena this is, so that a rank notices that it writes into another save
GENERATION = struct.Struct("<Q")
GENERATION_AT = PROGRESS.size
DATA_START = START  # start of the first file in an arena; the page before it is the control page

_COMMAND = struct.Struct("<B3xIQQQ")
_LENGTH = struct.Struct("<I")


def wave_base(start: int, size: int) -> int:
    """Return where the part of the plan that begins at `start` lies in the arena.

    Parts of `size` bytes alternate between two places: one is filled while the other is written.
    """
    return DATA_START + (start - DATA_START) // size % 2 * size


class Kind(IntEnum):
    ARENA = 1  # arena, size; the descriptor is sent with it
    DROP = 2  # arena
    JOB = 3  # arena, serial, offset and length of the job's JSON in the arena
    WAVE = 4  # arena, serial, start and end of the part of the plan at `wave_base`; end 0: no part follows
    SPACE = 5  # 0, number of the query: how much space is free on the root's file system?


@dataclass(frozen=True, slots=True)
class Command:
    kind: Kind
    arena: int
    first: int = 0
    second: int = 0
    third: int = 0


class FileSlot(TypedDict):
    """One file of a job.

    `start` is its position in the plan, in bytes from the start of the arena (a multiple of PAGE).
    """

    name: str
    start: int
    size: int


class Checksums(TypedDict):
    """Where to write the CRC-32 of the records of one zip file. Positions are bytes from the start of the file.

    `central_start`: start of the central directory.
    `records`: [data, size, local, central] of each record. Its CRC goes to `local` and to `central_start` + `central`.
    """

    central_start: int
    records: Sequence[Sequence[int]]


class Job(TypedDict):
    """Everything the writer must know about one save."""

    save_id: str
    step: int | None
    name: str  # of the directory to publish under the root
    files: list[FileSlot]  # sorted by start
    checksums: dict[str, Checksums]
    links: list[list[str]]  # [existing file, second name]: a hard link to it
    manifest: dict[str, Any]  # world_size, time, versions, metrics, names, tensors
    retention: list[dict[str, Any]] | None
    latest_link: bool  # move the link `latest` to this checkpoint
    ship: list[dict[str, Any]]  # where to ship it to after the commit: the specs of `shipping.Shipment`
    max_unshipped: int | None  # see `notes.Note.most`
    waves: (
        int  # bytes per part if the plan exceeds the arena and its parts follow as WAVE commands (`wave_base`), else 0
    )


def send_command(sock: socket.socket, command: Command, fds: Sequence[int] = ()) -> None:
    """Send one command. Raises OSError, BrokenPipeError if the writer is gone."""
    frame = _COMMAND.pack(command.kind, command.arena, command.first, command.second, command.third)
    sent = socket.send_fds(sock, [frame], list(fds)) if fds else sock.send(frame)
    if sent != len(frame):  # the stream took only a part; the rest has no descriptors
        sock.sendall(frame[sent:])


class CommandReader:
    """Assembles commands from the bytes of the socket. `closed` is True after end of file."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self._fds: list[int] = []
        self.closed = False

    def read(self) -> list[tuple[Command, int | None]]:
        """Return all complete commands now available, each with its descriptor or None. Blocks only if the socket does.

        A connection reset is not the end. Commands that were queued before it still arrive, and then end of file.
        """
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, 64 * _COMMAND.size, 16)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            return []
        if not data:
            self.closed = True
            return []
        self._fds.extend(fds)
        self._buffer += data
        commands = []
        while len(self._buffer) >= _COMMAND.size:
            kind, arena, *values = _COMMAND.unpack_from(self._buffer)
            self._buffer = self._buffer[_COMMAND.size :]
            command = Command(Kind(kind), arena, *values)
            commands.append((command, self._fds.pop(0) if command.kind is Kind.ARENA else None))
        return commands


def encode_reply(reply: Mapping[str, Any]) -> bytes:
    body = json.dumps(reply).encode()
    return _LENGTH.pack(len(body)) + body


class ReplyReader:
    """Assembles replies from the bytes of the stream."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Add `data` and return the replies that are now complete."""
        self._buffer += data
        replies = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            replies.append(json.loads(self._buffer[_LENGTH.size : end]))
            self._buffer = self._buffer[end:]
        return replies
