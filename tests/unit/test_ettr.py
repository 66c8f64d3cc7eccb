"""The formula of `ettr` against a simulation that walks through lives, and its best interval against a search."""

from __future__ import annotations

import math
import random

import pytest

from vembed_async_ckpt.ettr import advise, best_interval, ettr, hours_lost, mtbf_of

DAY = 86400.0
# (M, blocked, slowdown until durable, D, R)
SETTINGS = {
    "small state, a crash every 3 hours": (10_800.0, 0.0034, 0.3, 0.30, 60.0),
    "staged in the call": (10_800.0, 0.20, 0.5, 0.9, 60.0),
    "Llama 3 405B, asynchronous": (54 * DAY / 419, 0.5, 0.05, 60.0, 600.0),
    "Llama 3 405B, waiting": (54 * DAY / 419, 60.0, 0.0, 60.0, 600.0),
    "8 GPUs, waiting": (30 * DAY, 5.0, 0.0, 5.0, 300.0),
    "a crash every 15 minutes": (900.0, 5.0, 0.2, 60.0, 120.0),
}


def lost_of(blocked: float, slowdown: float, durable: float) -> float:
    return blocked + slowdown * (durable - blocked)


def simulate(interval: float, m: float, blocked: float, slowdown: float, durable: float, restart: float) -> float:
    """Each life is walked through interval by interval: train, save, be slowed, be durable, crash."""
    lives = int(min(60_000, max(1500, 600_000 / (m / interval))))
    chance = random.Random(1)
    kept = wall = 0.0
    for _ in range(lives):
        life = chance.expovariate(1 / m)
        wall += life + restart
        now = done = safe = 0.0
        held: float | None = None  # the work that the save in flight holds
        while True:
            end = min(now + interval, life)
            passed = end - now
            if held is None:
                done += passed
            else:
                stopped = min(blocked, passed)
                done += passed - stopped - slowdown * min(max(passed - blocked, 0.0), durable - blocked)
                if passed >= durable:
                    safe = held
            if end >= life:
                break
            now, held = end, done
        kept += safe
    return kept / wall


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("times", [0.25, 1.0, 4.0])
def test_the_formula_agrees_with_walking_through_lives(name: str, times: float):
    """Within half a percent at the best interval, and at a quarter and four times of it."""
    m, blocked, slowdown, durable, restart = SETTINGS[name]
    lost = lost_of(blocked, slowdown, durable)
    interval = max(durable, times * best_interval(lost=lost, durable=durable, mtbf=m))
    expected = simulate(interval, m, blocked, slowdown, durable, restart)
    assert ettr(interval, lost=lost, durable=durable, mtbf=m, restart=restart) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_best_interval_is_what_a_search_finds(name: str):
    """Within 2 %, and no interval of the grid is better."""
    m, blocked, slowdown, durable, restart = SETTINGS[name]
    given = {"lost": lost_of(blocked, slowdown, durable), "durable": durable, "mtbf": m}
    grid = [durable * (20 * m / durable) ** (n / 20_000) for n in range(20_001)]
    found = max(grid, key=lambda interval: ettr(interval, restart=restart, **given))
    best = best_interval(**given)
    assert best == pytest.approx(found, rel=0.02)
    assert ettr(best, restart=restart, **given) >= ettr(found, restart=restart, **given) * (1 - 1e-9)


def test_it_is_close_to_young_where_saves_are_cheap():
    """sqrt(2 w M), for intervals far below the time between crashes."""
    assert best_interval(lost=0.14, durable=0.3, mtbf=8 * 3600) == pytest.approx(
        math.sqrt(2 * 0.14 * 8 * 3600), rel=0.02
    )


def test_no_save_is_more_often_than_it_can_be():
    """A save that costs nothing is made as soon as the one before is durable; a shorter interval is an error."""
    assert best_interval(lost=0.0, durable=2.0, mtbf=1e6) == pytest.approx(2.0, rel=1e-4)
    with pytest.raises(ValueError, match="cannot be made: it takes 2 s"):
        ettr(1.0, lost=0.0, durable=2.0, mtbf=1e6, restart=0.0)


def test_hours_lost_of_thirty_days():
    """Without the restarts: at a save every 30 minutes and a crash every 8 hours some 22.5 of 720 hours, whatever a save costs."""
    cheap = hours_lost(1800, lost=0.01, durable=0.3, mtbf=8 * 3600, restart=60)
    dear = hours_lost(1800, lost=0.5, durable=0.6, mtbf=8 * 3600, restart=60)
    assert cheap == pytest.approx(22.3, abs=0.1)
    assert dear - cheap == pytest.approx(720 * 0.5 / 1800, rel=0.1)
    loading = hours_lost(1800, lost=0.01, durable=0.3, mtbf=8 * 3600, restart=60, load=60)
    assert loading - cheap == pytest.approx(720 * 60 / (8 * 3600), rel=0.05)


def test_the_rate_of_llama_3():
    """419 interruptions in 54 days on 16,384 GPUs."""
    assert mtbf_of(16_384) == pytest.approx(54 * DAY / 419, rel=0.001)
    assert mtbf_of(64) / 3600 == pytest.approx(792, abs=1)


def test_advice_says_what_the_interval_of_now_costs():
    """An interval that is too short to be kept is taken as what a save takes."""
    advice = advise(lost=0.14, durable=0.3, mtbf=8 * 3600, now=1800)
    assert advice.hours_lost < 3 < 22 < (advice.now_hours_lost or 0)
    assert advise(lost=0.14, durable=0.3, mtbf=8 * 3600, now=0.1).now_interval == 0.3
    assert advise(lost=-0.1, durable=0.3, mtbf=8 * 3600).interval == pytest.approx(0.3, rel=1e-4)
