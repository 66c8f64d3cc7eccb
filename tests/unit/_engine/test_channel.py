"""The channel between ranks: who is let in, what arrives, and how the end of the other side is noticed."""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from vembed_async_ckpt._engine import channel as channels
from vembed_async_ckpt._engine.channel import Address, Broken, Channel, Line, Message, connect

BOUND = 20.0  # seconds


class End:
    """A channel, and what it reports."""

    def __init__(self, address: Address | None = None) -> None:
        self.events: queue.Queue[tuple[str, Any, Any]] = queue.Queue()
        self.channel = Channel(
            received=lambda line, message: self.events.put(("message", line, message)),
            lost=lambda line, dead: self.events.put(("lost", line, dead)),
            tick=lambda: None,
            busy=lambda: False,
            broke=lambda error: self.events.put(("broke", None, error)),
            accepted=lambda line: self.events.put(("accepted", line, line.rank)),
            address=address,
        )

    def expect(self, what: str) -> tuple[Any, Any]:
        kind, line, value = self.events.get(timeout=BOUND)
        assert kind == what, (kind, value)
        return line, value


@pytest.fixture
def address() -> Address:
    return Address.new()


@pytest.fixture
def first(address: Address) -> Iterator[End]:
    end = End(address)
    yield end
    end.channel.close(BOUND)


@pytest.fixture
def other(first: End, address: Address) -> Iterator[tuple[End, Line]]:
    end = End()
    line = connect(address, 3)
    end.channel.add(line)
    yield end, line
    end.channel.close(BOUND)


def test_messages_with_data_and_descriptors(first: End, other: tuple[End, Line]) -> None:
    """In order and whole, both ways, however large; a descriptor comes with the message that it was sent with."""
    end, line = other
    back, rank = first.expect("accepted")
    assert rank == 3
    large = os.urandom(5 << 20)
    readable, writable = os.pipe()
    line.send(Message("large", {"n": [1, None, "ü"]}, (large, b"", b"x")))
    line.send(Message("descriptor", {}, fds=(writable,)))
    line.send(Message("last", {}))
    message = first.expect("message")[1]
    assert (message.kind, message.values, message.data) == ("large", {"n": [1, None, "ü"]}, (large, b"", b"x"))
    message = first.expect("message")[1]
    os.write(message.fds[0], b"here")
    assert os.read(readable, 10) == b"here"
    assert first.expect("message")[1].kind == "last"
    for fd in (readable, writable, message.fds[0]):
        os.close(fd)
    back.send(Message("answer", {}))
    assert end.expect("message")[1].kind == "answer"


def test_what_comes_with_the_token_is_a_message_too(first: End, address: Address) -> None:
    """However large: it is looked at when the token has been seen."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + address.name)
        hello = Message("hello", {"token": address.token, "rank": 5}).encode()
        sock.sendall(hello + Message("large", {}, (bytes(10_000),)).encode())
        assert first.expect("accepted")[1] == 5
        assert first.expect("message")[1].data == (bytes(10_000),)


def test_sending_never_waits_for_a_reader(first: End, address: Address) -> None:
    """What a stopped rank does not read is kept here, and is there when it reads on."""
    line = connect(address, 1)  # nobody serves it
    back, _ = first.expect("accepted")
    begun = time.monotonic()
    for number in range(100):
        back.send(Message("much", {"number": number}, (bytes(100_000),)))
    assert time.monotonic() - begun < 5.0
    assert back.unsent
    found: list[int] = []
    while len(found) < 100:
        assert select.select([line], [], [], BOUND)[0]
        found += [message.values["number"] for message in line.receive()]
    assert found == list(range(100))
    line.close()
    assert first.expect("lost")[1] is False


def test_the_end_of_a_connection_proves_nothing_and_that_of_a_process_does(first: End, address: Address) -> None:
    """First the connection of a process that goes on, then that of one that has ended; what it sent last still arrives."""
    line = connect(address, 1)
    first.expect("accepted")
    line.close()
    _, dead = first.expect("lost")
    assert dead is False
    with pytest.raises(queue.Empty):
        first.events.get(timeout=0.3)
    child = os.fork()
    if child == 0:
        try:
            theirs = connect(address, 2)
            theirs.send(Message("farewell", {}))
        finally:
            os._exit(0)
    first.expect("accepted")
    assert first.expect("message")[1].kind == "farewell"
    while not first.expect("lost")[1]:
        pass
    os.waitpid(child, 0)


def raw(address: Address, data: bytes) -> bytes:
    """Connect as a stranger, send, and return what comes back until the other side hangs up."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(BOUND)
        sock.connect("\0" + address.name)
        try:
            sock.sendall(data)
            return sock.recv(100)
        except ConnectionError:
            return b""


@pytest.mark.parametrize(
    "what", ["no token", "wrong token", "no rank", "rank 0", "another message", "not json", "too much", "descriptors"]
)
def test_a_stranger_is_refused_and_said(
    first: End, address: Address, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """The connections of the ranks go on."""
    token = address.token
    hello = {
        "no token": Message("hello", {"rank": 1}).encode(),
        "wrong token": Message("hello", {"token": token[:-1] + "x", "rank": 1}).encode(),
        "no rank": Message("hello", {"token": token}).encode(),
        "rank 0": Message("hello", {"token": token, "rank": 0}).encode(),
        "another message": Message("staged", {"token": token, "rank": 1}).encode(),
        "not json": struct.pack("<IQB", 5, 0, 0) + b"hello",
        "too much": struct.pack("<IQB", 5000, 1 << 33, 0),
        "descriptors": struct.pack("<IQB", 10, 0, 3) + b"0123456789",
    }[what]
    with caplog.at_level(logging.WARNING):
        assert raw(address, hello) == b""
        line = connect(address, 2)
        assert first.expect("accepted")[1] == 2
    assert "was refused" in caplog.text
    assert f"process {os.getpid()}" in caplog.text
    line.close()


def test_another_user_is_refused(
    first: End, address: Address, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both sides: who listens at the address may be a stranger too."""
    real = os.geteuid()
    monkeypatch.setattr(channels.os, "geteuid", lambda: real + 1)
    with pytest.raises(Broken, match=f"process {os.getpid()} of user {real} is refused"):
        connect(address, 1)
    deadline = time.monotonic() + BOUND
    while "is refused" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "is refused" in caplog.text


def test_who_stays_silent_is_hung_up_on(
    first: End, address: Address, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_HELLO_DEADLINE", 0.2)
    assert raw(address, b"") == b""
    assert "has not shown the token" in caplog.text


def test_what_is_no_message_ends_a_connection(first: End, other: tuple[End, Line]) -> None:
    """Of a rank that was let in, too."""
    _, line = other
    first.expect("accepted")
    line._sock.send(struct.pack("<IQB", 3, 0, 0) + b"{}}")
    assert first.expect("lost")[1] is False


def test_an_address_that_cannot_be_reached(address: Address) -> None:
    """Another machine and another container are told apart before anybody tries for long."""
    assert address.unreachable() is None
    assert Address.parse(address.text()) == address
    assert "another machine" in (replace(address, boot="x").unreachable() or "")
    assert "another container" in (replace(address, namespace="net:[1]").unreachable() or "")
    assert len(json.loads(address.text())["token"]) == 32
