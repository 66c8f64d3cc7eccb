"""When to save: each policy by itself, all of them in a run. Several ranks are in `tests/ranks`."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, CheckpointerClosed, Event
from vembed_async_ckpt._engine import when
from vembed_async_ckpt._engine.figures import Figures
from vembed_async_ckpt.policies import SavePolicy, before_time_limit, budget, every, on_best, on_request

BOUND = 20.0


class Clock:
    """Time that goes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (when.time, time):
            monkeypatch.setattr(module, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: 1e9 + self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Told:
    """A reporter that hands events to its sinks at once."""

    def __init__(self) -> None:
        self.sinks: list[Callable[[Event], None]] = []

    def add_sink(self, sink: Callable[[Event], None]) -> None:
        self.sinks.append(sink)

    def tell(self, *values: Any, **further: Any) -> None:
        further.setdefault("time", time.time())
        for sink in self.sinks:
            sink(Event(*values, **further))


@contextlib.contextmanager
def decider(policy: SavePolicy, root: Path = Path("/nonexistent"), told: Told | None = None) -> Iterator[when.Decider]:
    found = when.Decider(policy, str(root), told or Told())  # type: ignore[arg-type]
    try:
        yield found
    finally:
        found.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Linear(8, 8)


# -- every


@pytest.mark.parametrize(
    ("asked", "due"),
    [
        (range(13), [5, 10]),
        (range(1, 13), [5, 10]),
        ([6, 7, 10, 11], [10]),  # resumed at 6
        ([3, 6, 9, 12, 21], [6, 12, 21]),  # three micro-batches at a time: passed multiples are made up for, once
        ([5], [5]),
        ([0], []),
        ([9, 10, 4, 5, 6], [10, 5]),  # it went back
        ([1, 1000, 1001], [1000]),
    ],
)
def test_every_so_many_steps(asked: Any, due: list[int]):
    """At each multiple, whatever was saved in between."""
    with decider(every(steps=5)) as found:
        assert [step for step in asked if found.ask(step, None)] == due


def test_every_so_many_minutes_after_the_last_save_was_begun(clock: Clock):
    """Due until it is made; counted from the run's beginning at first."""
    with decider(every(minutes=2)) as found:
        for step, (seconds, due) in enumerate([(119, False), (1, True), (1, True), (30, True)]):
            clock.now += seconds
            assert found.ask(step, None) is due
        found.saved(3, None, clock.now)
        for step, (seconds, due) in enumerate([(0, False), (119.9, False), (0.2, True)], 4):
            clock.now += seconds
            assert found.ask(step, None) is due


def test_the_same_step_has_the_same_answer(clock: Clock):
    """Whoever asks twice, to compute a metric first perhaps, is told the same; the step counts once."""
    with decider(every(steps=2) | every(minutes=1)) as found:
        assert [found.ask(step, None) for step in (1, 1, 2, 2, 2, 3, 3)] == [0, 0, 1, 1, 1, 0, 0]
        clock.now += 61
        assert not found.ask(3, None)
        assert found.ask(5, None)


# -- before_time_limit


def test_before_the_time_limit_it_saves_once(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    """As early as a save and two steps take, before the minutes that were asked for; and no second time."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    told = Told()
    with decider(before_time_limit(minutes=5), told=told) as found:
        told.tell("step", "complete", seconds=160.0, parts=(10.0,) * 16)
        for number in range(20):
            told.tell("call", "complete", str(number), 1)
            told.tell("save", "complete", str(number), 1, seconds=30.0 if number == 7 else 5.0 + number / 100)
        left = {}
        for step in range(1, 200):
            clock.now += 5.0
            if found.ask(step, None):
                left[step] = 2000.0 - clock.now
                if len(left) == 3:
                    found.saved(step, None, clock.now)
    assert len(left) == 3
    # 300 s as asked, 5.19 s is durable 19 times of 20, and two steps of 10 s.
    assert 300 + 5.19 + 20 - 5 < left[min(left)] <= 300 + 5.19 + 20


@pytest.mark.parametrize("end", [1e9 + 1060, datetime.datetime.fromtimestamp(1e9 + 1060)])
def test_the_end_may_be_given(clock: Clock, end: Any):
    """Without Slurm."""
    with decider(before_time_limit(minutes=0.5, end=end)) as found:
        assert not found.ask(1, None)
        clock.now += 31
        assert found.ask(2, None)


# -- budget


def test_the_cost_of_a_save_is_what_it_took_from_the_training():
    """The call, the wait at the barrier and the slower steps, against the steps around them."""
    figures = Figures()
    figures(Event("step", "complete", seconds=3.2, time=103.2, parts=(0.2,) * 16))
    assert figures.step_seconds == pytest.approx(0.2)
    figures(Event("call", "complete", "a", 16, seconds=0.05, time=103.26))
    figures(Event("barrier", "complete", "a", 16, seconds=0.02, time=103.4))
    figures(Event("save", "complete", "a", 16, 1000, 1.3, time=104.5))
    assert (figures.measured, figures.cost) == (0, None)
    # the step with the call, five slower ones, then quiet again
    slow = (0.27, 0.24, 0.24, 0.24, 0.24, 0.24)
    figures(
        Event("step", "complete", seconds=sum(slow) + 2.0, time=103.2 + sum(slow) + 2.0, parts=(*slow, *(0.2,) * 10))
    )
    assert figures.measured == 1
    assert figures.cost == pytest.approx(0.27 + 5 * 0.24 - 6 * 0.2)
    assert figures.durable == pytest.approx(1.3)


def test_a_cost_is_never_less_than_what_was_blocked():
    """Steps beside a save that were quick by chance do not make it free; a failed save costs too."""
    figures = Figures()
    figures(Event("step", "complete", seconds=3.2, time=103.2, parts=(0.2,) * 16))
    figures(Event("call", "complete", "a", 16, seconds=0.05, time=103.26))
    figures(Event("save", "failed", "a", 16, seconds=0.3, time=103.5))
    figures(Event("step", "complete", seconds=1.0, time=104.2, parts=(0.1,) * 10))
    assert (figures.measured, figures.cost, figures.durable) == (1, pytest.approx(0.05), 0.0)


@pytest.mark.parametrize("percent", [0.5, 2.0, 10.0])
def test_a_budget_is_kept_and_used(clock: Clock, percent: float):
    """A run of an hour whose saves block 40 ms and slow the ten steps beside them by a tenth, the first far more: what it costs in
    all is within the budget, and not far below."""
    told, chance = Told(), random.Random(1)
    spent, saves, begun = 0.0, 0, clock.now
    with decider(budget(percent), told=told) as found:
        slow, blocked = 0, 0.0  # steps still beside a save; what the call before this step took
        laps: list[float] = []
        for step in range(1, 36_001):
            took = 0.1 * chance.uniform(0.97, 1.03)
            if slow:
                slow -= 1
                spent += 0.01
                took += 0.01
            clock.now += took
            laps.append(blocked + took)
            blocked = 0.0
            if slow == 1:
                told.tell("save", "complete", str(saves), step, seconds=1.0)
            if len(laps) == 10:
                told.tell("step", "complete", seconds=sum(laps), parts=tuple(laps))
                laps = []
            if found.ask(step, None):
                blocked = 0.04 if saves else 3.0
                found.saved(step, None, clock.now)
                clock.now += blocked
                saves += 1
                spent += blocked
                slow = 10
                told.tell("call", "complete", str(saves), step, seconds=blocked)
    share = 100 * spent / (clock.now - begun)
    assert percent * 0.6 < share < percent * 1.05
    assert saves > 20 * percent


def test_a_budget_waits_for_what_the_last_save_cost(clock: Clock):
    """No save is due while one is under way, however long that takes."""
    told = Told()
    with decider(budget(50), told=told) as found:
        assert not found.ask(1, None)  # no step was timed yet
        told.tell("step", "complete", seconds=1.6, parts=(0.1,) * 16)
        assert found.ask(2, None)
        found.saved(2, None, clock.now)
        told.tell("call", "complete", "a", 2, seconds=0.01)
        clock.now += 10_000
        assert not found.ask(3, None)
        told.tell("save", "complete", "a", 2, seconds=10_000.0)
        clock.now += 2
        told.tell("step", "complete", seconds=2.0, parts=(0.1,) * 20)
        assert found.ask(4, None)


# -- on_request


def test_a_signal_asks_for_one_save(root: Path):
    """SIGUSR2; the handler of before is called too, and is back after close()."""
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: heard.append(signum))
    try:
        ours = signal.getsignal(signal.SIGUSR2)
        with AsyncCheckpointer(root, policy=on_request(), writer="thread") as checkpointer:
            assert not checkpointer.should_save(1)
            os.kill(os.getpid(), signal.SIGUSR2)
            assert checkpointer.should_save(2)
            assert checkpointer.should_save(3)  # not saved yet
            checkpointer.save(3, extra={"a": 1})
            assert not checkpointer.should_save(4)
            assert heard == [signal.SIGUSR2]
        assert signal.getsignal(signal.SIGUSR2) is ours
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_file_asks_for_one_save_and_is_removed(root: Path):
    """`touch root/save-now`."""
    with AsyncCheckpointer(root, policy=on_request(), writer="thread") as checkpointer:
        (root / "save-now").touch()
        until(lambda: not (root / "save-now").exists())
        until(lambda: checkpointer.should_save(2) or checkpointer.should_save(3))
        checkpointer.save(3, extra={"a": 1})
        assert not checkpointer.should_save(4)
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    until(lambda: "vembed-ckpt-requests" not in {thread.name for thread in threading.enumerate()})


def test_what_cannot_be_removed_asks_for_nothing(root: Path, caplog: pytest.LogCaptureFixture):
    """Else it would ask for ever; said once."""
    with AsyncCheckpointer(root, policy=on_request(None), writer="thread") as checkpointer:
        (root / "save-now").mkdir()
        until(lambda: "save-now: cannot be removed" in caplog.text)
        time.sleep(1.2)
        assert not checkpointer.should_save(1)
        assert caplog.text.count("cannot be removed") == 1


def test_a_handler_that_came_later_stays(root: Path):
    """close() sets back only what is its own."""

    def theirs(signum: int, frame: Any) -> None:
        pass

    before = signal.getsignal(signal.SIGUSR1)
    try:
        with AsyncCheckpointer(root, policy=on_request(signal.SIGUSR1), writer="thread"):
            signal.signal(signal.SIGUSR1, theirs)
        assert signal.getsignal(signal.SIGUSR1) is theirs
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_outside_of_the_main_thread_the_file_asks(root: Path, caplog: pytest.LogCaptureFixture):
    """Python lets only the main thread listen to signals; said so, and nothing is taken over."""
    done: list[AsyncCheckpointer] = []
    thread = threading.Thread(target=lambda: done.append(AsyncCheckpointer(root, policy=on_request(), writer="thread")))
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join(BOUND)
    (checkpointer,) = done
    with checkpointer:
        assert "SIGUSR2 cannot be listened to" in caplog.text
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
        (root / "save-now").touch()
        steps = iter(range(1, 10_000_000))
        until(lambda: checkpointer.should_save(next(steps)))


def test_a_forked_worker_passes_no_request_on(root: Path):
    """It inherits the handler; a signal to it is none to the training."""
    with AsyncCheckpointer(root, policy=on_request(), writer="thread") as checkpointer:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGUSR2)
                os._exit(1 if checkpointer._decider._rules[0]._asked else 0)  # type: ignore[union-attr]
            os._exit(2)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert not checkpointer.should_save(1)


# -- on_best


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_so_far_is_saved(root: Path, mode: Any):
    """Better than what was saved, by the manifests of an earlier run too; NaN, and a step without the metric, are not."""
    sign = 1 if mode == "min" else -1
    values = [0.5, 0.6, math.nan, 0.4, None, 0.4, -math.inf, 0.3]
    saved = []
    for step, value in enumerate(values, 1):  # each step in a run of its own
        with AsyncCheckpointer(root, policy=on_best("loss", mode=mode), writer="thread") as checkpointer:
            metrics = None if value is None else {"loss": sign * value, "other": 0.0}
            assert not checkpointer.should_save(step)
            if checkpointer.should_save(step, metrics):
                checkpointer.save(step, extra={"a": 1}, metrics=None if value == -math.inf else metrics)
                saved.append(step)
                assert not checkpointer.should_save(step + 100, metrics)
    assert saved == [1, 4, 7, 8]  # 7 was saved without its metric: the next run knows nothing of it


# -- the checkpointer


def test_policies_are_combined(root: Path, model: torch.nn.Module):
    """Any of them is enough; a training that asks them at every step has the checkpoints that they say."""
    policy = every(steps=4) | on_best("loss") | every(minutes=1000)
    assert repr(policy) == "every(steps=4) | on_best('loss') | every(minutes=1000)"
    with AsyncCheckpointer(root, policy=policy) as checkpointer:
        for step in range(1, 11):
            metrics = {"loss": float(abs(step - 6))}
            if checkpointer.should_save(step, metrics):
                checkpointer.save(step, model=model, metrics=metrics)
    assert sorted(int(path.name[11:]) for path in root.glob("checkpoint-*")) == [1, 2, 3, 4, 5, 6, 8]


def test_a_real_run_under_a_budget(root: Path):
    """It saves, more than once, and is timed by should_save()."""
    layers = [torch.nn.Linear(128, 128) for _ in range(8)]
    net = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(net.parameters())
    deadline = time.monotonic() + 60
    saves = 0
    with AsyncCheckpointer(root, policy=budget(percent=20)) as checkpointer:
        step = 0
        while saves < 3:
            assert time.monotonic() < deadline
            step += 1
            net(torch.ones(64, 128)).sum().backward()
            optimizer.step()
            if checkpointer.should_save(step):
                checkpointer.save(step, model=net, optimizer=optimizer)
                saves += 1
        assert checkpointer._decider._figures.steps > 16  # type: ignore[union-attr]


def test_without_a_policy_the_question_is_an_error(root: Path):
    """A loop that would never save says so at once."""
    with (
        AsyncCheckpointer(root, writer="thread") as checkpointer,
        pytest.raises(ValueError, match=r"needs a policy: AsyncCheckpointer\(root, policy=every\(steps=500\)\)"),
    ):
        checkpointer.should_save(1)
    with pytest.raises(CheckpointerClosed):
        checkpointer.should_save(2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: every(), "either steps= or minutes="),
        (lambda: every(steps=5, minutes=5), "either steps= or minutes="),
        (lambda: every(steps=0), "steps is 0"),
        (lambda: every(steps=2.5), "steps is 2.5"),  # type: ignore[arg-type]
        (lambda: every(steps=True), "steps is True"),
        (lambda: every(minutes=0), "minutes is 0"),
        (lambda: every(minutes=math.inf), "minutes is inf"),
        (lambda: every(minutes="5"), "minutes is '5'"),  # type: ignore[arg-type]
        (lambda: budget(0), "percent is 0"),
        (lambda: budget(101), "percent is 101"),
        (lambda: budget(math.nan), "percent is nan"),
        (lambda: before_time_limit(minutes=-1), "minutes is -1"),
        (lambda: before_time_limit(), "SLURM_JOB_END_TIME is '' and end= was not given"),
        (lambda: before_time_limit(end="noon"), "end is 'noon'"),  # type: ignore[arg-type]
        (lambda: on_best(""), "metric is ''"),
        (lambda: on_best("loss", mode="least"), "mode is 'least'"),  # type: ignore[arg-type]
        (lambda: on_request(12345), "12345"),
        (lambda: AsyncCheckpointer("unused", policy="every 5"), "policy is 'every 5'"),  # type: ignore[arg-type]
        (lambda: every(steps=5) | 7, "unsupported operand"),  # type: ignore[operator]
    ],
)
def test_what_makes_no_sense_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], said: str):
    """When the policy is made."""
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert said in str(error.value)


def test_a_policy_that_cannot_begin_leaves_the_root_free(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither lock nor writer nor thread of the checkpointer stays behind."""

    def broken(self: Any, root: str) -> Any:
        raise RuntimeError("no way")

    policy = on_request() | on_best("loss")
    with monkeypatch.context() as patch:
        patch.setattr(type(on_best("loss")), "start", broken)
        with pytest.raises(RuntimeError, match="no way"):
            AsyncCheckpointer(root, policy=policy)
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    AsyncCheckpointer(root, policy=policy).close()


# -- the Trainer


def test_asking_costs_about_a_microsecond(root: Path, tmp_path: Path):
    """In the median, whatever the policy; the machine may be busy, so the best of several rounds counts."""
    policy = every(steps=10**9) | every(minutes=10**6) | on_request() | budget(0.001) | on_best("loss")
    with AsyncCheckpointer(root, policy=policy, writer="thread") as checkpointer:
        medians = []
        for turn in range(10):
            took = []
            for step in range(turn * 1000 + 1, turn * 1000 + 1001):
                begun = time.perf_counter_ns()
                checkpointer.should_save(step)
                took.append(time.perf_counter_ns() - begun)
            medians.append(sorted(took)[500])
    assert min(medians) < 3000  # nanoseconds, looking at the clock twice included; about 1000 were seen
