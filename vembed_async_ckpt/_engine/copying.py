"""The copy of this process's state into an arena, for one save.

It begins in the call of `save()`, on the training thread, and ends on the staging thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch

from .._capture.request import Request
from .._memory.arena import Arena
from .._memory.barrier import STEP_BARRIER, CopyPlan
from .._memory.devices import DeviceCopies, is_on_device
from .._memory.host_copy import copy_blocking
from .._memory.staging import DeferredCopy, Snapshot
from ..errors import StageError
from ..handle import SaveHandle
from .images import Targets

Pairs = tuple[list[torch.Tensor], list[torch.Tensor]]  # destinations, sources


class Copying:
    """One copy.

    `seconds`: what it took. `held`: for how many seconds it held the devices up. Both are known after `complete`.
    """

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._device: DeviceCopies | None = None
        self.seconds = 0.0
        self.held = 0.0

    # -- training thread

    def begin(
        self,
        arena: Arena,
        targets: Targets,
        copy_plan: CopyPlan,
        request: Request,
        handle: SaveHandle,
        further: Pairs = ([], []),
        *,
        blocking: bool,
    ) -> None:
        """Copy everything except the late tensors. Raises what a copy raises. `further`: more to copy now.

        Copies from devices may still run when this returns; later work on the caller's streams waits for them. With
        `blocking` and no late tensors they have completed.
        """
        begun = time.perf_counter()
        tensors = request.tensors
        to = [*further[0], *targets.now]
        sources = [*further[1], *copy_plan.now.of(tensors)]
        late = copy_plan.late.of(tensors)
        self._device = DeviceCopies.of([*sources, *copy_plan.on_device.of(late)])
        if self._device is not None:
            arena.pin()
            to, sources = _issue(self._device, to, sources)
        targets.small.fill(copy_plan.small.of(tensors))
        copy_blocking(to, sources)
        if late:
            wrappers = copy_plan.late.of(request.wrappers) if request.wrappers else ()
            self._snapshot = Snapshot(DeferredCopy(copy_plan, targets.late, late, wrappers), self._device)
            handle._copy_with_more_threads = self._snapshot.copy_with_more_threads
            STEP_BARRIER.add(self._snapshot)
        elif self._device is not None and blocking:
            self._device.wait()
        self.seconds = time.perf_counter() - begun

    def abandon(self) -> None:
        """The call failed before `complete` was due. Afterwards nothing is copied any more."""
        if self._snapshot is not None:
            self._snapshot.abandon()
        self.let_devices_end()

    # -- staging thread

    def complete(self) -> None:
        """Return when every byte has arrived. Raises why the copy is not the state at the call."""
        begun = time.perf_counter()
        if self._device is not None:
            self._device.relax_captures()
        if self._snapshot is not None:
            self._snapshot.run()
            if self._snapshot.error is not None:
                raise self._snapshot.error
        if self._device is not None:
            self._device.wait()
            self.held = self._device.held()
        self.seconds += time.perf_counter() - begun

    # -- any thread

    def let_devices_end(self) -> None:
        """Wait for the device copies: afterwards no device writes into the arena, unless one is stuck."""
        if self._device is not None and not self._device.stuck:
            # A failed device does not write either, and the save has already failed.
            with contextlib.suppress(RuntimeError, StageError):
                self._device.wait()

    @property
    def stuck(self) -> bool:
        """Whether a device did not answer in time and may still write to the arena."""
        return self._device is not None and self._device.stuck

    @property
    def waited(self) -> float:
        """Seconds for which the copy held up optimizer steps."""
        return 0.0 if self._snapshot is None else self._snapshot.waited

    @property
    def went_on(self) -> float:
        """When the last held-up step continued, as time.time()."""
        return 0.0 if self._snapshot is None else self._snapshot.went_on


def _issue(device: DeviceCopies, to: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Pairs:
    """Start the copies from devices. Return the copies within host memory."""
    pairs = list(zip(to, sources, strict=True))
    on_device = [pair for pair in pairs if is_on_device(pair[1])]
    device.issue([to for to, _ in on_device], [source for _, source in on_device])
    device.hold_back()
    in_host = [pair for pair in pairs if not is_on_device(pair[1])]
    return [to for to, _ in in_host], [source for _, source in in_host]
