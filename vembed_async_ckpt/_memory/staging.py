"""Stage: copy a state to its place in an arena, at once or while forward and backward run.

What is copied late is held by `.data` aliases, made per save and dropped when the copy is done: they keep the old memory alive
when a parameter gets new storage. (`detach()` does the same in twice the time.)
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
from .arena import Arena
from .barrier import STEP_BARRIER, CopyPlan
from .captures import is_capturing
from .devices import DeviceCopies
from .host_copy import AS_BYTES, DEADLINE, MAX_THREADS, TOO_SLOW, Group, addresses_of, copy_alone, copy_group, groups
from .profiling import recorded

_DATA, _VERSION = attrgetter("data"), attrgetter("_version")


class Destinations:
    """The places of a plan's tensors in an arena, as tensors. Made once per plan and arena."""

    def __init__(self, arena: Arena, tensors: Sequence[torch.Tensor], offsets: Sequence[int]) -> None:
        whole = torch.frombuffer(arena.memory, dtype=torch.uint8)
        self._bases: dict[torch.dtype, torch.Tensor] = {}
        self.tensors = [self._place(whole, t, at) for t, at in zip(tensors, offsets, strict=True)]

    def _place(self, whole: torch.Tensor, like: torch.Tensor, offset: int) -> torch.Tensor:
        dtype = torch.uint8 if like.dtype in AS_BYTES else like.dtype
        if offset % dtype.itemsize:  # never so in files of ours; as_strided counts in elements
            raise AssertionError(f"offset {offset} is not a multiple of {dtype.itemsize}")
        base = self._bases.get(dtype)
        if base is None:
            usable = whole.numel() // dtype.itemsize * dtype.itemsize
            base = self._bases[dtype] = whole[:usable].view(dtype)
        return base.as_strided(like.shape, _contiguous_strides(like.shape), offset // dtype.itemsize)


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return strides[::-1]


class DeferredCopy:
    """What may be copied after `save()` has returned, and how it looked at the call.

    Two nets, neither a proof: version counters, blind to fused optimizers, `.data` and numpy; and the last bytes of what is in host
    memory, blind to writes elsewhere in a tensor. For tensors of a device there are the version counters only.
    """

    def __init__(
        self, copy_plan: CopyPlan, destinations: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
    ) -> None:
        """Alias the late `tensors`."""
        self.names = copy_plan.names
        self._copy_plan = copy_plan
        self._destinations = destinations
        self._tensors = tensors
        self.aliases: list[torch.Tensor] = list(map(_DATA, tensors))
        self._versions = list(map(_VERSION, tensors))
        self._addresses = addresses_of(self.aliases, self.names)
        self._last_bytes = copy_plan.tails.read(copy_plan.host_part(self._addresses))

    def device_part(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(destinations, sources) of the copies from devices."""
        return self._copy_plan.device_part(self._destinations), self._copy_plan.device_part(self.aliases)

    def host_part(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """(destinations, sources) of the copies within host memory."""
        return self._copy_plan.host_part(self._destinations), self._copy_plan.host_part(self.aliases)

    def moved(self) -> str | None:
        """The name of a tensor whose storage was freed or resized since the call: its memory may not be read."""
        for name, before, now in zip(
            self.names, self._addresses, map(torch.Tensor.data_ptr, self.aliases), strict=True
        ):
            if now != before:
                return name
        return None

    def changed_version(self) -> str | None:
        """The name of a tensor that was changed since the call, if its version counter shows it."""
        for name, before, now in zip(self.names, self._versions, map(_VERSION, self._tensors), strict=True):
            if now != before:
                return name
        return None

    def check(self) -> str | None:
        """The name of a tensor that was changed between the call and the end of the copy, if one shows it."""
        changed = self.changed_version()
        if changed is not None:
            return changed
        copy_plan = self._copy_plan
        copied = copy_plan.tails.read(list(map(torch.Tensor.data_ptr, copy_plan.host_part(self._destinations))))
        if copied == self._last_bytes:
            return None
        for name, alias, before, after in zip(
            copy_plan.host_part(self.names), copy_plan.host_part(self.aliases), self._last_bytes, copied, strict=True
        ):
            # What is not contiguous (any more) has its last bytes elsewhere.
            if before != after and alias.is_contiguous():
                return name
        return None


class SharedCopy:
    """A copy within host memory that one thread makes beside the training, and further ones as soon as the training waits."""

    def __init__(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        self._left: deque[Group] = deque(groups(destinations, sources))  # begun by nobody
        self._changed = threading.Condition()
        self._open = len(self._left)  # not ended yet
        self._error: BaseException | None = None

    def run(self) -> None:
        """Returns when every byte has arrived, or with what a copy raised; nobody copies any more then."""
        self._copy(copy_group)
        with self._changed:
            if not self._changed.wait_for(lambda: self._open == 0, DEADLINE):
                raise StageError(TOO_SLOW)
        if self._error is not None:
            raise self._error

    def help(self, threads: int) -> None:
        """Have so many threads more take part, or as many as can be had. They end with the copy."""
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
    """Something changed what was being copied: overlap cannot be trusted with this training."""


class Snapshot:
    """One overlapped copy: the staging thread runs it, optimizers wait for it. Until the last byte has arrived it stands at the
    barrier.

    `waited`: seconds that steps were held up by it, `went_on`: when the last of them went on (time.time()). After `run`, `error`
    is None or says why the copy is no snapshot.
    """

    def __init__(self, late: DeferredCopy, device: DeviceCopies | None = None) -> None:
        """`device` issues the copies from devices, if there are any."""
        self._late: DeferredCopy | None = late
        self._device = device
        self._host: SharedCopy | None = None
        self._helpers = 0  # threads wanted for it
        self._copied = threading.Event()  # what is in host memory; copies from devices are issued
        self._arrived = threading.Event()
        self._passed = False  # an optimizer has gone on
        self.waited = 0.0
        self.went_on = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        """Copy; afterwards optimizers go on whatever came of it, and no alias is held any more."""
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
            self.error = error.with_traceback(None)  # whose frames hold the aliases
        finally:
            self._late = self._host = None
            del late
            self._end()

    def _changed(self, late: DeferredCopy) -> str | None:
        """Copy. Returns the name of a tensor that was changed since the call, if one shows it."""
        try:
            return late.moved() or self._copy(late)
        except StageError:
            moved = late.moved()
            if moved is None:
                raise
            return moved

    def _copy(self, late: DeferredCopy) -> str | None:
        """Returns the name of a tensor that was changed meanwhile, if one shows it."""
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
            if not self._passed:  # else an optimizer may have stepped already, behind the copies
                changed = changed or later
        return changed

    def abandon(self) -> None:
        """The save is off before it was submitted: nobody waits for it, nothing is held."""
        self._late = None
        self._end()

    def _end(self) -> None:
        STEP_BARRIER.remove(self)
        self._copied.set()
        self._arrived.set()

    def copy_with_more_threads(self) -> None:
        """The training waits: copy with as many threads more as it would use."""
        self._helpers = min(torch.get_num_threads(), MAX_THREADS)
        if (host := self._host) is not None:
            host.help(self._helpers)

    def barrier(self) -> None:
        # A graph that is being recorded cannot wait for what is outside of it.
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
    """The one thread that copies late and finishes saves. It keeps to one intra-op thread: a second OpenMP team in the process
    makes every step of a small model slower for as long as it exists, even idle."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vembed-ckpt-staging", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; it must not raise."""
        self._jobs.put(job)

    def check(self) -> None:
        """Raise `StageError` if nobody would run what is submitted."""
        if not self._thread.is_alive():
            raise StageError("the staging thread has ended; make a new checkpointer")

    def close(self, timeout: float) -> None:
        """End the thread after the jobs queued so far; waits at most `timeout` seconds."""
        self._jobs.put(None)
        _signals.join(self._thread, timeout)

    def _run(self) -> None:
        _use_one_thread()
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:
                logger.exception("a job of the staging thread failed")  # jobs end their own saves; the thread goes on
            del job


def _use_one_thread() -> None:
    """One intra-op thread for this thread only. `set_num_threads` is per thread in OpenMP, but also becomes the default of
    threads created later: another thread gives the old default back."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(count,))
    restore.start()
    restore.join()
