"""Numbers as people write them."""

from __future__ import annotations

import math


def digits(value: float) -> str:
    """Two digits that count below 10, else whole: 0.28, 3.4, 141, 1,250."""
    size = abs(value)
    if size >= 10 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{max(0, min(4, 1 - math.floor(math.log10(size))))}f}"


def milliseconds(seconds: float) -> str:
    """Without the unit: 3.4, 141."""
    return digits(seconds * 1e3)


def seconds(value: float) -> str:
    """Without the unit, two places below ten: 0.28, 3.41, 12."""
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def duration(value: float) -> str:
    """As it is said: 0.28 seconds, 90 seconds, 42 minutes, 5 hours, 11 days."""
    units = (("second", 1, 120), ("minute", 60, 7200), ("hour", 3600, 72 * 3600), ("day", 86400, math.inf))
    unit, size = next((unit, size) for unit, size, enough in units if value < enough)
    number = value / size
    text = f"{number:.2f}" if number < 1 else f"{number:.1f}".removesuffix(".0") if number < 10 else f"{number:,.0f}"
    return f"{text} {unit}{'' if text == '1' else 's'}"


def size(value: float) -> str:
    """218 MiB, 1.7 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.3g} GiB"


def amount(count: int, thing: str) -> str:
    """1 engine, 5 engines."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def listing(parts: list[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
