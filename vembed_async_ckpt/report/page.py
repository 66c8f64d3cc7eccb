"""The page: a few numbers, then one chart for each question."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from html import escape
from statistics import median

from .drawing import LEFT, RIGHT, WIDTH, Chart, duration, size
from .history import History, Save, percentile, shares

_BINS = 600  # of the time axis, where there are more steps

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6879; --grid: #e3e7ee; --paper: #ffffff; --card: #f6f8fb;
  --step: #8fa3bf; --blocked: #d1362f; --copy: #e0952b; --write: #2f74c0; --commit: #173f73; --gone: #8a55b5; --slowed: #e58d85; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf3; --soft: #9aa6b8; --grid: #2d3542; --paper: #141920; --card: #1c232d;
  --step: #6f86a6; --blocked: #f0655e; --copy: #f0b054; --write: #5fa0e8; --commit: #a9cdf7; --gone: #b98be0; --slowed: #a8554f; } }
body { margin: 0 auto; padding: 28px 24px 60px; max-width: 1010px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 34px 0 2px; } p { margin: 2px 0 10px; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin-top: 18px; }
.tile { background: var(--card); border-radius: 8px; padding: 10px 14px; } .tile b { display: block; font-size: 20px; }
.tile span { color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; display: block; }
text { font: 12px system-ui, sans-serif; fill: var(--ink); } text.tick { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--grid); } .mark { stroke: var(--ink); stroke-dasharray: 3 3; } .line { fill: none; stroke-width: 1.4; }
.step { fill: var(--step); } .step2 { fill: var(--step); opacity: .6; } .blocked { fill: var(--blocked); }
.copy { fill: var(--copy); } .write { fill: var(--write); } .commit { fill: var(--commit); } .gone { fill: var(--gone); }
.slowed { fill: var(--slowed); } .other { fill: var(--grid); } .line.step { stroke: var(--step); fill: none; }
.line.most { stroke: var(--slowed); } .line.write { stroke: var(--write); fill: none; }
table { border-collapse: collapse; font-size: 13px; margin-top: 6px; } td, th { padding: 3px 14px 3px 0; text-align: left; }
"""


def render(history: History, source: str, disk: float | None = None) -> str:
    """The page as HTML. `source`: where the events come from. `disk`: bytes per second that the disk writes, to compare with."""
    title = f"Checkpoints of {source}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_when(history))}</p>",
        _tiles(history),
        *_section("Where the time went", _GOODPUT, _goodput(history)),
        *_section("Steps and saves on one time axis", _TIMELINE, _timeline(history)),
        *_section("One save in detail", _DETAIL, _detail(history)),
        *_section("How long saves blocked training", _STALLS, _stalls(history)),
        *_section("Write rate", _RATES if disk is None else _RATES_OF_DISK, _rates(history, disk)),
        *_section("Disk use", _DISK, _disk_use(history)),
        _failures(history),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


_GOODPUT = (
    "Goodput is the share of the wall time that was training as it would have been without saves. Steps beside a save are "
    "compared with the 16 on either side: on a busy machine a part of that is chance."
)
_TIMELINE = "Red blocks training; the other colours overlap with it; a red dot is a save that failed. Point at one for its numbers."
_DETAIL = "The save that blocked training for the median time, and the steps around it."
_STALLS = "Of each save: the call of save() and the wait at optimizer.step(). The axis is logarithmic."
_RATES = "Writing and committing. The line is the fastest save of this run, not what the disk can do: --disk-gbps draws that."
_RATES_OF_DISK = "Writing and committing. The line is what the disk writes, as given."
_DISK = "Committed by the saves of these events, less what retention deleted. Checkpoints that were replaced are not deducted."


def _section(title: str, note: str, chart: str) -> list[str]:
    return [f"<h2>{escape(title)}</h2>", f"<p>{escape(note)}</p>", chart] if chart else []


def _when(history: History) -> str:
    begin = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(history.begin))
    runs = f" in {len(history.starts)} runs" if len(history.starts) > 1 else ""
    return f"{begin}, {duration(history.wall)}{runs}, {len(history.steps)} steps, {len(history.saves)} saves"


def _tiles(history: History) -> str:
    good = [save for save in history.ended if not save.failed]
    blocked = [save.blocked for save in history.saves if save.blocks]
    durable = [save.durable for save in good if save.durable is not None]
    rates = [save.rate for save in good if save.rate is not None]
    tiles = []
    if history.steps:
        tiles.append((f"{shares(history).training / max(history.wall, 1e-9):.1%}", "goodput"))
    if blocked:
        tiles.append((duration(median(blocked)), f"blocked, p99 {duration(percentile(blocked, 0.99))}"))
    if durable:
        tiles.append((duration(median(durable)), f"until durable, p99 {duration(percentile(durable, 0.99))}"))
    if rates:
        tiles.append((f"{size(median(rates))}/s", "write rate, median"))
    tiles.append((f"{len(good)}", f"committed, {sum(save.failed for save in history.saves)} failed"))
    tiles.append((size(sum(save.size for save in good)), "written"))
    inside = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles
    )
    return f'<div class="tiles">{inside}</div>'


def _goodput(history: History) -> str:
    if not history.steps:
        return ""
    found = shares(history)
    rows = [
        ("step", "training", found.training),
        ("blocked", "blocked by saves", found.blocked),
        ("slowed", "slower steps beside saves", found.slowed),
        ("other", "outside of steps", found.other),
    ]
    whole = sum(seconds for _, _, seconds in rows) or 1.0
    chart = Chart(64, 0.0, 1.0, "Shares of the wall time")
    x, place = 0.0, 0.0
    for kind, name, seconds in rows:
        width = seconds / whole * WIDTH
        text = f"{name}: {duration(seconds)}, {seconds / whole:.2%}"
        chart.box(x, 4, max(width, 1.0 if seconds else 0.0), 24, kind, text)
        chart.box(place, 44, 10, 10, kind)
        chart.text(place + 16, 53, f"{name} {seconds / whole:.2%}")
        x += width
        place += WIDTH / len(rows)
    return chart.svg()


def _timeline(history: History) -> str:
    chart = Chart(346, history.begin, history.end, "Steps and saves over time")
    top, bottom = 26.0, 146.0
    lanes = ("blocks training", "copy", "write", "commit", "retention")
    chart.time_axis(bottom + 20 + 30 * len(lanes), top)
    if history.steps:
        seconds = [end - begin for begin, end in history.steps]
        typical = min(max(seconds) * 1.05, percentile(seconds, 0.99) * 3)  # what is far longer is cut off
        unit, scale = ("s", 1.0) if typical >= 1 else ("ms", 1e3)
        chart.value_axis(top, bottom, typical * scale, unit)
        usual, most = _curves(history)

        def points(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
            return [(at, bottom - (bottom - top) * min(value / typical, 1.0)) for at, value in values]

        if most:
            chart.line(points(most), "most")
            chart.text(WIDTH - RIGHT, top - 12, "longest step in the bin, above the median", "end", "tick")
        chart.line(points(usual), "step")
    rows = {name: bottom + 24 + 30 * number for number, name in enumerate(lanes)}
    for name, y in rows.items():
        chart.lane(y, 18, name)
    for save in history.saves:
        text = _described(save)
        for begin, end in save.blocks:
            chart.span(begin, end, rows["blocks training"], 18, "blocked", text)
        for name, span in (("copy", save.copy), ("write", save.write), ("commit", save.commit)):
            if span is not None:
                chart.span(*span, rows[name], 18, name, text)
        if save.failed and save.end is not None:
            chart.dot(save.end, rows["commit"] + 9, "blocked", text)
    for gone in history.deletions:
        chart.span(*gone.span, rows["retention"], 18, "gone", f"{gone.detail}, {size(gone.freed)}")
    return chart.svg()


def _curves(history: History) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(time, seconds of a step): the steps, or the median and the longest in each of `_BINS` where there are more."""
    if len(history.steps) <= _BINS:
        return [point for begin, end in history.steps for point in ((begin, end - begin), (end, end - begin))], []
    bins: dict[int, list[float]] = {}
    width = max(history.wall, 1e-9) / _BINS
    for begin, end in history.steps:
        bins.setdefault(int((end - history.begin) / width), []).append(end - begin)
    at = {number: history.begin + (number + 0.5) * width for number in bins}
    return [(at[n], median(bins[n])) for n in sorted(bins)], [(at[n], max(bins[n])) for n in sorted(bins)]


def _detail(history: History) -> str:
    good = [save for save in history.ended if not save.failed and save.call is not None]
    if not good:
        return ""
    save = sorted(good, key=lambda save: save.blocked)[(len(good) - 1) // 2]
    assert save.end is not None
    whole = save.end - save.begin
    low, high = save.begin - 0.3 * whole, save.end + 0.3 * whole
    chart = Chart(240, low, high, f"The save of step {save.step}")
    chart.time_axis(204, 6)
    steps = [(begin, end) for begin, end in history.steps if end > low and begin < high][:2000]
    rows = ["training steps", "blocks training", "copy", "write", "commit"]
    for number, name in enumerate(rows):
        chart.lane(10 + 38 * number, 28, name)
    for number, (begin, end) in enumerate(steps):
        kind = "step2" if number % 2 else "step"
        chart.span(max(begin, low), min(end, high), 10, 28, kind, f"step of {duration(end - begin)}")
    for begin, end in save.blocks:
        chart.span(begin, end, 48, 28, "blocked", f"{duration(end - begin)} blocked")
    for number, span in ((2, save.copy), (3, save.write), (4, save.commit)):
        if span is not None:
            y = 10 + 38 * number
            chart.span(*span, y, 28, rows[number], _described(save))
            right = chart.x(span[1])
            place = (right + 6, "start") if right < WIDTH - 120 else (chart.x(span[0]) - 6, "end")
            chart.text(place[0], y + 18, duration(span[1] - span[0]), place[1])
    chart.text(LEFT, 236, _described(save), kind="tick")
    return chart.svg()


def _described(save: Save) -> str:
    parts = [f"step {save.step}", f"blocked {duration(save.blocked)}"]
    if save.durable is not None:
        parts.append(f"durable after {duration(save.durable)}")
    if save.size:
        parts.append(size(save.size))
    if save.rate is not None:
        parts.append(f"{size(save.rate)}/s")
    if save.failed:
        parts.append(f"failed: {save.reason}")
    return ", ".join(parts)


def _stalls(history: History) -> str:
    blocked = [save.blocked for save in history.saves if save.blocks]
    if not blocked:
        return ""
    low, high = (math.log10(max(value, 1e-6)) for value in (min(blocked), max(blocked)))
    low, high = math.floor(low * 4) / 4, math.floor(high * 4) / 4 + 0.25
    bins = round((high - low) * 8)
    counts = [0] * bins
    for value in blocked:
        counts[min(int((math.log10(max(value, 1e-6)) - low) * 8), bins - 1)] += 1
    chart = Chart(210, low, high, "Distribution of the time that saves blocked training")
    top, bottom = 34.0, 170.0
    chart.value_axis(top, bottom, float(max(counts)), "saves") if max(counts) >= 4 else None
    for number, count in enumerate(counts):
        edges = [low + number / 8, low + (number + 1) / 8]
        text = f"{count} saves from {duration(10 ** edges[0])} to {duration(10 ** edges[1])}"
        height = (bottom - top) * count / max(counts)
        if count:
            left, right = (chart.x(edge) for edge in edges)
            chart.box(left + 1, bottom - height, right - left - 2, height, "blocked", text)
    marks_of_ten = (1, 2, 5) if high - low < 3 else (1,)
    for power in range(math.floor(low), math.ceil(high) + 1):
        for at in (power + math.log10(factor) for factor in marks_of_ten):
            if low <= at <= high:
                chart.text(chart.x(at), bottom + 18, duration(10**at), "middle", "tick")
    marks = [("p50", median(blocked)), ("p99", percentile(blocked, 0.99))]
    for number, (name, value) in enumerate(marks):
        x = chart.x(math.log10(max(value, 1e-6)))
        chart.rule(x, 8 + 14 * number, x, bottom, "mark")
        side = (x + 5, "start") if x < WIDTH - 130 else (x - 5, "end")
        chart.text(side[0], 16 + 14 * number, f"{name} {duration(value)}", side[1])
    return chart.svg()


def _rates(history: History, disk: float | None) -> str:
    found = [(save.end or save.begin, save) for save in history.ended if save.rate is not None]
    if not found:
        return ""
    fastest = max(save.rate or 0.0 for _, save in found)
    limit = disk or fastest
    high = max(limit, fastest) * 1.12 / 1e9
    chart = Chart(200, history.begin, history.end, "Write rate of each save")
    top, bottom = 10.0, 160.0
    chart.time_axis(bottom, top)
    chart.value_axis(top, bottom, high, "GB/s")
    y = bottom - (bottom - top) * limit / 1e9 / high
    chart.rule(LEFT, y, WIDTH - RIGHT, y, "mark")
    chart.text(WIDTH - RIGHT, y - 5, f"{'the disk' if disk else 'fastest'}: {size(limit)}/s", "end", "tick")
    for at, save in found:
        chart.dot(at, bottom - (bottom - top) * (save.rate or 0.0) / 1e9 / high, "write", _described(save))
    return chart.svg()


def _disk_use(history: History) -> str:
    changes = [(save.end or 0.0, save.size) for save in history.ended if not save.failed]
    changes += [(gone.span[1], -gone.freed) for gone in history.deletions]
    if not changes:
        return ""
    points, used, most = [(history.begin, 0)], 0, 1
    for at, change in sorted(changes):
        points.append((at, used))
        used = max(used + change, 0)
        points.append((at, used))
        most = max(most, used)
    points.append((history.end, used))
    unit = 1e9 if most >= 1e9 else 1e6
    chart = Chart(200, history.begin, history.end, "Disk use over time")
    top, bottom, high = 10.0, 160.0, most * 1.1
    chart.time_axis(bottom, top)
    chart.value_axis(top, bottom, high / unit, "GB" if unit == 1e9 else "MB")
    chart.line([(at, bottom - (bottom - top) * value / high) for at, value in points], "write")
    return chart.svg()


def _failures(history: History) -> str:
    failed = [save for save in history.saves if save.failed]
    if not failed:
        return ""
    rows = "".join(
        f"<tr><td>{escape(str(save.step))}</td><td>{duration(save.begin - history.begin)}</td>"
        f"<td>{escape(save.reason)}</td></tr>"
        for save in failed[-50:]
    )
    return f"<h2>Saves that failed</h2><table><tr><th>step</th><th>after</th><th>reason</th></tr>{rows}</table>"
