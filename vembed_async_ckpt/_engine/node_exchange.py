"""The first rank's side of sharded saves: every rank of the node copies what it holds into the first rank's arena.

A save needs every rank. The n-th sharded save of the first rank belongs to the n-th call of `save()` on each other
rank. The ranks agree on step, directory and plan, and then the first rank tells the others the arena (see `grant`). An
arena is used again only when every rank that was told of it has let go of it or is proven to have ended.

All messages of a save go over the `Channel`. The job's store is used once, to tell the ranks where to connect.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from .. import _signals
from .._capture.request import Request
from .._memory.arena import Arena
from .._shared.protocol import GENERATION, GENERATION_AT
from ..errors import CheckpointError, PlanError, StageError
from ..handle import CheckpointInfo, SaveState
from . import messages, patience
from .channel import Address, Channel, Line, Message, sizes_of
from .messages import ENDS, Files, RaisedElsewhere, RefusedElsewhere, Said
from .rank_exchange import ROOM, Gathered, Parts
from .ranks import Ranks

ADDRESS = "node"  # name of the first rank's address in the store
CANNOT = "node/cannot/"  # followed by a rank: why it cannot connect


@dataclass(frozen=True)
class Plan:
    """What a rank plans to save.

    `digest`: equal on all ranks. The rest is told only when the digest is new. `outline`: one line for each tensor.
    `claims`: what the rank holds, for `check_claims`.
    """

    digest: str
    outline: list[str] = field(default_factory=list)
    claims: bytes = b""


@dataclass
class Call:
    """A call of `save()` on another rank. `number`: that rank's own count of its calls.

    `told`: what the rank told all others, in order. `plan`: None until its request is read. `error`: why the rank cannot
    take part.
    """

    number: int
    directory: str
    step: int | None
    told: list[bytes] = field(default_factory=list)
    plan: Plan | None = None
    error: CheckpointError | None = None


@dataclass
class _Part:
    """Another rank's part in a save. `staged`: all that it holds is in the arena. `files`: what it adds."""

    call: Call | None = None
    granted: bool = False
    staged: bool = False
    files: Files = field(default_factory=list)


def plan_of(request: Request) -> Plan:
    return Plan(request.digest.hex(), request.outline(), request.claims())


class NodeExchanges:
    """The sharded saves that this process begins as the first rank of a node, for one checkpointer."""

    def __init__(self, ranks: Ranks) -> None:
        """Listen, and tell the other ranks where. Raises OSError."""
        self._ranks = ranks
        self._others = range(1, ranks.world_size)
        self.room = ROOM * len(self._others)
        self._changed = threading.Condition()
        # guarded by _changed:
        self._lines: dict[int, Line] = {}
        self._known: dict[Line, set[int]] = {}  # numbers of the arenas that each connection was told of
        self._dead: set[int] = set()  # ranks that have ended
        self._open: list[NodeExchange] = []
        self._calls: dict[int, deque[Call]] = {rank: deque() for rank in self._others}
        self._saves: dict[int, deque[NodeExchange]] = {rank: deque() for rank in self._others}
        self._ahead: dict[int, str] = {}
        self._behind: dict[int, str] = {}
        self._agreed = ""
        self._retired: list[NodeExchange] = []
        self._number = 0
        self._due: deque[Callable[[], None]] = deque()
        self._broken: CheckpointError | None = None
        self._next_beat = 0.0
        self.over = False
        self.address = Address.new()
        self._channel = Channel(
            received=self._received,
            lost=self._lost,
            tick=self._tick,
            busy=lambda: bool(self._open),
            broke=self._broke,
            accepted=self._accepted,
            address=self.address,
        )
        ranks.add(_Rendezvous(self, ranks))

    # -- training thread

    def begin(self, directory: str, step: int | None, of_every_rank: bool) -> NodeExchange:
        """Begin the exchange for one call of `save()`."""
        with self._changed:
            if self._broken is not None:
                raise self._broken
            self._number += 1
            save = NodeExchange(self, self._number, directory, step, of_every_rank)
            self._open.append(save)
            self._send_all(Message("open", {"save": save.number, "directory": directory, "step": step}))
            for rank in self._others:
                if rank in self._dead:
                    self._fail(save, StageError(f"{directory}: rank {rank} has ended"))
                    continue
                if self._ahead.pop(rank, None) == directory:
                    self._fail(save, _refused_before(directory, rank))
                self._saves[rank].append(save)
                self._pair(rank)
        self._run_due()
        return save

    def tell_all(self, save: NodeExchange, message: bytes) -> list[bytes]:
        """Return what every rank told here, in the order of the ranks. All ranks call this equally often.

        Raises what `agree` raises.
        """
        with self._changed:
            save.rounds += 1
        told = self._wait_for_all(save, lambda call: len(call.told) >= save.rounds)
        everything = [message, *(call.told[save.rounds - 1] for call in told)]
        with self._changed:
            self._send_all(Message("told", {"save": save.number}, tuple(everything)))
        return everything

    def agree(
        self, save: NodeExchange, digest: str, describe: Callable[[], Plan], check: Callable[[list[bytes]], str | None]
    ) -> None:
        """Make sure that all ranks save the same. Wait for them only if the plan is not the one they agreed on last.

        `describe`: returns the whole plan. `check`: returns what is wrong with the claims of all ranks, or None.

        Raises `PlanError` if a rank refuses or saves something else, and `StageError` if one does not come.
        """
        with self._changed:
            save.digest, save.describe = digest, describe
            for rank, part in save.parts.items():
                if part.call is not None:
                    self._compare(save, rank, part.call)
            if save.error is not None:
                raise save.error
            if digest == self._agreed:
                return
        calls = self._wait_for_all(save, lambda call: call.plan is not None)
        wrong = check([describe().claims, *(call.plan.claims for call in calls if call.plan is not None)])
        with self._changed:
            if wrong is not None:
                self._fail(save, PlanError(f"{save.directory}: {wrong}"))
            if save.error is not None:
                raise save.error
            self._agreed = digest

    def _wait_for_all(self, save: NodeExchange, ready: Callable[[Call], bool]) -> list[Call]:
        while True:
            with self._changed:
                if save.error is not None:
                    raise save.error
                calls = [part.call for part in save.parts.values() if part.call is not None]
                if len(calls) == len(save.parts) and all(map(ready, calls)):
                    return calls
                self._changed.wait(_signals.SLICE)
            _signals.deliver()

    def wait_for_stragglers(self) -> None:
        """Wait shortly for ranks that may still copy into an arena of a failed save."""
        deadline = time.monotonic() + patience.RELEASE
        with self._changed:
            while self._retired and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)

    def grant(self, save: NodeExchange, arena: Arena, save_id: str) -> None:
        """Let the other ranks copy into `arena`."""
        with self._changed:
            save.arena, save.save_id = arena, save_id
            GENERATION.pack_into(arena.memory, GENERATION_AT, save.number)
            if save.error is None:
                for rank in self._others:
                    # A rank that still uses the arena of a failed save gets a new one only when it calls.
                    if save.parts[rank].call is not None or not self._straggles(rank):
                        self._send_grant(save, rank)

    def hand_back(
        self, save: NodeExchange, arena: Arena, release: Callable[[Arena], None], retire: Callable[[Arena], None]
    ) -> None:
        with self._changed:
            save.arena = None  # nobody is told of it any more
            used = bool(save.holders)
        if not used:
            release(arena)
            return
        retire(arena)
        with self._changed:
            save.release = partial(release, arena)
            self._retired.append(save)
            self._settle()
        self._run_due()

    def dropped(self, arena: Arena) -> None:
        """Tell the other ranks that the arena is gone."""
        with self._changed:
            for line, known in self._known.items():
                if arena.number in known:
                    known.discard(arena.number)
                    line.send(Message("drop", {"arena": arena.number}))

    def check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def close(self, timeout: float) -> None:
        self.over = True
        self._ranks.add(_Withdrawal(self, self._ranks))
        self._channel.close(timeout)

    def forget(self) -> None:
        self._channel.forget()

    # -- any thread, for one save

    def gather(self, save: NodeExchange, done: Callable[[Gathered], None]) -> None:
        with self._changed:
            save.done = done
            if save.error is not None:
                self._finish(save, save.error)
            self._finish_if_complete(save)
        self._run_due()

    def say(self, save: NodeExchange, said: Said) -> None:
        with self._changed:
            if save.said is not None and save.said.state in ENDS:
                if save in self._open and said.state in ENDS:
                    self._open.remove(save)  # the other ranks knew already that it had failed
                return
            save.said = said
            if said.state in ENDS:
                self._open.remove(save)
            self._tell(save, said)

    # -- the ranks' thread

    def refused(self, error: CheckpointError) -> None:
        """A rank cannot connect."""
        with self._changed:
            for save in list(self._open):
                self._fail(save, type(error)(f"{save.directory}: {error}"))
        self._run_due()

    def missing(self) -> list[int]:
        """Return the ranks that have not connected yet."""
        with self._changed:
            return [rank for rank in self._others if rank not in self._lines]

    # -- the channel's thread

    def _accepted(self, line: Line) -> None:
        with self._changed:
            if (earlier := self._lines.get(line.rank)) is not None:
                self._leave(earlier, "has closed its checkpointer")
            self._lines[line.rank] = line
            self._known[line] = set()
            self._dead.discard(line.rank)
            for save in self._open:
                line.send(Message("open", {"save": save.number, "directory": save.directory, "step": save.step}))

    def _received(self, line: Line, message: Message) -> None:
        values = message.values
        with self._changed:
            if message.kind == "call":
                self._calls[line.rank].append(Call(values["call"], values["directory"], values["step"]))
                self._pair(line.rank)
            elif message.kind in ("told", "plan", "refusal"):
                for call in self._find_calls(line.rank, values["call"]):
                    self._learn(line.rank, call, message)
            elif message.kind == "staged":
                self._staged(line, values["save"], list(zip(values["names"], message.data, strict=True)))
            elif message.kind == "release":
                error = None if values["error"] is None else messages.described(values["error"])
                self._release(line, values["save"], error, keeps=values["keeps"])
            self._settle()
        self._run_due()

    def _learn(self, rank: int, call: Call, message: Message) -> None:
        """Note what another rank says about its call."""
        values = message.values
        if message.kind == "told":
            call.told.append(message.data[0])
        elif message.kind == "plan":
            call.plan = Plan(values["digest"], values["outline"], *message.data)
        else:
            call.error = messages.described(values["error"])
            if values["withdrawn"] and call in self._calls[rank]:
                self._calls[rank].remove(call)
        for save in self._open:
            if save.parts[rank].call is call:
                self._compare(save, rank, call)
        self._changed.notify_all()

    def _staged(self, line: Line, number: int, files: Files) -> None:
        for save in self._using(line, number):
            save.holders.discard(line)
            part = save.parts[line.rank]
            part.staged, part.files = True, files
            self.room = max(self.room, len(self._others) * sizes_of(files))
            self._finish_if_complete(save)

    def _release(self, line: Line, number: int, error: CheckpointError | None, *, keeps: bool) -> None:
        """`keeps`: a device that does not answer may still write to the arena."""
        for save in self._using(line, number):
            if not keeps:
                save.holders.discard(line)
            if not save.parts[line.rank].staged:
                why = error or StageError(f"{save.directory}: rank {line.rank} did not copy its part")
                self._fail(save, _of_rank(line.rank, save.directory, why))

    def _lost(self, line: Line, dead: bool) -> None:
        dead = dead or line.is_dead()
        with self._changed:
            if self._lines.get(line.rank, line) is line and dead:
                self._dead.add(line.rank)
            if self._lines.get(line.rank) is line:
                self._leave(line, "has ended" if dead else "has closed its checkpointer or is ending")
            if dead:
                for save in (*self._open, *self._retired):
                    save.holders.discard(line)
            self._settle()
        self._run_due()

    def _tick(self) -> None:
        now = time.monotonic()
        with self._changed:
            for save in list(self._open):
                for rank, part in save.parts.items():
                    if not part.staged and save.error is None:
                        self._watch(save, rank, part, now)
            if self._open and now >= self._next_beat:
                self._next_beat = now + patience.BEAT
                self._send_all(Message("beat", {}))
        self._run_due()

    def _watch(self, save: NodeExchange, rank: int, part: _Part, now: float) -> None:
        line = self._lines.get(rank)
        if part.call is None and now - save.opened > patience.ARRIVAL:
            why = f"rank {rank} did not call save() within {patience.ARRIVAL:.0f} s"
        elif part.call is not None and line is not None and now - line.heard > patience.SILENCE:
            why = f"rank {rank} has not been heard of for {now - line.heard:.0f} s"
        else:
            return
        self._fail(save, StageError(f"{save.directory}: {why}. The model is sharded, so every rank must save it"))

    def _broke(self, error: CheckpointError) -> None:
        with self._changed:
            self._broken = error
            for save in list(self._open):
                self._fail(save, error)
        self._run_due()

    # -- _changed is held

    def _leave(self, line: Line, how: str) -> None:
        """Nothing more will come from this connection."""
        rank = line.rank
        del self._lines[rank], self._known[line]
        self._calls[rank].clear()
        for save in self._open:
            if not save.parts[rank].staged:
                self._fail(save, StageError(f"{save.directory}: rank {rank} {how}, and its state was not saved"))

    def _pair(self, rank: int) -> None:
        """Find the saves to which the rank's calls belong."""
        calls, saves = self._calls[rank], self._saves[rank]
        while calls:
            call = calls[0]
            while saves and saves[0].was_left_out(call):
                saves.popleft()
            tried = self._behind.get(rank) == call.directory
            if tried and not (saves and saves[0].directory == call.directory):
                del self._behind[rank]
                self._answer(rank, calls.popleft(), _refused_before(call.directory, 0))
                continue
            if not saves:
                return
            save = saves.popleft()
            calls.popleft()
            self._ahead.pop(rank, None)
            self._behind.pop(rank, None)
            if (call.directory, call.step) == (save.directory, save.step):
                self._join(save, rank, call)
                continue
            # One of the two may have left out a call. Its next call is then for what the other one tried here: that fails
            # at once, unless the other one tries it again.
            self._ahead[rank], self._behind[rank] = call.directory, save.directory
            mine, its = f"step {save.step} to {save.directory}", f"step {call.step} to {call.directory}"
            error = PlanError(f"rank {rank} saves {its}, rank 0 {mine}; all ranks must save the same at the same time")
            save.differed = True
            self._answer(rank, call, error)
            self._fail(save, error)

    def _answer(self, rank: int, call: Call, error: CheckpointError) -> None:
        """Refuse a call that belongs to no save."""
        text = messages.render(Said(SaveState.FAILED, None, error))
        if (line := self._lines.get(rank)) is not None:
            line.send(Message("said", {"save": 0, "call": call.number, "said": text}))

    def _join(self, save: NodeExchange, rank: int, call: Call) -> None:
        save.parts[rank].call = call
        self._compare(save, rank, call)
        if save.said is not None:
            self._send_said(save, rank, save.said)
        elif save.arena is not None and not save.parts[rank].granted and save.error is None:
            self._send_grant(save, rank)
        self._changed.notify_all()

    def _compare(self, save: NodeExchange, rank: int, call: Call) -> None:
        """Fail the save if `call` refuses or plans something else."""
        if call.error is not None:
            self._fail(save, _of_rank(rank, save.directory, call.error))
        elif save.digest and call.plan is not None and call.plan.digest != save.digest:
            first = _first_difference(save.describe().outline, call.plan.outline)
            self._fail(
                save,
                PlanError(
                    f"{save.directory}: rank {rank} plans other tensors than rank 0: {first}; all ranks must save the same "
                    "model and optimizer"
                ),
            )

    def _find_calls(self, rank: int, number: int) -> list[Call]:
        joined = [save.parts[rank].call for save in self._open]
        return [call for call in (*self._calls[rank], *joined) if call is not None and call.number == number]

    def _straggles(self, rank: int) -> bool:
        line = self._lines.get(rank)
        return any(line in save.holders for save in self._retired)

    def _send_grant(self, save: NodeExchange, rank: int) -> None:
        line, arena = self._lines.get(rank), save.arena
        if line is None or arena is None:
            return  # it is told when it has connected and called
        save.parts[rank].granted = True
        save.holders.add(line)
        new = arena.number not in self._known[line]
        self._known[line].add(arena.number)
        values = {
            "save": save.number,
            "directory": save.directory,
            "step": save.step,
            "digest": save.digest,
            "save_id": save.save_id,
            "arena": arena.number,
            "size": arena.size,
        }
        line.send(Message("grant", values, fds=(arena.fd,) if new else ()))

    def _tell(self, save: NodeExchange, said: Said) -> None:
        for rank in self._others:
            self._send_said(save, rank, said)

    def _send_said(self, save: NodeExchange, rank: int, said: Said) -> None:
        call = save.parts[rank].call
        values = {"save": save.number, "call": call.number if call else 0, "said": messages.render(said)}
        if (line := self._lines.get(rank)) is not None:
            line.send(Message("said", values))

    def _send_all(self, message: Message) -> None:
        for line in self._lines.values():
            line.send(message)

    def _fail(self, save: NodeExchange, error: CheckpointError) -> None:
        """The save cannot be completed. The other ranks are told at once; here it ends when its own copy has ended."""
        if save.complete or save.is_over():
            return
        save.error = error
        save.said = Said(SaveState.FAILED, None, error)
        self._tell(save, save.said)
        if save.done is not None:
            self._finish(save, error)
        self._changed.notify_all()

    def _finish_if_complete(self, save: NodeExchange) -> None:
        if save.done is not None and save.error is None and all(part.staged for part in save.parts.values()):
            save.complete = True
            self._finish(save, Parts([file for rank in self._others for file in save.parts[rank].files]))

    def _finish(self, save: NodeExchange, gathered: Gathered) -> None:
        done, save.done = save.done, None
        assert done is not None
        self._due.append(partial(done, gathered))

    def _using(self, line: Line, number: int) -> list[NodeExchange]:
        return [save for save in (*self._open, *self._retired) if save.number == number and line in save.holders]

    def _settle(self) -> None:
        """Free the arenas of failed saves that no rank uses any more."""
        for save in [save for save in self._retired if not save.holders]:
            self._retired.remove(save)
            assert save.release is not None
            self._due.append(save.release)
        self._changed.notify_all()

    # -- nothing is held

    def _run_due(self) -> None:
        while True:
            try:
                due = self._due.popleft()
            except IndexError:
                return
            due()


class NodeExchange:
    """One sharded save on the first rank. Its fields are guarded by `NodeExchanges`.

    `holders`: the connections of ranks that may copy into the arena.
    `said`: what was told last about the save.
    `error`: why the save cannot be completed.
    `differed`: a rank tried to save something else at the same time.
    `complete`: all that the other ranks hold is in the arena, and what they add was passed on.
    """

    def __init__(
        self, exchanges: NodeExchanges, number: int, directory: str, step: int | None, of_every_rank: bool
    ) -> None:
        self._exchanges = exchanges
        self.number = number
        self.directory = directory
        self.step = step
        self.room = exchanges.room if of_every_rank else 0
        self.opened = time.monotonic()
        self.digest = ""
        self.describe: Callable[[], Plan] = lambda: Plan("")
        self.rounds = 0
        self.save_id = ""
        self.parts: dict[int, _Part] = {rank: _Part() for rank in exchanges._others}
        self.arena: Arena | None = None
        self.holders: set[Line] = set()
        self.release: Callable[[], None] | None = None
        self.error: CheckpointError | None = None
        self.complete = False
        self.differed = False
        self.said: Said | None = None
        self.done: Callable[[Gathered], None] | None = None

    def is_over(self) -> bool:
        return self.said is not None and self.said.state in ENDS

    def was_left_out(self, call: Call) -> bool:
        """Return whether the rank of `call` never tried this save, which has ended, and tries a later one."""
        return self.is_over() and not self.differed and self.directory != call.directory

    def tell_all(self, message: bytes) -> list[bytes]:
        return self._exchanges.tell_all(self, message)

    def agree(self, request: Request) -> None:
        self._exchanges.agree(self, request.digest.hex(), partial(plan_of, request), request.check_claims)

    def grant(self, arena: Arena, save_id: str) -> None:
        self._exchanges.grant(self, arena, save_id)

    def gather(self, done: Callable[[Gathered], None]) -> None:
        self._exchanges.gather(self, done)

    def say(self, state: SaveState, info: CheckpointInfo | None = None, error: CheckpointError | None = None) -> None:
        self._exchanges.say(self, Said(state, info, error))

    def hand_back(self, arena: Arena, release: Callable[[Arena], None], retire: Callable[[Arena], None]) -> None:
        self._exchanges.hand_back(self, arena, release, retire)


class _Rendezvous:
    """Tells the other ranks where to connect, and learns which of them cannot."""

    def __init__(self, exchanges: NodeExchanges, ranks: Ranks) -> None:
        self._exchanges = exchanges
        self._ranks = ranks
        self._announced = False

    def poll(self) -> bool:
        store, missing = self._ranks.store, self._exchanges.missing()
        if not self._announced:
            self._announced = True
            for rank in missing:
                store.delete_key(f"{CANNOT}{rank}")
            store.set(ADDRESS, self._exchanges.address.text())
        if self._exchanges.over or not missing:
            return True
        for rank in missing:
            if store.check([f"{CANNOT}{rank}"]):
                self._exchanges.refused(PlanError(store.get(f"{CANNOT}{rank}").decode()))
                store.delete_key(f"{CANNOT}{rank}")
        return False

    def fail(self, error: CheckpointError) -> None:
        if self._exchanges.missing():
            self._exchanges.refused(error)


class _Withdrawal:
    """Removes the address from the store, unless it is that of a later checkpointer."""

    def __init__(self, exchanges: NodeExchanges, ranks: Ranks) -> None:
        self._text = exchanges.address.text()
        self._ranks = ranks

    def poll(self) -> bool:
        store = self._ranks.store
        if store.check([ADDRESS]) and bytes(store.get(ADDRESS)).decode() == self._text:
            store.delete_key(ADDRESS)
        return True

    def fail(self, error: CheckpointError) -> None:
        pass


def _of_rank(rank: int, directory: str, error: CheckpointError) -> CheckpointError:
    """Return an error of another rank as this rank reports it."""
    text = f"rank {rank} cannot take part in saving {directory}: {error}"
    if isinstance(error, PlanError):
        return RefusedElsewhere(text)
    return RaisedElsewhere(text) if isinstance(error, RaisedElsewhere) else StageError(text)


def _refused_before(directory: str, rank: int) -> PlanError:
    return PlanError(
        f"{directory}: rank {rank} has tried to save it when the other ranks saved something else; from the next save on all "
        "ranks save the same again"
    )


def _first_difference(here: list[str], there: list[str]) -> str:
    if not there:
        return "it has the plan of the save before"
    for mine, its in zip(here, there, strict=False):
        if mine != its:
            return f"{its!r} where rank 0 has {mine!r}"
    rest = there[len(here) :] or here[len(there) :]
    whose = "only this rank" if len(there) > len(here) else "only rank 0"
    return f"{whose} has {rest[0]!r}" if rest else "they are divided differently"
