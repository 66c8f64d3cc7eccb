"""From samples to ratios, and from ratios to tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

NAMES = {
    "none": "(no save: floor)",
    "ours": "vembed-async-ckpt, overlap",
    "ours-blocking": "vembed-async-ckpt, blocking",
    "torch_checkpointing": "torch_checkpointing",
    "dcp": "torch DCP async_save",
    "dcp-cached": "torch DCP, cached stager",
    "dcp-overlap": "torch DCP, overlapping stager",
    "dcp-process": "torch DCP, overlapping, process",
    "safetensors": "safetensors.save_file",
}
Rounds = dict[str, list[dict[str, float]]]
SYNCS = {"none": "", "ours": "all", "ours-blocking": "all", "torch_checkpointing": "nothing", "safetensors": "nothing"}


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; with fewer than a hundred values, close to their maximum."""
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def quiet_rounds(rounds: Rounds) -> Rounds:
    """The rounds in which other people's processes used less than a tenth of the machine, if there are five; else all.

    A round counts for all engines or for none, so that no engine is chosen for.
    """
    count = min(map(len, rounds.values()))
    quiet = [n for n in range(count) if statistics.mean(samples[n]["others"] for samples in rounds.values()) < 0.1]
    if len(quiet) < 5:
        return rounds
    return {name: [samples[n] for n in quiet] for name, samples in rounds.items()}


def claims(result: dict[str, Any]) -> dict[str, Any]:
    """The ratios that the project promises or is measured by, from the quiet rounds; what was not run is left out."""
    rounds = quiet_rounds(result["rounds"])
    found: dict[str, Any] = {"blocked": {}, "copy": {}, "write": {}, "memory": {}, "steps": {}}
    for name, samples in rounds.items():
        if "blocked" in samples[0]:
            blocked = [s["blocked"] for s in samples]
            found["blocked"][name] = {"median": statistics.median(blocked), "p99": p99(blocked)}
    for entry in found["blocked"].values():
        if "ours" in found["blocked"]:
            entry["times_ours"] = entry["median"] / found["blocked"]["ours"]["median"]
    copies = [min(s["foreach"], s["memcpy"]) for s in rounds["copy ceiling"]]
    writes = [s["write"] for s in rounds["write ceiling"]]
    found["copy"]["ceiling"] = statistics.median(copies)
    found["write"]["ceiling"] = statistics.median(writes)
    for name in ("ours", "ours-blocking"):
        for key in (name, f"{name}, alone"):
            if key in rounds:
                wrote = [s["our_write"] + s["our_commit"] for s in rounds[key]]
                found["write"][key] = statistics.median(c / w for c, w in zip(writes, wrote, strict=True))
    if "ours-blocking, alone" in rounds:
        samples = rounds["ours-blocking, alone"]
        for part in ("our_staging", "save"):
            ratios = [c / s[part] for c, s in zip(copies, samples, strict=True)]
            found["copy"][part] = statistics.median(ratios)
    for run in result["alone"]:
        added = {kind: run[kind]["saving"] - run[kind]["training"] for kind in ("proportional", "resident")}
        found["memory"][run["engine"]] = added | {"limit": 1.05 * run["bytes"] + (64 << 20)}
        for steps in run["steps"]:
            found["steps"][f"{run['engine']}, {steps['threads']} threads"] = {
                "median": statistics.median(steps["beside"]) / statistics.median(steps["quiet"]),
                "p99": p99(steps["beside"]) / p99(steps["quiet"]),
                "idle": statistics.median(steps["quiet"]) / statistics.median(steps["bare"]),
                "quiet": statistics.median(steps["quiet"]),
                "count": len(steps["beside"]),
            }
    return found


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    console.width = max(console.width, 120)  # wide enough for the tables in a log file too
    machine, options, found = result["machine"], result["options"], result["claims"]
    rounds = quiet_rounds(result["rounds"])
    count = len(rounds["write ceiling"])
    others = statistics.mean(s["others"] for samples in rounds.values() for s in samples)
    console.print(
        f"{machine['date']}  {machine['cpus']} x {machine['cpu']}, Linux {machine['kernel']}, {machine['file_system']}; "
        f"load {machine['load']:.2f} at the start; "
        f"state: {options['state']}, {options['megabytes']} MiB; {count} of {options['rounds']} rounds are used, in which others "
        f"had {others:.0%} of the CPUs\n"
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    )
    console.print(_engines(result))
    console.print(_ceilings(result))
    if found["memory"]:
        console.print(_memory(found))
        console.print(_steps(found))


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def _engines(result: dict[str, Any]) -> Table:
    table = _table(
        "What a save takes from the training loop, ms (medians), and when the checkpoint is there, s",
        "engine", "save()", "step", "blocked", "p99", "x ours", "work +", "written", "durable", "fsyncs",
    )  # fmt: skip
    rounds, blocked = quiet_rounds(result["rounds"]), result["claims"]["blocked"]
    floor = statistics.median(s["work"] for s in rounds["none"]) if "none" in rounds else None
    for name, entry in blocked.items():
        median = {key: statistics.median(s[key] for s in rounds[name]) for key in rounds[name][0]}
        table.add_row(
            NAMES[name],
            _milliseconds(median["save"]),
            _milliseconds(median["step"]),
            _milliseconds(entry["median"]),
            _milliseconds(entry["p99"]),
            f"{entry['times_ours']:,.2f}" if "times_ours" in entry else "",
            "" if floor is None else f"{(median['work'] - floor) * 1e3:+,.0f}",
            "" if name == "none" else f"{median['written']:.2f}",
            "" if name == "none" else f"{median['durable']:.2f}",
            SYNCS.get(name, "files"),
        )
    table.caption = (
        "work +: how much longer forward and backward took. durable: with the fsyncs that an engine leaves out"
    )
    return table


def _ceilings(result: dict[str, Any]) -> Table:
    copy, write = result["claims"]["copy"], result["claims"]["write"]
    size = result["options"]["megabytes"] * 2**20 / 1e9
    table = _table("Against what the machine can do in the same rounds", "", "GB/s", "of the ceiling")
    table.add_row("copy ceiling: 2 threads, warm memory", f"{size / copy['ceiling']:.1f}", "100 %")
    for part, text in (("our_staging", "blocking: the copy"), ("save", "blocking: all of save()")):
        if part in copy:
            table.add_row(text, f"{size / copy['ceiling'] * copy[part]:.1f}", f"{copy[part]:.0%}")
    table.add_row("write ceiling: O_DIRECT, 4 x 16 MiB, fsync", f"{size / write['ceiling']:.1f}", "100 %")
    for key, ratio in write.items():
        if key != "ceiling":
            table.add_row(f"write and commit, {key}", f"{size / write['ceiling'] * ratio:.1f}", f"{ratio:.0%}")
    return table


def _memory(found: dict[str, Any]) -> Table:
    table = _table("Host memory beyond training's, at the peak, MiB", "engine", "Pss", "RSS", "limit")
    for name, memory in found["memory"].items():
        values = (f"{memory[kind] / 2**20:,.0f}" for kind in ("proportional", "resident", "limit"))
        table.add_row(NAMES[name], *values)
    table.caption = "RSS counts a page shared by two processes twice. limit: 1.05 x state + 64 MiB"
    return table


def _steps(found: dict[str, Any]) -> Table:
    table = _table(
        "Small steps beside a save, against steps without one",
        "engine, torch threads", "median", "p99", "idle", "quiet step, ms", "steps beside",
    )  # fmt: skip
    for key, steps in found["steps"].items():
        name, _, threads = key.partition(",")
        ratios = (f"{steps[kind]:.2f}" for kind in ("median", "p99", "idle"))
        table.add_row(NAMES[name] + "," + threads, *ratios, _milliseconds(steps["quiet"]), str(steps["count"]))
    table.caption = "idle: steps with the engine there and no save, against steps before it existed"
    return table
