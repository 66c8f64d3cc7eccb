"""The trainer's side of the writer: starts it, sends it jobs, watches it, and replaces it when it dies.

It is one anyio task group in one daemon thread. Other threads only post calls to its inbox. Each of its waits ends when
the writer ends, when something is posted, or at a deadline.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio

from .. import _signals
from .._bell import Bell
from .._disk.filesystem import FILESYSTEM_OVERRIDE, Filesystem, LocalFilesystem
from .._disk.lock import RootLock
from .._memory.arena import Arena
from .._shared.memory import populate
from .._shared.protocol import Command, Kind, ProtocolError, ReplyReader, send_command
from .._writer import server
from ..errors import CheckpointError, CommitError, WriteError
from ..events import Event, Reporter, logger
from . import process as processes
from .options import WriterKind
from .parking import Parked
from .process import calling

LIVES = 3  # a job fails when this many writers have died while they had it
_EXIT_DEADLINE = 10.0  # seconds between the writer's end of file and its kill
_START_DEADLINE = 60.0  # seconds until the first writer answers: on a busy machine Python may start slowly
_UNDISTURBED = 2.0  # seconds of that in which no signal handler runs: a writer usually answers in a fraction of one
_PROBE = 0  # number of the arena that tests whether a writer works; the arenas of saves start at 1


class Job(Protocol):
    """A save, as far as the supervisor sees it.

    The methods are called on the supervisor's thread and must not block.
    """

    serial: int
    arena: Arena

    def location(self) -> tuple[int, int]:
        """Return (offset, length) of the job's JSON in the arena."""

    def accepted(self) -> None: ...

    def writing(self) -> None: ...

    def wave_written(self) -> None: ...

    def writer_died(self, error: WriteError) -> bool:
        """Return True if another writer can redo the job from the arena. Otherwise the save has failed with `error`."""

    def committed(self, reply: dict[str, Any]) -> None: ...

    def failed(self, error: WriteError | CommitError) -> None: ...


@dataclass
class _Writer:
    """A running writer.

    `sock`: its socket. `process`: its Popen, None for a thread. `end`: a descriptor that is readable when the process
    has ended. `log`: a descriptor of the file with its standard error.
    """

    sock: socket.socket
    process: subprocess.Popen[bytes] | None = None
    end: int = -1
    log: int = -1
    started: float = field(default_factory=time.monotonic)

    def epitaph(self) -> str:
        """Return how the writer ended, with the end of its log."""
        if self.process is None:
            return "the writer thread ended"
        said = os.pread(self.log, 1 << 16, 0).decode(errors="replace").strip()
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"exited with {code}"
        hint = " (the kernel's OOM killer, perhaps)" if code == -9 else ""
        return f"the writer process {self.process.pid} {how}{hint}" + (f": {said[-2000:]}" if said else "")

    def close(self) -> None:
        self.sock.close()
        for fd in (self.end, self.log):
            if fd >= 0:
                os.close(fd)
        self.end = self.log = -1


class Supervisor:
    """Keeps a writer running for `root`. If the supervisor itself breaks, its jobs fail and `check` raises."""

    def __init__(
        self,
        root: str,
        lock: RootLock,
        kind: WriterKind,
        arenas: Callable[[], list[Arena]],
        reporter: Reporter,
        filesystem: Filesystem | None = None,
        shipping: Callable[[dict[str, Any]], None] = lambda report: None,
    ) -> None:
        """`shipping` gets what the writer reports about checkpoints that are shipped, on the supervisor's thread."""
        self._root = root
        self._lock = lock
        self._kind = kind
        self._arenas = arenas
        self._reporter = reporter
        self._shipping = shipping
        self._filesystem = filesystem or FILESYSTEM_OVERRIDE.get() or LocalFilesystem()
        self._inbox: deque[Callable[[], None]] = deque()
        self._bell = Bell()
        self._posting = threading.Lock()
        self._over = False
        self._writer: _Writer | None = None
        # jobs that are sent or to be sent, in order; touched by the supervisor thread only
        self._jobs: dict[int, Job] = {}
        self._populating: set[int] = set()
        self._space: int | None = None  # free bytes at the root, as the writer last reported
        self._questions = 0
        self._told = threading.Event()  # the last question was answered
        self._begun = threading.Event()  # the first writer works, or could not be started
        self._refusal: str | None = None  # why it could not be started
        self._ends = 0
        self._closing = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="vembed-ckpt-supervisor", daemon=True)
        self._thread.start()

    # -- from other threads

    def refuse_without_writer(self) -> None:
        """Wait until the first writer works. Raises `CheckpointError` with the reason if it does not."""
        deadline = time.monotonic() + _START_DEADLINE
        answered = self._begun.wait(min(_UNDISTURBED, _START_DEADLINE))
        while not answered and time.monotonic() < deadline:
            _signals.deliver()
            answered = self._begun.wait(_signals.SLICE)
        if not answered:
            self._refusal = f"its writer has not answered for {_START_DEADLINE:.0f} s"
        if self._refusal is not None:
            raise CheckpointError(f"{self._root}: nothing can be saved: {self._refusal}")

    def give_up(self) -> None:
        """End a writer that never came to work, and do not wait for it."""
        self._post(self._kill)
        self.close(1.0)

    def _kill(self) -> None:
        if self._writer is not None and self._writer.process is not None:
            self._writer.process.kill()

    @property
    def writer_pid(self) -> int | None:
        writer = self._writer
        return writer.process.pid if writer is not None and writer.process is not None else None

    def submit(self, job: Job) -> None:
        """Give the writer a job that is complete in its arena."""
        if not self._post(lambda: self._take(job)):
            job.failed(WriteError(f"nobody watches the writer any more: {self._broken!r}"))

    def send_wave(self, job: Job, start: int, end: int) -> None:
        """Tell the writer that the plan's range [start, end) is now in the job's arena."""
        self._post(lambda: self._send(Command(Kind.WAVE, job.arena.number, job.serial, start, end)))

    def add_arena(self, arena: Arena) -> None:
        self._populating.add(arena.number)
        self._post(lambda: self._send_arena(arena))

    def drop_arena(self, arena: Arena) -> None:
        self._populating.discard(arena.number)
        number = arena.number
        self._post(lambda: self._send(Command(Kind.DROP, number)))

    def missing_space(self, needed: int, patience: float) -> tuple[int, int] | None:
        """Return (bytes missing, bytes free) if `needed` bytes do not fit at the root, else None.

        If the last report of the writer says that they do not fit, the writer is asked again first. If it does not
        answer within `patience` seconds, the result is None.
        """
        if self._space is None or self._space >= needed:
            return None
        self._told.clear()
        self._questions = question = self._questions + 1
        self._post(lambda: self._send(Command(Kind.SPACE, 0, question)))
        if not self._told.wait(patience) or self._space >= needed:
            return None
        return needed - self._space, self._space

    @property
    def populating(self) -> bool:
        """Whether pages of an arena are still being faulted in."""
        return bool(self._populating)

    def check(self) -> None:
        """Raise `WriteError` if the supervisor has ended."""
        if self._broken is not None or not self._thread.is_alive():
            raise WriteError(f"the supervisor of the writer broke: {self._broken!r}") from self._broken

    def close(self, timeout: float) -> bool:
        """Let the writer finish its jobs, then end it. Return False if that takes longer than `timeout` seconds."""
        self._post(self._begin_closing)
        if self._thread is not threading.current_thread():
            _signals.join(self._thread, timeout)
        return not self._thread.is_alive()

    def park(self) -> bool:
        """Let the thread do nothing any more, because the interpreter ends without waiting for the writer.

        A thread that frees a tensor while the interpreter ends aborts the process: torch takes the GIL in a destructor.
        Returns False if the thread has ended already.
        """
        parked = Parked()
        if not self._post(parked.poll):
            return False
        parked.wait()
        return True

    def forget(self) -> None:
        """In a forked child: close the descriptors that belong to the parent, and touch nothing else."""
        if self._writer is not None:
            os.close(self._writer.sock.detach())
            for fd in (self._writer.end, self._writer.log):
                if fd >= 0:
                    os.close(fd)
        if not self._over:
            self._bell.close()

    def _post(self, call: Callable[[], None]) -> bool:
        """Run `call` on the supervisor's thread. Return False if that thread has ended."""
        with self._posting:
            if self._over:
                return False
            self._inbox.append(call)
            self._bell.ring()
            return True

    # -- on the supervisor's thread

    def _main(self) -> None:
        try:
            anyio.run(self._supervise)
        except BaseException as error:
            self._broken = error
            logger.exception("the supervisor of the checkpoint writer broke")
        finally:
            with self._posting:
                self._over = True
                self._bell.close()
            while self._inbox:  # take the calls that are left in the inbox: their jobs fail below
                self._inbox.popleft()()
            self._refuse(f"the supervisor of the writer broke: {self._broken!r}")
            for job in list(self._jobs.values()):
                job.failed(WriteError(f"the supervisor of the writer ended: {self._broken!r}"))

    async def _supervise(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._answer_inbox)
            await self._keep_a_writer()
            tasks.cancel_scope.cancel()

    async def _answer_inbox(self) -> None:
        while True:
            await anyio.wait_readable(self._bell.fd)
            self._bell.clear()
            while self._inbox:
                self._inbox.popleft()()
            self._wanted.set()

    async def _keep_a_writer(self) -> None:
        self._wanted = anyio.Event()
        while True:
            if await self._run_one_writer():
                return
            while not self._jobs and not self._closing and self._begun.is_set():
                self._wanted = anyio.Event()
                await self._wanted.wait()  # a dead writer is replaced only when there is something to do
            if self._closing and not self._jobs:
                return

    async def _run_one_writer(self) -> bool:
        """Start a writer and serve it until it ends. Return True if it ended because it was asked to."""
        try:
            writer = self._start()
        except OSError as error:
            self._refuse(error.strerror or str(error))
            self._populating.clear()
            self._bury(WriteError(f"no writer could be started: {error}"), again=False)
            return False
        self._writer = writer
        orderly = False
        self._report("started", f"pid {writer.process.pid}" if writer.process else "thread")
        try:
            self._send_probe(writer)
            for arena in self._arenas():
                self._send_arena(arena)
            for job in list(self._jobs.values()):
                self._send_job(job)
            if self._closing:
                writer.sock.shutdown(socket.SHUT_WR)
            await self._listen(writer)
            orderly = True
        finally:
            self._writer = None
            self._populating.clear()  # the writer that would answer is gone
            with anyio.CancelScope(shield=True):
                epitaph = await self._reap(writer, orderly)
        if self._closing and not self._jobs:
            self._report("complete", epitaph)
            return True
        self._ends += 1
        killed = writer.process is not None and (writer.process.returncode or 0) < 0
        if not killed or self._ends >= LIVES:  # if somebody killed this writer, that says nothing about the next one
            self._refuse(f"{epitaph}; {processes.REMEDY}" if writer.process else epitaph)
        self._report("failed", epitaph)
        self._bury(WriteError(f"{epitaph}. The previous checkpoints are untouched"), again=True)
        return False

    def _refuse(self, why: str) -> None:
        """Record that the first writer cannot work, unless one has worked already."""
        if not self._begun.is_set():
            self._refusal = why
            self._begun.set()

    def _send_probe(self, writer: _Writer) -> None:
        """Let the writer map one page, in the way it maps arenas.

        If it reports success, every call that a save needs works.
        """
        if self._begun.is_set():
            return
        try:
            with calling("memfd_create"):
                page = os.memfd_create("vembed_async_ckpt_probe", os.MFD_CLOEXEC)
            try:
                os.ftruncate(page, mmap.PAGESIZE)
                with calling("sendmsg with a descriptor (SCM_RIGHTS)"):
                    send_command(writer.sock, Command(Kind.ARENA, _PROBE, mmap.PAGESIZE), (page,))
            finally:
                os.close(page)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended already; its exit status and log tell why
        except OSError as error:
            self._refuse(error.strerror or str(error))

    def _start(self) -> _Writer:
        with calling("socketpair"):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        if self._kind == "thread":
            threading.Thread(
                target=server.serve,
                args=(theirs, RootLock(self._root, os.dup(self._lock.fd)), self._filesystem, None),
                name="vembed-ckpt-server",
                daemon=True,
            ).start()
            return _Writer(ours)
        log = -1
        try:
            with calling("memfd_create"):
                log = os.memfd_create("vembed_async_ckpt_writer_log", os.MFD_CLOEXEC)
            process = processes.start(self._root, theirs.fileno(), self._lock.fd, log)
        except BaseException:
            if log >= 0:
                os.close(log)
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            self._lock.name(process.pid)
        except OSError as error:
            logger.warning("%s: the writer's name could not be written to the lock: %s", self._root, error)
        return _Writer(ours, process, processes.end_of(process), log)

    async def _listen(self, writer: _Writer) -> None:
        """Handle replies until the writer has ended, then those that are still in the socket."""
        replies = ReplyReader()
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                await anyio.wait_readable(writer.end)
                tasks.cancel_scope.cancel()

            if writer.process is not None:
                tasks.start_soon(watch)
            while True:
                await anyio.wait_readable(writer.sock)
                if not self._receive(writer, replies):
                    tasks.cancel_scope.cancel()
                    break
        while self._receive(writer, replies, last=True):
            pass

    def _receive(self, writer: _Writer, replies: ReplyReader, *, last: bool = False) -> bool:
        """Read once and handle the replies. Return False when there is nothing more to read."""
        try:
            data, fds, _, _ = socket.recv_fds(writer.sock, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return not last
        except OSError:
            return False
        for fd in fds:
            self._lock.replace(fd)  # the writer had to recreate the lock file
        try:
            for reply in replies.feed(data):
                self._handle(reply)
        except ProtocolError as error:
            logger.error("%s: %s; the writer is replaced", self._root, error)
            self._kill()
            return False
        return bool(data)

    async def _reap(self, writer: _Writer, orderly: bool) -> str:
        """Wait until the writer has ended. Return how it ended.

        `orderly`: the writer closed its socket. Otherwise the supervisor stopped listening, and the writer is left to
        finish.
        """
        if not orderly:
            writer.close()
            return "the supervisor broke off"
        if writer.process is not None:
            with anyio.move_on_after(_EXIT_DEADLINE):
                await anyio.wait_readable(writer.end)
            if writer.process.poll() is None:
                writer.process.kill()  # it closed its socket and did not exit
                with anyio.move_on_after(_EXIT_DEADLINE):
                    await anyio.wait_readable(writer.end)
                writer.process.poll()
        epitaph = writer.epitaph()
        writer.close()
        return epitaph

    def _bury(self, error: WriteError, *, again: bool) -> None:
        """A writer has ended.

        With `again`, each job decides whether another writer gets it; otherwise all jobs fail.
        """
        for serial, job in list(self._jobs.items()):
            if not again:
                job.failed(error)
                del self._jobs[serial]
            elif not job.writer_died(error):
                del self._jobs[serial]

    def _handle(self, reply: dict[str, Any]) -> None:
        event = reply["event"]
        job = self._jobs.get(reply.get("serial", -1))
        if event in ("ready", "swept"):
            for line in reply["swept"]:
                logger.warning("%s: %s", self._root, line)
                self._report("complete", line)
            if "error" in reply:
                self._report("failed", f"{self._root}: {reply['error']}")  # this also logs it
        elif event == "space":
            self._space = reply["free"]
            if reply["question"] == self._questions:
                self._told.set()
        elif event == "populated" and reply["arena"] == _PROBE:
            self._begun.set()
            self._send(Command(Kind.DROP, _PROBE))
        elif event == "populated":
            self._populate_here(reply["arena"])
        elif event == "warning":
            self._report("failed", f"{self._root}: {reply['message']}")
        elif event in ("after_commit", "unshipped"):
            self._shipping(reply)
        elif event == "tidy" and reply["pruned"]:
            detail = f"deleted {', '.join(reply['pruned'])}"
            self._reporter.emit(
                Event(
                    "retention", "complete", reply["save_id"], reply["step"], reply["freed"], reply["seconds"], detail
                )
            )
        elif job is None:
            return
        elif event == "accepted":
            job.accepted()
        elif event == "writing":
            job.writing()
        elif event == "wave":
            job.wave_written()
        elif event == "committed":
            del self._jobs[job.serial]
            job.committed(reply)
        elif event == "failed":
            del self._jobs[job.serial]
            kind = CommitError if reply["kind"] == "commit" else WriteError
            job.failed(kind(reply["message"]))

    def _populate_here(self, number: int) -> None:
        """Map the arena's pages in this process, after the writer has faulted them in.

        This is four times cheaper than faulting them in here first.
        """
        arena = next((arena for arena in self._arenas() if arena.number == number), None)
        if arena is None or number not in self._populating:
            return

        def run() -> None:
            try:
                populate(arena.memory, arena.size)
                if "torch" in sys.modules:  # else nobody can have used a device
                    arena.pin()
            finally:
                self._populating.discard(number)

        threading.Thread(target=run, name="vembed-ckpt-populate", daemon=True).start()

    def _take(self, job: Job) -> None:
        self._jobs[job.serial] = job
        self._send_job(job)

    def _send_job(self, job: Job) -> None:
        offset, length = job.location()
        self._send(Command(Kind.JOB, job.arena.number, job.serial, offset, length))

    def _send_arena(self, arena: Arena) -> None:
        if arena.fd >= 0:
            self._send(Command(Kind.ARENA, arena.number, arena.size), (arena.fd,))

    def _send(self, command: Command, fds: tuple[int, ...] = ()) -> None:
        if self._writer is None:
            return  # the next writer gets everything again
        try:
            send_command(self._writer.sock, command, fds)
        except OSError as error:
            # `_listen` notices the writer's death.
            logger.debug("the writer did not take %s: %s", command, error)

    def _begin_closing(self) -> None:
        self._closing = True
        if self._writer is not None:
            try:
                self._writer.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it has ended already

    def _report(self, phase: Any, detail: str) -> None:
        self._reporter.emit(Event("writer", phase, detail=detail))
