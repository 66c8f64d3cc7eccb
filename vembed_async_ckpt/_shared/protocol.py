"""What trainer and writer say to each other over one SOCK_STREAM pair.

Trainer to writer: constant-size commands, so that a send never blocks for long; a job itself lies as JSON in its arena, and
descriptors travel beside the command. Writer to trainer: JSON replies behind a 4-byte length.
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

PROGRESS = struct.Struct("<Q")  # at byte 0 of an arena: bytes of its job written so far
DATA_START = START  # where the first file of an arena starts; the page before it is the control page

_COMMAND = struct.Struct("<B3xIQQQ")
_LENGTH = struct.Struct("<I")


def wave_base(start: int, size: int) -> int:
    """Where in the arena the part of the plan lies that begins at `start`: parts of `size` bytes take turns in two places, so that
    one is filled while the other is written."""
    return DATA_START + (start - DATA_START) // size % 2 * size


class Kind(IntEnum):
    ARENA = 1  # arena, size; one descriptor travels along
    DROP = 2  # arena
    JOB = 3  # arena, serial, offset and length of the job's JSON in the arena
    WAVE = (
        4  # arena, serial, start and end of the part of the plan that lies at `wave_base`; end 0: there will be no more
    )
    SPACE = 5  # 0, number of the question: how much room has the root's file system now?


@dataclass(frozen=True, slots=True)
class Command:
    kind: Kind
    arena: int
    first: int = 0
    second: int = 0
    third: int = 0


class FileSlot(TypedDict):
    """One file of a job: its place in the plan (bytes from the start of the arena, a multiple of PAGE) and size."""

    name: str
    start: int
    size: int


class Checksums(TypedDict):
    """CRC-32 of the records of one zip file, to be filled in by whoever writes it. Positions count from the file's start.

    `records`: [data, size, local, central] each; the CRC is stored at `local`, and at `central` + `central_start`.
    """

    central_start: int
    records: Sequence[Sequence[int]]


class Job(TypedDict):
    """All that the writer must know of one save."""

    save_id: str
    step: int | None
    name: str  # directory to publish under the root
    files: list[FileSlot]  # by start
    checksums: dict[str, Checksums]
    links: list[list[str]]  # [existing file, further name]: one copy of the bytes
    manifest: dict[str, Any]  # world_size, time, versions, metrics, names, tensors
    retention: list[dict[str, Any]] | None
    latest_link: bool  # move the link `latest` to this checkpoint
    waves: (
        int  # 0, or the arena is smaller than the plan: parts of so many bytes follow as WAVE commands, see `wave_base`
    )


def send_command(sock: socket.socket, command: Command, fds: Sequence[int] = ()) -> None:
    """Send one command. Raises OSError, BrokenPipeError when the writer is gone."""
    frame = _COMMAND.pack(command.kind, command.arena, command.first, command.second, command.third)
    sent = socket.send_fds(sock, [frame], list(fds)) if fds else sock.send(frame)
    if sent != len(frame):  # a stream may take part of it; the rest carries no descriptors
        sock.sendall(frame[sent:])


class CommandReader:
    """Puts commands together from what the socket gives. `closed` is set at end of file."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self._fds: list[int] = []
        self.closed = False

    def read(self) -> list[tuple[Command, int | None]]:
        """All complete commands now available, each with its descriptor. Blocks only as the socket does.

        A reset is not the end: commands queued before it still come, then end of file.
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
    """Puts replies together from the bytes of the stream."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The complete replies after `data` more bytes."""
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
