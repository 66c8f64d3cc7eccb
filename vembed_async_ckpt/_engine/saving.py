"""The steps of one save on the rank that writes.

They lead from a request and an arena to a job for the writer, and from the writer's reply to the handle.

A save is an object with one stage (`Stage`) and one table of legal moves (`_MOVES`). Each stage belongs to one thread,
and the object that the thread works with belongs to that stage: the training thread and then the staging thread work
with `Copying`, the supervisor's thread works with `_Job`. A move hands the save over. What comes too late finds that its
move is not legal any more, and does nothing.
"""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._capture.request import Request
from .._format.plan import SavePlan, pages
from .._frozen import FrozenDict
from .._memory.arena import Arena
from .._memory.barrier import CopyPlan
from .._memory.devices import any_on_device
from .._memory.host_copy import copy_alone
from .._memory.places import Place
from .._shared.protocol import PROGRESS
from ..errors import CheckpointError, CommitError, StageError, WriteError
from ..events import Event, Phase, Reporter
from ..events import Stage as Reported
from ..handle import CheckpointInfo, SaveHandle, SaveState, Timings
from . import patience
from .assembly import Assembly, FixedJson, assemble
from .copying import Copying
from .images import FileImage, lay_out
from .rank_exchange import Gathered, Parts, RankExchange, merge
from .supervisor import LIVES, Supervisor
from .waves import Waves, part_size


@dataclass(frozen=True)
class Context:
    """What all saves of a checkpointer share.

    `after`: what the writer does after a commit, as the job states it. `committed` is called with the save id of every
    save that was committed. `ended` is called for every save that ended, with its failure or None.
    """

    root: Path
    after: Mapping[str, Any]
    supervisor: Supervisor
    reporter: Reporter
    release: Callable[[Arena], None]
    retire: Callable[[Arena], None]
    keep_for_ever: Callable[[Arena], None]
    committed: Callable[[str, CheckpointInfo], None]
    ended: Callable[[SaveHandle, CheckpointError | None], None]


class Stage(enum.Enum):
    """Where a save is, and whose it is."""

    CALLED = "the call of save() copies"  # the training thread's
    COPYING = "late tensors are copied"  # the staging thread's
    PASSING = "the state passes through a small arena in parts"  # the training thread's, and the supervisor's
    GATHERING = "the other ranks' part is awaited"  # nobody's, until the exchange calls
    SUBMITTED = "the writer has it"  # the supervisor's
    ENDED = "it was committed or has failed"
    ABANDONED = "its call failed, and nobody has the handle"


_MOVES = {
    Stage.CALLED: {Stage.COPYING, Stage.PASSING, Stage.ABANDONED},
    Stage.COPYING: {Stage.GATHERING, Stage.ENDED},
    Stage.PASSING: {Stage.ENDED},
    Stage.GATHERING: {Stage.SUBMITTED, Stage.ENDED},
    Stage.SUBMITTED: {Stage.ENDED},
    Stage.ENDED: set(),
    Stage.ABANDONED: set(),
}


class Save:
    """One save under way."""

    arena: Arena

    def __init__(
        self,
        serial: int,
        request: Request,
        plan: SavePlan,
        places: Sequence[Place],
        begun: float,
        context: Context,
        exchange: RankExchange,
    ) -> None:
        """`places`: where each tensor of the request goes. `begun`: time.perf_counter() of the call."""
        self.handle = SaveHandle(request.step, f"{context.root}/{request.directory}", context.reporter.call)
        self._serial = serial
        self._request = request
        self._plan = plan
        self._places = places
        self._context = context
        self._exchange = exchange
        self._begun = begun
        self._stall = 0.0
        self._staging = 0.0
        self._copying = Copying()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # small values of the call, and their places
        self._moving = threading.Lock()
        self._stage = Stage.CALLED  # guarded by _moving

    def _move(self, to: Stage) -> bool:
        """Move to a stage. Return False, and change nothing, if that is not a legal move."""
        with self._moving:
            if to not in _MOVES[self._stage]:
                return False
            self._stage = to
            return True

    # -- CALLED: the training thread

    def stage(self, copy_plan: CopyPlan, *, blocking: bool) -> None:
        """Copy everything into the arena except the late tensors, which `finish` copies. Raises what a copy raises.

        `blocking`: see `Copying.begin`.
        """
        request, state = self._request, self._request.state
        image = lay_out(self.arena, self._plan, request, self._places)
        training = dict(zip(state.tensors, image.training_targets(self.arena, state), strict=True))
        live = [name for name in training if name not in state.copies]
        further = [training[name] for name in live], [state.tensors[name] for name in live]
        self._copies = [(training[name], copy) for name, copy in state.copies.items()]
        state.find_numbers(training)
        self._copying.begin(
            self.arena, image.targets(copy_plan), copy_plan, request, self.handle, further, blocking=blocking
        )
        request.release_tensors()

    def abandon(self) -> None:
        """The call failed or was interrupted. Give back what the save holds, unless the save already ends by itself."""
        if self._move(Stage.ABANDONED):
            self._copying.abandon()
            self._give_arena_back()

    def stalled(self, seconds: float) -> None:
        """Add the seconds that the call cost the training thread."""
        self._stall += seconds

    # -- PASSING: the training thread

    def pass_in_waves(self) -> None:
        """Save a state that is larger than the arena: fill the arena and have it written, part by part.

        Returns when the last part is in the arena, or when the save has failed and the failure is on the handle.
        """
        begun = time.perf_counter()
        self.arena.image = None
        if any_on_device(self._request.tensors):
            self.arena.pin()
        waves, job = self._place_first(self.arena)
        supervisor = self._context.supervisor
        if not self._move(Stage.PASSING):
            raise AssertionError("nothing else can have moved a save that is being called")
        supervisor.submit(job)
        try:
            waves.run(lambda start, end: supervisor.send_wave(job, start, end), self.handle.done, supervisor.check)
        except BaseException:
            supervisor.send_wave(job, 0, 0)  # makes the writer give up this save, and that frees the arena
            self.handle._mark_read()  # the call itself raises; nobody gets the handle
            raise
        self._staging = time.perf_counter() - begun
        self._request.release_tensors()

    def _place_first(self, arena: Arena) -> tuple[Waves, _Job]:
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
        waves = Waves(arena, self._plan, self._request, assembly)
        location = waves.place_job()
        self._show_progress(assembly)
        return waves, _Job(self, self._serial, arena, location, waves)

    # -- COPYING: the staging thread

    def finish(self) -> None:
        """Complete the copy, add the rendered files, and submit the job. Any failure ends on the handle."""
        if not self._move(Stage.COPYING):
            return  # abandoned
        try:
            self._copying.complete()
        except BaseException as error:
            self._staging_failed(error)
            return
        finally:
            self._staging = self._copying.seconds
        if self._move(Stage.GATHERING):
            try:
                self._exchange.gather(self._submit)
            except BaseException as error:
                self._staging_failed(error)

    # -- GATHERING: the thread on which the exchange calls

    def _submit(self, gathered: Gathered) -> None:
        """Submit the job with what the other ranks added. If `gathered` is an error, the save fails with it."""
        try:
            if isinstance(gathered, CheckpointError):
                raise gathered
            image: FileImage = self.arena.image
            assert image.fixed is not None
            assembly = self._assemble(image.fixed, gathered)
            job = _Job(self, self._serial, self.arena, self._place(assembly))
            self._show_progress(assembly)
            self._emit("stage", "complete", self._staging)
            self._context.supervisor.check()
        except BaseException as error:
            self._staging_failed(error)
            return
        if self._move(Stage.SUBMITTED):
            self._context.supervisor.submit(job)

    def _staging_failed(self, error: BaseException) -> None:
        self._copying.let_devices_end()
        if isinstance(error, CheckpointError):
            self.fail(error)
            return
        failure = StageError(f"{self.handle.path} could not be staged: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self.fail(failure)

    def _assemble(self, fixed: FixedJson, gathered: Parts, *, waves: int = 0) -> Assembly:
        files = merge(self._request.files, gathered.files)
        after = self._context.after
        return assemble(self._request, files, self._plan, after, fixed, without=gathered.without, waves=waves)

    def _place(self, assembly: Assembly) -> tuple[int, int]:
        """Write the assembled files and the job into the arena. Return (offset, length) of the job."""
        for place, copy in self._copies:
            copy_alone([place], [copy])
        if assembly.end + len(assembly.job) > self.arena.size:
            raise StageError(
                f"{self.handle.path}: needs {assembly.end + len(assembly.job) - self.arena.size} bytes more than its arena has"
            )
        for start, data in assembly.pieces:
            self.arena.write(start, data)
        for file in assembly.files:
            self.arena.clear(file["start"] + file["size"], file["start"] + pages(file["size"]))
        self.arena.write(assembly.end, assembly.job)
        return assembly.end, len(assembly.job)

    def _show_progress(self, assembly: Assembly) -> None:
        memory, total = self.arena.memory, sum(pages(file["size"]) for file in assembly.files)
        PROGRESS.pack_into(memory, 0, 0)
        self.handle._progress = lambda: (min(PROGRESS.unpack_from(memory)[0], total), total)

    # -- SUBMITTED or PASSING: the supervisor's thread

    def show(self, state: SaveState) -> None:
        self.handle._move(state)
        if state is SaveState.STAGED:
            self._exchange.say(SaveState.STAGED)

    def committed(self, reply: dict[str, Any]) -> None:
        files: dict[str, int] = reply["files"]
        copying = self._copying
        timings = Timings(
            stall=self._stall + copying.waited,
            staging=self._staging,
            queued=reply["queued"],
            write=reply["write"],
            commit=reply["commit"],
            durable=time.perf_counter() - self._begun,
            held=copying.held,
        )
        info = CheckpointInfo(Path(reply["path"]), self._request.step, reply["total_bytes"], FrozenDict(files), timings)
        if copying.waited:
            self._emit("barrier", "complete", copying.waited, time=copying.went_on)
        if copying.held:
            self._emit("held", "complete", copying.held)
        parts = (timings.write, timings.commit)
        self._emit("write", "complete", sum(parts), info.total_bytes, parts=parts)
        self._end(None, info)

    # -- any thread

    def fail(self, error: CheckpointError) -> None:
        if isinstance(error, CommitError | WriteError):
            reason = str(error).removeprefix(f"{self.handle.path}: ")  # the new message names the path already
            error = type(error)(f"{self.handle.path} was not saved: {reason}")
        self._end(error)

    def _end(self, error: CheckpointError | None, info: CheckpointInfo | None = None) -> None:
        if not self._move(Stage.ENDED):
            return
        written, total = self.handle.progress
        self.handle._progress = lambda: (written if error else total, total)
        # Free the arena before the handle ends, so that a caller who waited for the handle can save again at once.
        self._give_arena_back()
        self.handle._move(SaveState.FAILED if error else SaveState.COMMITTED, info, error)
        self._exchange.say(SaveState.FAILED if error else SaveState.COMMITTED, info, error)
        if info is not None:
            self._context.committed(self._request.save_id, info)
        self._context.ended(self.handle, error)
        took = time.perf_counter() - self._begun
        if error is None:
            assert info is not None
            self._emit("save", "complete", took, info.total_bytes)
        else:
            self._emit("save", "failed", took, detail=str(error))

    def _give_arena_back(self) -> None:
        if self._copying.stuck:
            self._context.keep_for_ever(self.arena)
        else:
            self._exchange.hand_back(self.arena, self._context.release, self._context.retire)

    def _emit(
        self, stage: Reported, phase: Phase, seconds: float = 0.0, size: int = 0, detail: str = "", **further: Any
    ) -> None:
        request = self._request
        event = Event(stage, phase, request.save_id, request.step, size, seconds, detail, **further)
        self._context.reporter.emit(event)


class _Job:
    """A save as the supervisor has it. Only the supervisor's thread calls it. `waves`: the parts, if it has parts."""

    def __init__(
        self, save: Save, serial: int, arena: Arena, location: tuple[int, int], waves: Waves | None = None
    ) -> None:
        self.serial = serial
        self.arena = arena
        self._save = save
        self._location = location
        self._waves = waves
        self._deaths = 0

    def location(self) -> tuple[int, int]:
        return self._location

    def accepted(self) -> None:
        if self._waves is not None:
            self._waves.go_on()
        else:
            self._save.show(SaveState.STAGED)

    def writing(self) -> None:
        if self._waves is None:
            self._save.show(SaveState.WRITING)
        self._save._emit("write", "started")

    def wave_written(self) -> None:
        if self._waves is not None:
            self._waves.go_on()

    def writer_died(self, error: WriteError) -> bool:
        self._deaths += 1
        if self._waves is not None or self._deaths >= LIVES:
            self.failed(error)
            return False
        self._save.handle._move(SaveState.STAGED)
        return True

    def committed(self, reply: dict[str, Any]) -> None:
        if self._waves is not None:
            # only now: before its last part was written, the writer's death could lose the save
            self._save.handle._move(SaveState.STAGED)
        self._save.committed(reply)
        self._let_waves_end()

    def failed(self, error: CheckpointError) -> None:
        self._save.fail(error)
        self._let_waves_end()

    def _let_waves_end(self) -> None:
        if self._waves is not None:
            self._waves.go_on()
