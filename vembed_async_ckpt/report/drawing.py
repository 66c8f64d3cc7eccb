"""Charts as SVG, one element of text each: no script, no file beside the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, LEFT, RIGHT = 960, 132, 16


class Chart:
    """A drawing `WIDTH` wide on a horizontal axis from `low` to `high`. `y` counts from the top, in pixels."""

    def __init__(self, height: int, low: float, high: float, label: str) -> None:
        self.height = height
        self.low = low
        self.high = high if high > low else low + 1.0
        self._label = label
        self._parts: list[str] = []

    def x(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    def span(self, begin: float, end: float, y: float, height: float, kind: str, title: str = "") -> None:
        """A bar, at least a pixel wide."""
        left = self.x(begin)
        width = max(self.x(end) - left, 1.2)
        self._add("rect", f'x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}"', title)

    def box(self, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> None:
        self._add("rect", f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}"', title)

    def dot(self, value: float, y: float, kind: str, title: str = "") -> None:
        self._add("circle", f'cx="{self.x(value):.1f}" cy="{y:.1f}" r="3.5" class="{kind}"', title)

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Through (value, y)."""
        path = " ".join(f"{self.x(value):.1f},{y:.1f}" for value, y in points)
        self._parts.append(f'<polyline points="{path}" class="line {kind}"/>')

    def rule(self, x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> None:
        self._parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "label") -> None:
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>')

    def lane(self, y: float, height: float, name: str) -> None:
        """The name of a row, left of it."""
        self.text(LEFT - 10, y + height / 2 + 4, name, "end")

    def time_axis(self, y: float, top: float) -> None:
        """Ticks of the horizontal axis as time from its beginning."""
        whole = self.high - self.low
        unit = next((unit for unit in (3600.0, 60.0, 1.0) if whole >= 2 * unit), 1e-3)
        for tick in ticks(0.0, whole / unit, 8):
            x = self.x(self.low + tick * unit)
            self.rule(x, top, x, y)
            self.text(x, y + 16, duration(tick * unit, whole), "end" if x > WIDTH - 40 else "middle", "tick")

    def value_axis(self, top: float, bottom: float, high: float, unit: str) -> None:
        """Ticks of the vertical axis, from 0 at `bottom` to `high` at `top`."""
        for tick in ticks(0.0, high, 4):
            y = bottom - (bottom - top) * tick / high
            self.rule(LEFT, y, WIDTH - RIGHT, y)
            self.text(LEFT - 10, y + 4, f"{tick:g} {unit}", "end", "tick")

    def svg(self) -> str:
        inside = "\n".join(self._parts)
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(self._label, quote=True)}">\n'
            f"{inside}\n</svg>"
        )

    def _add(self, tag: str, attributes: str, title: str) -> None:
        inside = f"<title>{escape(title)}</title>" if title else ""
        self._parts.append(f"<{tag} {attributes}>{inside}</{tag}>")


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def duration(seconds: float, of: float | None = None) -> str:
    """Seconds as people write them; with `of`, in the unit that suits that many."""
    scale = abs(seconds if of is None else of)
    if scale >= 2 * 3600:
        return f"{seconds / 3600:.3g} h"
    if scale >= 120:
        return f"{seconds / 60:.3g} min"
    if scale >= 2 or seconds == 0 or (of is None and scale >= 1):
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if scale >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def size(count: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
