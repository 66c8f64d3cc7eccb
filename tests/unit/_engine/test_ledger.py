"""The record of saves: what is in flight, how each ended, and that each failure is raised once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from vembed_async_ckpt import CheckpointError, SaveHandle, SaveState, WriteError
from vembed_async_ckpt._engine.ledger import Ledger
from vembed_async_ckpt._engine.messages import RaisedElsewhere


def handle(step: int = 1) -> SaveHandle:
    return SaveHandle(step, Path(f"checkpoint-{step}"), lambda callback: callback())


def begun(ledger: Ledger, *steps: int) -> list[SaveHandle]:
    handles = [handle(step) for step in steps]
    for made in handles:
        made._called = True  # `save()` has returned
        ledger.begun(made, lambda: None)
    return handles


def fail(ledger: Ledger, made: SaveHandle, error: CheckpointError) -> None:
    made._move(SaveState.FAILED, error=error)
    ledger.ended(made, error)


def nobody() -> bool:
    return False


def alive() -> None: ...


def test_saves_are_counted_by_how_they_ended() -> None:
    ledger = Ledger("raise")
    first, second, third, fourth, fifth = begun(ledger, 1, 2, 3, 4, 5)
    assert len(ledger) == 5
    assert set(ledger.in_flight()) == {first, second, third, fourth, fifth}
    ledger.ended(first, None)
    fail(ledger, second, WriteError("full"))
    ledger.skipped(third)
    ledger.withdrawn(fourth)
    found = ledger.statistics()
    assert {key: found[key] for key in ("started", "committed", "failed", "skipped", "in_flight")} == {
        "started": 4, "committed": 1, "failed": 2, "skipped": 1, "in_flight": 1,
    }  # fmt: skip
    assert found["last_error"] == "full"


def test_bytes_that_are_still_to_be_written_are_added_up() -> None:
    ledger = Ledger("raise")
    for made, progress in zip(begun(ledger, 1, 2), ((3, 10), (0, 5)), strict=True):
        made._progress = lambda progress=progress: progress  # type: ignore[misc]
    assert ledger.statistics()["bytes_pending"] == 12


def test_a_save_that_may_not_begin_is_not_recorded() -> None:
    ledger = Ledger("raise")

    def refuse() -> None:
        raise CheckpointError("closed")

    with pytest.raises(CheckpointError, match="closed"):
        ledger.begun(handle(), refuse)
    assert len(ledger) == 0
    assert ledger.statistics()["started"] == 0


def test_each_failure_is_raised_once_and_the_oldest_first() -> None:
    ledger = Ledger("raise")
    for made in begun(ledger, 1, 2):
        fail(ledger, made, WriteError(f"step {made.step}"))
    for step in (1, 2):
        with pytest.raises(WriteError, match=f"step {step}"):
            ledger.raise_unread()
    ledger.raise_unread()


def test_a_failure_that_was_read_on_its_handle_is_not_raised_again() -> None:
    ledger = Ledger("raise")
    (made,) = begun(ledger, 1)
    fail(ledger, made, WriteError("full"))
    assert isinstance(made.exception(0), WriteError)
    ledger.raise_unread()


def test_who_asked_for_warnings_gets_no_error() -> None:
    ledger = Ledger("warn")
    (made,) = begun(ledger, 1)
    fail(ledger, made, WriteError("full"))
    ledger.raise_unread()
    assert ledger.statistics()["last_error"] == "full"


def test_what_another_rank_raised_is_not_raised_here_too() -> None:
    ledger = Ledger("raise")
    (made,) = begun(ledger, 1)
    fail(ledger, made, RaisedElsewhere("there"))
    ledger.raise_unread()


def test_a_withdrawn_save_that_ends_later_counts_once() -> None:
    """`save()` has raised already; what the writer reports afterwards is nobody's."""
    ledger = Ledger("raise")
    (made,) = begun(ledger, 1)
    ledger.withdrawn(made)
    fail(ledger, made, WriteError("full"))
    assert ledger.statistics()["failed"] == 1
    ledger.raise_unread()


def test_waiting_ends_with_the_last_save() -> None:
    ledger = Ledger("raise")
    (made,) = begun(ledger, 1)
    threading.Timer(0.05, ledger.ended, (made, None)).start()
    ledger.wait(20, nobody, alive)
    assert len(ledger) == 0
    ledger.wait(0, nobody, alive)


def test_waiting_is_bounded_and_says_what_is_left() -> None:
    ledger = Ledger("raise")
    begun(ledger, 1, 2)
    with pytest.raises(TimeoutError, match=r"2 saves are still in flight after 0\.05 s"):
        ledger.wait(0.05, nobody, alive)


def test_waiting_goes_on_while_something_else_is_busy() -> None:
    ledger, answers = Ledger("raise"), [True, True, False]
    ledger.wait(20, lambda: answers.pop(0), alive)
    assert answers == []


def test_waiting_ends_when_nobody_works_any_more() -> None:
    ledger = Ledger("raise")
    begun(ledger, 1)

    def dead() -> None:
        raise WriteError("the supervisor broke")

    with pytest.raises(WriteError, match="the supervisor broke"):
        ledger.wait(None, nobody, dead)


def test_no_save_begins_or_ends_while_somebody_changes_something() -> None:
    ledger, order = Ledger("raise"), []
    with ledger.changing():
        thread = threading.Thread(target=lambda: (ledger.begun(handle(), lambda: None), order.append("begun")))
        thread.start()
        thread.join(0.05)
        order.append("changed")
    thread.join(20)
    assert order == ["changed", "begun"]
