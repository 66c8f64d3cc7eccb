"""Object stores on this machine for the tests: moto's server, and localbucket, which can be killed and started again."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, unquote

import pytest
from obstore.store import S3Store

SECRET = "wJalrXUtnFEMI-not-a-real-key"
_PATIENCE = 60.0
_REQUEST = re.compile(
    r'(PUT|POST|GET|HEAD|DELETE) /bucket(?:/([^ "?]*))?(?:\?([^ "]*))?[^"]*"? ?(?:HTTP/1.[01]")? ?(\d{3})?'
)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Bucket:
    """A store with one bucket. Its clients reach it through a door that can be shut."""

    def __init__(self, kind: Literal["moto", "localbucket"], directory: Path) -> None:
        self.kind = kind
        self._directory = directory
        self._log = directory / "server.log"
        self._port = free_port()
        self._server: subprocess.Popen[bytes] | None = None
        self.start()
        urllib.request.urlopen(urllib.request.Request(self._direct("/bucket"), method="PUT"), timeout=_PATIENCE).close()
        self.door = Door(self._port)
        self.store = S3Store(  # not through the door
            "bucket",
            endpoint=self._direct(""),
            access_key_id="test",
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.door.port}",
        }

    def _direct(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"

    def start(self) -> None:
        command = {
            "moto": ["moto.server", "-H", "127.0.0.1", "-p", str(self._port)],
            "localbucket": ["localbucket", str(self._directory / "buckets"), "--port", str(self._port)],
        }[self.kind]
        (self._directory / "buckets").mkdir(exist_ok=True)
        with self._log.open("ab") as log:
            self._server = subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=log)
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                urllib.request.urlopen(self._direct("/"), timeout=_PATIENCE).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                assert self._server.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL. What localbucket has on disk is there again after `start`; moto has everything in memory."""
        assert self._server is not None
        self._server.kill()
        self._server.wait()

    def close(self) -> None:
        self.door.close()
        self.kill()

    def requests(self, begin: int = 0) -> list[tuple[str, str, str]]:
        """(method, key, query) of the requests that were answered with success, in order; of the log from `begin` on."""
        text = self._log.read_bytes()[begin:].decode(errors="replace")
        found = [match.groups(default="") for match in _REQUEST.finditer(text)]
        return [(method, key, query) for method, key, query, code in found if code.startswith("2")]

    def log_size(self) -> int:
        return self._log.stat().st_size

    def sent_again(self, prefix: str, begin: int = 0) -> list[str]:
        """The objects below `prefix` that were sent to their end after a list of the store had shown them finished.

        One whose answer was lost, or whose sender was killed just before, may be sent again: nobody knew.
        """
        finished: set[str] = set()
        shown: set[str] = set()
        again = []
        for method, key, query in self.requests(begin):
            key = unquote(key)
            if method == "GET" and query.startswith("list-type"):
                (listed,) = parse_qs(query).get("prefix", [""])
                shown |= {name for name in finished if name.startswith(listed)}
            elif key.startswith(prefix) and is_end(method, query):
                again += [key] if key in shown else []
                finished.add(key)
        assert len(finished) > 3
        return again


def is_end(method: str, query: str) -> bool:
    """Whether a request completes an object."""
    return (method == "PUT" and not query) or (method == "POST" and query.startswith("uploadId="))


class Door:
    """Forwards connections to a server, until it is shut. Counts the bytes that go out to clients."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.sent = 0
        self._open = True
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self) -> None:
        """Break all connections, and every new one."""
        with self._lock:
            self._open = False
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def reopen(self) -> None:
        with self._lock:
            self._open = True

    def close(self) -> None:
        self.shut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(("127.0.0.1", self._server), timeout=_PATIENCE)
            except OSError:
                return
            with server:
                with self._lock:
                    if not self._open:
                        return
                    self._connections |= {client, server}
                with contextlib.suppress(OSError):
                    self._pump(client, server)
                with self._lock:
                    self._connections -= {client, server}

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        while True:
            for ready in select.select([client, server], [], [], _PATIENCE)[0]:
                data = ready.recv(1 << 18)
                if not data:
                    return
                if ready is server:
                    self.sent += len(data)
                (client if ready is server else server).sendall(data)


@contextlib.contextmanager
def bucket(kind: Literal["moto", "localbucket"], factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    found = Bucket(kind, factory.mktemp(kind))
    try:
        yield found
    finally:
        found.close()
