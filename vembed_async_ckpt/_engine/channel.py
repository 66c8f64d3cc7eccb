"""The channel between the ranks of one node: connections over an abstract unix socket, and the thread that serves them.

Messages are JSON with bytes and descriptors beside them. An abstract socket has no permissions: every process of the
network namespace can connect to it. So both sides check the other's user id, which the kernel tells, and whoever
connects must send a token of 128 bits first, which only the job's store has.

A process that ends closes its connection. A forked child may keep it open, so a pidfd of the other process is watched
too. Only the pidfd proves that a process has ended: a connection can also be closed by one that goes on.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .._bell import Bell
from .._format import bounded_json
from ..errors import CheckpointError, StageError
from ..events import logger

_FRAME = struct.Struct("<IQB")  # bytes of the JSON, bytes of the data behind it, number of descriptors
_CREDENTIALS = struct.Struct("iII")  # struct ucred of unix(7): pid, uid, gid
_MAX_HELLO = 4096  # bytes that a connection may send before it has shown the token
_MAX_TEXT, _MAX_DATA = 256 << 20, 16 << 30
_HELLO_DEADLINE = 10.0  # seconds in which a new connection must show the token


@dataclass(frozen=True)
class Message:
    """`kind` says what it is, `values` are JSON values. `data` and `fds` come beside the JSON."""

    kind: str
    values: dict[str, Any]
    data: tuple[bytes, ...] = ()
    fds: tuple[int, ...] = ()

    def encode(self) -> bytes:
        text = json.dumps({"kind": self.kind, "sizes": list(map(len, self.data)), "values": self.values}).encode()
        data = b"".join(self.data)
        return _FRAME.pack(len(text), len(data), len(self.fds)) + text + data


class Broken(Exception):
    """A connection carries something that is no message of ours."""


class Line:
    """One end of a connection. Any thread may send. Only the thread of the `Channel` receives.

    `rank`: of the other process; -1 until it is known.
    `heard`: when the last bytes came, as time.monotonic().
    `closed`: nothing more can be received.
    `wake`: called when something could not be sent at once, so that the channel's thread sends it later.
    """

    def __init__(self, sock: socket.socket, rank: int = -1) -> None:
        """Raises `Broken` if the other process belongs to another user."""
        sock.setblocking(False)
        self._sock = sock
        pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid != os.geteuid():
            raise Broken(f"process {pid} of user {uid} is refused")
        self.pid = pid
        self.rank = rank
        self.heard = self.begun = time.monotonic()
        self.closed = False
        self.pidfd = -1
        with contextlib.suppress(OSError, AttributeError):  # no pidfd in this sandbox, or another pid namespace
            self.pidfd = os.pidfd_open(pid)
        self.wake: Callable[[], None] = lambda: None
        self._sending = threading.Lock()
        self._unsent: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._buffer = bytearray()
        self._fds: deque[int] = deque()

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._unsent)

    def send(self, message: Message) -> None:
        """Send `message`, or queue what the socket does not take now. Never blocks.

        The descriptors are duplicated: the caller keeps its own. Nothing is sent to a process that has gone.
        """
        with self._sending:
            if self._sock.fileno() < 0:
                return
            self._unsent.append((memoryview(message.encode()), tuple(map(os.dup, message.fds))))
            self._flush()
        if self._unsent:
            self.wake()

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it now."""
        with self._sending:
            self._flush()

    def _flush(self) -> None:
        while self._unsent:
            data, fds = self._unsent[0]
            try:
                sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
            except BlockingIOError:
                return
            except OSError:
                self._drop_unsent()  # nobody reads it; the channel notices the end
                return
            for fd in fds:
                os.close(fd)
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = (data[sent:], ())

    def _drop_unsent(self) -> None:
        while self._unsent:
            for fd in self._unsent.popleft()[1]:
                os.close(fd)

    def receive(self) -> Iterator[Message]:
        """Yield the complete messages that are there. Raises `Broken`.

        A message is looked at only when the one before it was handled, which may have set `rank`.
        """
        while not self.closed:
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, 1 << 20, 16, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                break
            except OSError:
                data, fds = b"", []
            self._fds.extend(fds)
            if not data:
                self.closed = True
                break
            self.heard = time.monotonic()
            self._buffer += data
            yield from self._complete()

    def _complete(self) -> Iterator[Message]:
        while len(self._buffer) >= _FRAME.size:
            text, data, fds = _FRAME.unpack_from(self._buffer)
            strange = text + data > _MAX_HELLO if self.rank < 0 else text > _MAX_TEXT or data > _MAX_DATA
            if strange or (self.rank < 0 and (fds or self._fds)):
                raise Broken(f"process {self.pid} sent no message of ours")
            end = _FRAME.size + text + data
            if len(self._buffer) < end:
                break
            message = self._parse(bytes(self._buffer[_FRAME.size : end]), text, fds)
            del self._buffer[:end]
            yield message

    def _parse(self, body: bytes, text: int, fds: int) -> Message:
        try:
            head = bounded_json.loads(body[:text])
            parts, at = [], text
            for size in head["sizes"]:
                parts.append(body[at : at + size])
                at += size
            return Message(head["kind"], head["values"], tuple(parts), tuple(self._fds.popleft() for _ in range(fds)))
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise Broken(f"process {self.pid} sent no message of ours: {error!r}") from error

    def is_dead(self) -> bool:
        """Return whether the other process is proven to have ended."""
        return self.pidfd >= 0 and bool(select.select([self.pidfd], [], [], 0)[0])

    def hang_up(self) -> None:
        """Close the socket. The end of the process is still seen."""
        with self._sending:
            self.closed = True
            self._drop_unsent()
            self._sock.close()
        while self._fds:
            os.close(self._fds.popleft())

    def close(self) -> None:
        self.hang_up()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


@dataclass(frozen=True)
class Address:
    """Where the first rank listens, and what tells whether another rank can reach it there."""

    name: str
    token: str
    boot: str
    namespace: str

    @classmethod
    def new(cls) -> Address:
        return cls(f"vembed_async_ckpt-{secrets.token_hex(16)}", secrets.token_hex(16), *here())

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address that `text()` gave. Raises `Broken` if it is none."""
        try:
            found = bounded_json.loads(text.encode())
            if not all(isinstance(value, str) for value in found.values()):
                raise TypeError("its parts are no text")
            return cls(**found)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Broken(f"the address of the first rank is none of ours: {error!r}") from error

    def text(self) -> str:
        return json.dumps(asdict(self))

    def unreachable(self) -> str | None:
        """Return why this process can never connect to the address, or None."""
        boot, namespace = here()
        if boot != self.boot:
            return "runs on another machine than rank 0: sharded models are saved only by ranks of one machine"
        if namespace != self.namespace:
            return (
                "runs in another container than rank 0 (another network namespace), so the two cannot share memory: start all "
                "ranks of the machine in one container"
            )
        return None


def here() -> tuple[str, str]:
    """Return what is the same for all processes that can reach each other: the running kernel and its namespace."""
    boot = namespace = ""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/net")
    return boot, namespace


def connect(address: Address, rank: int) -> Line:
    """Connect to the first rank as `rank`. Raises OSError or `Broken`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(1.0)
        sock.connect("\0" + address.name)
        line = Line(sock, rank=0)
    except BaseException:
        sock.close()
        raise
    line.send(Message("hello", {"token": address.token, "rank": rank}))
    return line


class Channel:
    """A thread that serves connections.

    It calls, on its own thread, `received(line, message)` for every message, `lost(line, dead)` when a connection has
    ended and once more when the process behind it is proven to have ended, and `tick()` several times a second while
    `busy()` is true. `accepted(line)` is called first for a connection that has shown the token. If one of them raises,
    the channel ends and calls `broke(error)`.
    """

    def __init__(
        self,
        *,
        received: Callable[[Line, Message], None],
        lost: Callable[[Line, bool], None],
        tick: Callable[[], None],
        busy: Callable[[], bool],
        broke: Callable[[CheckpointError], None],
        accepted: Callable[[Line], None] | None = None,
        address: Address | None = None,
    ) -> None:
        """`address`: where to listen, if other processes shall connect. Raises OSError."""
        self._received = received
        self._lost = lost
        self._tick = tick
        self._busy = busy
        self._broke = broke
        self._accepted = accepted
        self._address = address
        self._listener: socket.socket | None = None
        if address is not None:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self._listener.bind("\0" + address.name)
            self._listener.listen(256)
        self._bell = Bell()
        self._lock = threading.Lock()
        self._lines: list[Line] = []  # guarded by _lock
        self._closing_at: float | None = None
        self._over = False
        self._thread = threading.Thread(target=self._run, name="vembed-ckpt-channel", daemon=True)
        self._thread.start()

    # -- from any thread

    def add(self, line: Line) -> None:
        """Serve this connection."""
        line.wake = self.wake
        with self._lock:
            self._lines.append(line)
        self.wake()

    def wake(self) -> None:
        """Let the thread look at everything now."""
        with self._lock:
            if not self._over:
                self._bell.ring()

    def close(self, timeout: float) -> None:
        """Send what is queued, for at most `timeout` seconds, and end the thread and the connections."""
        self._closing_at = time.monotonic() + timeout
        self.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout + 1.0)

    def forget(self) -> None:
        """In a forked child: close the descriptors that belong to the parent."""
        if self._over:
            return
        self._over = True
        for line in self._lines:
            line._sending = threading.Lock()  # a thread of the parent may have held the old one
            line.close()
        if self._listener is not None:
            self._listener.close()
        self._bell.close()

    # -- on the channel's thread

    def _run(self) -> None:
        try:
            while not self._is_finished():
                self._wait()
                self._look()
        except Exception as error:
            logger.exception("the channel between the ranks broke")
            broken = StageError(f"the ranks of this node cannot speak to each other any more: {error!r}")
            broken.__cause__ = error
            self._broke(broken)
        finally:
            with self._lock:
                self._over = True
                lines, self._lines = self._lines, []
            for line in lines:
                line.close()
            if self._listener is not None:
                self._listener.close()
            self._bell.close()

    def _is_finished(self) -> bool:
        if self._closing_at is None:
            return False
        unsent = any(line.unsent and not line.closed for line in self._lines)
        return not unsent or time.monotonic() >= self._closing_at

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._bell.fd, select.POLLIN)
        if self._listener is not None:
            poll.register(self._listener, select.POLLIN)
        with self._lock:
            lines = list(self._lines)
        for line in lines:
            if not line.closed:
                poll.register(line, select.POLLIN | (select.POLLOUT if line.unsent else 0))
            if line.pidfd >= 0:
                poll.register(line.pidfd, select.POLLIN)
        timed = self._busy() or self._closing_at is not None or any(line.rank < 0 for line in lines)
        poll.poll(100 if timed else None)
        self._bell.clear()

    def _look(self) -> None:
        if self._listener is not None:
            self._accept(self._listener)
        with self._lock:
            lines = list(self._lines)
        for line in lines:
            self._serve(line)
        self._tick()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                logger.warning("a connection of another rank could not be accepted: %s", error)
                return
            try:
                line = Line(sock)
            except (Broken, OSError) as error:
                logger.warning("a connection to the ranks' channel was refused: %s", error)
                sock.close()
                continue
            line.wake = self.wake
            with self._lock:
                self._lines.append(line)

    def _serve(self, line: Line) -> None:
        """Handle what has come. The end of the process is looked at first: what it sent before is all there then."""
        dead = line.is_dead()
        line.flush()
        was_closed = line.closed
        try:
            for message in line.receive():
                if line.rank >= 0:
                    self._received(line, message)
                else:
                    self._admit(line, message)
            if line.rank < 0 and time.monotonic() - line.begun > _HELLO_DEADLINE:
                raise Broken(f"process {line.pid} has not shown the token")
        except Broken as error:
            logger.warning("a connection to the ranks' channel was refused: %s", error)
            line.hang_up()
        if dead:
            self._forget_line(line)
            line.close()
            if line.rank >= 0:
                self._lost(line, True)
        elif line.closed and not was_closed:
            if line.rank >= 0:
                self._lost(line, False)
            line.hang_up()
            if line.rank < 0 or line.pidfd < 0:
                self._forget_line(line)
                line.close()

    def _admit(self, line: Line, message: Message) -> None:
        address = self._address
        given, rank = str(message.values.get("token")), message.values.get("rank")
        if (
            address is None
            or message.kind != "hello"
            or not hmac.compare_digest(given.encode(), address.token.encode())
        ):
            raise Broken(f"process {line.pid} has not shown the token")
        if type(rank) is not int or rank < 1:
            raise Broken(f"process {line.pid} says that it is rank {rank!r}")
        line.rank = rank
        if self._accepted is not None:
            self._accepted(line)

    def _forget_line(self, line: Line) -> None:
        with self._lock:
            if line in self._lines:
                self._lines.remove(line)


def sizes_of(files: Sequence[tuple[str, bytes]]) -> int:
    """Return the bytes that these files take in an arena, at most."""
    return sum(len(data) + 8192 for _, data in files)
