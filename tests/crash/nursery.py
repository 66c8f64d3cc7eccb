"""A warm process that forks children on request: imports are paid once, and no thread exists when it forks.

Run as a script it is that process (`nursery.py SOCKET_FD MODULE`); imported, `Nursery` is the way to it. A child runs one function
of the module, `function(talk, **arguments)`, and ends as any interpreter does. Its end is known by pidfd and exit status; writers
whose trainer died become children of the nursery, which reaps them.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import vembed_async_ckpt

PATIENCE = 120.0  # seconds for anything that is expected to happen
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Talk:
    """The child's end of its line to the test: a message is there, whole, when `say` returns, whatever dies next."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def say(self, message: str) -> None:
        self._sock.send(message.encode())

    def listen(self) -> str:
        """The next message of the test; empty when the test is gone."""
        return self._sock.recv(1 << 16).decode()

    def log_handler(self) -> logging.Handler:
        """Says what is logged."""
        handler = logging.Handler()
        handler.emit = lambda record: self.say(f"LOG {record.getMessage()}")  # type: ignore[method-assign]
        return handler


class Child:
    """A forked process, seen from the test. `messages` is all it said so far."""

    def __init__(self, nursery: Nursery, pid: int, sock: socket.socket, stderr: Any) -> None:
        self.pid = pid
        self.messages: list[str] = []
        self._nursery = nursery
        self._sock = sock
        self._stderr = stderr
        self._pidfd = os.pidfd_open(pid)  # the nursery reaps only when asked to: the id is still this child's
        self._read = 0
        self._code: int | None = None

    def tell(self, message: str) -> None:
        self._sock.send(message.encode())

    def expect(self, start: str, timeout: float = PATIENCE) -> str:
        """The rest of the next message that begins with `start`; messages before it are passed over."""
        deadline = time.monotonic() + timeout
        while True:
            while self._read < len(self.messages):
                self._read += 1
                if self.messages[self._read - 1].startswith(start):
                    return self.messages[self._read - 1][len(start) :].strip()
            if not self._receive(deadline - time.monotonic()):
                raise AssertionError(f"no {start!r} from {self}")

    def _receive(self, timeout: float) -> bool:
        """Take one message, waiting for it; False if none can come any more."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(timeout, 0) * 1000)}
        if self._sock.fileno() not in ready:
            return False
        message = self._sock.recv(1 << 16)
        if message:
            self.messages.append(message.decode())
        return bool(message)

    def listen(self, seconds: float) -> None:
        """Take all that it says for so long into `messages`."""
        deadline = time.monotonic() + seconds
        while self._receive(deadline - time.monotonic()):
            pass

    def kill(self, number: int = signal.SIGKILL) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit code, negative for a signal; all it said is in `messages` afterwards."""
        if not wait_for_end(self._pidfd, timeout):
            raise AssertionError(f"{self} is still alive after {timeout} s")
        while self._receive(0):
            pass
        self._code = self._nursery.status(self.pid)
        return self._code

    def last(self, start: str) -> int:
        """The highest number that it said after `start`, 0 if none."""
        return max((int(m.split()[1]) for m in self.messages if m.startswith(start + " ")), default=0)

    def stderr(self) -> str:
        return os.pread(self._stderr.fileno(), 1 << 20, 0).decode(errors="replace")

    def close(self) -> None:
        if not wait_for_end(self._pidfd, 0):
            self.kill()
        self.wait()
        self._sock.close()
        self._stderr.close()
        os.close(self._pidfd)

    def __str__(self) -> str:
        return f"child {self.pid}, exit code {self._code}; it said {self.messages}; stderr: {self.stderr()[-3000:]}"


def wait_for_end(pidfd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


class Nursery:
    """The warm process. Its children see the package that this process sees."""

    def __init__(self, module: str, directory: str = "") -> None:
        """`directory`: where the module is, if not beside this file."""
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # One thread each: what these libraries start at import would not survive the fork.
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        package = os.path.dirname(os.path.dirname(os.path.abspath(vembed_async_ckpt.__file__)))
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), str(theirs.fileno()), module],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **one, "PYTHONPATH": os.pathsep.join(filter(None, (package, directory)))},
        )
        theirs.close()
        self._asking = threading.Lock()  # tests run several children at once, each from a thread
        self._statuses: dict[int, int] = {}
        self._receive("ready")

    @contextmanager
    def child(self, function: str, **arguments: Any) -> Iterator[Child]:
        """Fork a child that runs `function(talk, **arguments)`; it is killed at the end if it still lives."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the child
        request = json.dumps({"function": function, "arguments": arguments}).encode()
        with self._asking:
            socket.send_fds(self._sock, [request], [theirs.fileno(), stderr.fileno()])
            theirs.close()
            pid = self._receive("pid")
            self._statuses.pop(pid, None)  # that of an earlier process: ids come again
            child = Child(self, pid, ours, stderr)
        try:
            yield child
        finally:
            child.close()

    def _receive(self, key: str) -> int:
        while True:
            if not select.select([self._sock], [], [], PATIENCE)[0]:
                raise AssertionError(f"the nursery does not answer ({key})")
            data = self._sock.recv(1 << 16)
            assert data, "the nursery ended"
            message = json.loads(data)
            if key in message:
                return message[key]
            self._statuses[message["ended"]] = message["status"]

    def status(self, pid: int) -> int:
        with self._asking:
            while pid not in self._statuses:
                self._sock.send(b'{"reap": true}')
                self._receive("reaped")
            return self._statuses[pid]

    def left_alive(self, timeout: float) -> list[str]:
        """The processes below the nursery, zombies too, that are still there when all were given `timeout` seconds to end."""
        deadline = time.monotonic() + timeout
        while True:
            with self._asking:
                self._sock.send(b'{"reap": true}')
                self._receive("reaped")
            found = _below(self._process.pid)
            if not found or time.monotonic() > deadline:
                return sorted(f"{pid} {state} {name}" for pid, (state, name) in found.items())
            try:
                pidfd = os.pidfd_open(min(found))
            except ProcessLookupError:
                continue
            wait_for_end(pidfd, max(deadline - time.monotonic(), 0))
            os.close(pidfd)

    def close(self) -> None:
        self._sock.close()
        self._process.wait(PATIENCE)


def _below(root: int) -> dict[int, tuple[str, str]]:
    processes = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                before, _, after = file.read().rpartition(")")
            state, parent = after.split()[:2]
            processes[int(pid)] = (int(parent), state, before.partition("(")[2])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    found, more = {}, [root]
    while more:
        parent = more.pop()
        children = [pid for pid, (its_parent, _, _) in processes.items() if its_parent == parent]
        found |= {pid: processes[pid][1:] for pid in children}
        more += children
    return found


# -- the warm process itself


def _serve(sock: socket.socket) -> tuple[Talk, str, dict[str, Any]]:
    """Answer requests. Returns in every child with what it has to do; the nursery itself exits when the test is gone."""
    sock.send(b'{"ready": 1}')
    while True:
        data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 2)
        if not data:
            os._exit(0)
        request = json.loads(data)
        if "reap" in request:
            _reap(sock)
            continue
        assert len(os.listdir("/proc/self/task")) == 1, "a thread exists: forking would not be safe"
        pid = os.fork()
        if pid == 0:
            sock.close()
            os.dup2(fds[1], 2)
            os.close(fds[1])
            return Talk(socket.socket(fileno=fds[0])), request["function"], request["arguments"]
        for fd in fds:
            os.close(fd)
        sock.send(json.dumps({"pid": pid}).encode())


def _reap(sock: socket.socket) -> None:
    count = 0
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        count += 1
        sock.send(json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}).encode())
    sock.send(json.dumps({"reaped": count}).encode())


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    module = importlib.import_module(sys.argv[2])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores them
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    talk, function, arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    getattr(module, function)(talk, **arguments)


if __name__ == "__main__":
    main()
