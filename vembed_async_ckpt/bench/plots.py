"""Pictures of a result, PNG and SVG: the stall of each engine, how it scales, and what save intervals cost."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .catalog import title_of as title

OURS, PEERS, INK = "#1a7f5a", "#9aa5b1", "#1f2933"
LINES = ("#52606d", "#b44d12", "#3e6fb0", "#8a5fb0", "#a68a00", "#c2477f", "#0f8b8d", "#7b8794")
STYLE = {"font.size": 11, "text.color": INK, "axes.edgecolor": PEERS, "svg.hashsalt": "vembed-ckpt bench"}
Sample = dict[str, Any]


def draw(result: Sample, stem: Path) -> list[Path]:
    """Write `stem`-stall, -scaling and -intervals, what of it there is; returns the files."""
    summary = result["summary"]
    files = []
    with matplotlib.rc_context(STYLE):
        if summary.get("stall", {}).get("engines"):
            files += _write(stall(result), stem, "stall")
        if summary.get("scaling", {}).get("size"):
            files += _write(scaling(result), stem, "scaling")
        if summary.get("scaling", {}).get("interval"):
            files += _write(intervals(result), stem, "intervals")
    return files


def stall(result: Sample) -> Figure:
    """Left: a bar to the median of the blocked time, a dot for every save. Right: what the training takes longer for one save."""
    engines = result["summary"]["stall"]["engines"]
    samples: dict[str, list[float]] = {name: [] for name in engines}
    for visit in result["measures"]["stall"]["samples"]:
        samples[visit["engine"]] += [save["blocked"] * 1e3 for save in visit.get("blocked", ())]
    names = sorted(engines, key=lambda name: engines[name]["blocked"], reverse=True)
    figure = Figure(figsize=(11.5, 0.55 * len(names) + 2.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
    for row, name in enumerate(names):
        median = engines[name]["blocked"] * 1e3
        left.barh(row, median, color=_colour(name), height=0.62)
        left.plot(samples[name], [row] * len(samples[name]), "o", markersize=3, color=INK, alpha=0.35)
        left.text(max(*samples[name], median) * 1.15, row, _time(median), va="center", weight="bold")
    left.set_yticks(range(len(names)), [title(name) for name in names])
    left.set_xscale("log")
    lowest = min(min(values) for values in samples.values() if values)
    left.set_xlim(min(0.1, lowest / 2), max(max(values) for values in samples.values() if values) * 6)
    left.xaxis.set_major_formatter(lambda value, _: _time(value))
    left.set_xlabel("training loop blocked per save (log scale)\nbar: median, dot: one save; less is better")
    threads = [part["threads"] for part in engines[names[0]]["steps"]]
    for row, name in enumerate(names):
        for place, part in enumerate(engines[name]["steps"]):
            y = row + 0.32 * (0.5 * (len(threads) - 1) - place)
            alpha = (0.55, 1.0)[place] if len(threads) > 1 else 1.0
            lost = max(part["lost"], 0) * 1e3
            right.barh(y, lost, height=0.28, color=_colour(name), alpha=alpha)
            right.text(lost, y, f" {part['lost'] * 1e3:,.0f}", va="center", fontsize=8.5)
    for place, line in enumerate(("dotted", "dashed")[-len(threads) :]):
        floor = statistics.median(entry["steps"][place]["floor"] for entry in engines.values()) * 1e3
        right.axvline(floor, color=INK, linewidth=1, linestyle=line)
    right.margins(x=0.15)
    pale = f"\npale, dotted: {threads[0]} torch thread\nfull, dashed: {threads[-1]} threads" if len(threads) > 1 else ""
    right.set_xlabel(f"training lost per save, ms\nuntil it is durable; lines: a raw write{pale}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
    figure.suptitle(_heading(result), x=0.01, ha="left", fontsize=11)
    return figure


def scaling(result: Sample) -> Figure:
    """Blocked time by size of the state and by number of tensors, on log scales."""
    summary = result["summary"]["scaling"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, kind, label in zip(
        both, ("size", "tensors"), ("size of the state, GiB", "tensors in the state"), strict=True
    ):
        for name, colour in _colours(summary[kind]).items():
            points = summary[kind][name]
            scale = 2**30 if kind == "size" else 1
            x, y = [point[0] / scale for point in points], [point[1] * 1e3 for point in points]
            axes.plot(
                x, y, "o-", color=colour, linewidth=2.4 if name == "ours" else 1.4, markersize=4, label=title(name)
            )
        ticks = sorted(
            {point[0] / (2**30 if kind == "size" else 1) for curve in summary[kind].values() for point in curve}
        )
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,.3g}" if kind == "size" else f"{tick:,.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yscale("log")
        axes.set_xlabel(label)
        _plain(axes)
    both[0].yaxis.set_major_formatter(lambda value, _: _time(value))
    both[0].set_ylabel("training loop blocked per save, median")
    _legend(figure, both[0])
    figure.suptitle(_heading(result), x=0.01, ha="left", fontsize=11)
    return figure


def intervals(result: Sample) -> Figure:
    """How much longer a whole training takes, by the interval of its saves."""
    curves = result["summary"]["scaling"]["interval"]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, colour in _colours(curves).items():
        x, y = [point[0] for point in curves[name]], [point[1] for point in curves[name]]
        axes.plot(x, y, "o-", color=colour, linewidth=2.4 if name == "ours" else 1.4, markersize=4, label=title(name))
    ticks = sorted({point[0] for curve in curves.values() for point in curve})
    axes.axhline(1, color=PEERS, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} x")
    top = max(point[1] for curve in curves.values() for point in curve)
    axes.set_yticks([tick for tick in (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500) if tick <= max(top * 1.2, 1.2)])
    axes.set_xlabel("a save every so many steps")
    axes.set_ylabel("training time, to the same without saves")
    _plain(axes)
    _legend(figure, axes)
    figure.suptitle(_heading(result), x=0.01, ha="left", fontsize=11)
    return figure


def _colour(name: str) -> str:
    return OURS if name.startswith("ours") else PEERS


def _colours(curves: Sample) -> dict[str, str]:
    """One for each engine, the same in every panel: results are in the order of what they say."""
    peers = iter(LINES * len(curves))
    return {name: OURS if name == "ours" else next(peers) for name in sorted(curves)}


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="y", color=PEERS, alpha=0.25, linewidth=0.7)


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9.5)


def _heading(result: Sample) -> str:
    machine, state = result["machine"], result["state"]
    size = state["bytes"] / 2**20
    text = f"{size / 1024:.3g} GiB" if size >= 1000 else f"{size:.3g} MiB"
    model = "" if state["model"] == "synthetic" else f"{state['model']}, "
    return (
        f"{model}{text} of weights and AdamW in {state['tensors']:,} tensors, {machine['gpu'] or str(machine['cpus']) + ' cores'}, "
        f"torch {machine['versions']['torch']}, {machine['date'][:10]}"
    )


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.3g} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


def _write(figure: Figure, stem: Path, kind: str) -> list[Path]:
    files = [stem.with_name(f"{stem.name}-{kind}.{suffix}") for suffix in ("png", "svg")]
    figure.savefig(files[0], dpi=160)
    figure.savefig(files[1], metadata={"Date": None})
    return files
