"""What the meter says of saves and steps whose times are known, and of a real training."""

from __future__ import annotations

import concurrent.futures
import json
import math
import subprocess
import sys
import threading
import timeit
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vembed_async_ckpt import AsyncCheckpointer, Event, StallMeter, StallReport
from vembed_async_ckpt.ettr import best_interval, hours_lost, mtbf_of

BOUND = 20  # seconds that a wait may take before it is a failure
EPOCH = 1_000_000.0  # where the wall clock stands when the other one stands at 0


class Flight:
    """A save in the background."""

    def __init__(self) -> None:
        self.over = False

    def done(self) -> bool:
        return self.over


class Loop:
    """A training in made-up time, and the meter in it. Times are seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meter = StallMeter(clock=lambda: self.now, wall=lambda: EPOCH + self.now)

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            with self.meter.step():
                self.now += seconds

    def call(self, seconds: float) -> None:
        """One `save()` in the meter's bracket."""
        with self.meter.save():
            self.now += seconds

    def start(self, seconds: float) -> Flight:
        """The same, and then it goes on in the background."""
        self.call(seconds)
        flight = Flight()
        self.meter.watch(flight)
        return flight

    def tell(self, stage: Any, phase: Any, save_id: str = "a", *, seconds: float = 0.0, step: int = 1) -> None:
        """An event of our engine, stamped now."""
        self.meter(Event(stage, phase, save_id, step, seconds=seconds, time=EPOCH + self.now))

    @property
    def report(self) -> StallReport:
        return self.meter.report()


@pytest.fixture
def loop() -> Loop:
    return Loop()


def near(value: float) -> Any:
    return pytest.approx(value, abs=1e-9)


def test_nothing_seen_is_nothing_said(loop: Loop):
    """Neither zero nor a crash: None, and dashes in the table."""
    report = loop.report
    assert (report.saves, report.steps, report.busy_steps, report.elapsed) == (0, 0, 0, 0.0)
    assert report.blocked_p50 is report.inflation is report.cost_per_save is report.cost_per_hour is None
    assert "-" in str(report)
    assert json.loads(report.json())["quiet_step"] is None


def test_steps_without_saves_are_quiet(loop: Loop):
    """Their time is told; nothing costs anything."""
    loop.steps(100, 0.25)
    report = loop.report
    assert (report.steps, report.busy_steps, report.elapsed) == (100, 0, near(25.0))
    assert report.quiet_step == near(0.25)
    assert report.busy_step is None
    assert report.cost_per_save is None


def test_a_save_that_is_watched(loop: Loop):
    """20 ms blocked and four steps of 110 instead of 100 ms: 60 ms for the save, and what that is of an hour."""
    loop.steps(50, 0.1)
    flight = loop.start(0.02)
    loop.steps(4, 0.11)
    flight.over = True
    loop.steps(50, 0.1)
    report = loop.report
    assert (report.saves, report.failed, report.steps, report.busy_steps) == (1, 0, 104, 4)
    assert report.blocked_p50 == report.blocked_p99 == report.blocked_max == report.blocked_first == near(0.02)
    assert (report.quiet_step, report.busy_step) == (near(0.1), near(0.11))
    assert report.inflation == near(0.1)
    assert report.noise == near(0.0)
    assert report.slowed_per_save == near(0.04)
    assert report.cost_per_save == near(0.06)
    assert report.elapsed == near(10.46)
    assert report.cost_per_hour == near(0.06 / 10.46 * 3600)
    assert report.barrier_total == 0.0


def test_the_report_says_how_often_to_save(loop: Loop):
    """60 ms for a save that is durable after 460 ms: the best interval by the formula, and what the interval of the run loses."""
    for _ in range(10):
        loop.steps(50, 0.1)
        flight = loop.start(0.02)
        loop.steps(4, 0.11)
        flight.over = True
    loop.steps(50, 0.1)
    report = loop.meter.report(mtbf=8 * 3600, restart=30.0)
    given = {"lost": 0.06, "durable": 0.46, "mtbf": 8 * 3600}
    best = best_interval(**given)
    assert best == pytest.approx(math.sqrt(2 * 0.06 * 8 * 3600), rel=0.02)
    advice = report.advice
    assert advice is not None
    assert advice.interval == pytest.approx(best, rel=1e-3)
    assert advice.hours_lost == pytest.approx(hours_lost(best, **given, restart=30.0), rel=1e-3)
    assert advice.now_interval == near(report.elapsed / 10)
    assert advice.now_hours_lost is not None
    assert advice.now_hours_lost > advice.hours_lost
    assert "save every              58.8 s, loses 88.7 min in 30 days; as now, every 5.96 s, 7.33 h" in str(report)
    assert json.loads(report.json())["advice"]["mtbf"] == 8 * 3600
    assert loop.meter.report(gpus=64).advice.mtbf == mtbf_of(64)


def test_without_a_known_cost_there_is_no_advice(loop: Loop):
    """Neither before the first save nor for a run without steps."""
    assert loop.report.advice is None
    loop.call(0.1)
    assert loop.report.advice is None


@pytest.mark.parametrize("drift", [0.001, -0.001])
def test_a_drift_of_the_step_time_is_not_inflation(loop: Loop, drift: float):
    """Every step is a millisecond longer (shorter) than the one before; busy ones take 10 ms more."""
    seconds, flight = 1.0, Flight()
    flight.over = True
    for n in range(600):
        if n % 100 == 50:
            flight = loop.start(0.0)
        if n % 100 == 60:
            flight.over = True
        loop.steps(1, seconds + (0.0 if flight.over else 0.01))
        seconds += drift
    report = loop.report
    assert (report.saves, report.busy_steps) == (6, 60)
    assert report.slowed_per_save == near(0.1)
    assert report.busy_step - report.quiet_step == near(0.01)


def test_a_slow_step_among_the_neighbours_counts_for_nothing(loop: Loop):
    """A median: an evaluation of 60 s beside a save changes no figure but the noise."""
    loop.steps(20, 0.1)
    loop.steps(1, 60.0)
    loop.steps(5, 0.1)
    flight = loop.start(0.0)
    loop.steps(3, 0.1)
    flight.over = True
    loop.steps(20, 0.1)
    report = loop.report
    assert report.inflation == near(0.0)
    assert report.noise == near((60.0 - 0.1) / 16 / 2 / 0.1)


def test_what_quiet_steps_show_of_themselves_is_the_noise(loop: Loop):
    """Every fourth step, busy or not, takes 140 ms: an inflation of 10 % that no save made, and a noise of 10 % that says so."""
    flight = Flight()
    for n in range(400):
        if n % 80 == 40:
            flight = loop.start(0.0)
        if n % 80 == 48:
            flight.over = True
        loop.steps(1, 0.14 if n % 4 == 0 else 0.1)
    report = loop.report
    assert report.inflation == near(0.1)
    assert report.noise == near(0.1)


def test_saves_that_never_leave_a_quiet_step_have_no_inflation(loop: Loop):
    """Back to back from the first step: None, not a guess."""
    loop.call(0.01)
    loop.meter.watch(lambda: False)
    loop.steps(10, 0.1)
    report = loop.report
    assert report.busy_steps == 10
    assert report.busy_step == near(0.1)
    assert report.inflation is report.quiet_step is report.cost_per_save is report.cost_per_hour is None


def test_few_quiet_steps_between_saves_serve_both(loop: Loop):
    """Three quiet steps after each of two saves: the first save's right neighbours are the second's left ones."""
    loop.steps(16, 0.1)
    for _ in range(2):
        flight = loop.start(0.0)
        loop.steps(5, 0.12)
        flight.over = True
        loop.steps(3, 0.1)
    assert loop.report.busy_steps == 10
    assert loop.report.inflation == near(0.2)
    loop.steps(1, 0.1)
    assert loop.report.inflation == near(0.2), "a report in the middle changes nothing"


def test_a_save_inside_a_step_is_not_counted_twice(loop: Loop):
    """Its 50 ms are blocked time; without anything in flight afterwards the step is as quiet as the others."""
    loop.steps(20, 0.1)
    for _ in range(3):
        with loop.meter.step():
            loop.now += 0.1
            loop.call(0.05)
        loop.steps(20, 0.1)
    report = loop.report
    assert (report.saves, report.busy_steps) == (3, 0)
    assert report.quiet_step == near(0.1)
    assert report.cost_per_save == near(0.05)


def test_percentiles_are_those_of_the_calls(loop: Loop):
    """1 to 100 ms, the first of them cold: median, 99th percentile, maximum, first."""
    for milliseconds in (100, *range(1, 100)):
        loop.call(milliseconds / 1e3)
    report = loop.report
    assert (report.blocked_p50, report.blocked_p99) == (near(0.051), near(0.1))
    assert (report.blocked_max, report.blocked_first) == (near(0.1), near(0.1))
    assert report.blocked_total == near(5.05)


def test_a_step_or_a_save_that_raises(loop: Loop):
    """The step does not count; the save does, as failed, with the time that it took."""

    def fail(seconds: float) -> None:
        loop.now += seconds
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), loop.meter.step():
        fail(5.0)
    with pytest.raises(ZeroDivisionError), loop.meter.save():
        fail(0.01)
    assert (loop.report.steps, loop.report.saves, loop.report.failed) == (0, 1, 1)
    assert loop.report.blocked_total == near(0.01)


# -- what can be watched


class FailedHandle:
    """Looks like a SaveHandle whose save failed; whoever asks for the result takes the failure for read."""

    class state:
        value = "failed"

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> None:
        raise AssertionError("the failure is not the meter's to read")

    exception = result


def test_a_future_is_in_flight_until_it_is_done(loop: Loop):
    """Of concurrent.futures, as DCP's async_save gives; a failure counts."""
    for outcome in (None, OSError("full")):
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        loop.call(0.01)
        loop.meter.watch(future)
        loop.steps(2, 0.1)
        future.set_exception(outcome) if outcome else future.set_result(None)
        loop.steps(2, 0.1)
    assert (loop.report.busy_steps, loop.report.steps, loop.report.failed) == (4, 8, 1)


def test_a_failure_is_left_to_be_read(loop: Loop):
    """The meter counts it and does not touch it: it will still be raised where it should."""
    loop.call(0.01)
    loop.meter.watch(FailedHandle())
    loop.steps(1, 0.1)
    assert loop.report.failed == 1


def test_what_says_nothing_of_its_end_counts_as_over(loop: Loop, caplog: pytest.LogCaptureFixture):
    """`done()` that raises is logged and stops no training."""

    def broken() -> bool:
        raise RuntimeError("no")

    loop.call(0.01)
    loop.meter.watch(broken)
    loop.steps(2, 0.1)
    assert loop.report.busy_steps == 0
    assert "does not say whether it is over" in caplog.text


def test_what_cannot_be_watched_is_refused(loop: Loop):
    """At once, with the remedy."""
    with pytest.raises(ValueError, match=r"after a save"):
        loop.meter.watch(lambda: True)
    loop.call(0.0)
    with pytest.raises(TypeError, match=r"done\(\)"):
        loop.meter.watch(3)


def test_two_saves_in_flight(loop: Loop):
    """A step is busy while either is."""
    loop.steps(16, 0.1)
    flights = []
    for _ in range(2):
        flights.append(loop.start(0.0))
        loop.steps(2, 0.1)
    for flight in flights:
        flight.over = True
        loop.steps(2, 0.1)
    assert loop.report.busy_steps == 6


# -- as a sink


def test_events_tell_of_the_whole_save(loop: Loop):
    """Blocked, the wait at the barrier, and which steps were busy, without a bracket."""
    loop.steps(20, 0.1)
    loop.now += 0.004
    loop.tell("call", "complete", seconds=0.004)
    loop.steps(2, 0.11)
    loop.tell("stage", "complete", seconds=0.2)
    loop.tell("write", "started")
    loop.steps(2, 0.105)
    loop.tell("barrier", "complete", seconds=0.015)
    loop.tell("write", "complete", seconds=0.3)
    loop.tell("save", "complete", seconds=0.43)
    loop.steps(20, 0.1)
    report = loop.report
    assert (report.saves, report.failed, report.busy_steps) == (1, 0, 4)
    assert report.blocked_total == near(0.004)
    assert (report.barrier_total, report.barrier_max) == (near(0.015), near(0.015))
    assert report.slowed_per_save == near(0.03)
    assert report.cost_per_save == near(0.034), "the barrier is a part of the busy steps, not counted twice"


def test_a_cost_without_the_call_s_part_is_not_told(loop: Loop):
    """Events that do not say what the call took: the steps are told, the cost is not."""
    loop.steps(20, 0.1)
    loop.tell("stage", "complete")
    loop.steps(2, 0.11)
    loop.tell("save", "complete")
    loop.steps(20, 0.1)
    report = loop.report
    assert (report.saves, report.busy_steps) == (1, 2)
    assert report.inflation == near(0.1)
    assert report.blocked_p50 is report.cost_per_save is report.cost_per_hour is None


def test_events_come_late(loop: Loop):
    """The save began in a step that is over by the time that its event arrives: the step is busy, its call is taken out."""
    loop.steps(20, 0.1)
    other = loop.start(0.0)
    with loop.meter.step():
        loop.now += 0.154  # 50 of them in save()
        event = Event("call", "complete", "a", 1, seconds=0.05, time=EPOCH + loop.now)
    loop.now += 0.002
    loop.meter(event)
    loop.tell("save", "complete", seconds=0.056)
    other.over = True
    loop.steps(20, 0.1)
    report = loop.report
    assert report.busy_steps == 1
    assert report.busy_step == near(0.104)


def test_an_end_before_the_beginning(loop: Loop):
    """A save may be over before its call has returned: it is counted once, and nothing stays in flight."""
    loop.steps(2, 0.1)
    loop.now += 0.05
    loop.tell("save", "complete", seconds=0.04)
    loop.tell("call", "complete", seconds=0.05)
    loop.steps(5, 0.1)
    report = loop.report
    assert (report.saves, report.busy_steps) == (1, 0)
    assert report.blocked_total == near(0.05)


@pytest.mark.parametrize("failed", [False, True])
def test_bracket_watch_and_sink_are_one_save(loop: Loop, failed: bool):
    """All three tell of the same save: it counts once, and so does its failure."""
    loop.steps(20, 0.1)
    flight = loop.start(0.005)
    loop.now -= 0.001
    loop.tell("call", "complete", seconds=0.003)
    loop.now += 0.001
    loop.steps(3, 0.1)
    loop.tell("save", "failed" if failed else "complete", seconds=0.3)
    flight.over = True
    loop.steps(3, 0.1)
    report = loop.report
    assert (report.saves, report.failed, report.busy_steps) == (1, failed, 3)
    assert report.blocked_total == near(0.005)


def test_a_call_that_saved_nothing_is_no_save(loop: Loop):
    """Skipped, or raised after its plan was made: no event of it will ever end it."""
    loop.tell("plan", "started")
    loop.tell("plan", "complete", seconds=0.1)
    loop.tell("backpressure", "failed")
    loop.tell("prewarm", "complete", "", seconds=1.0)
    loop.tell("writer", "complete", "")
    loop.steps(3, 0.1)
    assert (loop.report.saves, loop.report.busy_steps) == (0, 0)


def test_a_rank_that_does_not_write_saves_the_same_step_again(loop: Loop):
    """Its events bear no save_id: told apart by step and end."""
    for _ in range(2):
        loop.tell("call", "complete", "", seconds=0.0, step=7)
        loop.steps(2, 0.1)
        loop.tell("save", "complete", "", step=7)
        loop.steps(2, 0.1)
    assert (loop.report.saves, loop.report.busy_steps, loop.report.steps) == (2, 4, 8)


def test_a_save_that_another_rank_skipped_is_none(loop: Loop):
    """The rank that does not write hears of it after its call: from then on no step is busy, and no save is counted."""
    loop.tell("call", "complete", "", seconds=0.0, step=7)
    loop.steps(2, 0.1)
    loop.tell("backpressure", "failed", "", step=7)
    loop.steps(3, 0.1)
    assert (loop.report.saves, loop.report.busy_steps, loop.report.steps) == (0, 2, 5)


# -- what the meter costs


def test_the_table_and_the_json_say_the_same(loop: Loop):
    """One line per figure; JSON has every field, in seconds."""
    loop.steps(20, 0.1)
    flight = loop.start(0.0025)
    loop.steps(4, 0.102)
    flight.over = True
    loop.steps(20, 0.1)
    report = loop.report
    assert json.loads(report.json()) == asdict(report)
    table = str(report)
    for text in (
        "p50 2.50 ms",
        "p99 2.50 ms",
        "quiet step              100.00 ms",
        "busy step               102.00 ms, +2.0%",
    ):
        assert text in table
    assert "cost per save           10.50 ms" in table
    assert all(name in StallReport.__doc__ for name in ("barrier_*", "noise", "cost_per_hour", "seconds"))


def test_a_step_costs_less_than_five_microseconds():
    """The best of several loops, with a save being watched."""
    meter = StallMeter()
    with meter.save():
        pass
    meter.watch(lambda: False)

    def step() -> None:
        with meter.step():
            pass

    assert min(timeit.repeat(step, number=2000, repeat=20)) / 2000 < 5e-6


def test_memory_does_not_grow_with_the_run(loop: Loop):
    """10,000 saves and 30,000 steps later it is what it was after half of them."""

    def train(saves: int) -> None:
        for n in range(saves):
            flight = loop.start(0.001 + n % 7 * 1e-4)
            save_id = f"{loop.now}"
            loop.tell("call", "complete", save_id, seconds=0.001)
            loop.steps(2, 0.1)
            loop.tell("save", "complete" if n % 10 else "started", save_id)  # one in ten is never heard of again
            flight.over = True
            loop.steps(1, 0.1)

    train(5000)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        train(5000)
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()
    assert loop.report.blocked_p50 == pytest.approx(0.0013, abs=1e-4), "of a sample"


def test_events_may_come_from_other_threads():
    """Eight threads report saves while steps go on: every one is counted, none stays in flight."""
    meter = StallMeter()
    together = threading.Barrier(8)

    def work(thread: int) -> None:
        for n in range(100):
            together.wait(BOUND)
            for stage in ("call", "save"):
                meter(Event(stage, "complete", f"{thread}.{n}", n))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with meter.step():
            pass
        meter.report()
    assert meter.report().saves == 800
    assert not meter._flying


def test_the_meter_loads_no_torch():
    """It measures any engine, in any loop."""
    script = "import sys, vembed_async_ckpt as v; v.StallMeter(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]


# -- a real training


@pytest.fixture
def training() -> Any:
    import torch

    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.randn(8, 64)).pow(2).mean().backward()
        optimizer.step()

    return model, optimizer, step


def test_a_real_training_with_brackets(root: Path, training: Any):
    """Every save counts, its call is what was blocked, and what the handle knows of the barrier is in the report."""
    model, optimizer, step = training
    meter = StallMeter()
    stalls = []
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for n in range(60):
            with meter.step():
                step()
            if n % 20 == 10:
                with meter.save():
                    handle = checkpointer.save(n, model=model, optimizer=optimizer)
                meter.watch(handle)
                handle.wait_staged(BOUND)
                stalls.append(handle.result(BOUND).timings.stall)
    report = meter.report()
    assert (report.saves, report.failed, report.steps) == (3, 0, 60)
    assert report.blocked_total + report.barrier_total >= sum(stalls)
    assert report.blocked_total < sum(stalls) + 0.1
    assert report.busy_steps == 0, "each was over before the next step"
    assert math.isfinite(report.cost_per_hour)


def test_a_real_training_with_the_meter_as_a_sink(root: Path, training: Any):
    """`sinks=[meter]` and `meter.step()` are enough: each save counts once, with what its call took."""
    model, optimizer, step = training
    meter = StallMeter()
    handles = []
    with AsyncCheckpointer(root, writer="thread", sinks=[meter]) as checkpointer:
        for n in range(60):
            with meter.step():
                step()
            if n % 20 == 10:
                handles.append(checkpointer.save(n, model=model, optimizer=optimizer))
        stall = sum(handle.result(BOUND).timings.stall for handle in handles)
    report = meter.report()
    assert (report.saves, report.failed, report.steps) == (3, 0, 60)
    assert report.busy_steps >= 1
    assert report.blocked_total > 0
    assert report.blocked_total + report.barrier_total == pytest.approx(stall, abs=1e-3)
