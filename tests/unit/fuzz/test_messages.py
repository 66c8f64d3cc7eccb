"""What another process may send: every reader refuses it with its protocol's own error, or reads it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

from vembed_async_ckpt import StageError
from vembed_async_ckpt._engine import channel, messages
from vembed_async_ckpt._shared import protocol
from vembed_async_ckpt._shared.protocol import (
    Command,
    CommandReader,
    Kind,
    ProtocolError,
    ReplyReader,
    decode_job,
    encode_reply,
)

from ..by_hand import job
from .strategies import bytes_near, fuzz, near, values


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def through_socket(content: bytes, read: Callable[[socket.socket], object]) -> None:
    """Let `read` read what somebody sent who has hung up. Nothing is left open."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        ours.sendall(content)
        ours.shutdown(socket.SHUT_WR)
        try:
            read(theirs)
        finally:
            ours.close()
            theirs.close()
            assert len(os.listdir("/proc/self/fd")) == before


def test_commands(examples: int) -> None:
    frames = b"".join(protocol._COMMAND.pack(kind, 1, 2, 3, 4) for kind in (Kind.DROP, Kind.JOB, Kind.WAVE, Kind.SPACE))

    def read(sock: socket.socket) -> None:
        reader = CommandReader(sock)
        while not reader.closed:
            assert all(isinstance(command, Command) for command, _ in reader.read())

    through_socket(frames, read)
    fuzz(
        bytes_near(frames) | st.binary(max_size=200),
        lambda data: through_socket(data, read),
        ProtocolError,
        examples=examples,
    )


def test_replies(examples: int) -> None:
    good: dict[str, Any] = {
        "event": "committed", "serial": 1, "path": "/x", "sequence": 1, "files": {"a": 1}, "total_bytes": 1,
        "queued": 0.5, "write": 0.5, "commit": 0.5,
    }  # fmt: skip
    assert ReplyReader().feed(encode_reply(good)) == [good]

    def framed(value: Any) -> bytes:
        body = encoded(value)
        return len(body).to_bytes(4, "little") + body

    strategy = bytes_near(encode_reply(good) * 2) | near(good).map(framed) | values.map(framed)
    fuzz(strategy, lambda data: ReplyReader().feed(data), ProtocolError, examples=examples)


def test_jobs(examples: int) -> None:
    good = json.loads(json.dumps(job(1)[0]))
    assert decode_job(encoded(good)) == good

    def parse(content: bytes) -> None:
        found = decode_job(content)
        for slot in found["files"]:
            assert not slot["name"].startswith("/")
            assert ".." not in slot["name"].split("/")

    fuzz(bytes_near(encoded(good)) | near(good).map(encoded), parse, ProtocolError, examples=examples)


def test_channel_of_a_node(examples: int) -> None:
    good = channel.Message("stage", {"a": [1, "x"], "b": None}, (b"data", b"")).encode()

    def parse(content: tuple[bytes, int]) -> None:
        data, rank = content

        def read(sock: socket.socket) -> None:
            line = channel.Line(sock, rank)
            try:
                while not line.closed:
                    for _ in line.receive():
                        line.rank = max(line.rank, 1)  # as the channel does once it has seen the token
            finally:
                line.close()

        through_socket(data, read)

    def framed(value: Any) -> bytes:
        text = encoded(value)
        return channel._FRAME.pack(len(text), 4, 0) + text + b"data"

    parse((good, 1))
    heads = near({"kind": "stage", "sizes": [4, 0], "values": {"a": 1}}).map(framed)
    strategy = st.tuples(bytes_near(good * 2) | heads | st.binary(max_size=100), st.sampled_from([-1, 0, 3]))
    fuzz(strategy, parse, channel.Broken, examples=examples, size=lambda content: len(content[0]))


class Store(dict[str, bytes]):
    """The job's store, as far as messages use it."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()


TIMINGS = dict.fromkeys(("stall", "staging", "queued", "write", "commit", "durable", "held"), 0.5)
REPORT: dict[str, Any] = {
    "state": "committed",
    "without": [1],
    "info": {"path": "/x", "step": 1, "total_bytes": 2, "files": {"a": 2}, "timings": TIMINGS},
    "error": ["WriteError", "it failed", False],
}


def test_what_ranks_leave_in_the_store(examples: int) -> None:
    store = Store()
    messages.put_files(store, "part", [("a", b"data")])
    messages.put_entries(store, "list", [messages.Entry(1, 2, 3.0)])
    assert messages.get_part(store, "part") == [("a", b"data")]
    assert messages.get_entries(store, "list") == [messages.Entry(1, 2, 3.0)]
    assert messages.parse(encoded(REPORT)).without == (1,)
    part, entries = store["part/0"], store["list"]

    def parse(content: tuple[str, bytes]) -> None:
        where, text = content
        if where == "report":
            messages.parse(text)
            return
        found = Store({where: text})
        if where.startswith("part"):
            found.setdefault("part", b"1")
            messages.get_part(found, "part")
        else:
            messages.get_entries(found, "list")

    strategy = st.one_of(
        st.tuples(st.just("report"), bytes_near(encoded(REPORT)) | near(REPORT).map(encoded)),
        st.tuples(st.just("part/0"), bytes_near(part) | near(json.loads(part)).map(encoded)),
        st.tuples(st.just("part"), bytes_near(b"1")),
        st.tuples(st.just("list"), bytes_near(entries) | near(json.loads(entries)).map(encoded)),
    )
    fuzz(strategy, parse, StageError, KeyError, examples=examples, size=lambda content: len(content[1]))


def test_an_address(examples: int) -> None:
    good = channel.Address.new().text()

    def parse(content: bytes) -> None:
        channel.Address.parse(content.decode())

    parse(good.encode())
    with pytest.raises(channel.Broken):
        parse(b"[]")
    strategy = bytes_near(good.encode()) | near(json.loads(good)).map(encoded)
    fuzz(strategy, parse, channel.Broken, UnicodeDecodeError, examples=examples)
