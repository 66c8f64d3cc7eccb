"""The end of a save, seen by a thread of its own: what the loop does meanwhile is in none of its times."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from typing import Any

from vembed_async_ckpt import CheckpointInfo

from ..engine import DEADLINE, Engine, Handle
from ..machine import NewBytes, sync_tree

Sample = dict[str, Any]


class Finish:
    """Begun when `save()` has returned: waits for the engine, syncs what the engine leaves out, and takes the time of both."""

    def __init__(self, engine: Engine, handle: Handle, number: int, begun: float) -> None:
        """`begun`: when `save()` was called."""
        self._engine, self._handle, self._number, self._begun = engine, handle, number, begun
        self._info: CheckpointInfo | None = None
        self._written = self._durable = 0.0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._watch, name="bench-finish", daemon=True)
        self._thread.start()

    def over(self) -> bool:
        """Whether the checkpoint is durable, or the save has failed."""
        return not self._thread.is_alive()

    def result(self) -> Sample:
        """Wait; seconds from the call to `written` and to `durable`, and what our own engine says. Raises what the engine
        raised."""
        self._thread.join(DEADLINE)
        if self._thread.is_alive():
            raise TimeoutError(f"a save has not ended within {DEADLINE:.0f} s")
        if self._error is not None:
            raise self._error
        says: dict[str, Any] = {} if self._info is None else asdict(self._info.timings)
        return {"written": self._written, "durable": self._durable, **{f"our_{key}": says[key] for key in says}}

    def _watch(self) -> None:
        try:
            self._info = self._handle.wait()
            self._written = time.perf_counter() - self._begun
            if not self._engine.syncs:
                sync_tree(self._engine.path(self._number))
            self._durable = time.perf_counter() - self._begun
        except BaseException as error:
            self._error = error


def save_alone(engine: Engine, number: int) -> Sample:
    """A save with nothing beside it. The checkpoint stays."""
    new = NewBytes(engine.directory)
    begun = time.perf_counter()
    handle = engine.save(number)
    returned = time.perf_counter()
    finish = Finish(engine, handle, number, begun)
    return {"save": returned - begun, **finish.result(), "bytes": new.count()}
