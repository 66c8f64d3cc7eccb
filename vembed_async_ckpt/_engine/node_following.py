"""The other ranks' side of sharded saves. See `node_exchange` for how the ranks of a node save together."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from .. import _signals
from .._capture.request import Request
from .._memory.arena import Arena
from .._shared.protocol import GENERATION, GENERATION_AT
from ..errors import CheckpointError, PlanError, StageError
from ..handle import SaveState
from . import messages, patience
from .channel import Address, Broken, Channel, Line, Message, connect
from .following import Heard
from .messages import ENDS, Files, Said
from .node_exchange import ADDRESS, CANNOT, Plan, plan_of
from .ranks import Ranks

_T = TypeVar("_T")
_FAREWELL = 10.0  # seconds in which a closing checkpointer still tells the first rank what it could not tell before


class Skipped(Exception):
    """The first rank left this save out (`when_busy="skip"`). `why`: what it says about that."""

    def __init__(self, why: CheckpointError | None) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True)
class Grant:
    """A save of the first rank, and the arena into which this rank copies its part. `number`: the first rank's count."""

    number: int
    directory: str
    step: int | None
    digest: str
    save_id: str
    arena: Arena

    def check(self) -> None:
        """Raise `StageError` if the arena belongs to another save by now, which can only be an error of this package."""
        (current,) = GENERATION.unpack_from(self.arena.memory, GENERATION_AT)
        if current != self.number:
            raise StageError(f"{self.directory}: the shared memory was given to another save; please report this")


class NodeCall:
    """One call of `save()`. Its fields are guarded by `NodeFollowing`.

    `grant`: the save that it belongs to, once this rank may copy.
    `refusal`: why it belongs to none.
    `answers`: what all ranks told, for each `tell_all`.
    `late`: the first rank did not call in time.
    `done`: this rank writes no more to the arena. `over`: how the save ended is known.
    """

    def __init__(self, following: NodeFollowing, number: int, directory: str, step: int | None, heard: Heard) -> None:
        self._following = following
        self.number = number
        self.directory = directory
        self.step = step
        self.heard = heard
        self.answers: deque[list[bytes]] = deque()
        self.grant: Grant | None = None
        self.refusal: CheckpointError | Skipped | None = None
        self.late = False
        self.done = False
        self.over = False

    def tell_all(self, message: bytes) -> list[bytes]:
        """Return what every rank told here, in the order of the ranks. Raises what `agree` raises."""
        return self._following.tell_all(self, message)

    def agree(self, request: Request) -> Grant:
        """Wait until this rank may copy. Raises `Skipped`, `CheckpointError`, or what a signal handler raises."""
        return self._following.agree(self, request.digest.hex(), partial(plan_of, request))

    def refuse(self, error: CheckpointError) -> None:
        """This rank's `save()` raises `error`: the save fails on all ranks. No copy runs any more."""
        self._following.refuse(self, error)

    def staged(self, files: Files) -> None:
        """All that this rank holds is in the arena. `files`: what it adds."""
        self._following.staged(self, files)

    def failed(self, error: CheckpointError, *, keeps: bool) -> None:
        """This rank could not copy. No copy runs any more, except that with `keeps` a device may still write."""
        self._following.failed(self, error, keeps=keeps)


class NodeFollowing:
    """The calls of `save()` on a rank that does not write, for one checkpointer."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        # guarded by _changed:
        self._line: Line | None = None
        self._connecting = False
        self._unsent: list[Message] = []  # what the first rank is told when there is a connection
        self._calls: dict[int, NodeCall] = {}
        self._begun: dict[int, tuple[str, int | None]] = {}  # saves that the first rank has begun, by its count
        self._grants: dict[int, Grant] = {}  # those that belong to no call yet
        self._arenas: dict[int, Arena] = {}
        self._agreed = ""
        self._broken: CheckpointError | None = None
        self._over = False
        self._due: deque[Callable[[], None]] = deque()
        self._next_beat = 0.0
        self._channel: Channel | None = None

    # -- training thread

    def begin(self, directory: str, step: int | None, heard: Heard) -> NodeCall:
        """Begin a call. `heard` is called, on the channel's thread, with the states of the save that it belongs to."""
        with self._changed:
            if self._broken is not None:
                raise self._broken
            call = NodeCall(self, next(self._numbers), directory, step, heard)
            self._calls[call.number] = call
            if self._channel is None:
                self._channel = Channel(
                    received=self._received,
                    lost=self._lost,
                    tick=self._tick,
                    busy=lambda: bool(self._calls),
                    broke=self._broke,
                )
            if self._line is None and not self._connecting:
                self._connecting = True
                self._ranks.add(_Connection(self, self._ranks))
            self._send(Message("call", {"call": call.number, "directory": directory, "step": step}))
        return call

    def tell_all(self, call: NodeCall, message: bytes) -> list[bytes]:
        with self._changed:
            self._send(Message("told", {"call": call.number}, (message,)))
        return self._wait(call, lambda: call.answers.popleft() if call.answers else None)

    def agree(self, call: NodeCall, digest: str, describe: Callable[[], Plan]) -> Grant:
        plan = Plan(digest) if digest == self._agreed else describe()
        with self._changed:
            values = {"call": call.number, "digest": plan.digest, "outline": plan.outline}
            self._send(Message("plan", values, (plan.claims,)))

        def take() -> Grant | None:
            grant = next((grant for grant in self._grants.values() if _fits(grant, call, digest)), None)
            if grant is not None:
                del self._grants[grant.number]
                call.grant, self._agreed = grant, digest
            return grant

        grant = self._wait(call, take)
        grant.check()
        return grant

    def _wait(self, call: NodeCall, take: Callable[[], _T | None]) -> _T:
        """Return what `take` returns, as soon as that is not None."""
        deadline = time.monotonic() + patience.ARRIVAL
        while True:
            with self._changed:
                if call.refusal is not None:
                    raise call.refusal
                taken = take()
                if taken is not None:
                    return taken
                if (call.directory, call.step) not in self._begun.values() and time.monotonic() > deadline:
                    call.late = True
                    raise StageError(
                        f"{call.directory}: rank 0 did not save it within {patience.ARRIVAL:.0f} s. The model is sharded, so every "
                        "rank must save it"
                    )
                self._changed.wait(_signals.SLICE)
            _signals.deliver()

    def refuse(self, call: NodeCall, error: CheckpointError) -> None:
        with self._changed:
            if call.grant is not None:
                self._release(call, error)
            elif call.refusal is None:
                values = {"call": call.number, "error": messages.describe(error), "withdrawn": call.late}
                self._send(Message("refusal", values))
            call.over = True
            self._forget_ended(call)

    # -- staging thread

    def staged(self, call: NodeCall, files: Files) -> None:
        with self._changed:
            if call.grant is not None:
                values = {"save": call.grant.number, "names": [name for name, _ in files]}
                self._send(Message("staged", values, tuple(data for _, data in files)))
            call.done = True
            self._forget_ended(call)

    def failed(self, call: NodeCall, error: CheckpointError, *, keeps: bool) -> None:
        with self._changed:
            self._release(call, error, keeps=keeps)
            self._forget_ended(call)

    # -- any thread

    def check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def close(self, timeout: float) -> None:
        """Tell the first rank what is left to tell, and end the connection."""
        deadline = time.monotonic() + min(timeout, _FAREWELL)
        with self._changed:
            while self._unsent and self._connecting and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            self._over = True
        if self._channel is not None:
            self._channel.close(timeout)
        for arena in self._arenas.values():
            arena.close()

    def forget(self) -> None:
        if self._channel is not None:
            self._channel.forget()
        for arena in self._arenas.values():
            arena.forget()

    # -- the ranks' thread

    def connected(self, line: Line) -> None:
        with self._changed:
            self._connecting = False
            self._line = line
            for message in self._unsent:
                line.send(message)
            self._unsent.clear()
            assert self._channel is not None
            self._channel.add(line)
            self._changed.notify_all()

    def cannot_connect(self, error: CheckpointError) -> None:
        with self._changed:
            self._connecting = False
            self._unsent.clear()
            for call in list(self._calls.values()):
                self._hear(call, Said(SaveState.FAILED, None, error))
            self._changed.notify_all()
        self._run_due()

    def is_over(self) -> bool:
        return self._over

    # -- the channel's thread

    def _received(self, line: Line, message: Message) -> None:
        values = message.values
        with self._changed:
            if line is not self._line:
                return
            if message.kind == "open":
                self._begun[values["save"]] = (values["directory"], values["step"])
            elif message.kind == "told":
                for call in self._calls.values():
                    if (call.directory, call.step) == self._begun.get(values["save"]):
                        call.answers.append(list(message.data))
            elif message.kind == "grant":
                self._granted(message)
            elif message.kind == "said":
                self._said(values["save"], values["call"], messages.parse(values["said"].encode()))
            elif message.kind == "drop" and (arena := self._arenas.pop(values["arena"], None)) is not None:
                arena.close()
            self._changed.notify_all()
        self._run_due()

    def _granted(self, message: Message) -> None:
        values = dict(message.values)
        number, size = values.pop("arena"), values.pop("size")
        try:
            if message.fds:
                self._arenas[number] = Arena(number, size, message.fds[0])
            values["arena"] = self._arenas[number]
        except (OSError, ValueError, KeyError) as error:
            why = StageError(f"{values['directory']}: the shared memory of rank 0 cannot be used here: {error!r}")
            self._send_release(values["save"], why)
            return
        grant = Grant(values.pop("save"), **values)
        self._grants[grant.number] = grant

    def _said(self, number: int, call_number: int, said: Said) -> None:
        if said.state in ENDS:
            self._begun.pop(number, None)
            if self._grants.pop(number, None) is not None:
                self._send_release(number, None)  # the save ended before this rank took part
        for call in list(self._calls.values()):
            if call.number == call_number or (call.grant is not None and call.grant.number == number):
                self._hear(call, said)

    def _lost(self, line: Line, dead: bool) -> None:
        with self._changed:
            if line is not self._line:
                return
            self._line = None
            how = "has ended" if dead or line.is_dead() else "has closed its checkpointer or is ending"
            for call in list(self._calls.values()):
                self._give_up(call, f"rank 0, which writes, {how}")
            self._begun.clear()
            self._grants.clear()
            used = [call.grant.arena for call in self._calls.values() if call.grant is not None]
            for arena in self._arenas.values():
                if arena not in used:
                    arena.close()
            self._arenas.clear()
            self._changed.notify_all()
        self._run_due()

    def _tick(self) -> None:
        now = time.monotonic()
        with self._changed:
            line = self._line
            if line is None or not self._calls:
                return
            if now - line.heard > patience.SILENCE:
                for call in list(self._calls.values()):
                    if call.grant is not None or (call.directory, call.step) in self._begun.values():
                        self._give_up(call, f"rank 0, which writes, has not been heard of for {now - line.heard:.0f} s")
            if now >= self._next_beat:
                self._next_beat = now + patience.BEAT
                line.send(Message("beat", {}))
        self._run_due()

    def _broke(self, error: CheckpointError) -> None:
        with self._changed:
            self._broken = error
            for call in list(self._calls.values()):
                self._hear(call, Said(SaveState.FAILED, None, error))
            self._changed.notify_all()
        self._run_due()

    # -- _changed is held

    def _send(self, message: Message) -> None:
        if self._line is not None:
            self._line.send(message)
        else:
            self._unsent.append(message)

    def _send_release(self, number: int, error: CheckpointError | None, *, keeps: bool = False) -> None:
        described = None if error is None else messages.describe(error)
        self._send(Message("release", {"save": number, "error": described, "keeps": keeps}))

    def _release(self, call: NodeCall, error: CheckpointError, *, keeps: bool = False) -> None:
        if call.grant is not None and not call.done:
            self._send_release(call.grant.number, error, keeps=keeps)
        call.done = True

    def _give_up(self, call: NodeCall, why: str) -> None:
        """The end of the save will not be heard."""
        known = ". It is saved if all of it was staged: look at latest()" if call.done else ""
        self._hear(call, Said(SaveState.FAILED, None, StageError(f"{call.directory}: {why}{known}")))

    def _hear(self, call: NodeCall, said: Said) -> None:
        ends = said.state in ENDS
        if call.grant is None:
            if ends:
                call.refusal = Skipped(said.error) if said.state is SaveState.SKIPPED else said.error
                call.over = True
                self._forget_ended(call)
        elif not call.over:
            call.over = ends
            self._due.append(partial(call.heard, said.state, said.info, said.error))
            self._forget_ended(call)

    def _forget_ended(self, call: NodeCall) -> None:
        if not call.over or not (call.done or call.grant is None):
            return
        self._calls.pop(call.number, None)
        if call.grant is not None and call.grant.arena not in self._arenas.values():
            call.grant.arena.close()  # the first rank it came from has gone

    # -- nothing is held

    def _run_due(self) -> None:
        while True:
            try:
                due = self._due.popleft()
            except IndexError:
                return
            due()


class _Connection:
    """Connects to the first rank as soon as the store tells where."""

    def __init__(self, following: NodeFollowing, ranks: Ranks) -> None:
        self._following = following
        self._ranks = ranks
        self._deadline = time.monotonic() + patience.ARRIVAL

    def poll(self) -> bool:
        store = self._ranks.store
        if self._following.is_over():
            return True
        if store.check([ADDRESS]):
            address = Address.parse(bytes(store.get(ADDRESS)).decode())
            why = address.unreachable()
            if why is not None:
                why = f"rank {self._ranks.rank} {why}"
                store.set(f"{CANNOT}{self._ranks.rank}", why)
                self._following.cannot_connect(PlanError(why))
                return True
            try:
                self._following.connected(connect(address, self._ranks.rank))
                return True
            except (OSError, Broken):
                pass  # an address of an earlier checkpointer, perhaps: the store will have the new one
        if time.monotonic() < self._deadline:
            return False
        self.fail(StageError(f"rank 0 did not begin a sharded save within {patience.ARRIVAL:.0f} s"))
        return True

    def fail(self, error: CheckpointError) -> None:
        self._following.cannot_connect(error)


def _fits(grant: Grant, call: NodeCall, digest: str) -> bool:
    return (grant.directory, grant.step, grant.digest) == (call.directory, call.step, digest)
