"""The two loops of the writer: one answers the trainer at once, the other writes and commits one job after another.

The trainer's death does not stop accepted jobs: they are finished, then the writer ends.
"""

from __future__ import annotations

import errno
import os
import queue
import select
import socket
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from .._disk import commit as commits
from .._disk import deletion as removal
from .._disk import link_update, notes
from .._disk.catalog import Committed, interrupted
from .._disk.direct_io import CHUNK, STEP, FileWriter, IOThreads, sync_all, write_range
from .._disk.filesystem import Filesystem, parent_of
from .._disk.lock import RootLock, Taken
from .._format import names
from .._format.manifest import FileRecord, Manifest
from .._format.plan import pages
from .._shared.memory import map_arena, populate
from .._shared.protocol import (
    DATA_START,
    PROGRESS,
    Command,
    CommandReader,
    Job,
    Kind,
    decode_job,
    encode_reply,
    wave_base,
)
from ..errors import CheckpointError, CommitError, WriteError
from ..retention import Policy, from_spec, unknown_metrics
from .shipping import Shippers, are_waiting
from .trainer import Trainer

TRIES = 3  # a failed write is repeated from the arena into new files
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass
class _Arena:
    memory: memoryview
    size: int


@dataclass
class _Pending:
    """An accepted job, and the queue through which its waves arrive. None in the queue means that no more will come."""

    arena: int
    serial: int
    job: Job
    accepted: float
    waves: queue.SimpleQueue[tuple[int, int] | None] = field(default_factory=queue.SimpleQueue)


class Server:
    """Serves one root over one socket until the trainer is gone and every accepted job has ended."""

    def __init__(self, sock: socket.socket, lock: RootLock, fs: Filesystem, trainer: Trainer | None) -> None:
        """`lock`: this writer's share of the root's lock.

        `trainer`: None for a writer thread in the trainer's process.
        """
        self._sock = sock
        self._lock = lock
        self._taken: Taken | None = None  # another process has taken the root
        # save ids of the checkpoints that were there or were made here; None: not read yet
        self._seen: set[str] | None = None
        self._root = lock.root
        self._fs = fs
        self._trainer = trainer
        # a writer thread in the training's process has to share the GIL: fewer, larger steps are faster then
        self._step = CHUNK if trainer is None else STEP
        self._sending = threading.Lock()
        self._orphaned = False
        self._arenas: dict[int, _Arena] = {}
        # "prune": something was shipped, so that retention may delete more. None: no job will come any more.
        self._jobs: queue.SimpleQueue[_Pending | Literal["prune"] | None] = queue.SimpleQueue()
        self._shippers = Shippers(lock.root, self._shipper_said)
        self._retention: Policy | None = None  # that of the newest save
        self._waiting_for_waves: dict[int, _Pending] = {}
        self._threads = IOThreads()
        self._committed = Committed(lock.root)
        self._highest = 0  # the highest sequence number seen so far
        self._said: set[str] = set()  # warnings that the trainer was sent already
        self._litter = False  # something could not be removed and must be swept later

    def serve(self) -> None:
        """Serve the socket. Returns when the trainer closed it or died, and the last accepted job has ended."""
        worker = threading.Thread(target=self._work, name="vembed-ckpt-writer", daemon=True)
        worker.start()
        reader = CommandReader(self._sock)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        patience = None if self._trainer is None else self._trainer.register(poll)
        self._sock.setblocking(False)
        try:
            while not reader.closed:
                poll.poll(patience)
                if self._trainer is not None and not self._orphaned and self._trainer.is_dead():
                    # A forked child of the trainer may keep the socket open. After this, what is queued can still be
                    # read, then the socket ends.
                    self._sock.shutdown(socket.SHUT_RD)
                    self._orphaned = True
                for command, fd in reader.read():
                    self._handle(command, fd)
        finally:
            # However the loop ended: this writer must end everything it began before another writer may start.
            for pending in list(self._waiting_for_waves.values()):
                pending.waves.put(None)
            self._jobs.put(None)
            worker.join()
            self._threads.close()
            self._shippers.close()
        self._lock.clear()

    def _handle(self, command: Command, fd: int | None) -> None:
        if command.kind is Kind.ARENA:
            assert fd is not None
            memory = map_arena(fd, command.first)
            os.close(fd)
            self._arenas[command.arena] = _Arena(memoryview(memory), command.first)
            threading.Thread(
                target=self._populate,
                args=(command.arena, memory, command.first),
                name="vembed-ckpt-populate",
                daemon=True,
            ).start()
        elif command.kind is Kind.DROP:
            self._arenas.pop(command.arena, None)
        elif command.kind is Kind.JOB:
            memory_ = self._arenas[command.arena].memory
            job = decode_job(bytes(memory_[command.second : command.second + command.third]))
            PROGRESS.pack_into(memory_, 0, 0)
            pending = _Pending(command.arena, command.first, job, time.perf_counter())
            if job["waves"]:
                self._waiting_for_waves[command.first] = pending
            self._jobs.put(pending)
            self._send(event="accepted", serial=command.first)
        elif command.kind is Kind.SPACE:
            # In a thread of its own: on a mount that hangs, the call hangs too.
            threading.Thread(
                target=self._say_space, args=(command.first,), name="vembed-ckpt-space", daemon=True
            ).start()
        elif command.kind is Kind.WAVE:
            waiting = self._waiting_for_waves.get(command.first)  # None: the job has failed already and was answered
            if waiting is not None:
                waiting.waves.put((command.second, command.third) if command.third else None)

    def _populate(self, arena: int, memory: Any, size: int) -> None:
        populate(memory, size)
        self._send(event="populated", arena=arena)

    def _say_space(self, question: int = 0) -> None:
        try:
            found = os.statvfs(self._root)
        except OSError:
            return  # the free space is unknown; a failing write will report the problem
        self._send(event="space", question=question, free=found.f_bavail * found.f_frsize)

    def _work(self) -> None:
        self._say_space()
        try:
            self._lock.refuse_if_lost()
            self._note(manifest.save_id for _, manifest in self._committed.refresh())
            self._send(event="ready", swept=removal.sweep(self._fs, self._root))
            self._drop_notes()
            if are_waiting(self._root):
                self._shippers.wake()
        except Exception as error:
            self._litter = True
            self._send(event="ready", swept=[], error=f"leftovers could not be swept: {_said(error)}")
        while (pending := self._jobs.get()) is not None:
            if pending == "prune":
                self._prune_again()
                continue
            self._run(pending)
            self._say_space()
            self._waiting_for_waves.pop(pending.serial, None)
            del pending

    def _run(self, pending: _Pending) -> None:
        try:
            replaced, reply = self._save(pending)
        except Exception as error:
            self._failed(pending, error)
            return
        self._note([pending.job["save_id"]])
        if pending.job["latest_link"]:
            self._move_latest_link(pending)
        self._send(event="committed", serial=pending.serial, **reply)
        if pending.job["ship"]:
            self._shippers.wake()
        try:
            self._tidy(pending, replaced)
        except Exception as error:
            self._litter = True
            self._send(event="warning", serial=pending.serial, message=_said(error))

    def _move_latest_link(self, pending: _Pending) -> None:
        """Point the link `latest` to the new checkpoint.

        An error is only a warning: the checkpoint is durable already.
        """
        job = pending.job
        try:
            said = link_update.point(self._fs, self._root, job["name"], job["save_id"])
        except OSError as error:
            said = f"{os.path.join(self._root, names.LATEST)} could not be moved: {error.strerror}"
        if said and said not in self._said:
            self._said.add(said)
            self._send(event="warning", serial=pending.serial, message=said)

    def _failed(self, pending: _Pending, error: Exception) -> None:
        kind = "commit" if isinstance(error, CommitError) else "write"
        message = _said(error)
        if not isinstance(error, OSError | WriteError | CommitError):
            message += "\n" + traceback.format_exc()
        self._send(
            event="failed", serial=pending.serial, kind=kind, message=message, errno=getattr(error, "errno", None)
        )
        if self._orphaned:
            log = os.path.join(names.work_directory(self._root), names.ORPHAN_LOG)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                with (
                    parent_of(log) as (parent, name),
                    os.fdopen(os.open(name, flags, 0o666, dir_fd=parent), "a") as file,
                ):
                    file.write(f"{time.strftime('%F %T')} {pending.job['name']} was staged but not saved: {message}\n")
            except OSError:
                # The disk that did not take the checkpoint does not take this note either. The jobs behind this one go
                # on.
                pass

    def _save(self, pending: _Pending) -> tuple[str | None, dict[str, Any]]:
        """Write and commit one job. Returns the path of a replaced directory (or None), and the reply."""
        job = pending.job
        self._secure()
        committed = self._committed.refresh()
        self._note(manifest.save_id for _, manifest in committed)
        commits.refuse_non_directory(os.path.join(self._root, job["name"]))
        for path, manifest in committed:
            if manifest.save_id == job["save_id"]:  # the previous writer died between commit and reply
                self._fs.sync_directory(self._root)
                self._fs.sync_directory(names.work_directory(self._root))
                return None, self._reply(path, manifest, pending, pending.accepted, time.perf_counter())
        sequence = self._next_sequence([manifest.sequence for _, manifest in committed])
        tries = 1 if job["waves"] else TRIES
        for attempt in range(tries):
            self._secure()
            work = names.save_directory(self._root, job["save_id"], attempt)
            try:
                return self._attempt(pending, work, sequence)
            except CommitError:
                self._litter = True
                raise
            except Exception as error:
                self._discard(work, job["save_id"])
                if attempt + 1 == tries or not isinstance(error, OSError):
                    raise
        raise AssertionError("unreachable")

    def _next_sequence(self, visible: list[int]) -> int:
        """Return the next sequence number.

        It is higher than every number that is visible, can come back, or was ever read.
        """
        waiting = [entry.order[0] for entry in interrupted(self._root)]
        self._highest = max(self._highest, *visible, *waiting, 0)
        return self._highest + 1

    def _discard(self, work: str, save_id: str) -> None:
        """Delete what a failed attempt left, best effort.

        The next sweep deletes the rest; the attempt's own error is reported.
        """
        try:
            notes.remove(self._fs, self._root, save_id)
            if os.path.isdir(work):
                removal.remove_work(self._fs, work, save_id)
        except OSError:
            pass
        self._litter |= os.path.isdir(work)

    def _attempt(self, pending: _Pending, work: str, sequence: int) -> tuple[str | None, dict[str, Any]]:
        job, fs = pending.job, self._fs
        begun = time.perf_counter()
        self._send(event="writing", serial=pending.serial)
        fs.make_directory(work)
        writers = self._write(pending, work)
        records = {w.slot["name"]: FileRecord(w.slot["size"], w.hash.hexdigest()) for w in writers}
        for source, further in job["links"]:
            try:
                fs.link(os.path.join(work, source), os.path.join(work, further))
                records[further] = records[source]
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._send(
                    event="warning",
                    serial=pending.serial,
                    message=f"{further} was left out: no hard links on this file system ({error})",
                )
        written = time.perf_counter()
        manifest = Manifest(
            save_id=job["save_id"], step=job["step"], sequence=sequence, files=records, **job["manifest"]
        )
        self._secure()
        if job["ship"]:
            # Before the rename: if this process dies after it, the next run ships the checkpoint.
            targets = tuple(notes.Target(spec) for spec in job["ship"])
            note = notes.Note(job["save_id"], job["name"], job["step"], sequence, targets, job["max_unshipped"])
            notes.put(fs, self._root, note)
        replaced = commits.commit(fs, self._root, job["name"], work, manifest)
        return replaced, self._reply(os.path.join(self._root, job["name"]), manifest, pending, begun, written)

    def _reply(self, path: str, manifest: Manifest, pending: _Pending, begun: float, written: float) -> dict[str, Any]:
        return {
            "path": path,
            "sequence": manifest.sequence,
            "files": {name: record.size for name, record in manifest.files.items()},
            "total_bytes": sum(slot["size"] for slot in pending.job["files"]),
            "queued": begun - pending.accepted,
            "write": written - begun,
            "commit": time.perf_counter() - written,
        }

    def _write(self, pending: _Pending, work: str) -> list[FileWriter]:
        job, memory = pending.job, self._arenas[pending.arena].memory
        lock, total = threading.Lock(), 0

        def wrote(count: int) -> None:
            nonlocal total
            with lock:
                total += count
                PROGRESS.pack_into(memory, 0, total)

        writers: list[FileWriter] = []
        try:
            for slot in job["files"]:
                path = os.path.join(work, *slot["name"].split("/"))
                self._make_parents(work, slot["name"])
                writers.append(FileWriter(self._fs, path, slot, job["checksums"].get(slot["name"]), self._step))
            for start, end in self._ranges(pending):
                base = wave_base(start, job["waves"]) if job["waves"] else DATA_START
                write_range(writers, memory, start, end, base, self._threads, wrote)
                if job["waves"]:
                    self._send(event="wave", serial=pending.serial)
            sync_all(writers, self._threads)
        finally:
            for writer in writers:
                writer.abandon()
        return writers

    def _make_parents(self, work: str, name: str) -> None:
        parts = name.split("/")[:-1]
        for depth in range(len(parts)):
            parent = os.path.join(work, *parts[: depth + 1])
            if not os.path.isdir(parent):
                self._fs.make_directory(parent)

    def _ranges(self, pending: _Pending) -> Any:
        last = pending.job["files"][-1]
        end = pages(last["start"] + last["size"])
        if not pending.job["waves"]:
            yield DATA_START, end
            return
        covered = DATA_START
        while covered < end:
            wave = pending.waves.get()
            if wave is None:
                raise WriteError("the save ended before all of the state had passed through the small arena")
            yield wave
            covered = wave[1]

    def _tidy(self, pending: _Pending, replaced: str | None) -> None:
        """Clean up after the commit.

        First the replaced directory and leftovers are deleted, then the checkpoints that retention does not keep.
        """
        job = pending.job
        try:
            if self._litter or replaced is not None:
                self._lock.refuse_if_lost()
            if self._litter:
                swept = removal.sweep(self._fs, self._root)
                self._litter = False
                self._send(event="swept", swept=swept)
            elif replaced is not None:
                target = os.path.join(self._root, job["name"])
                removal.dispose(self._fs, self._root, replaced, job["name"], job["save_id"], carried_to=target)
            if replaced is not None:
                self._drop_notes()
        finally:
            # Prune even if that failed: one directory that cannot be deleted must not let the others fill the disk.
            self._retention = None if job["retention"] is None else from_spec(job["retention"])
            pruned = self._prune(job["save_id"], job["step"])
        self._send(event="tidy", **pruned)

    def _prune(self, save_id: str, step: int | None) -> dict[str, Any]:
        """Delete the checkpoints that retention does not keep. Returns what to report, for this save."""
        began = time.perf_counter()
        pruned = {} if self._retention is None else self._apply(self._retention)
        freed, seconds = sum(pruned.values()), time.perf_counter() - began
        return {"save_id": save_id, "step": step, "pruned": list(pruned), "freed": freed, "seconds": seconds}

    def _prune_again(self) -> None:
        """Delete what retention kept only because it was still to be shipped."""
        try:
            self._lock.refuse_if_lost()
            self._send(event="tidy", **self._prune("", None))
        except Exception as error:
            self._send(event="warning", message=_said(error))

    def _apply(self, policy: Policy) -> dict[str, int]:
        """Delete what `policy` does not keep. Returns the deleted names with the bytes of each."""
        committed = self._committed.refresh()
        for problem in unknown_metrics(policy, [manifest for _, manifest in committed]):
            if len(committed) > 1 and problem not in self._said:
                self._said.add(problem)
                self._send(event="warning", message=f"retention: {problem}. By that rule all are kept")

        def gave_way(note: notes.Note) -> None:
            self._not_shipped(note, removal.gave_way_text(note))

        gone = removal.prune(self._fs, self._root, policy, committed, self._lock.refuse_if_lost, gave_way)
        files = {os.path.basename(path): set(manifest.files.values()) for path, manifest in committed}
        return {name: sum(record.size for record in files[name]) for name in gone}  # a hard link counts once

    def _drop_notes(self) -> None:
        for note in notes.drop_unpublished(self._fs, self._root):
            self._not_shipped(note, notes.not_shipped(note))

    def _not_shipped(self, note: notes.Note, detail: str) -> None:
        self._send(event="after_commit", phase="failed", save_id=note.save_id, step=note.step, detail=detail, over=True)

    def _shipper_said(self, report: dict[str, Any]) -> None:
        """Pass on a report of the shipper. Called on a thread of its own."""
        self._send(**report)
        if report["event"] == "after_commit" and report["phase"] == "complete":
            self._jobs.put("prune")

    def _secure(self) -> None:
        """Check that the root still belongs to this writer, before anything is written or published.

        Raises `CommitError`.
        """
        if self._taken is not None:
            raise self._taken
        try:
            done = self._lock.secure()
            if not done:
                return
            if self._root != self._lock.root:
                self._root = self._lock.root
                self._committed = Committed(self._root)
            there = self._committed.refresh()
            strangers = [path for path, found in there if self._seen is not None and found.save_id not in self._seen]
            if strangers:
                raise Taken(
                    f"{self._root}: another process saved {', '.join(map(os.path.basename, sorted(strangers)))} here after the "
                    "lock file of this one was removed; stop one of the two, or use another directory"
                )
            self._send(fd=self._lock.fd, event="warning", message=done)  # from here on the trainer may delete again
        except Taken as error:
            self._taken = error  # permanently: the root now belongs to that process
            raise

    def _note(self, save_ids: Iterable[str]) -> None:
        self._seen = {*(self._seen or ()), *save_ids}

    def _send(self, *, fd: int | None = None, **reply: Any) -> None:
        """Send a reply. `fd`: a descriptor to send with it."""
        data, fds = encode_reply(reply), [] if fd is None else [fd]
        with self._sending:
            while data and not self._orphaned:
                try:
                    sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
                    data, fds = data[sent:], []
                except BlockingIOError:
                    select.select([], [self._sock], [], 1.0)
                except OSError:
                    self._orphaned = True


def _said(error: Exception) -> str:
    """Return an error as text. Our own errors need only their message; others get the name of their type in front."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def serve(sock: socket.socket, lock: RootLock, fs: Filesystem, trainer: Trainer | None) -> None:
    """Run a server to its end, then close the socket and its share of the lock."""
    try:
        Server(sock, lock, fs, trainer).serve()
    finally:
        lock.close()
        sock.close()
