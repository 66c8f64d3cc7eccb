"""The line that is shown while a run lasts."""

from __future__ import annotations

import io

from rich.console import Console

from vembed_async_ckpt.bench.progress import Line, medians

from .made_up import visit

SAMPLES = [
    visit("dcp", 0, [0.048, 0.05], [0.5, 0.5], [0.6, 0.6]),
    visit("ours", 0, [0.003, 0.004], [0.1, 0.1], [0.3, 0.3]),
    {"engine": "original", "round": 0, "error": "OSError"},
]


def line(left: float) -> Line:
    shown = Line(Console(file=io.StringIO()), "cost", SAMPLES, lambda: left)
    shown.begin_round(1, 6)
    shown.end_visit()
    shown.end_visit()
    return shown


def test_it_has_the_time_left_and_the_medians_so_far():
    """The shortest first; an engine that failed has none."""
    assert medians(SAMPLES) == [("ours", 0.0035), ("dcp", 0.049)]
    assert line(45.0).text("moonclip", 200) == (
        "cost, round 2, 3 of 6, 45 seconds left: moonclip; stops training so far: vembed-async-ckpt 3.5 ms, DCP async_save 49 ms"
    )


def test_it_stays_one_line():
    """On a narrow terminal with as many medians as fit, none cut in two."""
    text = line(45.0).text("moonclip", 100)
    assert text == "cost, round 2, 3 of 6, 45 seconds left: moonclip; stops training so far: vembed-async-ckpt 3.5 ms"
    assert line(45.0).text("moonclip", 60) == "cost, round 2, 3 of 6, 45 seconds left: moonclip"


def test_time_that_is_over_is_not_negative():
    """A visit may last longer than it should."""
    assert "0.00 seconds left" in line(-3.0).text("moonclip", 200)
