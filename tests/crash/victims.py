"""Saves made with the real supervisor, writer and commit, without torch: small arenas filled by hand.

The functions run in children of a nursery. A save is known by its number `n`, which decides every byte of its files.
"""

from __future__ import annotations

import errno
import faulthandler
import itertools
import json
import logging
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import anyio._backends._asyncio  # noqa: F401  (so that no child has to)

from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._disk.lock import RootLock
from vembed_async_ckpt._engine.supervisor import LIVES, Supervisor
from vembed_async_ckpt._format.plan import pages
from vembed_async_ckpt._memory.arena import Arena
from vembed_async_ckpt._shared.protocol import DATA_START
from vembed_async_ckpt.events import Reporter
from vembed_async_ckpt.retention import KeepLast

if TYPE_CHECKING:
    from .nursery import Talk

LINK = ("model.safetensors", "model_state_dict.safetensors")
PATIENCE = 100.0  # seconds for a save, on the busiest of machines
_ARENA = 1 << 20


def contents(n: int) -> dict[str, bytes]:
    """The files of save `n`: no two saves share a byte range, sizes differ and are no multiples of a page."""
    data = struct.pack("<I", n) * (5000 + 10 * n)
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    header += b" " * (-len(header) % 8)
    return {
        "model.safetensors": struct.pack("<Q", len(header)) + header + data,
        "config.json": json.dumps({"n": n, "pad": "x" * n}).encode(),
        "inner/tokens.bin": f"tokens of {n}\n".encode() * 400,
    }


def place(arena: Arena, n: int, step: int, keep: int, ship: Sequence[dict[str, Any]] = ()) -> tuple[int, int]:
    """Put save `n` into `arena`, files and job; returns offset and length of the job."""
    start, slots = DATA_START, []
    for name, data in contents(n).items():
        arena.clear(start, start + pages(len(data)))
        arena.write(start, data)
        slots.append({"name": name, "start": start, "size": len(data)})
        start += pages(len(data))
    job = {
        "save_id": f"{n:032x}",
        "step": step,
        "name": f"checkpoint-{step}",
        "files": slots,
        "checksums": {},
        "links": [list(LINK)],
        "manifest": {},
        "retention": KeepLast(keep).spec(),
        "latest_link": False,
        "ship": list(ship),
        "max_unshipped": None,
        "waves": 0,
    }
    encoded = json.dumps(job).encode()
    arena.write(start, encoded)
    return start, len(encoded)


class _Save:
    """A `supervisor.Job`: save `n`, placed in `arena`; its progress is said over the line."""

    def __init__(self, talk: Talk, arena: Arena, n: int, step: int, keep: int) -> None:
        self.serial, self.arena, self.n = n, arena, n
        self.ended = threading.Event()
        self._talk = talk
        self._deaths = 0
        self._location = place(arena, n, step, keep)

    def location(self) -> tuple[int, int]:
        return self._location

    def accepted(self) -> None:
        self._talk.say(f"STAGED {self.n}")

    def writing(self) -> None: ...

    def wave_written(self) -> None: ...

    def writer_died(self, error: Exception) -> bool:
        self._deaths += 1
        if self._deaths < LIVES:
            return True
        self.failed(error)
        return False

    def committed(self, reply: dict[str, Any]) -> None:
        self._talk.say(f"ACK {self.n}")
        self._talk.say(f"ENDED {self.n}")
        self.ended.set()

    def failed(self, error: Exception) -> None:
        self._talk.say(f"ERR {self.n} {error}")
        self._talk.say(f"ENDED {self.n}")
        self.ended.set()


class _Buffered(LocalFilesystem):
    """A file system without O_DIRECT: what is not synced is in the page cache only."""

    def create(self, path: str, *, direct: bool) -> int:
        if direct:
            raise OSError(errno.EINVAL, "no O_DIRECT here", path)
        return super().create(path, direct=False)


class _Supervisor(Supervisor):
    """Starts its first writer process under `tracer`, a script that takes the interpreter's arguments.

    With `dies_too`, it kills its own process where it would start another one: to the disk, both died at once.
    """

    tracer: str | None = None
    dies_too = False
    tidied: Callable[[], None] = staticmethod(lambda: None)  # what follows a commit is over, well or not

    def _handle(self, reply: dict[str, Any]) -> None:
        super()._handle(reply)
        if reply["event"] == "tidy" or (reply["event"] == "warning" and reply.get("serial") not in self._jobs):
            self.tidied()

    def _start(self) -> Any:
        interpreter = sys.executable
        self._starts = getattr(self, "_starts", itertools.count())
        if next(self._starts) and self.dies_too:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.tracer:
            sys.executable, self.tracer = self.tracer, None
        try:
            return super()._start()
        finally:
            sys.executable = interpreter


def save(
    talk: Talk,
    root: str,
    writer: str,
    keep: int,
    saves: list[tuple[int, int]],
    direct: bool = True,
    wait: bool = False,
    tracer: str | None = None,
    dies_too: bool = False,
) -> None:
    """Make `saves`, a list of (n, step), one after another; then close. With `wait`, begin when told to."""
    assert "torch" not in sys.modules
    if wait:
        talk.listen()
    logging.getLogger("vembed_async_ckpt").addHandler(talk.log_handler())
    os.makedirs(root, exist_ok=True)
    lock = RootLock.acquire(root)
    reporter = Reporter([lambda event: talk.say(f"EVENT {event.stage} {event.phase} {event.detail}")])
    arena = Arena(1, _ARENA)
    _Supervisor.tracer, _Supervisor.dies_too = tracer, dies_too
    filesystem = LocalFilesystem() if direct else _Buffered()
    supervisor = _Supervisor(root, lock, writer, lambda: [arena], reporter, filesystem)
    for n, step in saves:
        job = _Save(talk, arena, n, step, keep)
        supervisor.submit(job)
        if not job.ended.wait(PATIENCE):
            faulthandler.dump_traceback()
            raise AssertionError(f"save {n} never ended")
    assert supervisor.close(PATIENCE)
    lock.close()
    reporter.close(PATIENCE)
    talk.say("CLOSED")


def obey(talk: Talk, root: str, writer: str = "process", keep: int = 1, direct: bool = True) -> None:
    """Do what the test says: `save N STEP` (ENDED is said when it has ended, TIDIED when what follows has too), `close`."""
    logging.getLogger("vembed_async_ckpt").addHandler(talk.log_handler())
    os.makedirs(root, exist_ok=True)
    lock = RootLock.acquire(root)
    reporter = Reporter([lambda event: talk.say(f"EVENT {event.stage} {event.phase} {event.detail}")])
    arena = Arena(1, _ARENA)
    _Supervisor.tidied = staticmethod(lambda: talk.say("TIDIED"))
    filesystem = LocalFilesystem() if direct else _Buffered()
    supervisor = _Supervisor(root, lock, writer, lambda: [arena], reporter, filesystem)
    while word := talk.listen():
        verb, *numbers = word.split()
        if verb == "save":
            supervisor.submit(_Save(talk, arena, *map(int, numbers), keep))
        elif verb == "close":
            talk.say(f"CLOSED {supervisor.close(float(numbers[0]) if numbers else PATIENCE)}")
    lock.close()
    reporter.close(PATIENCE)


def idle(talk: Talk, root: str) -> None:
    """Say how many seconds of processor time a thread writer takes in half a second without a save."""
    os.makedirs(root)
    arena = Arena(1, _ARENA)
    supervisor = Supervisor(root, RootLock.acquire(root), "thread", lambda: [arena], Reporter())
    first = _Save(talk, arena, 1, 1, keep=1)
    supervisor.submit(first)
    assert first.ended.wait(PATIENCE)
    before = time.process_time()
    time.sleep(0.5)
    talk.say(f"USED {time.process_time() - before}")
    assert supervisor.close(PATIENCE)
