"""What a rank that does not write copies into the first rank's arena, for one save."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from .._capture.request import Request
from .._format.plan import SavePlan
from .._memory.barrier import CopyPlan
from .._memory.places import Place
from .._memory.staging import TornSnapshot
from ..errors import CheckpointError, StageError
from ..handle import SaveHandle
from .copying import Copying
from .images import place_tensors
from .messages import Files
from .node_following import Grant, NodeCall


class Share:
    """One rank's part in one save. The call of `save()` begins it, the staging thread ends it.

    If the call fails, it abandons the part: whichever of `abandon` and `finish` comes first has it.
    """

    def __init__(
        self, call: NodeCall, grant: Grant, handle: SaveHandle, render: Callable[[], Files], torn: Callable[[], None]
    ) -> None:
        """`render`: returns this rank's files. `torn`: called if tensors were changed while they were copied late."""
        self._call = call
        self._grant = grant
        self._handle = handle
        self._render = render
        self._torn = torn
        self._copying = Copying()
        self._taken = threading.Lock()

    def waited(self) -> float:
        """Seconds for which the copy held up optimizer steps."""
        return self._copying.waited

    # -- training thread

    def stage(
        self, request: Request, plan: SavePlan, places: Sequence[Place], copy_plan: CopyPlan, *, blocking: bool
    ) -> None:
        """Copy everything into the arena except the late tensors, which `finish` copies. Raises what a copy raises."""
        arena = self._grant.arena
        targets = place_tensors(arena, plan, request, places).targets(copy_plan)
        self._copying.begin(arena, targets, copy_plan, request, self._handle, blocking=blocking)
        request.release_tensors()

    def abandon(self, error: CheckpointError) -> None:
        """The call raises `error`."""
        if self._taken.acquire(blocking=False):
            self._copying.abandon()
            self._call.failed(error, keeps=self._copying.stuck)

    # -- staging thread

    def finish(self) -> None:
        """Complete the copy, and tell the first rank. Any failure ends the save on all ranks."""
        if not self._taken.acquire(blocking=False):
            return
        try:
            self._copying.complete()
            self._grant.check()
            files = self._render()
        except BaseException as error:
            self._copying.let_devices_end()
            if isinstance(error, TornSnapshot):
                self._torn()
            known = error if isinstance(error, CheckpointError) else StageError(repr(error))
            self._call.failed(known, keeps=self._copying.stuck)
        else:
            self._call.staged(files)
