"""The first rank's side of a save by several ranks.

It collects what the other ranks add, and tells them how the save ended.

The first rank has all the state that a checkpoint needs. A rank that does not take part loses only its own random
states and data position; the checkpoint is still saved. The save waits some time for such a rank, in the background,
and then goes on without it.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .._capture.request import Request
from .._memory.arena import Arena
from .._memory.barrier import STEP_BARRIER
from ..errors import CheckpointError, StageError
from ..events import logger
from ..handle import CheckpointInfo, SaveState
from . import messages, patience
from .messages import ENDS, Entry, Files, RaisedElsewhere, Said
from .ranks import Ranks

ROOM = 256 << 10  # bytes that a rank's files are expected to take, until larger ones were seen
_KEPT = 64  # saves whose outcome is kept for ranks that have not read it

_NUMBERS = itertools.count(1)  # numbers of the saves that this process begins, whatever the root


@dataclass(frozen=True)
class Parts:
    """What the other ranks add to a save. `without`: the ranks that the save goes on without."""

    files: Files
    without: tuple[int, ...] = ()


Gathered = Parts | CheckpointError


class RankExchange(Protocol):
    """One save on the rank that writes it, and the part that the other ranks have in it."""

    room: int  # bytes of the arena to reserve for the other ranks' files

    def agree(self, request: Request) -> None:
        """Make sure that every rank saves the same, if each saves a part of the tensors. Raises `CheckpointError`."""

    def grant(self, arena: Arena, save_id: str) -> None:
        """Let the other ranks copy their tensors into `arena`, if they have any."""

    def hand_back(self, arena: Arena, release: Callable[[Arena], None], retire: Callable[[Arena], None]) -> None:
        """`release` the arena of a save that has ended; `retire` it first while another rank may still copy into it."""

    def gather(self, done: Callable[[Gathered], None]) -> None:
        """Call `done` once, with what the other ranks add or with the error for which the save must fail.

        The call comes at the latest about `HOLD` seconds later.
        """

    def say(self, state: SaveState, info: CheckpointInfo | None = None, error: CheckpointError | None = None) -> None:
        """Tell the other ranks the state of the save."""


class WholeState:
    """The part of an exchange that is empty where the first rank copies all tensors."""

    def agree(self, request: Request) -> None:
        pass

    def grant(self, arena: Arena, save_id: str) -> None:
        pass

    def hand_back(self, arena: Arena, release: Callable[[Arena], None], retire: Callable[[Arena], None]) -> None:
        release(arena)


class SingleRank(WholeState):
    """The exchange of a training that has one rank: there is nobody to exchange with."""

    room = 0

    def gather(self, done: Callable[[Gathered], None]) -> None:
        done(Parts([]))

    def say(self, state: SaveState, info: CheckpointInfo | None = None, error: CheckpointError | None = None) -> None:
        pass


class RankExchanges:
    """The saves that this process begins as the first rank of a job, for one checkpointer."""

    def __init__(self, ranks: Ranks, root: str) -> None:
        self.ranks = ranks
        self.root = root
        self.room = ROOM
        # touched on the ranks' thread only:
        self._entries: dict[str, list[Entry]] = {}  # by the name of their list
        self._kept: deque[tuple[str, Entry]] = deque()  # all of them, oldest first
        self._absent: dict[int, bytes | None] = {}  # ranks that were missed, with their `here` sign at that time
        self._warned_of: tuple[int, ...] = ()

    def meet(self, directory: str, step: int | None, of_every_rank: bool) -> RankExchange:
        """Begin the exchange for one call of `save()`. With `of_every_rank` the other ranks have a part in it."""
        return _JobExchange(self, directory, step, of_every_rank)

    def stop_holding(self) -> None:
        """Stop holding saves for ranks that trained on without calling `save()`.

        Called when a new save waits for memory that a held save occupies.
        """
        for task in self.ranks.tasks():
            if isinstance(task, _Gather):
                task.hurried = True

    # -- on the ranks' thread

    def is_expected(self, rank: int) -> bool:
        """Return whether to hold a save for `rank`. False if it was missed before and has given no sign since."""
        return rank not in self._absent or self.ranks.here(rank) != self._absent[rank]

    def came(self, rank: int) -> None:
        self._absent.pop(rank, None)
        if rank in self._warned_of:
            self._warned_of = ()

    def missed(self, directory: str, ranks: tuple[int, ...]) -> None:
        """Note that a save goes on without `ranks`. Warn, but only once for the same ranks."""
        for rank in ranks:
            self._absent[rank] = self.ranks.here(rank)
        self.warn(directory, ranks, "did not call save() in time")

    def warn(self, directory: str, ranks: tuple[int, ...], why: str) -> None:
        if ranks == self._warned_of:
            return
        self._warned_of = ranks
        several, which = "s" * (len(ranks) > 1), ", ".join(map(str, ranks[:20]))
        logger.warning(
            "%s/%s: rank%s %s of %d %s. The checkpoint is saved without the random states and data position%s of the rank%s; "
            "all else is in it. To have them saved too, call save() on every rank",
            *(self.root, directory, several, which, self.ranks.world_size, why, several, several),
        )

    def begin(self, name: str, entry: Entry) -> None:
        """Show a new save to the other ranks."""
        self._entries.setdefault(name, []).append(entry)
        self._kept.append((name, entry))
        self.show(name)
        while len(self._kept) > _KEPT:
            self.forget(*self._kept[0])

    def show(self, name: str) -> None:
        messages.put_entries(self.ranks.store, name, self._entries.get(name, []))

    def forget(self, name: str, entry: Entry) -> None:
        """Remove a save from the store: no rank needs to read about it any more."""
        if (name, entry) not in self._kept:
            return
        self._kept.remove((name, entry))
        self._entries[name].remove(entry)
        self.show(name)
        if not self._entries[name]:
            del self._entries[name]
        for rank in range(1, self.ranks.world_size):
            messages.take_back(self.ranks.store, f"{entry.number}/from/{rank}")
        for what in ("seen", "said"):
            self.ranks.store.delete_key(f"{entry.number}/{what}")


class _JobExchange(WholeState):
    def __init__(self, exchanges: RankExchanges, directory: str, step: int | None, of_every_rank: bool) -> None:
        self._exchanges = exchanges
        self._ranks = exchanges.ranks
        self._of_every_rank = of_every_rank
        self.directory = directory
        self.list = f"{'all' if of_every_rank else 'first'}/{directory}"
        self.entry = Entry(next(_NUMBERS), step, time.time())
        self.steps = STEP_BARRIER.steps  # optimizer steps counted at the call
        self.room = exchanges.room * (self._ranks.world_size - 1) if of_every_rank else 0
        self.gathered = False
        self.joined: set[int] = set()  # ranks whose part has come
        self.without: tuple[int, ...] = ()
        self._over = False
        self._ranks.add(_Begin(exchanges, self))
        self.say(SaveState.STAGING)

    def gather(self, done: Callable[[Gathered], None]) -> None:
        if self._of_every_rank:
            self._ranks.add(_Gather(self._exchanges, self, done))
        else:
            done(Parts([]))

    def say(self, state: SaveState, info: CheckpointInfo | None = None, error: CheckpointError | None = None) -> None:
        if self._over:
            return
        self._over = state in ENDS
        text = messages.render(Said(state, info, error, self.without))
        self._ranks.add(_Say(self._ranks, f"{self.entry.number}/said", text))
        if self._over and self._of_every_rank:
            self._ranks.add(_Forget(self._exchanges, self))


class _Begin:
    def __init__(self, exchanges: RankExchanges, exchange: _JobExchange) -> None:
        self._exchanges, self._exchange = exchanges, exchange

    def poll(self) -> bool:
        self._exchanges.begin(self._exchange.list, self._exchange.entry)
        return True

    def fail(self, error: CheckpointError) -> None:
        pass


class _Say:
    def __init__(self, ranks: Ranks, name: str, value: str) -> None:
        self._ranks, self._name, self._value = ranks, name, value

    def poll(self) -> bool:
        self._ranks.store.set(self._name, self._value)
        return True

    def fail(self, error: CheckpointError) -> None:
        pass  # the other ranks notice by themselves that the store is gone


class _Forget:
    """Removes what the store holds for a save, once the save has ended and the ranks in it know the outcome.

    The outcome itself stays in the store for ranks that come later.
    """

    def __init__(self, exchanges: RankExchanges, exchange: _JobExchange) -> None:
        self._exchanges = exchanges
        self._exchange = exchange
        self._deadline = time.monotonic() + patience.SILENCE

    def poll(self) -> bool:
        ranks, exchange = self._exchanges.ranks, self._exchange
        seen = ranks.store.add(f"{exchange.entry.number}/seen", 0)
        if seen < self._listeners() and time.monotonic() < self._deadline:
            return False
        if seen >= ranks.world_size - 1:
            self._exchanges.forget(exchange.list, exchange.entry)
        for rank in exchange.joined:
            messages.take_back(ranks.store, f"{exchange.entry.number}/from/{rank}")
        return True

    def _listeners(self) -> int:
        """Return how many ranks will read the outcome."""
        if self._exchange.gathered:
            return len(self._exchange.joined)
        others = range(1, self._exchanges.ranks.world_size)
        return sum(self._exchanges.is_expected(r) and self._exchanges.ranks.here(r) is not None for r in others)

    def fail(self, error: CheckpointError) -> None:
        pass


class _Gather:
    """Waits on the first rank for what the other ranks add."""

    def __init__(self, exchanges: RankExchanges, exchange: _JobExchange, done: Callable[[Gathered], None]) -> None:
        self._exchanges = exchanges
        self._exchange = exchange
        self._done = done
        self._missing = list(range(1, exchanges.ranks.world_size))
        self._files: dict[int, Files] = {}
        self._begun = time.monotonic()
        self.hurried = False

    def poll(self) -> bool:
        exchanges, exchange = self._exchanges, self._exchange
        for rank in list(self._missing):
            part = messages.get_part(exchanges.ranks.store, f"{exchange.entry.number}/from/{rank}")
            if part is None:
                continue
            exchange.joined.add(rank)
            if isinstance(part, tuple):
                reason, raised = part
                kind = RaisedElsewhere if raised else StageError
                exchange.gathered = True
                self._done(kind(f"rank {rank} cannot take part in saving {exchange.directory}: {reason}"))
                return True
            exchanges.came(rank)
            self._files[rank] = part
            exchanges.room = max(exchanges.room, sum(len(data) + 8192 for _, data in part))
            self._missing.remove(rank)
        if self._missing:
            if time.monotonic() - self._begun <= max(map(self._hold, self._missing)):
                return False
            exchange.entry.released = True
            exchanges.show(exchange.list)
            exchanges.missed(exchange.directory, tuple(self._missing))
        self._go_on()
        return True

    def _hold(self, rank: int) -> float:
        """Return for how many seconds the save is held for `rank`."""
        ranks = self._exchanges.ranks
        if (ranks.silence(rank) or 0.0) > patience.SILENCE:
            return 0.0
        stepped = STEP_BARRIER.steps > self._exchange.steps
        expected = self._exchanges.is_expected(rank)
        if ranks.here(rank) is None:
            if not expected:
                return 0.0
            return patience.STEP_HOLD if stepped else patience.FIRST_HOLD
        if stepped and self.hurried:
            return 0.0
        return patience.HOLD if expected else patience.AGAIN_HOLD

    def _go_on(self) -> None:
        self._exchange.gathered = True
        self._exchange.without = tuple(self._missing)
        files = [file for rank in sorted(self._files) for file in self._files[rank]]
        self._done(Parts(files, self._exchange.without))

    def fail(self, error: CheckpointError) -> None:
        self._exchanges.warn(self._exchange.directory, tuple(self._missing), f"cannot be asked ({error})")
        self._go_on()


def merge(own: Files, gathered: Files) -> Files:
    """Return the files of all ranks. If several ranks have a file of the same name, the first rank's is used."""
    merged = dict(own)
    for name, data in gathered:
        merged.setdefault(name, data)
    return list(merged.items())
