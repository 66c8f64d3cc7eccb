"""The messages between trainer and writer over one SOCK_STREAM pair.

The trainer sends commands of constant size, so a send never blocks for long. A job is JSON in its arena. Descriptors
are sent beside the command. The writer sends JSON replies, each after a 4-byte length.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypedDict, cast

from .._format import bounded_json
from .._format.names import is_save_id
from .._format.plan import START, is_safe_relative

PROGRESS = struct.Struct("<Q")  # at byte 0 of an arena: how many bytes of its job have been written
# at byte 8: which use of the arena this is, so that a rank notices that it writes into another save
GENERATION = struct.Struct("<Q")
GENERATION_AT = PROGRESS.size
DATA_START = START  # start of the first file in an arena; the page before it is the control page

_COMMAND = struct.Struct("<B3xIQQQ")
_LENGTH = struct.Struct("<I")
_MAX_REPLY = 64 << 20  # bytes; a checkpoint of 100,000 files takes a tenth of this


class ProtocolError(Exception):
    """The other side sent what this package never sends. Nothing more can be read from it."""


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


_KINDS = frozenset(Kind)


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


_JOB: dict[str, type | tuple[type, ...]] = {
    "save_id": str, "step": (int, type(None)), "name": str, "files": list, "checksums": dict, "links": list, "manifest": dict,
    "retention": (list, type(None)), "latest_link": bool, "ship": list, "max_unshipped": (int, type(None)), "waves": int,
}  # fmt: skip


def decode_job(content: bytes) -> Job:
    """Return the job that a trainer placed in its arena. Raises `ProtocolError` if it is none or leaves its directory."""
    try:
        found = bounded_json.loads(content)
        for key, kind in _JOB.items():
            if not isinstance(found[key], kind):
                raise TypeError(f"{key} is {str(found[key])[:60]!r}")
        start = DATA_START
        for slot in found["files"]:
            if (
                type(slot["start"]) is not int
                or type(slot["size"]) is not int
                or slot["start"] < start
                or slot["size"] < 0
            ):
                raise ValueError(f"unusable place {slot!r}")
            start = slot["start"] + slot["size"]
        further = [name for link in found["links"] for name in link]
        for name in (*(slot["name"] for slot in found["files"]), *further, found["name"]):
            if not isinstance(name, str) or not is_safe_relative(name):
                raise ValueError(f"the name {name!r} leaves the directory")
        if not is_save_id(found["save_id"]) or "/" in found["name"] or not found["files"]:
            raise ValueError(f"save {found['save_id']!r} of {len(found['files'])} files as {found['name']!r}")
        return cast(Job, found)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ProtocolError(f"the trainer sent {content[:60]!r}, which is no job: {error!r}") from error


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
        Raises `ProtocolError` for an unknown command, and for an arena without a descriptor.
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
        for fd in fds:
            os.set_inheritable(fd, False)  # `recv_fds` of Python 3.10 and 3.11 ignores MSG_CMSG_CLOEXEC
        self._fds.extend(fds)
        self._buffer += data
        commands = []
        while len(self._buffer) >= _COMMAND.size:
            kind, arena, *values = _COMMAND.unpack_from(self._buffer)
            self._buffer = self._buffer[_COMMAND.size :]
            if kind not in _KINDS or (kind == Kind.ARENA and not self._fds):
                raise ProtocolError(f"the trainer sent command {kind} with {len(self._fds)} descriptors")
            command = Command(Kind(kind), arena, *values)
            commands.append((command, self._fds.pop(0) if command.kind is Kind.ARENA else None))
        return commands


def encode_reply(reply: Mapping[str, Any]) -> bytes:
    body = json.dumps(reply).encode()
    return _LENGTH.pack(len(body)) + body


# What a reply has besides its event, with the types. It may have more.
_REPLIES: dict[str, dict[str, type | tuple[type, ...]]] = {
    "ready": {"swept": list},
    "swept": {"swept": list},
    "space": {"question": int, "free": int},
    "populated": {"arena": int},
    "warning": {"message": str},
    "accepted": {"serial": int},
    "writing": {"serial": int},
    "wave": {"serial": int},
    "committed": {
        "serial": int, "path": str, "sequence": int, "files": dict, "total_bytes": int,
        "queued": float, "write": float, "commit": float,
    },
    "failed": {"serial": int, "kind": str, "message": str},
    "tidy": {"save_id": str, "step": (int, type(None)), "pruned": list, "freed": int, "seconds": float},
    "after_commit": {"phase": str, "save_id": str},
    "unshipped": {},
}  # fmt: skip


def _reply(body: bytes) -> dict[str, Any]:
    try:
        found = bounded_json.loads(body)
        for key, kind in _REPLIES[found["event"]].items():
            if not isinstance(found[key], kind):
                raise TypeError(f"{key} is {str(found[key])[:60]!r}")
        return dict(found)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ProtocolError(f"the writer sent {body[:60]!r}, which is no reply: {error!r}") from error


class ReplyReader:
    """Assembles replies from the bytes of the stream."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Add `data` and return the replies that are now complete.

        Raises `ProtocolError` for what is no reply, or not all of one (see `_REPLIES`).
        """
        self._buffer += data
        replies = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > _MAX_REPLY:
                raise ProtocolError(f"the writer announced a reply of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            replies.append(_reply(self._buffer[_LENGTH.size : end]))
            self._buffer = self._buffer[end:]
        return replies
