"""One picture of a result: how long a save blocks the training loop, engine by engine.

python benchmarks/plot.py benchmarks/results/saves-2026-01-01.json      writes the same name as .png and .svg
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import NAMES, quiet_rounds

OURS, PEERS, INK = "#1a7f5a", "#9aa5b1", "#1f2933"


def draw(result: dict[str, Any], out: Path) -> None:
    """Write `out` as PNG and SVG: a bar to the median, a dot for every save."""
    samples = {
        name: [sample["blocked"] * 1e3 for sample in rounds]
        for name, rounds in quiet_rounds(result["rounds"]).items()
        if name in NAMES and name != "none"
    }
    names = sorted(samples, key=lambda name: statistics.median(samples[name]), reverse=True)
    plt.rcParams.update({"font.size": 11, "text.color": INK, "axes.edgecolor": PEERS, "svg.hashsalt": "saves"})
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(names) + 1.9), layout="constrained")
    right = max(map(max, samples.values()))
    for row, name in enumerate(names):
        median = statistics.median(samples[name])
        colour = OURS if name.startswith("ours") else PEERS
        axes.barh(row, median, color=colour, height=0.62)
        axes.plot(samples[name], [row] * len(samples[name]), "o", markersize=3, color=INK, alpha=0.35)
        axes.text(max(*samples[name], median) * 1.15, row, _label(median), va="center", weight="bold")
    axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes.set_xscale("log")
    axes.set_xlim(0.1, right * 4)
    axes.xaxis.set_major_formatter(lambda value, _: _label(value))
    axes.set_xlabel("training loop blocked per save (log scale); bar: median, dot: one save; less is better")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    machine, options = result["machine"], result["options"]
    axes.set_title(
        f"{options['megabytes'] / 1024:g} GiB of state, {max(map(len, samples.values()))} saves each, {machine['cpus']} cores, "
        f"torch {machine['versions']['torch']}, {machine['date'][:10]}",
        loc="left",
        fontsize=11,
    )
    figure.savefig(out.with_suffix(".png"), dpi=160)
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})


def _label(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.3g} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    draw(json.loads(path.read_text()), path)
    print(path.with_suffix(".png"), path.with_suffix(".svg"))
