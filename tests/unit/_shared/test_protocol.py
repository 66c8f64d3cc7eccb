"""The messages between trainer and writer: cut anywhere, they arrive whole and in order."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from vembed_async_ckpt._shared import protocol
from vembed_async_ckpt._shared.protocol import (
    Command,
    CommandReader,
    Kind,
    ReplyReader,
    encode_reply,
    send_command,
    wave_base,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


Pair = tuple[socket.socket, socket.socket]
COMMANDS = [
    Command(Kind.DROP, 3),
    Command(Kind.JOB, 1, 7, 1 << 40, 5),
    Command(Kind.WAVE, 1, 7, 4096, 1 << 63),
    Command(Kind.SPACE, 0, 9),
]


def test_commands_arrive_as_they_were_sent(pair: Pair) -> None:
    for command in COMMANDS:
        send_command(pair[0], command)
    assert CommandReader(pair[1]).read() == [(command, None) for command in COMMANDS]


def test_a_command_that_is_cut_anywhere_arrives_whole(pair: Pair) -> None:
    sender, receiver = pair
    for command in COMMANDS:
        send_command(sender, command)
    data = receiver.recv(4096)
    receiver.setblocking(False)
    reader, found = CommandReader(receiver), []
    assert reader.read() == []
    for byte in data:
        sender.send(bytes([byte]))
        found += [command for command, _ in reader.read()]
    assert found == COMMANDS
    assert not reader.closed
    sender.close()
    assert reader.read() == []
    assert reader.closed


def test_a_descriptor_arrives_with_its_own_command(pair: Pair) -> None:
    files = [os.memfd_create(f"arena-{n}") for n in range(3)]
    for n, fd in enumerate(files):
        os.write(fd, b"x" * n)
        send_command(pair[0], Command(Kind.DROP, n))
        send_command(pair[0], Command(Kind.ARENA, n, 4096), (fd,))
        os.close(fd)
    reader, found = CommandReader(pair[1]), []
    while len(found) < 6:
        found += reader.read()
    arenas = [(command.arena, fd) for command, fd in found if fd is not None]
    assert [(n, os.fstat(fd).st_size) for n, fd in arenas] == [(0, 0), (1, 1), (2, 2)]
    for _, fd in arenas:
        assert not os.get_inheritable(fd), "another process of the writer's would keep the memory"
        os.close(fd)


def test_a_stream_that_takes_a_part_is_given_the_rest() -> None:
    class Narrow:
        taken = b""

        def send(self, data: bytes) -> int:
            self.taken += data[:5]
            return 5

        def sendall(self, data: bytes) -> None:
            self.taken += data

    narrow = Narrow()
    send_command(narrow, COMMANDS[1])  # type: ignore[arg-type]
    assert narrow.taken == protocol._COMMAND.pack(*(int(value) for value in (Kind.JOB, 1, 7, 1 << 40, 5)))


def test_a_reset_is_not_the_end(pair: Pair) -> None:
    class Reset:
        def __init__(self) -> None:
            self.calls = 0

        def recvmsg(self, *_: object) -> object:
            self.calls += 1
            if self.calls == 1:
                raise ConnectionResetError
            return protocol._COMMAND.pack(Kind.DROP, 3, 0, 0, 0) if self.calls == 2 else b"", [], 0, None

    reader = CommandReader(Reset())  # type: ignore[arg-type]
    assert reader.read() == []
    assert not reader.closed
    assert reader.read() == [(Command(Kind.DROP, 3), None)]
    assert reader.read() == []
    assert reader.closed


@pytest.mark.parametrize(
    "frame",
    [
        protocol._COMMAND.pack(99, 0, 0, 0, 0),  # a kind that this release does not know
        protocol._COMMAND.pack(Kind.ARENA, 0, 0, 0, 0),  # an arena without its descriptor
    ],
)
def test_what_no_trainer_sends_is_a_protocol_error(pair: Pair, frame: bytes) -> None:
    pair[0].send(frame)
    with pytest.raises(protocol.ProtocolError):
        CommandReader(pair[1]).read()


REPLIES = [
    {"event": "ready", "swept": []},
    {"event": "warning", "message": "\u00e9" * 1000},
    {"event": "space", "question": 0, "free": 1 << 60},
]


@pytest.mark.parametrize("step", [1, 3, 4096, 1 << 20])
def test_replies_that_are_cut_anywhere_arrive_whole(step: int) -> None:
    data, reader, found = b"".join(map(encode_reply, REPLIES)), ReplyReader(), []
    for at in range(0, len(data), step):
        found += reader.feed(data[at : at + step])
    assert found == REPLIES
    assert reader.feed(b"") == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"3", b"\xff", b"[" * 100_000, b'"event"', b'{"event":"other"}', b'{"event":[]}',
     b'{"event":"warning"}', b'{"event":"space","question":0,"free":"all"}', b'{"event":"committed","serial":1}'],
)  # fmt: skip
def test_what_no_writer_sends_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(protocol.ProtocolError):
        ReplyReader().feed(struct.pack("<I", len(body)) + body)


def test_a_length_that_no_reply_has_is_refused_at_once() -> None:
    """Not when four gigabytes have arrived, of which none will."""
    with pytest.raises(protocol.ProtocolError, match="4294967295 bytes"):
        ReplyReader().feed(struct.pack("<I", 0xFFFFFFFF))


def test_parts_of_a_plan_alternate_between_two_places() -> None:
    size = 1 << 20
    bases = [wave_base(protocol.DATA_START + n * size, size) for n in range(5)]
    assert bases == [protocol.DATA_START + n % 2 * size for n in range(5)]
