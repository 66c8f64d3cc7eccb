"""How many rounds there are, and who is left out, in the time that was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from vembed_async_ckpt.bench.measures import common
from vembed_async_ckpt.bench.options import Options, Refused, default_engines, parse_scale, parse_share, parse_time


class Clock:
    """A run in made-up time."""

    def __init__(self, budget: float | None, rounds: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.budget = budget
        self.options = Options(budget=budget, rounds=rounds)
        self.rounds: list[int] = []
        self.left_out: list[Any] = []
        monkeypatch.setattr(common.time, "monotonic", lambda: self.now)

    def left(self) -> float:
        return float("inf") if self.budget is None else self.budget - self.now

    def begin_round(self, number: int, visits: int) -> None:
        self.rounds.append(visits)

    def leave_out(self, thing: Any) -> None:
        self.left_out.append(thing)

    def run(self, things: list[str], seconds: float, prepared: float = 6.0) -> list[tuple[int, str]]:
        """Every visit takes so many seconds."""
        self.now = prepared
        visits = []
        for visit in common.rounds(self, things):  # type: ignore[arg-type]
            visits.append(visit)
            self.now += seconds
        return visits


FIVE = ["ours", "original", "dcp", "torch_checkpointing", "dcp-overlap", "raw-disk"]


def test_two_rounds_fit_into_two_minutes(monkeypatch: pytest.MonkeyPatch):
    """With visits of nine seconds: 6 + 2 x 54 = 114 s; a third round is not begun."""
    clock = Clock(120.0, None, monkeypatch)
    visits = clock.run(FIVE, 9.0)
    assert [number for number, _ in visits] == [0] * 6 + [1] * 6
    assert sorted(thing for _, thing in visits[6:]) == sorted(FIVE)
    assert clock.now <= 120
    assert clock.left_out == []


def test_a_round_that_does_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch):
    """With visits of twelve seconds there is one."""
    clock = Clock(120.0, None, monkeypatch)
    assert len(clock.run(FIVE, 12.0)) == 6
    assert clock.now <= 120


def test_engines_are_left_out_where_one_round_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    """The last ones of the list; ours comes first."""
    clock = Clock(30.0, None, monkeypatch)
    visits = clock.run(FIVE, 10.0)
    assert [thing for _, thing in visits] == ["ours", "original"]
    assert clock.left_out == FIVE[2:]
    assert clock.now <= 30


def test_more_time_has_more_rounds_and_the_order_changes(monkeypatch: pytest.MonkeyPatch):
    """Ten minutes of nine-second visits: ten rounds, not all in the same order."""
    clock = Clock(600.0, None, monkeypatch)
    visits = clock.run(FIVE, 9.0)
    assert len(visits) == 6 * 10 or len(visits) == 6 * 11
    orders = {tuple(thing for number, thing in visits if number == n) for n in range(len(visits) // 6)}
    assert len(orders) > 1
    assert clock.now <= 600


def test_a_number_of_rounds_is_kept_whatever_time_it_takes(monkeypatch: pytest.MonkeyPatch):
    """`--rounds` is not bound by a budget."""
    assert len(Clock(None, 3, monkeypatch).run(FIVE, 1000.0)) == 18


def test_a_budget_chooses_the_engines():
    """Three, five, eight, all."""
    assert [len(default_engines(budget)) for budget in (30.0, 120.0, 600.0)] == [3, 5, 8]
    assert default_engines(3600.0) == ("all",)
    assert default_engines(None) == default_engines(120.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("2m", 120), ("10 min", 600), ("1h", 3600), ("1.5h", 5400), ("30d", 2_592_000), ("45", 45)],
)
def test_times_are_read_as_people_write_them(text: str, seconds: float):
    """Seconds unless there is a unit."""
    assert parse_time(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "0", "-1s", "soon", "1 week", "1y"])
def test_what_is_no_time_is_refused(text: str):
    """With the option and the text."""
    with pytest.raises(Refused, match=r"--budget .* is no time; write it as 30s, 2m or 8h"):
        parse_time(text, "--budget")


def test_shares_and_scales():
    """1 % is 0.01; 1/8 is an eighth, and no scale is above 1."""
    assert parse_share("1%", "--overhead") == parse_share("0.01", "--overhead") == 0.01
    assert parse_scale("1/8") * 8 == parse_scale("1") == 1
    for text in ("2", "0", "1/0", "-1/8", "big"):
        with pytest.raises(Refused, match="--scale"):
            parse_scale(text)
