"""All ranks act after the same step: stops and saves, without a collective, whoever is slow, late or dead."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from vembed_async_ckpt import StageError
from vembed_async_ckpt._engine import patience
from vembed_async_ckpt._engine.agreement import SAVE, STOP, Agreement
from vembed_async_ckpt._engine.gate import Gate

BOUND = 30.0


class Slow:
    """A store of which every call takes `delay()` seconds, as for a rank whose thread does not get to run."""

    def __init__(self, store: Any, delay: Callable[[], float]) -> None:
        self._store = store
        self._delay = delay

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        def delayed(*arguments: Any) -> Any:
            time.sleep(self._delay())
            return call(*arguments)

        return delayed


@pytest.fixture
def dead() -> Iterator[Callable[[], float]]:
    """The delay of a rank that never comes back, until the end of the test."""
    over = threading.Event()

    def wait() -> float:
        over.wait(BOUND * 2)
        return 0.0

    yield wait
    over.set()


@contextlib.contextmanager
def ranks(count: int, slow: dict[int, Callable[[], float]] | None = None) -> Iterator[list[Agreement]]:
    """The agreements of `count` ranks in this process; `slow`: seconds that calls of the store take on a rank."""
    store = dist.HashStore()
    made = [
        Agreement(rank, count, lambda rank=rank: Slow(store, lambda: (slow or {}).get(rank, float)()))  # type: ignore[misc]
        for rank in range(count)
    ]
    try:
        yield made
    finally:
        for agreement in made[1:]:
            agreement.close(5.0)
        made[0].close(5.0)


def run(agreement: Agreement, kind: str, last: int, seconds: Callable[[], float]) -> int | None:
    """The steps of a training thread until it is told to act; the step after which it was, None if never."""
    gate = agreement.gates[kind]
    for step in range(1, last + 1):
        time.sleep(seconds())
        gate.position = step
        if gate.closed:
            assert gate.wait(BOUND)
            if gate.reached(step):
                return step
    return None


def run_all(
    agreements: list[Agreement], seconds: Callable[[int], float], asking: Callable[[], None]
) -> list[int | None]:
    """All ranks train, no step waits for another rank; `asking` runs beside them."""
    answers: list[int | None] = [None] * len(agreements)

    def train(rank: int) -> None:
        answers[rank] = run(agreements[rank], STOP, 100_000, lambda: seconds(rank))

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(len(agreements))]
    for thread in threads:
        thread.start()
    asking()
    for thread in threads:
        thread.join(BOUND)
        assert not thread.is_alive()
    return answers


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_that_run_apart_stop_after_the_same_step(count: int) -> None:
    """Each has its own pace, none waits for another; one or several ask, at random moments."""
    chance = random.Random(7)
    for _ in range(5):
        paces = [chance.uniform(0.001, 0.003) for _ in range(count)]
        askers = chance.sample(range(count), chance.choice([1, 1, 2]))
        before = chance.uniform(0.0, 0.1)
        with ranks(count) as made:

            def ask(made: list[Agreement] = made, askers: list[int] = askers, before: float = before) -> None:
                time.sleep(before)
                for rank in askers:
                    made[rank].ask(STOP, 10 + rank)

            answers = run_all(made, lambda rank, paces=paces: paces[rank], ask)  # type: ignore[misc]
            assert len(set(answers)) == 1, (answers, paces, askers)
            assert answers[0] is not None
            numbers = {agreement.signum for agreement in made}
            assert len(numbers) == 1, "all exit with the same code"
            assert numbers <= {10 + rank for rank in askers}


@pytest.mark.parametrize("late", [0, 1, 3])
def test_a_rank_whose_thread_is_late_is_waited_for(late: int) -> None:
    """The leader's or another's: the others stand at their gates meanwhile."""
    with ranks(4, {late: lambda: 0.08}) as made:
        time.sleep(1.0)  # it has joined
        answers = run_all(made, lambda rank: 0.001 * (1 + rank), lambda: made[2].ask(STOP, 15))
    assert len(set(answers)) == 1, answers
    assert answers[0] is not None


def test_the_step_is_the_next_one_of_the_rank_that_is_ahead() -> None:
    """None of them makes more steps than that."""
    with ranks(2) as made:
        made[0].gates[STOP].position = 7
        made[1].gates[STOP].position = 12
        made[1].ask(STOP)
        for agreement in made:
            wait_until(lambda agreement=agreement: agreement.gates[STOP].reached(13))  # type: ignore[misc]
            assert not agreement.gates[STOP].reached(12)


def test_a_dead_rank_is_left_out_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dead: Callable[[], float]
) -> None:
    """It has joined and says nothing more. The others agree without it, and say so."""
    monkeypatch.setattr(patience, "AGREE", 2.0)
    delays: dict[int, Callable[[], float]] = {}
    with ranks(4, delays) as made:
        wait_until(lambda: signs(made[0]) == 3)
        delays[3] = dead  # from here on its thread never comes back
        answers = run_all(made[:3], lambda rank: 0.001, lambda: made[1].ask(STOP, 15))
        assert len(set(answers)) == 1
        assert answers[0] is not None
        assert f"a stop after step {answers[0]} was agreed without rank 3" in caplog.text
        made.pop()  # it cannot be closed


def test_ranks_without_a_leader_stop_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dead: Callable[[], float]
) -> None:
    """A stop that was asked for happens, agreed or not; which it was is said."""
    monkeypatch.setattr(patience, "AGREE", 1.0)
    delays: dict[int, Callable[[], float]] = {}
    with ranks(2, delays) as made:
        wait_until(lambda: signs(made[0]) == 1)
        delays[0] = dead
        made[1].ask(STOP, 15)
        assert run(made[1], STOP, 100_000, lambda: 0.001) is not None
        assert "rank 1 stops after its present step, not agreed with the others: rank 0 has not answered" in caplog.text
        made[:] = [made[1], made[1]]


def test_a_rank_that_comes_later_stops_too(caplog: pytest.LogCaptureFixture) -> None:
    """It was still starting when the others agreed: nobody waits for it longer than a second."""
    store = dist.HashStore()
    first = Agreement(0, 2, lambda: store)
    first.gates[STOP].position = 3
    first.ask(STOP, 15)
    begun = time.monotonic()
    wait_until(lambda: first.gates[STOP].reached(4))
    assert time.monotonic() - begun < 3.0
    second = Agreement(1, 2, lambda: store)
    wait_until(lambda: second.gates[STOP].closed)
    assert second.signum == 15
    assert [second.gates[STOP].reached(step) for step in (3, 4)] == [False, True]
    assert "rank 1 was not there when the ranks agreed to stop after step 4" in caplog.text
    second.close(5.0)
    first.close(5.0)


def test_saves_are_agreed_on_again_and_again() -> None:
    """Each request gives one step or, if another comes at the same time, two: the same ones on all ranks."""
    count, turns = 3, 5
    chance = random.Random(11)
    saved: list[list[int]] = [[] for _ in range(count)]
    over = threading.Event()
    with ranks(count) as made:

        def train(rank: int) -> None:
            gate = made[rank].gates[SAVE]
            pace = random.Random(rank)
            for step in range(1, 100_000):
                time.sleep(pace.uniform(0.0, 0.004))
                gate.position = step
                if gate.closed:
                    assert gate.wait(BOUND)
                    if gate.reached(step):
                        gate.take(step)
                        saved[rank].append(step)
                if over.is_set() and not any(agreement.asking for agreement in made) and not gate.closed:
                    return

        threads = [threading.Thread(target=train, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for turn in range(turns):
            for rank in chance.sample(range(count), chance.choice([1, 2])):
                made[rank].ask(SAVE)
            wait_until(lambda turn=turn: all(len(steps) > turn for steps in saved))  # type: ignore[misc]
        over.set()
        for thread in threads:
            thread.join(BOUND)
            assert not thread.is_alive()
    assert turns <= len(saved[0]) <= 2 * turns
    assert saved[0] == saved[1] == saved[2] == sorted(set(saved[0]))


def test_a_later_checkpointer_of_the_ranks_does_not_hear_the_rounds_of_the_earlier() -> None:
    """In one job, under the same root: what was agreed in the first training stops nobody in the second."""
    store = dist.HashStore()
    for turn in range(2):
        # the ranks make theirs in another order the second time
        made = {rank: Agreement(rank, 2, lambda: store) for rank in ((0, 1), (1, 0))[turn]}
        time.sleep(0.3)
        assert not any(agreement.gates[kind].closed for agreement in made.values() for kind in (STOP, SAVE))
        made[1].gates[STOP].position = made[0].gates[STOP].position = 5
        made[1].ask(STOP, 15)
        for agreement in made.values():
            wait_until(lambda agreement=agreement: agreement.gates[STOP].reached(6))  # type: ignore[misc]
        made[1].close(5.0)
        if turn:  # this rank is faster than the first one: it hears a session that was not for it
            hasty = Agreement(1, 2, lambda: store)
            time.sleep(0.3)
            assert not hasty.gates[STOP].closed
            hasty.close(5.0)
        made[0].close(5.0)


def test_ranks_leave_together() -> None:
    """After a stop none ends before the others have closed: launchers end all when one has ended."""
    with ranks(3) as made:
        wait_until(lambda: signs(made[0]) == 2)
        gone: list[int] = []

        def leave(rank: int) -> None:
            made[rank].close(BOUND, together=True)
            gone.append(rank)

        threads = [threading.Thread(target=leave, args=(rank,)) for rank in range(3)]
        for number, thread in enumerate(threads):
            thread.start()
            if number < 2:
                time.sleep(0.3)
                assert gone == []
        for thread in threads:
            thread.join(BOUND)
        assert sorted(gone) == [0, 1, 2]


def test_the_first_rank_answers_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank gets its answer for the same step; where it said nothing, the wait ends with an error."""
    with ranks(2) as made:
        for step in range(1, 40):
            made[0].answer(step, step % 3 == 0)
            assert made[1].answer_of_first_rank(step, BOUND) == (step % 3 == 0)
        with pytest.raises(
            StageError, match=r"step 1: rank 0 did not say whether to save \(its last answer was for step 39"
        ):
            made[1].answer_of_first_rank(1, BOUND)
        with pytest.raises(StageError, match="step 40: rank 0 did not say"):
            made[1].answer_of_first_rank(40, 0.2)


def test_a_store_that_is_gone_stops_nobody_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever stands at its gate, or asks afterwards, stops alone."""

    class Gone(Slow):
        def __getattr__(self, name: str) -> Any:
            if gone.is_set():
                raise dist.DistStoreError("no route to host")
            return super().__getattr__(name)

    gone = threading.Event()
    store = dist.HashStore()
    agreement = Agreement(1, 2, lambda: Gone(store, lambda: 0.0))
    gone.set()
    wait_until(lambda: "cannot agree on anything any more" in caplog.text)
    agreement.ask(STOP, 15)
    assert agreement.gates[STOP].reached(0)
    agreement.ask(SAVE)
    assert not agreement.gates[SAVE].closed
    with pytest.raises(StageError):
        agreement.answer_of_first_rank(1, 5.0)
    agreement.close(1.0)


def test_no_keys_pile_up_in_the_store() -> None:
    """After many rounds there are as many as after a few."""
    store = dist.HashStore()
    made = [Agreement(rank, 2, lambda: store) for rank in (0, 1)]
    counts = []
    for step in range(1, 19):
        made[1].ask(SAVE)
        for agreement in made:
            gate = agreement.gates[SAVE]
            wait_until(lambda gate=gate: gate.closed and gate.wait(0))  # type: ignore[misc]
            gate.take(10**9)
        wait_until(lambda: not any(agreement.asking for agreement in made))
        if step % 6 == 0:
            counts.append(store.num_keys())
    assert max(counts) - min(counts) <= 1
    assert len(json.loads(store.get("agreed"))["rounds"]["save"]) <= 9
    made[1].close(5.0)
    made[0].close(5.0)


def test_a_gate_holds_back_whoever_comes_after_it_was_closed() -> None:
    """It lets the agreed step through, and what was taken does not come again."""
    gate = Gate()
    gate.position = 4
    assert gate.close(1) == 4
    assert gate.closed
    assert not gate.wait(0.01)
    gate.decide(6)
    assert gate.wait(0)
    assert [gate.reached(step) for step in (5, 6, 7)] == [False, True, True]
    gate.close(2)
    gate.take(6)
    assert gate.closed, "a round is under way"
    gate.decide(None)
    assert not gate.closed


def signs(leader: Agreement) -> int:
    """How many ranks the first one would wait for."""
    store = leader._connect()
    if not store.check(["agreed"]):
        return 0
    session = json.loads(store.get("agreed"))["session"]
    return sum(store.check([f"{session}/here/{rank}"]) for rank in range(1, leader.world_size))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
