"""The writer, served over a socket by hand: what it writes, what it answers, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vembed_async_ckpt import KeepBest, KeepLast, verify
from vembed_async_ckpt._disk.filesystem import Filesystem, LocalFilesystem
from vembed_async_ckpt._disk.lock import RootLock
from vembed_async_ckpt._format import names
from vembed_async_ckpt._shared import protocol
from vembed_async_ckpt._shared.memory import MEMFD, map_arena
from vembed_async_ckpt._shared.protocol import DATA_START, PROGRESS, Command, Kind, ReplyReader, send_command
from vembed_async_ckpt._writer import server
from vembed_async_ckpt._writer.trainer import Trainer
from vembed_async_ckpt.testing import FailingFilesystem

from ..by_hand import FILES, contents, job, pair, save_id, write_files

SIZE = 1 << 20


class Connection:
    """The trainer's end of a served writer."""

    def __init__(self, root: Path, fs: Filesystem | None = None, trainer: Trainer | None = None) -> None:
        self.root = root
        self.lock = RootLock.acquire(str(root))
        self.sock, theirs = pair()
        share = RootLock(str(root), os.dup(self.lock.fd))
        self.thread = threading.Thread(
            target=self._serve, args=(theirs, share, fs or LocalFilesystem(), trainer), daemon=True
        )
        self.error: BaseException | None = None
        self.thread.start()
        self._reader, self._replies = ReplyReader(), []
        self.seen: list[dict[str, Any]] = []
        self._arenas: dict[int, Any] = {}

    def _serve(self, *arguments: Any) -> None:
        try:
            server.serve(*arguments)
        except BaseException as error:
            self.error = error

    def next(self, *events: str) -> dict[str, Any]:
        """The next reply of one of these events; others before it are skipped."""
        while True:
            while self._replies:
                reply: dict[str, Any] = self._replies.pop(0)
                self.seen.append(reply)
                if reply["event"] in events:
                    return reply
            data = self.sock.recv(1 << 16)
            assert data, f"the writer ended before {events}"
            self._replies += self._reader.feed(data)

    def arena(self, number: int = 1) -> Any:
        if number not in self._arenas:
            fd = os.memfd_create(MEMFD)
            os.ftruncate(fd, SIZE)
            self._arenas[number] = map_arena(fd, SIZE)
            send_command(self.sock, Command(Kind.ARENA, number, SIZE), (fd,))
            os.close(fd)
        return self._arenas[number]

    def send(self, number: int, files: dict[str, bytes] = FILES, **values: Any) -> None:
        described, image = job(number, files, **values)
        memory, body = self.arena(), json.dumps(described).encode()
        memory[: len(image)] = bytes(image)
        memory[SIZE - len(body) :] = body
        send_command(self.sock, Command(Kind.JOB, 1, number, SIZE - len(body), len(body)))

    def save(self, number: int, files: dict[str, bytes] = FILES, **values: Any) -> dict[str, Any]:
        self.send(number, files, **values)
        return self.next("committed", "failed")

    def close(self) -> None:
        self.sock.close()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.lock.release()


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., Connection]]:
    made: list[Connection] = []

    def connect(fs: Filesystem | None = None, trainer: Trainer | None = None) -> Connection:
        made.append(Connection(tmp_path / "checkpoints", fs, trainer))
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


Connect = Callable[..., Connection]


def test_a_job_becomes_a_checkpoint(connect: Connect) -> None:
    writer = connect()
    assert writer.next("ready") == {"event": "ready", "swept": []}
    reply = writer.save(1)
    path = writer.root / "checkpoint-1"
    assert (reply["serial"], reply["path"], reply["sequence"]) == (1, str(path), 1)
    assert reply["files"] == {name: len(data) for name, data in FILES.items()}
    assert reply["total_bytes"] == sum(map(len, FILES.values()))
    assert {name: data for name, data in contents(path).items() if name != names.MANIFEST} == FILES
    assert verify(path).step == 1
    assert writer.next("tidy")["pruned"] == []
    (progress,) = PROGRESS.unpack_from(writer.arena(), 0)
    assert progress >= reply["total_bytes"]
    writer.close()
    assert [entry.name for entry in writer.root.iterdir()] == ["checkpoint-1"]


def test_sequences_go_on_from_what_is_there(connect: Connect) -> None:
    first = connect()
    for number in (5, 3):
        first.save(number)
    first.close()
    assert connect().save(1)["sequence"] == 3


def test_a_failed_write_is_repeated_from_the_arena(connect: Connect) -> None:
    disk = FailingFilesystem()
    writer = connect(disk)
    writer.next("ready")
    disk.fail(errno.EIO, "write", times=server.TRIES - 1)
    assert writer.save(1)["event"] == "committed"
    disk.fail(errno.EIO, "sync", times=None)
    failed = writer.save(2)
    assert (failed["event"], failed["kind"], failed["errno"]) == ("failed", "write", errno.EIO)
    assert "Input/output error" in failed["message"]
    disk.heal()
    assert writer.save(3)["event"] == "committed"
    assert writer.next("tidy")
    assert sorted(entry.name for entry in (writer.root / names.WORK).iterdir()) == [names.LOCK]


def test_a_doubtful_commit_is_not_repeated_and_said(connect: Connect) -> None:
    disk = FailingFilesystem()
    writer = connect(disk)
    writer.next("ready")
    disk.fail(errno.EIO, "sync_directory", nth=3)  # two directories of the checkpoint, then the root
    failed = writer.save(1)
    assert (failed["event"], failed["kind"]) == ("failed", "commit")
    assert writer.save(1, save_id=save_id(1))["event"] == "committed", "the same save again: it is there"


def test_a_program_error_fails_the_save_with_its_traceback_and_not_the_writer(connect: Connect) -> None:
    writer = connect()
    failed = writer.save(1, manifest={"no such field": 1})
    assert failed["event"] == "failed"
    assert "TypeError" in failed["message"]
    assert "Traceback" in failed["message"]
    assert writer.save(2)["event"] == "committed"


def test_hard_links_are_made_or_left_out_with_a_warning(connect: Connect) -> None:
    disk = FailingFilesystem()
    writer = connect(disk)
    link = ["model.safetensors", "model_state_dict.safetensors"]
    assert set(writer.save(1, links=[link])["files"]) == {*FILES, link[1]}
    disk.fail(errno.EPERM, "link")
    writer.send(2, links=[link])
    assert "no hard links on this file system" in writer.next("warning")["message"]
    assert set(writer.next("committed")["files"]) == set(FILES)
    disk.fail(errno.EIO, "link", times=None)
    assert writer.save(3, links=[link])["event"] == "failed"


def test_retention_deletes_what_it_does_not_keep_and_says_what(connect: Connect) -> None:
    writer = connect()
    for number in (1, 2, 3):
        writer.save(number, retention=KeepLast(2).spec())
        tidy = writer.next("tidy")
    assert (tidy["pruned"], tidy["freed"]) == (["checkpoint-1"], sum(map(len, FILES.values())))
    assert sorted(path.name for path in writer.root.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_metric_that_no_checkpoint_has_is_said_once(connect: Connect) -> None:
    writer = connect()
    spec = KeepBest("loss", "min").spec()
    for number in (1, 2, 3, 4):
        writer.save(number, retention=spec)
        writer.next("tidy")
    (warning,) = [reply["message"] for reply in writer.seen if reply["event"] == "warning"]
    assert "loss" in warning


def test_a_deletion_that_fails_is_a_warning_and_made_up_for(connect: Connect) -> None:
    disk = FailingFilesystem()
    writer = connect(disk)
    writer.save(1, name="checkpoint-1")
    writer.next("tidy")
    disk.fail(errno.EIO, "unlink")
    writer.save(2, {"model.safetensors": b"new"}, name="checkpoint-1")
    assert "Input/output" in writer.next("warning")["message"]
    writer.save(3)
    swept = writer.next("swept")["swept"]
    assert swept
    assert sorted(entry.name for entry in (writer.root / names.WORK).iterdir()) == [names.LOCK]


def test_a_file_has_the_name(connect: Connect) -> None:
    writer = connect()
    (writer.root / "checkpoint-1").write_text("theirs")
    failed = writer.save(1)
    assert "exists and is not a directory" in failed["message"]
    assert (writer.root / "checkpoint-1").read_text() == "theirs"


def test_the_link_moves_or_says_once_why_not(connect: Connect) -> None:
    disk = FailingFilesystem()
    writer = connect(disk)
    writer.save(1, latest_link=True)
    assert (writer.root / names.LATEST).readlink() == Path("checkpoint-1")
    disk.fail(errno.EPERM, "symlink", times=None)
    for number in (2, 3):
        writer.save(number, latest_link=True)
        writer.next("tidy")
    (warning,) = [reply["message"] for reply in writer.seen if reply["event"] == "warning"]
    assert "could not be moved: Operation not permitted" in warning


def test_leftovers_are_swept_at_the_start(connect: Connect, tmp_path: Path) -> None:
    work = tmp_path / "checkpoints" / names.WORK
    write_files(work / f"work-{save_id(1)}.0", {"model.safetensors": b"half"})
    assert connect().next("ready")["swept"] == [f"dropped the unfinished save work-{save_id(1)}.0"]


def test_leftovers_that_cannot_be_swept_do_not_keep_it_from_saving(connect: Connect, tmp_path: Path) -> None:
    work = tmp_path / "checkpoints" / names.WORK
    write_files(work / f"work-{save_id(1)}.0", {"model.safetensors": b"half"})
    disk = FailingFilesystem()
    disk.fail(errno.EIO, "unlink")
    writer = connect(disk)
    assert "leftovers could not be swept" in writer.next("ready")["error"]
    assert writer.save(2)["event"] == "committed"
    assert writer.next("swept")["swept"]


def test_free_space_is_told_when_asked(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = connect()
    send_command(writer.sock, Command(Kind.SPACE, 0, 7))
    while (reply := writer.next("space"))["question"] != 7:
        pass
    assert reply["free"] > 0

    def fail(path: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "statvfs", fail)
    assert writer.save(1)["event"] == "committed", "unknown, and no reason to refuse"


def test_parts_of_a_plan_arrive_as_waves(connect: Connect) -> None:
    """A plan of three parts in an arena of two: each part is written from its place."""
    writer, part = connect(), 16 << 10
    data = bytes(range(256)) * (3 * part // 256)
    described, _ = job(1, {"model.safetensors": data}, waves=part)
    memory, body = writer.arena(), json.dumps(described).encode()
    memory[SIZE - len(body) :] = body
    send_command(writer.sock, Command(Kind.JOB, 1, 1, SIZE - len(body), len(body)))
    for start in range(0, len(data), part):
        base = protocol.wave_base(DATA_START + start, part)
        memory[base : base + part] = data[start : start + part]
        send_command(writer.sock, Command(Kind.WAVE, 1, 1, DATA_START + start, DATA_START + start + part))
        writer.next("wave")
    writer.next("committed")
    assert (writer.root / "checkpoint-1" / "model.safetensors").read_bytes() == data
    assert verify(writer.root / "checkpoint-1")


@pytest.mark.parametrize("how", ["told", "closed"])
def test_parts_that_do_not_come_fail_the_save(connect: Connect, how: str) -> None:
    writer = connect()
    described, _ = job(1, {"model.safetensors": b"x" * (64 << 10)}, waves=16 << 10)
    memory, body = writer.arena(), json.dumps(described).encode()
    memory[SIZE - len(body) :] = body
    send_command(writer.sock, Command(Kind.JOB, 1, 1, SIZE - len(body), len(body)))
    if how == "told":
        send_command(writer.sock, Command(Kind.WAVE, 1, 1, 0, 0))
        assert "ended before all of the state had passed" in writer.next("failed")["message"]
        send_command(writer.sock, Command(Kind.WAVE, 1, 1, DATA_START, DATA_START + 4096))  # late: nobody waits for it
        assert writer.save(2)["event"] == "committed"
        return
    writer.next("writing")
    writer.close()
    assert not (writer.root / "checkpoint-1").exists()


def test_accepted_jobs_are_finished_when_the_trainer_is_gone(connect: Connect) -> None:
    writer = connect()
    for number in (1, 2):
        writer.send(number)
        writer.next("accepted")
    writer.close()
    assert sorted(path.name for path in writer.root.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_what_could_not_be_saved_without_a_trainer_is_noted_for_the_next(connect: Connect, tmp_path: Path) -> None:
    disk = FailingFilesystem()

    class Dead:
        """A trainer that has died, whose forked child keeps the socket open."""

        def register(self, poll: object) -> int:
            return 10

        def is_dead(self) -> bool:
            return bool(died)

    died: list[bool] = []
    writer = connect(disk, Dead())
    writer.next("ready")
    disk.fail(errno.EIO, "create", times=None)
    gate = threading.Event()
    real = disk.make_directory
    disk.make_directory = lambda path: (gate.wait(20), real(path))[1]  # type: ignore[method-assign,func-returns-value]
    writer.send(1)
    writer.next("writing")
    died.append(True)
    with contextlib.suppress(BrokenPipeError):
        while True:  # until it has noticed, and reads no more
            send_command(writer.sock, Command(Kind.SPACE, 0, 1))
    gate.set()
    writer.thread.join(20)
    log = tmp_path / "checkpoints" / names.WORK / names.ORPHAN_LOG
    assert "checkpoint-1 was staged but not saved" in log.read_text()


def test_a_lock_that_was_removed_is_made_again_and_handed_back(connect: Connect) -> None:
    writer = connect()
    writer.next("ready")
    (writer.root / names.WORK / names.LOCK).unlink()
    assert "its lock file was removed, and was made again" in (writer.send(1), writer.next("warning"))[1]["message"]
    assert writer.next("committed")


def test_a_root_that_another_took_is_not_written_again(connect: Connect) -> None:
    writer = connect()
    writer.next("ready")
    (writer.root / names.WORK / names.LOCK).unlink()
    other = RootLock.acquire(str(writer.root))
    assert "another process saves here" in writer.save(1)["message"]
    other.release()
    failed = writer.save(2)
    assert (failed["event"], failed["kind"]) == ("failed", "commit")
    assert not list(writer.root.glob("checkpoint-*"))


def test_checkpoints_of_another_who_came_and_went_end_it_too(connect: Connect) -> None:
    from ..by_hand import checkpoint

    writer = connect()
    writer.next("ready")
    (writer.root / names.WORK / names.LOCK).unlink()
    checkpoint(writer.root / "checkpoint-9", 9)
    assert "another process saved checkpoint-9 here" in writer.save(1)["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"null", b"[" * 100_000, {"save_id": "../x"}, {"files": [{"name": "../x", "start": DATA_START, "size": 1}]},
     {"files": [{"name": "x", "start": 0, "size": 1}]}, {"files": [{"name": "x", "start": DATA_START, "size": -1}]}, {"files": []},
     {"name": "a/b"}, {"name": ".."}, {"links": [["x", "/etc/passwd"]]}, {"waves": "many"}, {"files": [3]}, {"links": [3]}],
)  # fmt: skip
def test_what_is_no_job_ends_the_writer_and_writes_nothing(connect: Connect, body: Any) -> None:
    writer = connect()
    writer.next("ready")
    content = body if isinstance(body, bytes) else json.dumps({**job(1)[0], **body}).encode()
    memory = writer.arena()
    memory[SIZE - len(content) :] = content
    send_command(writer.sock, Command(Kind.JOB, 1, 1, SIZE - len(content), len(content)))
    writer.thread.join(20)
    assert isinstance(writer.error, protocol.ProtocolError)
    assert list(writer.root.glob("checkpoint-*")) == []


def test_a_dropped_arena_is_forgotten(connect: Connect) -> None:
    writer = connect()
    writer.save(1)
    send_command(writer.sock, Command(Kind.DROP, 1))
    send_command(writer.sock, Command(Kind.DROP, 1))
    writer._arenas.clear()
    assert writer.save(2)["event"] == "committed"
