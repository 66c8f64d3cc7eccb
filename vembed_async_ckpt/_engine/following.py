"""The other ranks' side of a save: they find the save that a call belongs to, add their part, and learn how it ended.

A call belongs to the oldest save of its directory in which this rank has not taken part. The first rank may have gone
on with a save without this rank. Such a save is skipped, with two exceptions: the call comes soon after the newest of
them, or no further save appears soon. Then the call was late, and its handle reports how that newest save ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from ..errors import CheckpointError, StageError
from ..events import logger
from ..handle import CheckpointInfo, SaveState
from . import messages, patience
from .messages import ENDS, Entry, Files
from .ranks import Ranks

Heard = Callable[[SaveState, CheckpointInfo | None, CheckpointError | None], None]


class Following:
    """The calls of `save()` on a rank that does not write, for one checkpointer."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        # touched on the ranks' thread only; the keys are the lists of saves:
        self.calls: dict[str, deque[_Follow]] = {}  # calls that belong to no save yet, oldest first
        self.newest: dict[str, int] = {}  # the newest save that this rank took part in

    def join(
        self, directory: str, step: int | None, of_every_rank: bool, render: Callable[[], Files], heard: Heard
    ) -> None:
        """Add the files that `render` returns to the first rank's save, and report its states to `heard` until it ends.

        Both are called on the ranks' thread. If `render` raises, the save fails on every rank.
        """
        self.ranks.add(_Follow(self, directory, step, of_every_rank, render, heard))


class _Follow:
    def __init__(
        self,
        following: Following,
        directory: str,
        step: int | None,
        of_every_rank: bool,
        render: Callable[[], Files],
        heard: Heard,
    ) -> None:
        self._following = following
        self._ranks = following.ranks
        self._directory = directory
        self._step = step
        self._of_every_rank = of_every_rank
        self._render = render
        self._heard = heard
        self.list = f"{'all' if of_every_rank else 'first'}/{directory}"
        self._save: Entry | None = None
        self._announced = False
        self._last = b""
        self._begun = time.monotonic()
        self._time = time.time()

    def poll(self) -> bool:
        if not self._announced:
            self._announced = True
            self._following.calls.setdefault(self.list, deque()).append(self)
            self._ranks.called()
        if self._save is None:
            self._match()
        return (self._save is not None and self._listen(self._save)) or self._give_up()

    def _match(self) -> None:
        """Find the save that this call belongs to, and add this rank's part to it."""
        following, store = self._following, self._ranks.store
        if following.calls[self.list][0] is not self:
            return  # an earlier call comes first
        newest = following.newest.get(self.list, 0)
        entries = [entry for entry in messages.get_entries(store, self.list) if entry.number > newest]
        released = [entry for entry in entries if entry.released]
        awaited = [entry for entry in entries if not entry.released and (not released or entry.step == self._step)]
        if awaited:
            self._save = awaited[0]
        elif released and (
            abs(self._time - released[-1].time) < patience.LATE or time.monotonic() - self._begun > patience.LATE
        ):
            self._save = released[-1]
        if self._save is None:
            return
        following.newest[self.list] = self._save.number
        self._drop()
        if self._of_every_rank and not self._save.released:
            self._add(f"{self._save.number}/from/{self._ranks.rank}")

    def _drop(self) -> None:
        calls = self._following.calls[self.list]
        calls.remove(self)
        if not calls:
            del self._following.calls[self.list]

    def _add(self, name: str) -> None:
        store = self._ranks.store
        try:
            files = self._render()
        except Exception as error:  # the other ranks must learn of any error
            messages.put_refusal(store, name, f"{type(error).__name__}: {error}", raised=True)
        else:
            messages.put_files(store, name, files)

    def _listen(self, save: Entry) -> bool:
        """Pass on the first rank's latest report. Return True if the save has ended."""
        store, name = self._ranks.store, f"{save.number}/said"
        if not store.check([name]):
            return False
        text = bytes(store.get(name))
        if text == self._last:
            return False
        self._last = text
        said = messages.parse(text)
        if said.state not in ENDS:
            self._heard(said.state, said.info, said.error)
            return False
        if said.state is SaveState.COMMITTED and self._ranks.rank in said.without:
            logger.warning(
                "%s: rank %d called save() too late: the checkpoint is saved without its random states and data position; "
                "all else is in it",
                *(said.info.path if said.info else self._directory, self._ranks.rank),
            )
        if self._of_every_rank:
            store.add(f"{save.number}/seen", 1)
        self._heard(said.state, said.info, said.error)
        return True

    def _give_up(self) -> bool:
        silence = self._ranks.silence(0)
        if silence is not None and silence > patience.SILENCE:
            reason = f"rank 0, which writes, has not been heard of for {silence:.0f} s"
        elif self._save is None and time.monotonic() - self._begun > patience.PATIENCE:
            reason = (
                f"rank 0, which writes, did not call save() within {patience.PATIENCE:.0f} s; every rank must call it"
            )
        else:
            return False
        self.fail(StageError(f"{self._directory}: {reason}"))
        return True

    def fail(self, error: CheckpointError) -> None:
        if self._announced and self._save is None:
            self._drop()
        self._heard(SaveState.FAILED, None, error)
