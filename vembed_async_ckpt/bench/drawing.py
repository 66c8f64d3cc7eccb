"""Plots as SVG, without any library: rows of dots, and curves with their names at them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

INK, GREY, PALE, OURS = "#1b1f24", "#68727c", "#e4e7ea", "#0b6e4f"
WIDTH, LEFT, RIGHT = 760, 190, 110
LOG_FROM = 20.0  # an axis is logarithmic where the largest value is that many times the smallest


@dataclass(frozen=True)
class Row:
    """The samples of one engine: each a ring, the median a dot with its value."""

    title: str
    samples: Sequence[float]
    median: float
    label: str
    ours: bool


@dataclass(frozen=True)
class Curve:
    """`value(x)` from `start` on; `best` is marked with a dot."""

    title: str
    value: Callable[[float], float]
    start: float
    best: float
    ours: bool


class Axis:
    """Maps values to pixels between `first` and `last`; logarithmic where the data needs it, else from zero."""

    def __init__(self, values: Sequence[float], first: float, last: float, *, logarithmic: bool | None = None) -> None:
        positive = [value for value in values if value > 0] or [1.0]
        wide = min(values) > 0 and max(positive) > LOG_FROM * min(positive)
        self.logarithmic = wide if logarithmic is None else logarithmic
        self.low = min(positive) / 1.3 if self.logarithmic else min(0.0, *values)
        self.high = max(positive) * (1.1 if self.logarithmic else 1.02)
        self._first, self._last = first, last

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self._first + share * (self._last - self._first)

    def ticks(self) -> list[float]:
        """Some four to eight round values."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 3) if len(powers) < 4 else (1,)
            found = [step * 10.0**power for power in powers for step in steps]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
            found = [number * step for number in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        return [value for value in found if self.low <= value <= self.high]


def dots(rows: Sequence[Row], unit: str) -> str:
    """The rows from top to bottom, the axis below."""
    height = 30 * len(rows) + 46
    x = Axis([value for row in rows for value in (*row.samples, row.median)], LEFT, WIDTH - RIGHT)
    parts = []
    bottom = 30 * len(rows) + 8
    for tick in x.ticks():
        parts += [
            _line(x(tick), 4, x(tick), bottom, PALE),
            _text(x(tick), bottom + 16, f"{tick:,.10g}", GREY, "middle"),
        ]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 33, unit + ", logarithmic" * x.logarithmic, GREY, "middle"))
    for place, row in enumerate(rows):
        y, colour = 20 + 30 * place, OURS if row.ours else INK
        parts.append(_text(LEFT - 14, y + 4, row.title, colour, "end", bold=row.ours))
        parts += [_ring(x(value), y) for value in row.samples]
        parts.append(_dot(x(row.median), y, 5.5, colour))
        end = x(max(*row.samples, row.median))
        parts.append(_text(end + 12, y + 4, row.label, colour, bold=row.ours))
    return _svg(height, parts)


def curves(drawn: Sequence[Curve], ticks: Sequence[tuple[float, str]], unit: str, under: str) -> str:
    """On a logarithmic axis of `ticks`. The names stand in a column beside the falling side, where the curves are apart."""
    height, top, bottom, left, right = 400, 12, 350, 60, WIDTH - 20
    x = Axis([ticks[0][0] * 1.3, ticks[-1][0] / 1.1], left, right, logarithmic=True)
    most = max(curve.value(curve.best) for curve in drawn)
    y = Axis([0.0, 5 * most], bottom, top, logarithmic=False)
    parts = []
    for tick in y.ticks():
        parts += [
            _line(left, y(tick), right, y(tick), PALE),
            _text(left - 8, y(tick) + 4, f"{tick:,.10g}", GREY, "end"),
        ]
    for tick, said in ticks:
        parts += [_line(x(tick), top, x(tick), bottom, PALE), _text(x(tick), bottom + 18, said, GREY, "middle")]
    parts += [_text(right, bottom + 38, under, GREY, "end"), _text(left - 46, top + 2, unit, GREY)]
    order = sorted(drawn, key=lambda curve: curve.best)
    step = min(22.0, (bottom - top) * 0.7 / len(order))
    heights = [top + 14 + step * place for place in range(len(order))]
    flanks = [_flank(curve, y, at) for curve, at in zip(order, heights, strict=True)]
    column = max(x(flank) for flank in flanks) + 26
    for curve, at, flank in zip(order, heights, flanks, strict=True):
        colour = OURS if curve.ours else INK
        points = [ticks[0][0] * (ticks[-1][0] / ticks[0][0]) ** (n / 300) for n in range(301)]
        path = [(x(point), y(curve.value(point))) for point in [curve.start, *points] if point >= curve.start]
        inside = [(a, b) for a, b in path if left <= a <= right and top <= b <= bottom]
        parts.append(_path(inside, colour if curve.ours else GREY, 2.6 if curve.ours else 1.3))
        if left <= x(curve.best) <= right:
            parts.append(_dot(x(curve.best), y(curve.value(curve.best)), 4.5, colour))
        parts.append(_line(x(flank), at, column - 4, at, colour, 0.6))
        parts.append(_text(column, at + 4, curve.title, colour, bold=curve.ours))
    return _svg(height, parts)


def _flank(curve: Curve, y: Axis, at: float) -> float:
    """Where the falling side of a curve is at that height, or its start."""
    low, high = math.log(curve.start), math.log(max(curve.best, curve.start))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if y(curve.value(math.exp(middle))) < at else (low, middle)
    return math.exp(high)


def _svg(height: float, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" xmlns="http://www.w3.org/2000/svg" font-size="14">'
    return head + "".join(parts) + "</svg>"


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, width: float = 1.0) -> str:
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"/>'


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start", *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _ring(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="none" stroke="{GREY}"/>'


def _dot(x: float, y: float, radius: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>'


def _path(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>'
