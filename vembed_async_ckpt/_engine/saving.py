"""The steps of one save.

They lead from a request and an arena to a job for the writer, and from the writer's reply to the handle.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._capture.request import Request
from .._capture.training_state import TrainingState
from .._format.plan import SavePlan, pages
from .._format.safetensors import Layout
from .._frozen import FrozenDict
from .._memory.arena import Arena
from .._memory.barrier import STEP_BARRIER, CopyPlan, pick
from .._memory.devices import DeviceCopies, any_on_device, is_on_device
from .._memory.host_copy import SmallPlaces, copy_blocking
from .._memory.staging import DeferredCopy, Destinations, Snapshot
from .._shared.protocol import PROGRESS
from ..errors import CheckpointError, CommitError, StageError, WriteError
from ..events import Event, Phase, Reporter, Stage
from ..handle import CheckpointInfo, SaveHandle, SaveState, Timings
from . import patience
from .assembly import Assembly, FixedJson, assemble
from .rank_exchange import Gathered, Parts, RankExchange, merge
from .supervisor import LIVES, Supervisor
from .waves import Waves, part_size


@dataclass(frozen=True)
class Context:
    """What all saves of a checkpointer share.

    `after`: what the writer does after a commit, as the job states it. `ended` is called for every save that ended,
    with its failure or None.
    """

    root: Path
    after: Mapping[str, Any]
    supervisor: Supervisor
    reporter: Reporter
    release: Callable[[Arena], None]
    keep_for_ever: Callable[[Arena], None]
    ended: Callable[[SaveHandle, CheckpointError | None], None]


@dataclass(frozen=True)
class Places:
    """The arena tensors into which the tensors of a `CopyPlan` are copied."""

    small: SmallPlaces
    now: list[torch.Tensor]
    late: list[torch.Tensor]


@dataclass
class Image:
    """A plan laid out in an arena.

    The headers and the files with constant content are written, and the places of the tensors are known. `training`:
    the last layout of the training state, which lies behind the plan, and the places of its tensors. `divided`: the
    last copy plan and its places.
    """

    plan: SavePlan
    destinations: Destinations
    fixed: FixedJson
    training: tuple[Layout, Destinations] | None = None
    divided: tuple[CopyPlan, Places] | None = None

    def places(self, copy_plan: CopyPlan) -> Places:
        if self.divided is None or self.divided[0] is not copy_plan:
            tensors = self.destinations.tensors
            small = SmallPlaces(pick(tensors, copy_plan.small))
            self.divided = copy_plan, Places(small, pick(tensors, copy_plan.now), pick(tensors, copy_plan.late))
        return self.divided[1]

    def training_places(self, arena: Arena, state: TrainingState) -> list[torch.Tensor]:
        if self.training is None or self.training[0] is not state.layout:
            offsets = [self.plan.end + state.layout.offsets[name] for name in state.tensors]
            self.training = state.layout, Destinations(arena, list(state.tensors.values()), offsets)
        return self.training[1].tensors


def prepare(arena: Arena, plan: SavePlan, request: Request) -> Image:
    """Return the image of `plan` in `arena`; make it if need be.

    Afterwards every byte that is the same for all saves of the plan is in place.
    """
    image = arena.image
    if isinstance(image, Image) and image.plan is plan:
        return image
    arena.image = None
    for position, data in plan.pieces:
        arena.write(position, data)
    for file in plan.files:
        arena.clear(file.start + file.size, file.start + pages(file.size))
    arena.image = Image(plan, Destinations(arena, request.tensors, plan.offsets), FixedJson(plan, request))
    return arena.image  # type: ignore[no-any-return]


class Save:
    """One save under way.

    `stage` and `pass_in_waves` run on the training thread, `finish` on the staging thread, and the methods of
    `supervisor.Job` on the supervisor's thread.
    """

    arena: Arena

    def __init__(
        self, serial: int, request: Request, plan: SavePlan, begun: float, context: Context, exchange: RankExchange
    ) -> None:
        """`begun`: time.perf_counter() of the call."""
        self.serial = serial
        self._request = request
        self._plan = plan
        self._context = context
        self._exchange = exchange
        self._begun = begun
        self._stall = 0.0
        self._staging = 0.0
        self._held = 0.0
        self._snapshot: Snapshot | None = None
        self._device: DeviceCopies | None = None
        self._waves: Waves | None = None
        self._job = (0, 0)
        self._deaths = 0
        self._handed_over = False
        self._abandoned = False
        self._once = threading.Lock()
        self._over = False
        self.handle = SaveHandle(request.step, context.root / request.directory, context.reporter.call)

    # -- training thread

    def stage(self, copy_plan: CopyPlan, *, blocking: bool) -> None:
        """Copy everything into the arena except the late tensors, which `finish` copies. Raises what a copy raises.

        Copies from devices may still run when this returns; later work on the caller's streams waits for them. With
        `blocking` and no late tensors they have completed.
        """
        request = self._request
        image = prepare(self.arena, self._plan, request)
        begun = time.perf_counter()
        places, tensors, state = image.places(copy_plan), request.tensors, request.state
        training = image.training_places(self.arena, state)
        state.find_numbers(dict(zip(state.tensors, training, strict=True)))
        to = [*training, *places.now]
        sources = [*state.tensors.values(), *pick(tensors, copy_plan.now)]
        late = pick(tensors, copy_plan.late)
        self._device = DeviceCopies.of([*sources, *late])
        if self._device is not None:
            self.arena.pin()
            to, sources = self._issue(self._device, to, sources)
        places.small.fill(pick(tensors, copy_plan.small))
        copy_blocking(to, sources)
        if late:
            later = DeferredCopy(copy_plan, places.late, late)
            self._snapshot = Snapshot(later, self._device)
            self.handle._copy_with_more_threads = self._snapshot.copy_with_more_threads
            STEP_BARRIER.add(self._snapshot)
        elif self._device is not None and blocking:
            self._device.wait()
        self._staging = time.perf_counter() - begun
        request.release_tensors()

    def _issue(
        self, device: DeviceCopies, to: list[torch.Tensor], sources: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Start the copies from devices. Return the copies within host memory, as (destinations, sources)."""
        pairs = list(zip(to, sources, strict=True))
        on_device = [pair for pair in pairs if is_on_device(pair[1])]
        device.issue([to for to, _ in on_device], [source for _, source in on_device])
        device.hold_back()
        in_host = [pair for pair in pairs if not is_on_device(pair[1])]
        return [to for to, _ in in_host], [source for _, source in in_host]

    def abandon(self) -> None:
        """The call failed or was interrupted. Give back what the save holds, unless the save already ends by itself."""
        with self._once:
            if self._handed_over:
                return
            self._abandoned = True
        if self._snapshot is not None:
            self._snapshot.abandon()
        self._let_devices_end()
        self._give_arena_back()

    def _let_devices_end(self) -> None:
        """Wait for the device copies: afterwards no device writes into the arena, unless one is stuck."""
        if self._device is not None and not self._device.stuck:
            # A failed device does not write either, and the save has already failed.
            with contextlib.suppress(RuntimeError, StageError):
                self._device.wait()

    def _give_arena_back(self) -> None:
        if self._device is not None and self._device.stuck:
            self._context.keep_for_ever(self.arena)
        else:
            self._context.release(self.arena)

    def pass_in_waves(self) -> None:
        """Save a state that is larger than the arena: fill the arena and have it written, part by part.

        Returns when the last part is in the arena, or when the save has failed and the failure is on the handle.
        """
        begun = time.perf_counter()
        self.arena.image = None
        if any_on_device(self._request.tensors):
            self.arena.pin()
        waves = self._place_first(self.arena)
        supervisor = self._context.supervisor
        self._handed_over = True
        supervisor.submit(self)
        try:
            waves.run(lambda start, end: supervisor.send_wave(self, start, end), self.handle.done, supervisor.check)
        except BaseException:
            supervisor.send_wave(self, 0, 0)  # makes the writer give up this save, and that frees the arena
            self.handle._mark_read()  # the call itself raises; nobody gets the handle
            raise
        self._staging = time.perf_counter() - begun
        self._request.release_tensors()

    def _place_first(self, arena: Arena) -> Waves:
        outcome: queue.SimpleQueue[Gathered] = queue.SimpleQueue()
        self._exchange.gather(outcome.put)
        try:
            gathered = outcome.get(timeout=2 * patience.HOLD + patience.SILENCE)
        except queue.Empty:
            raise StageError(f"{self.handle.path}: the other ranks' state did not come") from None
        if isinstance(gathered, CheckpointError):
            raise gathered
        self._request.state.find_numbers(self._request.state.tensors)
        assembly = self._assemble(FixedJson(self._plan, self._request), gathered, waves=part_size(arena))
        waves = self._waves = Waves(arena, self._plan, self._request, assembly)
        self._job = waves.place_job()
        self._show_progress(assembly)
        return waves

    def stalled(self, seconds: float) -> None:
        """Add the seconds that the call cost the training thread."""
        self._stall += seconds

    # -- staging thread

    def finish(self) -> None:
        """Complete the copy, add the rendered files, and submit the job. Any failure ends on the handle."""
        with self._once:
            if self._abandoned:
                return
            self._handed_over = True  # from now on the save ends by itself
        try:
            if self._device is not None:
                self._device.relax_captures()
            if self._snapshot is not None:
                begun = time.perf_counter()
                self._snapshot.run()
                self._staging += time.perf_counter() - begun
                if self._snapshot.error is not None:
                    raise self._snapshot.error
            if self._device is not None:
                begun = time.perf_counter()
                self._device.wait()
                self._staging += time.perf_counter() - begun
                self._held = self._device.held()
            self._exchange.gather(self._submit)
        except BaseException as error:
            self._staging_failed(error)

    # -- staging thread or the ranks' thread

    def _submit(self, gathered: Gathered) -> None:
        """Submit the job with what the other ranks added. If `gathered` is an error, the save fails with it."""
        try:
            if isinstance(gathered, CheckpointError):
                raise gathered
            image: Image = self.arena.image
            assembly = self._assemble(image.fixed, gathered)
            self._place(assembly)
            self._show_progress(assembly)
            self._emit("stage", "complete", self._staging)
            self._context.supervisor.check()
            self._context.supervisor.submit(self)
        except BaseException as error:
            self._staging_failed(error)

    def _staging_failed(self, error: BaseException) -> None:
        self._let_devices_end()
        if isinstance(error, CheckpointError):
            self.failed(error)
            return
        failure = StageError(f"{self.handle.path} could not be staged: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self.failed(failure)

    def _assemble(self, fixed: FixedJson, gathered: Parts, *, waves: int = 0) -> Assembly:
        files = merge(self._request.files, gathered.files)
        after = self._context.after
        return assemble(self._request, files, self._plan, after, fixed, without=gathered.without, waves=waves)

    def _place(self, assembly: Assembly) -> None:
        if assembly.end + len(assembly.job) > self.arena.size:
            raise StageError(
                f"{self.handle.path}: needs {assembly.end + len(assembly.job) - self.arena.size} bytes more than its arena has"
            )
        for start, data in assembly.pieces:
            self.arena.write(start, data)
        for file in assembly.files:
            self.arena.clear(file["start"] + file["size"], file["start"] + pages(file["size"]))
        self.arena.write(assembly.end, assembly.job)
        self._job = (assembly.end, len(assembly.job))

    def _show_progress(self, assembly: Assembly) -> None:
        memory, total = self.arena.memory, sum(pages(file["size"]) for file in assembly.files)
        PROGRESS.pack_into(memory, 0, 0)
        self.handle._progress = lambda: (min(PROGRESS.unpack_from(memory)[0], total), total)

    # -- supervisor's thread

    def location(self) -> tuple[int, int]:
        return self._job

    def accepted(self) -> None:
        if self._waves is not None:
            self._waves.go_on()
        else:
            self.handle._move(SaveState.STAGED)
            self._exchange.say(SaveState.STAGED)

    def writing(self) -> None:
        if self._waves is None:
            self.handle._move(SaveState.WRITING)
        self._emit("write", "started")

    def wave_written(self) -> None:
        if self._waves is not None:
            self._waves.go_on()

    def writer_died(self, error: WriteError) -> bool:
        self._deaths += 1
        if self._waves is not None or self._deaths >= LIVES:
            self.failed(error)
            return False
        self.handle._move(SaveState.STAGED)
        return True

    def committed(self, reply: dict[str, Any]) -> None:
        files: dict[str, int] = reply["files"]
        waited = self._snapshot.waited if self._snapshot is not None else 0.0
        timings = Timings(
            stall=self._stall + waited,
            staging=self._staging,
            queued=reply["queued"],
            write=reply["write"],
            commit=reply["commit"],
            durable=time.perf_counter() - self._begun,
            held=self._held,
        )
        info = CheckpointInfo(Path(reply["path"]), self._request.step, reply["total_bytes"], FrozenDict(files), timings)
        if waited and self._snapshot is not None:
            self._emit("barrier", "complete", waited, time=self._snapshot.went_on)
        if self._held:
            self._emit("held", "complete", self._held)
        parts = (timings.write, timings.commit)
        self._emit("write", "complete", sum(parts), info.total_bytes, parts=parts)
        if self._waves is not None:
            # only now: before its last part was written, the writer's death could lose the save
            self.handle._move(SaveState.STAGED)
        self._end(None, info)

    def failed(self, error: CheckpointError) -> None:
        if isinstance(error, CommitError | WriteError):
            reason = str(error).removeprefix(f"{self.handle.path}: ")  # the new message names the path already
            error = type(error)(f"{self.handle.path} was not saved: {reason}")
        self._end(error)

    def _end(self, error: CheckpointError | None, info: CheckpointInfo | None = None) -> None:
        with self._once:
            if self._over:
                return
            self._over = True
        written, total = self.handle.progress
        self.handle._progress = lambda: (written if error else total, total)
        # Free the arena before the handle ends, so that a caller who waited for the handle can save again at once.
        self._give_arena_back()
        self.handle._move(SaveState.FAILED if error else SaveState.COMMITTED, info, error)
        self._exchange.say(SaveState.FAILED if error else SaveState.COMMITTED, info, error)
        self._context.ended(self.handle, error)
        if self._waves is not None:
            self._waves.go_on()
        took = time.perf_counter() - self._begun
        if error is None:
            assert info is not None
            self._emit("save", "complete", took, info.total_bytes)
        else:
            self._emit("save", "failed", took, detail=str(error))

    def _emit(
        self, stage: Stage, phase: Phase, seconds: float = 0.0, size: int = 0, detail: str = "", **further: Any
    ) -> None:
        request = self._request
        event = Event(stage, phase, request.save_id, request.step, size, seconds, detail, **further)
        self._context.reporter.emit(event)
