"""Staging: copies a state to its place in an arena, either at once or while forward and backward run.

A late copy holds the storages of its tensors until it is done. They keep the old memory alive when a parameter gets new
storage.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy.typing as npt
import torch

from .. import _signals
from ..errors import StageError
from ..events import logger
from .addresses import TailProbe
from .barrier import STEP_BARRIER, CopyPlan
from .captures import is_capturing
from .devices import DeviceCopies
from .host_copy import DEADLINE, MAX_THREADS, TOO_SLOW, Group, Groups, copy_alone, copy_group, no_memory
from .profiling import recorded

_DATA, _VERSION = attrgetter("data"), attrgetter("_version")
_START: Callable[[Any], int] = torch.UntypedStorage.data_ptr


class DeferredCopy:
    """The tensors that may be copied after `save()` has returned, and their state at the call.

    Two checks detect a change in the meantime. Neither is a proof. Version counters do not see fused optimizers,
    `.data` and numpy. The last bytes of a tensor in host memory do not show writes elsewhere in it. Tensors on a device
    have the version counter only.
    """

    def __init__(
        self,
        copy_plan: CopyPlan,
        places: LatePlaces,
        tensors: Sequence[torch.Tensor],
        wrappers: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """Hold the storages of the late `tensors`, and record their versions, addresses and last bytes.

        `wrappers`: for each of them, another tensor that shows the same memory and has a version counter of its own, as
        a DTensor has.

        Raises `StageError` for a tensor with freed storage.
        """
        self.names = copy_plan.names
        self._copy_plan = copy_plan
        self._places = places
        self._tensors = tensors
        named = [(name, wrapper) for name, wrapper in zip(self.names, wrappers, strict=False) if wrapper is not None]
        self._counting = [*tensors, *(wrapper for _, wrapper in named)]
        self._names_of_counting = [*self.names, *(name for name, _ in named)]
        self._versions = list(map(_VERSION, self._counting))
        self._storages = list(map(torch.Tensor.untyped_storage, tensors))
        self._memory = list(map(_START, self._storages))
        if 0 in self._memory:
            raise no_memory(repr(self.names[self._memory.index(0)]))
        self._addresses = list(map(torch.Tensor.data_ptr, tensors))
        self._in_host: tuple[list[torch.UntypedStorage], list[int]] = [], []
        self._last_bytes = copy_plan.tails.read(copy_plan.in_host.of(self._addresses))

    def sources(self) -> list[torch.Tensor]:
        """Return the tensors as they were at the call: `p.data = other` may have given them other memory since."""
        aliases = list(map(_DATA, self._tensors))
        # `.data` holds the GIL. So the training cannot give a tensor other memory in the middle of it.
        if list(map(torch.Tensor.data_ptr, aliases)) == self._addresses and self._copy_plan.looks.holds(aliases):
            return aliases
        return list(map(_tensor_at, self._storages, self._addresses, self._copy_plan.shapes))

    def groups(self, sources: Sequence[torch.Tensor]) -> Iterator[Group]:
        """Return the copies within host memory, in groups."""
        in_host = self._copy_plan.in_host
        self._in_host = in_host.of(self._storages), in_host.of(self._memory)
        return self._places.groups.of(in_host.of(sources))

    def device_part(self, sources: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return (destinations, sources) of the copies from devices."""
        return self._places.on_device, self._copy_plan.on_device.of(sources)

    def refuse_if_moved(self, group: Group) -> None:
        """Raise `StageError` if the storage of a tensor in `group` was freed or resized since the call."""
        storages, before = self._in_host
        if list(map(_START, storages[group.tensors])) != before[group.tensors]:
            raise StageError("a tensor lost its memory")

    def moved(self) -> str | None:
        """Return the name of a tensor whose storage was freed or resized since the call, or None.

        The memory of such a tensor must not be read.
        """
        return _first_difference(self.names, self._memory, list(map(_START, self._storages)))

    def changed_version(self) -> str | None:
        """Return the name of a tensor that changed since the call according to its version counter, or None."""
        return _first_difference(self._names_of_counting, self._versions, list(map(_VERSION, self._counting)))

    def check(self) -> str | None:
        """Return the name of a tensor that changed between the call and the end of the copy, or None.

        None is no proof: see the class.
        """
        changed = self.changed_version()
        if changed is not None:
            return changed
        differ = self._places.last_bytes() != self._last_bytes
        return self._copy_plan.in_host.of(self.names)[int(differ.argmax())] if differ.any() else None


def _first_difference(names: Sequence[str], before: list[int], now: list[int]) -> str | None:
    if now == before:
        return None
    return next(name for name, old, new in zip(names, before, now, strict=True) if old != new)


def _tensor_at(
    storage: torch.UntypedStorage, address: int, shape: tuple[torch.dtype, torch.Size, tuple[int, ...]]
) -> torch.Tensor:
    dtype, size, strides = shape
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, (address - storage.data_ptr()) // dtype.itemsize, size, strides)


class LatePlaces:
    """The places of the late tensors of a copy plan in an arena.

    `groups`: divides the copies within host memory.
    `on_device`: the places of the tensors that devices copy.
    """

    def __init__(self, copy_plan: CopyPlan, places: Sequence[torch.Tensor]) -> None:
        in_host = copy_plan.in_host.of(places)
        self.groups = Groups(in_host)
        self.on_device = copy_plan.on_device.of(places)
        self._addresses = list(map(torch.Tensor.data_ptr, in_host))
        self._tails = TailProbe(list(map(_extent, in_host)))

    def last_bytes(self) -> npt.NDArray[Any]:
        """Return the last bytes that were copied to each place in host memory, as `CopyPlan.tails` does."""
        return self._tails.read(self._addresses)


def _extent(place: torch.Tensor) -> int:
    """Return how many bytes there are from the first element to the end of the last one."""
    return (sum((n - 1) * step for n, step in zip(place.shape, place.stride(), strict=True)) + 1) * place.itemsize


class SharedCopy:
    """A copy within host memory. One thread makes it beside the training; more threads join when the training waits."""

    def __init__(self, groups: Iterable[Group], check: Callable[[Group], None]) -> None:
        """`check` is called before a group is copied, and raises if its sources must not be read."""
        self._left: deque[Group] = deque(groups)  # groups that no thread has taken yet
        self._check = check
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
                group = self._left.popleft()
            except IndexError:
                return
            try:
                if self._error is None:
                    self._check(group)
                    copy(group.to, group.of)
            except BaseException as error:
                self._error = error
            finally:
                del group
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
        """Copy. Afterwards optimizers continue, also after a failure, and nothing of the tensors is held any more."""
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
            self.error = error.with_traceback(None)  # the frames of the traceback hold the tensors
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
        sources = late.sources()
        if self._device is not None:
            self._device.issue(*late.device_part(sources))
        self._host = SharedCopy(late.groups(sources), late.refuse_if_moved)
        del sources
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

        Its memory is released, and no optimizer waits for it.
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
