"""Lets all ranks of a job agree on a step, for a stop or for a save, while the training threads go on.

A training thread neither runs a collective nor reads the store: at the end of a step it writes its position and looks
at its gate (see `gate`). A thread on each rank polls the job's store, on a connection of its own. A round goes so:

1. A rank asks. The first rank, the leader, sees this and begins a round.
2. Each rank closes its gate, then reads its training thread's position and publishes it.
3. The leader publishes the agreed step, S = 1 + the highest position, and each rank opens its gate.

No rank has passed S, because a training thread whose published position is p waits at its next step, p + 1 <= S, until
S is known. So all ranks act after the same step S, however far they are apart. A rank that gives no position within
`patience.AGREE` seconds is left out, loudly. A rank that gets no answer stops alone.

The keys in the store, under the root's path. `agreed`: what the leader says, as JSON (see `_Word`). It names the
leader's session, which changes with each checkpointer. Under the session's name: `ask/{kind}`, the newest request of
another rank; `here/{rank}`, its last sign, "left" at its end; `at/{kind}/{round}/{rank}`, its position;
`heard/{kind}/{round}`, how many ranks have read the agreed step.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from .. import _signals
from ..errors import StageError
from ..events import logger
from . import patience
from .gate import Gate

STOP, SAVE = "stop", "save"
_KINDS = (STOP, SAVE)
_WORD = "agreed"
_LEFT = b"left"
_KEPT = 8  # rounds, and answers, that the leader repeats for ranks that are behind
_INSTANCES = itertools.count(1)


@dataclass
class _Round:
    """`step`: the agreed one; None while the positions are collected. `what`: the number that came with the request.

    `without`: ranks that gave no position.
    """

    number: int
    what: int
    step: int | None = None
    without: tuple[int, ...] = ()


@dataclass
class _Answers:
    """The steps at which the leader's metrics say to save: `due`, complete from step `first` to step `last`."""

    first: int = 0
    last: int = -1
    due: list[int] = field(default_factory=list)


@dataclass
class _Word:
    """What the leader says. `left`: it has closed its checkpointer. `rounds`: the newest of each kind."""

    session: str
    left: bool = False
    rounds: dict[str, list[_Round]] = field(default_factory=lambda: {kind: [] for kind in _KINDS})
    answers: _Answers = field(default_factory=_Answers)

    def render(self) -> str:
        return json.dumps(asdict(self) | {"rounds": {k: [*map(astuple, r)] for k, r in self.rounds.items()}})

    @classmethod
    def parse(cls, text: bytes) -> _Word:
        said = json.loads(text)
        rounds = {kind: [_Round(n, w, s, tuple(o)) for n, w, s, o in said["rounds"][kind]] for kind in _KINDS}
        return cls(said["session"], said["left"], rounds, _Answers(**said["answers"]))


class Agreement:
    """This process among the ranks that agree, for one checkpointer. `gates`: one for stops and one for saves."""

    def __init__(self, rank: int, world_size: int, connect: Callable[[], Any]) -> None:
        """Start the thread. `connect` is called there; it returns a torch.distributed.Store that no one else uses."""
        self.rank = rank
        self.world_size = world_size
        self.gates = {kind: Gate() for kind in _KINDS}
        self.asking: set[str] = set()  # kinds for which this rank has asked and has no answer yet
        self.signum = 0  # the signal for which the ranks stop, once a round for it has begun
        self._connect = connect
        self._poll = max(patience.POLL, world_size / 1000)  # at most 1000 looks a second at the store, by all ranks
        self._changed = threading.Condition()
        # guarded by _changed:
        self._asks: dict[str, int] = {}  # requests of this rank that the thread has not seen yet
        self._answers = _Answers()
        self._waiting = False  # the training thread waits for an answer
        self._closing = False
        self._together = False
        self._broken: BaseException | None = None
        self._deadline = 0.0
        self._thread = threading.Thread(target=self._run, name="vembed-ckpt-agreement", daemon=True)
        self._thread.start()

    @classmethod
    def of_this_process(cls, root: str, rank: int, world_size: int) -> Agreement:
        """Return an agreement of the ranks that save to `root`, by a further connection to the job's store."""
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        shared = _get_default_store()

        def connect() -> Any:
            own = shared.clone() if hasattr(shared, "clone") else shared  # as in `ranks`
            return PrefixStore(f"vembed_async_ckpt{root}/agreement", own)

        return cls(rank, world_size, connect)

    # -- from any thread, but not from signal handlers

    def ask(self, kind: str, what: int = 0) -> None:
        """Ask all ranks to agree on a step."""
        with self._changed:
            self.asking.add(kind)
            self._asks.setdefault(kind, what)
            if self._broken is None:
                self._changed.notify_all()
                return
        self._go_alone(kind, f"the store cannot be used any more: {self._broken}")

    def answer(self, step: int, due: bool) -> None:
        """On the first rank: tell the others whether its metrics say to save at `step`."""
        with self._changed:
            known = self._answers
            kept = [*known.due, step] if due else known.due
            first = kept[-_KEPT - 1] + 1 if len(kept) > _KEPT else known.first
            self._answers = _Answers(first, step, kept[-_KEPT:])
            self._changed.notify_all()

    def answer_of_first_rank(self, step: int, timeout: float) -> bool:
        """On another rank: return what the first rank told about `step`. Waits until it is known.

        Raises `StageError` if it is not known after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
            try:
                while self._answers.last < step and self._broken is None:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(min(left, _signals.SLICE))
                answers = self._answers
            finally:
                self._waiting = False
        if answers.first <= step <= answers.last:
            return step in answers.due
        raise StageError(
            f"step {step}: rank 0 did not say whether to save (its last answer was for step {answers.last}); "
            "call should_save() with metrics at the same steps on all ranks"
        ) from self._broken

    def close(self, timeout: float, *, together: bool = False) -> None:
        """End the thread, for at most `timeout` seconds.

        The first rank lets the others read the last agreed step. With `together` each rank waits until all others close
        too: a launcher may end all processes when the first of them has ended.
        """
        with self._changed:
            self._closing = True
            self._together = together
            self._deadline = time.monotonic() + timeout
            self._changed.notify_all()
        _signals.join(self._thread, timeout + 1.0)

    # -- on the thread

    def _run(self) -> None:
        try:
            store = self._connect()
            side = _Leader(self, store) if self.rank == 0 else _Follower(self, store)
            while self._wait(side.in_a_hurry):
                side.look()
            while not side.may_leave(self._together) and time.monotonic() < self._deadline:
                time.sleep(patience.POLL / 10)
                side.look()
            side.leave()
        except Exception as error:
            with self._changed:
                self._broken = error
                closing = self._closing
                self._changed.notify_all()
            if not closing:
                logger.warning("the ranks cannot agree on anything any more: %s: %s", type(error).__name__, error)
            for kind, gate in self.gates.items():
                if kind in self.asking or (gate.closed and not gate.wait(0)):
                    self._go_alone(kind, f"the store cannot be used any more: {error}")

    def _wait(self, soon: bool) -> bool:
        """Wait until it is time to look into the store. Return False at the end."""
        with self._changed:
            if not self._closing and not self._asks:
                self._changed.wait(self._poll / 10 if soon or self._waiting else self._poll)
            return not self._closing

    def _take_asks(self) -> dict[str, int]:
        with self._changed:
            asks, self._asks = self._asks, {}
            return asks

    def _go_alone(self, kind: str, why: str) -> None:
        """End a request or a round that this rank gets no answer to."""
        if kind == STOP:
            logger.warning("rank %d stops after its present step, not agreed with the others: %s", self.rank, why)
            self.gates[kind].decide_here()
        else:
            logger.warning("rank %d: no save is due, as the ranks could not agree: %s", self.rank, why)
            self.gates[kind].decide(None)
        self.asking.discard(kind)


class _Leader:
    """The first rank's side, on the thread."""

    def __init__(self, agreement: Agreement, store: Any) -> None:
        self._agreement = agreement
        self._store = store
        self._word = _Word(f"{os.getpid()}-{next(_INSTANCES)}-{time.time_ns()}")
        self._said = ""
        self._heard: dict[str, bytes] = dict.fromkeys(_KINDS, b"")
        self._wanted: dict[str, int] = {}  # requests that no round answers yet
        self._gathering: dict[str, _Gathering] = {}
        self._absent: dict[int, bytes | None] = {}  # ranks that were left out, with their sign at that time
        for kind in _KINDS:
            store.set(self._key("ask", kind), "")  # before anybody knows the session
        self._say()

    @property
    def in_a_hurry(self) -> bool:
        return bool(self._gathering)

    def look(self) -> None:
        for kind in _KINDS:
            asked = bytes(self._store.get(self._key("ask", kind)))
            if asked != self._heard[kind]:
                self._heard[kind] = asked
                self._wanted.setdefault(kind, int(asked.rpartition(b":")[2]))
        for kind, what in self._agreement._take_asks().items():
            self._wanted.setdefault(kind, what)
        for kind in _KINDS:
            if kind not in self._gathering and kind in self._wanted:
                self._begin(kind, self._wanted.pop(kind))
            if kind in self._gathering:
                self._wanted.pop(kind, None)  # the round under way answers this request too
                self._collect(kind, self._gathering[kind])
        self._word.answers = self._agreement._answers
        self._say()

    def may_leave(self, together: bool) -> bool:
        """Return whether the other ranks have read all that was agreed; with `together`, whether they have left."""
        others = [rank for rank in range(1, self._agreement.world_size) if rank not in self._absent]
        if together and any(self._sign(rank) not in (None, _LEFT) for rank in others):
            return False
        for kind in _KINDS:
            if kind in self._gathering:
                return False
            for last in self._word.rounds[kind][-1:]:
                counted = self._agreement.world_size - 1 - len(last.without)
                if self._store.add(self._key("heard", kind, last.number), 0) < counted:
                    return False
        return True

    def leave(self) -> None:
        self._word.left = True
        self._say()

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, (self._word.session, *parts)))

    def _say(self) -> None:
        text = self._word.render()
        if text != self._said:
            self._store.set(_WORD, text)
            self._said = text

    def _begin(self, kind: str, what: int) -> None:
        rounds = self._word.rounds[kind]
        number = rounds[-1].number + 1 if rounds else 1
        if kind == STOP:
            self._agreement.signum = self._agreement.signum or what
        position = self._agreement.gates[kind].close(number)
        self._word.rounds[kind] = [*rounds[-_KEPT:], _Round(number, what)]
        self._say()
        for rank, sign in list(self._absent.items()):
            if self._sign(rank) != sign:
                del self._absent[rank]  # it is there again
        missing = {rank for rank in range(1, self._agreement.world_size) if rank not in self._absent}
        self._gathering[kind] = _Gathering(self._word.rounds[kind][-1], position, missing)
        if number > 2:
            self._store.delete_key(self._key("heard", kind, number - 2))

    def _collect(self, kind: str, gathering: _Gathering) -> None:
        found = {rank: self._key("at", kind, gathering.round.number, rank) for rank in gathering.missing}
        age = time.monotonic() - gathering.begun
        if not found or self._store.check(list(found.values())):
            self._read(gathering, found)
        elif age >= gathering.look_closer_at:  # at each of them, which takes a request for each
            gathering.look_closer_at = age + patience.FIRST_HOLD / 2
            self._read(gathering, {rank: key for rank, key in found.items() if self._store.check([key])})
            for rank in list(gathering.missing):
                if age >= patience.AGREE or self._sign(rank) in (None, _LEFT):
                    gathering.missing.discard(rank)
                    self._absent[rank] = self._sign(rank)
        if not gathering.missing:
            self._end(kind, gathering)

    def _read(self, gathering: _Gathering, keys: dict[int, str]) -> None:
        for rank, key in keys.items():
            gathering.highest = max(gathering.highest, int(self._store.get(key)))
            gathering.missing.discard(rank)
            self._store.delete_key(key)

    def _end(self, kind: str, gathering: _Gathering) -> None:
        done = gathering.round
        done.step = gathering.highest + 1
        done.without = tuple(sorted(self._absent))
        silent = [rank for rank in done.without if self._absent[rank] not in (None, _LEFT)]
        if silent:
            logger.warning(
                "a %s after step %d was agreed without rank%s %s, which did not answer for %.0f s",
                *(kind, done.step, "s" * (len(silent) > 1), ", ".join(map(str, silent)), patience.AGREE),
            )
        del self._gathering[kind]
        self._say()
        self._agreement.gates[kind].decide(done.step)
        self._agreement.asking.discard(kind)

    def _sign(self, rank: int) -> bytes | None:
        key = self._key("here", rank)
        return bytes(self._store.get(key)) if self._store.check([key]) else None


class _Gathering:
    """A round whose positions are being collected."""

    def __init__(self, round_: _Round, position: int, missing: set[int]) -> None:
        self.round = round_
        self.highest = position
        self.missing = missing
        self.begun = time.monotonic()
        self.look_closer_at = patience.FIRST_HOLD


class _Follower:
    """The side of any other rank, on the thread."""

    def __init__(self, agreement: Agreement, store: Any) -> None:
        self._agreement = agreement
        self._store = store
        self._there = False  # the leader has said something
        self._read = b""
        self._session = ""
        self._left = False  # the first rank has closed its checkpointer
        self._gone = False  # this rank closes its own
        self._signs = itertools.count(1)
        self._done = dict.fromkeys(_KINDS, 0)  # number of the last round that has ended
        self._shown = dict.fromkeys(_KINDS, 0)  # number of the last round that this rank gave its position to
        self._asked: dict[str, tuple[int, float, bool]] = {}  # (number to send, when it was asked, whether it was sent)

    @property
    def in_a_hurry(self) -> bool:
        return any(self._shown[kind] > self._done[kind] for kind in self._shown)

    def look(self) -> None:
        now = time.monotonic()
        for kind, what in self._agreement._take_asks().items():
            self._asked.setdefault(kind, (what, now, False))
        self._there = self._there or self._store.check([_WORD])
        if self._there:
            text = bytes(self._store.get(_WORD))
            if text != self._read:
                self._read = text
                self._hear(_Word.parse(text))
        for kind, (what, since, sent) in list(self._asked.items()):
            if self._left or now - since > patience.AGREE + patience.FIRST_HOLD:
                del self._asked[kind]
                why = "has closed its checkpointer" if self._left else f"has not answered for {now - since:.0f} s"
                self._agreement._go_alone(kind, f"rank 0 {why}")
            elif self._session and not sent:
                self._store.set(self._key("ask", kind), f"{self._agreement.rank}-{next(self._signs)}:{what}")
                self._asked[kind] = (what, since, True)

    def may_leave(self, together: bool) -> bool:
        """Return whether this rank need not wait any longer. It is gone for the others from the first call on."""
        if self._session and not self._gone:
            self._store.set(self._key("here", self._agreement.rank), _LEFT)
            self._gone = True
        return not together or self._left or not self._session

    def leave(self) -> None:
        """Do nothing: the others know."""

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, (self._session, *parts)))

    def _hear(self, word: _Word) -> None:
        if word.session != self._session:
            if word.left:
                return  # that of an earlier checkpointer
            self._join(word)
        self._left = word.left
        for kind in _KINDS:
            for said in word.rounds[kind]:
                if said.number > self._done[kind]:
                    self._follow(kind, said)
            if self._left and self._shown[kind] > self._done[kind]:
                self._done[kind] = self._shown[kind]
                self._agreement._go_alone(kind, "rank 0 has closed its checkpointer")
        with self._agreement._changed:
            self._agreement._answers = word.answers
            self._agreement._changed.notify_all()

    def _join(self, word: _Word) -> None:
        """Follow a session that is new to this rank."""
        for kind in self._shown:
            if self._shown[kind] > self._done[kind]:  # a round of the session before, which nobody ends any more
                self._agreement._go_alone(kind, "rank 0 has made another checkpointer")
        self._session = word.session
        for kind in _KINDS:
            ended = [said for said in word.rounds[kind] if said.step is not None]
            # A round that counted this rank counted an earlier checkpointer of it. Others concern this one too.
            self._done[kind] = max(
                (said.number for said in ended if self._agreement.rank not in said.without), default=0
            )
            self._shown[kind] = self._done[kind]
        self._asked = {kind: (what, since, False) for kind, (what, since, _) in self._asked.items()}
        self._appear()

    def _appear(self) -> None:
        self._store.set(self._key("here", self._agreement.rank), str(next(self._signs)))

    def _follow(self, kind: str, said: _Round) -> None:
        agreement = self._agreement
        if kind == STOP:
            agreement.signum = agreement.signum or said.what
        if said.step is None:
            if said.number > self._shown[kind]:
                self._shown[kind] = said.number
                position = agreement.gates[kind].close(said.number)
                self._store.set(self._key("at", kind, said.number, agreement.rank), str(position))
            return
        self._done[kind] = said.number
        self._shown[kind] = max(self._shown[kind], said.number)
        self._asked.pop(kind, None)
        left_out = agreement.rank in said.without
        if left_out:
            self._appear()
        else:
            self._store.add(self._key("heard", kind, said.number), 1)
        if left_out and kind == STOP:
            logger.warning(
                "rank %d was not there when the ranks agreed to stop after step %d", agreement.rank, said.step
            )
        agreement.gates[kind].decide(said.step if kind == STOP or not left_out else None)
        agreement.asking.discard(kind)
