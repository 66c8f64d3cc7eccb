"""Staging: copies a state to its place in an arena, either at once or while forward and backward run.

A late copy holds `.data` aliases, made for each save and dropped when the copy is done. They keep the old memory alive
when a parameter gets new storage. (`detach()` would do the same in twice the time.)
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch

from .. import _signals
from ..errors import StageError
from ..events import logger
from .barrier import STEP_BARRIER, CopyPlan
from .captures import is_capturing
from .devices import DeviceCopies
from .host_copy import DEADLINE, MAX_THREADS, TOO_SLOW, Group, addresses_of, copy_alone, copy_group, groups
from .profiling import recorded

_DATA, _VERSION = attrgetter("data"), attrgetter("_version")


class DeferredCopy:
    """The tensors that may be copied after `save()` has returned, and their state at the call.

    Two checks detect a change in the meantime. Neither is a proof. Version counters do not see fused optimizers,
    `.data` and numpy. The last bytes of a tensor in host memory do not show writes elsewhere in it. Tensors on a device
    have the version counter only.
    """

    def __init__(
        self,
        copy_plan: CopyPlan,
        destinations: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
        wrappers: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """Make aliases of the late `tensors`, and record their versions, addresses and last bytes.

        `wrappers`: for each of them, another tensor that shows the same memory and has a version counter of its own, as
        a DTensor has.
        """
        self.names = copy_plan.names
        self._copy_plan = copy_plan
        self._destinations = destinations
        self._tensors = tensors
        self.aliases: list[torch.Tensor] = list(map(_DATA, tensors))
        watched = [(name, wrapper) for name, wrapper in zip(self.names, wrappers, strict=False) if wrapper is not None]
        self._wrapped = [name for name, _ in watched], [wrapper for _, wrapper in watched]
        self._versions = list(map(_VERSION, tensors)), list(map(_VERSION, self._wrapped[1]))
        self._addresses = addresses_of(self.aliases, self.names)
        self._last_bytes = copy_plan.tails.read(copy_plan.host_part(self._addresses))

    def device_part(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return (destinations, sources) of the copies from devices."""
        return self._copy_plan.device_part(self._destinations), self._copy_plan.device_part(self.aliases)

    def host_part(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Return (destinations, sources) of the copies within host memory."""
        return self._copy_plan.host_part(self._destinations), self._copy_plan.host_part(self.aliases)

    def moved(self) -> str | None:
        """Return the name of a tensor whose storage was freed or resized since the call, or None.

        The memory of such a tensor must not be read.
        """
        for name, before, now in zip(
            self.names, self._addresses, map(torch.Tensor.data_ptr, self.aliases), strict=True
        ):
            if now != before:
                return name
        return None

    def changed_version(self) -> str | None:
        """Return the name of a tensor that changed since the call according to its version counter, or None."""
        wrapped, wrappers = self._wrapped
        for names, before, tensors in (
            (self.names, self._versions[0], self._tensors),
            (wrapped, self._versions[1], wrappers),
        ):
            for name, then, now in zip(names, before, map(_VERSION, tensors), strict=True):
                if now != then:
                    return name
        return None

    def check(self) -> str | None:
        """Return the name of a tensor that changed between the call and the end of the copy, or None.

        None is no proof: see the class.
        """
        changed = self.changed_version()
        if changed is not None:
            return changed
        copy_plan = self._copy_plan
        copied = copy_plan.staged_tails.read(list(map(torch.Tensor.data_ptr, copy_plan.host_part(self._destinations))))
        if copied == self._last_bytes:
            return None
        for name, alias, before, after in zip(
            copy_plan.host_part(self.names), copy_plan.host_part(self.aliases), self._last_bytes, copied, strict=True
        ):
            # A tensor that is not contiguous (any more) has its last bytes elsewhere.
            if before != after and alias.is_contiguous():
                return name
        return None


class SharedCopy:
    """A copy within host memory. One thread makes it beside the training; more threads join when the training waits."""

    def __init__(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        self._left: deque[Group] = deque(groups(destinations, sources))  # groups that no thread has taken yet
        self._changed = threading.Condition()
        self._open = len(self._left)  # groups that are not finished yet
        self._error: BaseException | None = None

    def run(self) -> None:
        """Return when every byte has arrived. Raises what a copy raised, after every thread has stopped copying.

        Raises `StageError` if the copy does not end within `DEADLINE` seconds.
        """
        self._copy(copy_group)
        with self._changed:
            if not self._changed.wait_for(lambda: self._open == 0, DEADLINE):
                raise StageError(TOO_SLOW)
        if self._error is not None:
            raise self._error

    def help(self, threads: int) -> None:
        """Start up to `threads` more threads for this copy, or as many as the process can have.

        They end with the copy.
        """
        for _ in range(threads if self._left else 0):
            try:
                threading.Thread(target=self._copy, args=(copy_alone,), name="vembed-ckpt-copy", daemon=True).start()
            except RuntimeError:
                return

    def _copy(self, copy: Callable[[list[torch.Tensor], list[torch.Tensor]], None]) -> None:
        while True:
            try:
                to, of = self._left.popleft()
            except IndexError:
                return
            try:
                if self._error is None:
                    addresses_of(of)
                    copy(to, of)
            except BaseException as error:
                self._error = error
            finally:
                del to, of
                with self._changed:
                    self._open -= 1
                    self._changed.notify_all()


class TornSnapshot(StageError):
    """A tensor changed while it was copied: overlap cannot be used with this training."""


class Snapshot:
    """One overlapped copy.

    The staging thread runs it; optimizers wait for it at the barrier until the last byte has arrived.

    `waited`: seconds for which it held up optimizer steps.
    `went_on`: when the last held-up step continued, as time.time().
    `error`: after `run`, None or the reason why the copy is not a valid snapshot.
    """

    def __init__(self, late: DeferredCopy, device: DeviceCopies | None = None) -> None:
        """`device` issues the copies from devices, if there are any."""
        self._late: DeferredCopy | None = late
        self._device = device
        self._host: SharedCopy | None = None
        self._helpers = 0  # how many more threads the copy shall use
        self._copied = threading.Event()  # host memory is copied, and the copies from devices are issued
        self._arrived = threading.Event()
        self._passed = False  # an optimizer has passed the barrier
        self.waited = 0.0
        self.went_on = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        """Copy. Afterwards optimizers continue, also after a failure, and no alias is held any more."""
        late = self._late
        assert late is not None
        try:
            changed = self._changed(late)
            if changed is not None:
                self.error = TornSnapshot(
                    f"{changed!r} was changed while it was being copied, without passing through a torch optimizer's step; "
                    'use staging="blocking", or wait for handle.wait_staged() before changing it. '
                    "Later saves of this checkpointer are blocking"
                )
        except BaseException as error:
            self.error = error.with_traceback(None)  # the frames of the traceback hold the aliases
        finally:
            self._late = self._host = None
            del late
            self._end()

    def _changed(self, late: DeferredCopy) -> str | None:
        """Copy the tensors. Return the name of the first one that changed since `save()`, or None."""
        try:
            return late.moved() or self._copy(late)
        except StageError:
            moved = late.moved()
            if moved is None:
                raise
            return moved

    def _copy(self, late: DeferredCopy) -> str | None:
        """Copy the tensors. Return the name of one that changed meanwhile, or None."""
        if self._device is not None:
            self._device.issue(*late.device_part())
        self._host = SharedCopy(*late.host_part())
        self._host.help(self._helpers)
        self._host.run()
        changed = late.check()
        self._copied.set()
        if self._device is not None:
            self._device.wait()
            later = late.changed_version()
            if not self._passed:  # otherwise an optimizer may have stepped already, ordered after the copies
                changed = changed or later
        return changed

    def abandon(self) -> None:
        """Drop the snapshot of a save that failed before it was submitted.

        The aliases are released, and no optimizer waits for it.
        """
        self._late = None
        self._end()

    def _end(self) -> None:
        STEP_BARRIER.remove(self)
        self._copied.set()
        self._arrived.set()

    def copy_with_more_threads(self) -> None:
        """The training waits now: copy with as many more threads as it would use."""
        self._helpers = min(torch.get_num_threads(), MAX_THREADS)
        if (host := self._host) is not None:
            host.help(self._helpers)

    def barrier(self) -> None:
        # A CUDA graph that is being recorded cannot wait for events from outside of it.
        awaited = self._arrived if is_capturing() else self._copied
        if not awaited.is_set():
            begun = time.perf_counter()
            with _signals.held(), recorded("barrier"):
                self.copy_with_more_threads()
                while not awaited.wait(_signals.SLICE):
                    _signals.deliver()
                    if time.perf_counter() - begun > DEADLINE:
                        raise StageError(TOO_SLOW)
            self.waited += time.perf_counter() - begun
            self.went_on = time.time()
        if self._device is not None and not self._arrived.is_set():
            self._device.hold_back()
        self._passed = True


class StagingThread:
    """The thread that makes late copies and finishes saves.

    It uses one intra-op thread. A second OpenMP team in the process would make every step of a small model slower as
    long as it exists, even while it is idle.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vembed-ckpt-staging", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job. The job must not raise."""
        self._jobs.put(job)

    def check(self) -> None:
        """Raise `StageError` if the thread has ended, so that no job would run."""
        if not self._thread.is_alive():
            raise StageError("the staging thread has ended; make a new checkpointer")

    def close(self, timeout: float) -> None:
        """End the thread after the jobs queued so far. Wait at most `timeout` seconds."""
        self._jobs.put(None)
        _signals.join(self._thread, timeout)

    def _run(self) -> None:
        _use_one_thread()
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:
                logger.exception("a job of the staging thread failed")  # a job ends its own save; the thread goes on
            del job


def _use_one_thread() -> None:
    """Limit this thread to one intra-op thread.

    In OpenMP `set_num_threads` applies to the calling thread, but it also becomes the default of threads created later.
    Another thread therefore restores the old default.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(count,))
    restore.start()
    restore.join()
