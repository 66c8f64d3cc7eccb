"""The handle says how a save ended, to whoever waits in whatever way; a failure is raised once, never twice and never lost."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
import torch
import trio

from vembed_async_ckpt import (
    AsyncCheckpointer,
    CheckpointerClosed,
    CheckpointInfo,
    Event,
    SaveHandle,
    SaveState,
    WriteError,
    latest,
)
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._engine import leader as engine

BOUND = 20


class Disk(LocalFilesystem):
    """A disk that can be held up, and that can be full."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.writing = threading.Event()
        self.full = False

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        self.writing.set()
        assert self.go.wait(BOUND)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, data, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    filesystem = Disk()
    monkeypatch.setattr(engine, "Supervisor", functools.partial(engine.Supervisor, filesystem=filesystem))
    yield filesystem
    filesystem.go.set()


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Linear(3, 3)


Open = Callable[..., AsyncCheckpointer]


@pytest.fixture
def checkpointer(root: Path, disk: Disk) -> Iterator[AsyncCheckpointer]:
    with AsyncCheckpointer(root, writer="thread") as made:
        yield made
        disk.go.set()
        disk.full = False


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def failed(checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module, step: int = 1) -> SaveHandle:
    """A save that has failed, its failure still unread."""
    disk.full = True
    ended = threading.Event()
    handle = checkpointer.save(step, model=model)
    handle.add_done_callback(lambda h: ended.set())
    assert ended.wait(BOUND)
    disk.full = False
    assert handle.state is SaveState.FAILED
    return handle


def test_a_save_goes_from_staged_to_committed(checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module):
    """State, progress, done, result and repr on the way and at the end."""
    disk.go.clear()
    handle = checkpointer.save(5, model=model)
    handle.wait_staged(BOUND)
    assert disk.writing.wait(BOUND)
    assert handle.state in (SaveState.STAGED, SaveState.WRITING)
    assert not handle.done()
    written, total = handle.progress
    assert written == 0
    assert total > 0
    with pytest.raises(TimeoutError, match=r"step 5.*0\.01 s"):
        handle.result(0.01)
    with pytest.raises(TimeoutError):
        handle.exception(0)
    with pytest.raises(TimeoutError, match="1 saves"):
        checkpointer.wait(0.01)
    disk.go.set()
    info = handle.result(BOUND)
    assert isinstance(info, CheckpointInfo)
    assert (info.step, info.path) == (5, handle.path)
    assert info.total_bytes == sum(info.files.values())
    assert {name: (info.path / name).stat().st_size for name in info.files} == dict(info.files)
    assert handle.done()
    assert handle.state is SaveState.COMMITTED
    assert handle.exception() is None
    assert handle.progress == (total, total)
    assert "step=5 committed" in repr(handle)
    with pytest.raises(AttributeError):
        info.timings.stall = 0.0  # type: ignore[misc]
    assert all(
        getattr(info.timings, part) >= 0 for part in ("stall", "staging", "queued", "write", "commit", "durable")
    )


def test_wait_staged_times_out_while_staging(root: Path, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch):
    """Before it is staged, wait_staged waits; the save goes on when the wait is given up."""
    go = threading.Event()
    finish = engine.Save.finish

    def held(self: Any) -> None:
        assert go.wait(BOUND)
        finish(self)

    monkeypatch.setattr(engine.Save, "finish", held)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model)
        assert handle.state is SaveState.STAGING
        with pytest.raises(TimeoutError, match="staging"):
            handle.wait_staged(0.01)
        go.set()
        handle.wait_staged(BOUND)
        handle.result(BOUND)


def test_callbacks_get_the_handle_once_whatever_came_of_it(
    checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module, caplog: pytest.LogCaptureFixture
):
    """Added before or after the end, called for success and failure; one that raises is logged and stops no other."""
    called: list[tuple[str, SaveHandle]] = []
    done = threading.Event()

    def broken(handle: SaveHandle) -> None:
        raise ValueError("of the user's own")

    disk.go.clear()
    handle = checkpointer.save(1, model=model)
    handle.add_done_callback(broken)
    handle.add_done_callback(lambda h: called.append(("before", h)))
    disk.go.set()
    handle.result(BOUND)
    handle.add_done_callback(lambda h: (called.append(("after", h)), done.set()))
    assert done.wait(BOUND)
    assert called == [("before", handle), ("after", handle)]
    assert "of the user's own" in caplog.text
    bad = failed(checkpointer, disk, model, 2)
    done.clear()
    bad.add_done_callback(lambda h: (called.append(("failed", h)), done.set()))
    assert done.wait(BOUND)
    assert called[-1] == ("failed", bad)
    bad.exception()


def test_a_callback_added_after_close_is_called(root: Path, model: torch.nn.Module):
    """ "At once if it has ended" holds also when the reporting thread is gone."""
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model)
    called = threading.Event()
    handle.add_done_callback(lambda h: called.set())
    assert called.wait(5)


# -- await


def on_asyncio(function: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(function())  # type: ignore[arg-type]


def on_trio(function: Callable[[], Awaitable[Any]]) -> Any:
    return trio.run(function)


async def cancelled_await(handle: SaveHandle, backend: Callable[..., Any]) -> bool:
    """Whether awaiting the handle was cut off by a short time limit."""
    if backend is on_trio:
        with trio.move_on_after(0.02) as scope:
            await handle
        return scope.cancelled_caught
    try:
        async with asyncio.timeout(0.02):
            await handle
    except TimeoutError:
        return True
    return False


BACKENDS = pytest.mark.parametrize("backend", [on_asyncio, on_trio], ids=["asyncio", "trio"])


@BACKENDS
def test_await_gives_the_result(
    checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module, backend: Callable[..., Any]
):
    """On both event loops, while it runs and after it has ended; no thread is parked and no descriptor left."""
    checkpointer.save(0, model=model).result(BOUND)  # all its threads run, its arena is there
    checkpointer.wait(BOUND)
    threads, fds = threading.active_count(), descriptors()

    async def wait() -> CheckpointInfo:
        disk.go.clear()
        handle = checkpointer.save(1, model=model)
        handle.wait_staged(BOUND)
        threading.Timer(0.05, disk.go.set).start()
        info = await handle
        assert await handle is info
        return info

    assert backend(wait).step == 1
    checkpointer.wait(BOUND)
    assert threading.active_count() <= threads + 1  # the timer's, perhaps
    assert descriptors() == fds


@BACKENDS
def test_a_cancelled_await_touches_nothing(
    checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module, backend: Callable[..., Any]
):
    """The save goes on, may be awaited again, and no descriptor is left of 50 waits given up."""
    disk.go.clear()
    handle = checkpointer.save(1, model=model)
    handle.wait_staged(BOUND)

    async def impatient() -> None:
        assert await cancelled_await(handle, backend)
        fds = descriptors()
        for _ in range(50):
            assert await cancelled_await(handle, backend)
        assert descriptors() == fds
        assert not handle.done()
        disk.go.set()
        assert (await handle).step == 1

    backend(impatient)


@BACKENDS
def test_await_raises_what_failed(
    checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module, backend: Callable[..., Any]
):
    """And so it is read: the next save does not raise it again."""
    handle = failed(checkpointer, disk, model)

    async def wait() -> None:
        await handle

    with pytest.raises(WriteError, match="No space left"):
        backend(wait)
    checkpointer.save(2, model=model).result(BOUND)


@pytest.mark.asyncio
async def test_many_wait_for_one(checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module):
    """Tasks, a thread and a callback all see the same end."""
    disk.go.clear()
    handle = checkpointer.save(1, model=model)
    thread = asyncio.create_task(asyncio.to_thread(handle.result, BOUND))

    async def wait() -> CheckpointInfo:
        return await handle

    tasks = [asyncio.create_task(wait()) for _ in range(20)]
    await asyncio.sleep(0)
    disk.go.set()
    results = await asyncio.gather(thread, *tasks)
    assert all(result is results[0] for result in results)


@BACKENDS
def test_async_with_and_the_stream_of_events(root: Path, model: torch.nn.Module, backend: Callable[..., Any]):
    """`async for` sees the stages of a save in order, and ends after close()."""
    seen: list[Event] = []

    async def main() -> None:
        async def listen(checkpointer: AsyncCheckpointer) -> None:
            async for event in checkpointer.events():
                seen.append(event)

        async with anyio.create_task_group() as tasks, AsyncCheckpointer(root, writer="thread") as checkpointer:
            with anyio.fail_after(BOUND):
                tasks.start_soon(listen, checkpointer)
                while not checkpointer._reporter._sinks:
                    await anyio.sleep(0)
                for step in (1, 2):
                    assert (await checkpointer.save(step, model=model)).step == step

    backend(main)
    stages = [(event.stage, event.phase) for event in seen if event.step == 2]
    assert stages[-4:] == [("stage", "complete"), ("write", "started"), ("write", "complete"), ("save", "complete")]
    assert all(event.save_id for event in seen if event.step == 2)


@pytest.mark.asyncio
async def test_a_stream_given_up_leaves_nothing(checkpointer: AsyncCheckpointer, model: torch.nn.Module):
    """Breaking out of `async for` takes the sink and its descriptor away."""
    await checkpointer.save(0, model=model)
    fds, sinks = descriptors(), len(checkpointer._reporter._sinks)
    for step in range(5):
        events: AsyncIterator[Event] = checkpointer.events()
        pending = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await checkpointer.save(step, model=model)
        await pending
        await events.aclose()  # type: ignore[attr-defined]
    assert len(checkpointer._reporter._sinks) == sinks
    assert descriptors() == fds


@pytest.mark.asyncio
async def test_a_stream_that_ends_never_writes_to_a_descriptor_of_others(
    root: Path, disk: Disk, model: torch.nn.Module
):
    """An event that is being delivered while the stream is closed must not reach whoever has got its descriptor since."""
    entered, leave = threading.Event(), threading.Event()
    leave.set()

    def slow(event: Event) -> None:
        entered.set()
        assert leave.wait(BOUND)

    async with AsyncCheckpointer(root, writer="thread", sinks=[slow]) as checkpointer:
        events = checkpointer.events()
        pending = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)  # its sink is in place, behind the slow one
        await checkpointer.save(0, model=model)
        await pending
        checkpointer.wait(BOUND)
        await flushed(checkpointer)
        for gate in (entered, leave, disk.go, disk.writing):
            gate.clear()
        handle = checkpointer.save(1, model=model)
        assert await asyncio.to_thread(entered.wait, BOUND)  # an event is on its way to both
        assert await asyncio.to_thread(disk.writing.wait, BOUND)  # and nobody opens or closes anything
        bell = events.ag_frame.f_locals["bell"]._other  # type: ignore[attr-defined]
        await events.aclose()  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(bell)
        mine = os.eventfd(0, os.EFD_NONBLOCK)
        if mine != bell:
            os.dup2(mine, bell)
        leave.set()
        disk.go.set()
        await handle
        await flushed(checkpointer)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(mine)
        for fd in {mine, bell}:
            os.close(fd)


async def flushed(checkpointer: AsyncCheckpointer) -> None:
    """Return once every event so far has been delivered."""
    done = threading.Event()
    checkpointer._reporter.call(done.set)
    assert await asyncio.to_thread(done.wait, BOUND)


# -- failures: once, and never lost


def test_an_unread_failure_is_raised_once_by_the_next_save(
    checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module, root: Path
):
    """Before anything of that call is saved; the repeated call saves, and it is not raised again."""
    handle = failed(checkpointer, disk, model)
    with pytest.raises(WriteError, match=r"checkpoint-1 was not saved.*No space left") as raised:
        checkpointer.save(2, model=model)
    assert raised.value is handle.exception()
    assert list(root.glob("checkpoint-*")) == []
    checkpointer.save(2, model=model).result(BOUND)
    checkpointer.close()


def raising(wait: Callable[[float], Any]) -> None:
    with pytest.raises(WriteError):
        wait(BOUND)


READERS: dict[str, Callable[[SaveHandle], Any]] = {
    "exception": lambda handle: handle.exception(BOUND),
    "result": lambda handle: raising(handle.result),
    "wait_staged": lambda handle: raising(handle.wait_staged),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_failure_that_was_read_is_not_raised_again(
    checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module, read: Callable[[SaveHandle], Any]
):
    """Whoever has seen it on the handle is not told once more."""
    read(failed(checkpointer, disk, model))
    checkpointer.save(2, model=model).result(BOUND)
    checkpointer.close()


def test_looking_at_a_handle_does_not_read_its_failure(
    checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module
):
    """done(), state, repr and a callback see that it failed; the failure itself is still to be told."""
    handle = failed(checkpointer, disk, model)
    assert handle.done()
    assert "failed" in repr(handle)
    handle.add_done_callback(lambda h: None)
    with pytest.raises(WriteError):
        checkpointer.save(2, model=model)


def test_each_of_several_failures_is_told(checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module):
    """Two failures that nobody read: one per call, the first one first."""
    failed(checkpointer, disk, model, 1)
    with pytest.raises(WriteError, match="checkpoint-1"):
        checkpointer.save(2, model=model)
    failed(checkpointer, disk, model, 2)
    with pytest.raises(WriteError, match="checkpoint-2"):
        checkpointer.save(3, model=model)
    checkpointer.save(3, model=model).result(BOUND)
    statistics = checkpointer.statistics()
    assert (statistics["started"], statistics["committed"], statistics["failed"]) == (3, 1, 2)
    assert "checkpoint-2" in statistics["last_error"]


def test_a_failure_is_not_lost_in_the_moment_of_its_end(
    checkpointer: AsyncCheckpointer, disk: Disk, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
):
    """A save() that comes after the failure is noted and before its handle says so leaves it for the next one."""
    ending, go = threading.Event(), threading.Event()
    move = SaveHandle._move

    def slow(self: SaveHandle, state: SaveState, *rest: Any, **named: Any) -> None:
        if state is SaveState.FAILED:
            ending.set()
            assert go.wait(BOUND)
        move(self, state, *rest, **named)

    monkeypatch.setattr(SaveHandle, "_move", slow)
    disk.full = True
    first = checkpointer.save(1, model=model)
    assert ending.wait(BOUND)
    disk.full = False
    second = checkpointer.save(2, model=model)
    go.set()
    second.result(BOUND)
    assert first.done()
    with pytest.raises(WriteError, match="checkpoint-1"):
        checkpointer.save(3, model=model)


def test_close_raises_an_unread_failure_once(root: Path, disk: Disk, model: torch.nn.Module):
    """The last chance to tell; everything is closed all the same."""
    checkpointer = AsyncCheckpointer(root, writer="thread")
    failed(checkpointer, disk, model)
    with pytest.raises(WriteError, match="No space left"):
        checkpointer.close()
    checkpointer.close()
    with pytest.raises(CheckpointerClosed):
        checkpointer.save(2, model=model)
    AsyncCheckpointer(root, writer="thread").close()


def test_the_context_manager_raises_it_but_never_instead_of_the_training_s_own(
    root: Path, disk: Disk, model: torch.nn.Module, caplog: pytest.LogCaptureFixture
):
    """At a normal end the failure comes out; under an exception of the training it is logged."""
    with pytest.raises(WriteError), AsyncCheckpointer(root, writer="thread") as checkpointer:
        failed(checkpointer, disk, model)
    caplog.clear()

    def training() -> None:
        with AsyncCheckpointer(root, writer="thread") as checkpointer:
            failed(checkpointer, disk, model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        training()
    assert "No space left" in caplog.text


def test_on_error_warn_logs_and_goes_on(
    root: Path, disk: Disk, model: torch.nn.Module, caplog: pytest.LogCaptureFixture
):
    """Nothing is raised by save() or close(); the log and the statistics say it, the handle raises it if asked."""
    with AsyncCheckpointer(root, writer="thread", on_error="warn") as checkpointer:
        handle = failed(checkpointer, disk, model)
        checkpointer.save(2, model=model).result(BOUND)
        assert "No space left" in checkpointer.statistics()["last_error"]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING and "No space left" in r.getMessage()]) == 1
    with pytest.raises(WriteError):
        handle.result()


def test_a_failed_save_leaves_the_earlier_checkpoint(root: Path, disk: Disk, model: torch.nn.Module):
    """The same step again: when it fails, the directory is the old one, whole (the fixture verifies it)."""
    with AsyncCheckpointer(root, writer="thread", on_error="warn") as checkpointer:
        checkpointer.save(1, model=model, extra="first").result(BOUND)
        failed(checkpointer, disk, model)
    assert (root / "checkpoint-1" / "vembed_training_state.json").read_text().count("first")


# -- ending


def test_close_is_bounded_and_the_save_goes_on(root: Path, disk: Disk, model: torch.nn.Module):
    """TimeoutError in time; what was staged is written all the same."""
    checkpointer = AsyncCheckpointer(root, writer="thread")
    disk.go.clear()
    handle = checkpointer.save(1, model=model)
    handle.wait_staged(BOUND)
    with pytest.raises(TimeoutError):
        checkpointer.close(0.1)
    with pytest.raises(CheckpointerClosed):
        checkpointer.save(2, model=model)
    disk.go.set()
    assert handle.result(BOUND).step == 1


def test_close_may_be_called_again_and_by_several(root: Path, model: torch.nn.Module):
    """The second call returns; so does one from another thread."""
    checkpointer = AsyncCheckpointer(root, writer="thread")
    checkpointer.save(1, model=model)
    threads = [threading.Thread(target=checkpointer.close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert not any(thread.is_alive() for thread in threads)
    checkpointer.close()
    assert "closed" in repr(checkpointer)


# -- sinks


def test_a_sink_that_raises_is_logged_and_fails_nothing(
    root: Path, model: torch.nn.Module, caplog: pytest.LogCaptureFixture
):
    """The other sinks still get every event."""
    seen: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError("the user's sink")

    with AsyncCheckpointer(root, writer="thread", sinks=[broken, seen.append]) as checkpointer:
        checkpointer.save(1, model=model).result(BOUND)
    assert ("save", "complete") in [(event.stage, event.phase) for event in seen]
    assert "the user's sink" in caplog.text


def test_a_sink_that_blocks_holds_up_reports_not_saves(root: Path, model: torch.nn.Module):
    """save(), result() and further saves go on while it blocks; close() does not wait for it longer than allowed."""
    go = threading.Event()
    checkpointer = AsyncCheckpointer(root, writer="thread", sinks=[lambda event: go.wait(BOUND)])
    for step in range(3):
        checkpointer.save(step, model=model).result(5)
    checkpointer.close(5)
    go.set()


def test_events_are_frozen_and_timed(root: Path, model: torch.nn.Module):
    """What a sink gets cannot be changed by it, and says how long each stage took."""
    seen: list[Event] = []
    with AsyncCheckpointer(root, writer="thread", sinks=[seen.append]) as checkpointer:
        info = checkpointer.save(4, model=model).result(BOUND)
    (complete,) = [event for event in seen if (event.stage, event.phase) == ("save", "complete")]
    assert (complete.step, complete.bytes) == (4, info.total_bytes)
    assert complete.seconds > 0
    with pytest.raises(AttributeError):
        complete.step = 5  # type: ignore[misc]
    assert [e.time for e in seen] == sorted(e.time for e in seen)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, which is not looked at afterwards."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_disk_that_is_too_small_is_named_before_anything_is_staged(
    small_disk: Path, on_error: Literal["raise", "warn"]
) -> None:
    """The error has the numbers; room that was made since is seen at once, and the save works."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(20 << 20))
    model = torch.nn.Linear(1000, 2000)
    seen: list[Event] = []
    with AsyncCheckpointer(small_disk / "root", on_error=on_error, sinks=[seen.append]) as checkpointer:
        checkpointer.save(1, extra={"the writer": "has looked at the disk"}).result(60)
        if on_error == "raise":
            with pytest.raises(WriteError, match=r"at least 8\d{6} bytes are needed, \d+ are free"):
                checkpointer.save(2, model=model)
        else:
            error = checkpointer.save(2, model=model).exception(60)
            assert isinstance(error, WriteError)
            assert checkpointer.statistics()["last_error"] == str(error)
        assert latest(small_disk / "root") == small_disk / "root" / "checkpoint-1"
        ballast.unlink()
        checkpointer.save(2, model=model).result(60)
    assert [event.step for event in seen if (event.stage, event.phase) == ("stage", "complete")] == [1, 2]
