"""Tables of a result, each with what its columns mean below it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .catalog import ENGINES, title_of
from .summary import of as summary_of

Sample = dict[str, Any]
Noted = tuple[Table, str]  # and what its columns mean


def show(result: Sample, console: Console) -> None:
    """Print what was measured on what, a table for each measure, and what each engine leaves out."""
    machine, state = result["machine"], result["state"]
    shape = "" if state["model"] == "synthetic" else f"{state['model']}, "
    console.print(
        f"{machine['date']}  {machine['cpus']} x {machine['cpu']}, {machine['gpu'] or 'no GPU'}, Linux {machine['kernel']}, "
        f"{machine['file_system']}; load {machine['load']:.2f} at the start\n"
        f"state: {shape}{_binary(state['bytes'])} in {state['tensors']:,} tensors, weights and AdamW; "
        f"{result['options']['saves']} saves in each visit\n"
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version),
        highlight=False,
    )
    for measure, summary in summary_of(result).items():
        for table, note in TABLES[measure](summary):
            console.print()
            console.print(table)
            console.print(note, style="dim", highlight=False)
        if "used" in summary:
            console.print(
                f"{summary['used']} of {summary['rounds']} rounds are used; other people's processes had "
                f"{summary['others']:.0%} of the CPUs in them",
                highlight=False,
            )
        for engine, error in summary["errors"].items():
            console.print(f"[red]failed:[/] {engine}: {error}", highlight=False)
    lacking = [(listed["title"], listed["lacks"]) for listed in result["engines"].values()]
    console.print(_lacks([(title, lacks) for title, lacks in lacking if lacks]))
    missing = [listed for listed in result["engines"].values() if not listed["installed"]]
    for listed in missing:
        console.print(f"not installed: {listed['title']} (pip install {listed['pip']})", highlight=False)
    if not result["complete"]:
        console.print("[yellow]The run was ended before everything was measured.[/]")


def list_engines() -> None:
    """Print every engine there is."""
    Console(soft_wrap=True).print(engines())


def engines() -> Table:
    """Every engine there is."""
    table = _table("Engines", "name", left=("installed", "configured", "leaves out"))
    for listed in ENGINES.values():
        state = "yes" if listed.installed else f"pip install {listed.pip}"
        table.add_row(listed.name, state, listed.configuration, listed.lacks)
    return table


def _lacks(rows: list[tuple[str, str]]) -> Table:
    table = _table("What a checkpoint lacks when its engine calls it written", "engine", left=("lacks",))
    for row in rows:
        table.add_row(*row)
    return table


def _table(title: str, first: str, *columns: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for column in left:
        table.add_column(column, overflow="fold")
    return table


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    value = seconds * 1e3
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _ratio(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:,.2f}"


def _share(value: float) -> str:
    return f"{value:.0%}"


def _binary(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _count(value: int) -> str:
    return f"{value:,}"


def _in_order(summary: Sample, key: str) -> list[tuple[str, Sample]]:
    return sorted(summary["engines"].items(), key=lambda item: item[1][key])


def _cost(summary: Sample) -> list[Noted]:
    table = _table(
        "Cost: every quantity, its median, its range, and the median of each visit",
        "engine",
        *("quantity", "median", "least", "most", "visits"),
    )
    for name, entry in summary["engines"].items():
        for key, quantity in entry.items():
            write = _binary if key.endswith("_bytes") else _precisely
            values = (write(quantity[each]) for each in ("median", "low", "high"))
            visits = ", ".join(write(value) for value in quantity["of_visits"])
            table.add_row(title_of(name), key.rpartition("_")[0], *values, visits)
    return [(table, _COST)]


def _precisely(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if abs(seconds) < 1 else f"{seconds:,.3f} s"


_COST = """\
first, blocked: save() and the wait before optimizer.step(), of the first save and of later ones. lost: what the training takes
longer for one save until it is durable. beside: from the call to durable beside small steps; durable: with nothing beside it.
loaded, cold: loading with the files in the page cache, and without. written: bytes of one save on disk.
floor: lost beside a raw write."""


def _stall(summary: Sample) -> list[Noted]:
    blocked = _table(
        "Stall: what a save takes from the training loop, ms",
        "engine",
        *("blocked", "p99", "save()", "at step", "x ours", "work x", "copy ceiling", "durable, s"),
    )
    for name, entry in _in_order(summary, "blocked"):
        blocked.add_row(
            title_of(name),
            *(milliseconds(entry[key]) for key in ("blocked", "blocked_p99", "save", "step")),
            _ratio(entry["times_ours"]),
            _ratio(entry["work_ratio"]),
            _share(entry["of_copy_ceiling"]),
            _seconds(entry["durable"]),
        )
    steps = _table(
        "What a save costs the steps, and what the idle engine does",
        "engine",
        *("threads", "lost, ms", "floor, ms", "inflation", "p99", "idle", "idle p99", "quiet step, ms", "steps"),
    )
    for name, entry in _in_order(summary, "blocked"):
        for part in entry["steps"]:
            steps.add_row(
                title_of(name),
                str(part["threads"]),
                milliseconds(part["lost"]),
                milliseconds(part["floor"]),
                *(_ratio(part[key]) for key in ("inflation", "inflation_p99", "idle", "idle_p99")),
                milliseconds(part["quiet"]),
                str(part["count"]),
            )
    return [(blocked, _BLOCKED), (steps, _STEPS)]


_BLOCKED = """\
blocked: save() and the wait before optimizer.step(), median. x ours: times what ours takes. work x: forward and backward
beside the save, to the same without. copy ceiling: the fastest copy of this state to warm memory, of blocked; above 100 %
the copy goes on behind the loop's back. durable: from the call to fsynced, beside training."""
_STEPS = """\
lost: what the training takes longer for one save, from the call until the checkpoint is durable (what an engine leaves
unsynced is synced by a thread meanwhile), median. floor: the same beside a raw write of as many bytes. inflation: the steps
meanwhile, to steps without a save in the same process, median; p99: the same of 99th percentiles. idle: steps with the engine
there and no save, to steps without it. threads: of torch; with 1 a core is spare if there are two."""


def _durable(summary: Sample) -> list[Noted]:
    direct = all(entry["direct"] for entry in summary["engines"].values())
    table = _table(
        "Durable: from the call to a checkpoint that survives a power cut, s",
        "engine",
        *("durable", "p99", "written", "x ours", "of the disk", "GB/s", "on disk"),
    )
    for name, entry in _in_order(summary, "durable"):
        table.add_row(
            title_of(name),
            *(_seconds(entry[key]) for key in ("durable", "durable_p99", "written")),
            _ratio(entry["times_ours"]),
            _share(entry["of_ceiling"]),
            f"{entry['throughput'] / 1e9:.2f}",
            decimal(round(entry["bytes_on_disk"])),
        )
    return [(table, _DURABLE + ("O_DIRECT, 4 x 16 MiB in flight)." if direct else "no O_DIRECT here: page cache)."))]


_DURABLE = """\
written: when the engine says that it is there. durable: with the fsync of what it leaves unsynced. GB/s: of state. Nothing
trains meanwhile. of the disk: seconds of a raw write and fsync of as many bytes beside it, of durable ("""


def _memory(summary: Sample) -> list[Noted]:
    gpu = any(entry["gpu"] for entry in summary["engines"].values())
    table = _table(
        "Memory at the peak, beyond the same training's, MiB",
        "engine",
        *("host", "x state", "RSS", *(("GPU",) if gpu else ()), "limit"),
    )
    for name, entry in _in_order(summary, "proportional"):
        sizes = [entry["resident"], *([entry["gpu"]] if gpu else []), entry["allowed"]]
        table.add_row(
            title_of(name),
            f"{entry['proportional'] / 2**20:,.0f}",
            _ratio(entry["of_state"]),
            *(f"{size / 2**20:,.0f}" for size in sizes),
        )
    return [(table, _MEMORY)]


_MEMORY = """\
host: of the process tree, a page shared by several counted once (Pss, sampled); the page cache is not in it. RSS: the
kernel's peaks, a shared page in every process. limit: what this project allows itself, 1.05 x state + 64 MiB."""


def _scaling(summary: Sample) -> list[Noted]:
    tables: list[Noted] = []
    for kind, heading, first in (
        ("size", "Blocked time by size of the state, ms (median / p99)", _binary),
        ("tensors", "Blocked time by number of tensors, ms (median / p99)", _count),
    ):
        points = {
            name: {p[0]: f"{milliseconds(p[1])} / {milliseconds(p[2])}" for p in curve}
            for name, curve in summary[kind].items()
        }
        tables += _grid(heading, points, first, _BLOCKED_BRIEFLY)
    points = {name: {p[0]: _ratio(p[1]) for p in curve} for name, curve in summary["interval"].items()}
    heading = "Whole training time by save interval, to the same training without saves"
    return tables + _grid(heading, points, lambda value: f"every {value}", _INTERVALS)


_BLOCKED_BRIEFLY = "blocked: save() and the wait before optimizer.step()."
_INTERVALS = """\
1.05: the training takes 5 % longer with a save every so many steps. A save waits for the one before; the removal of old
checkpoints, and the fsync that an engine leaves out, are not counted."""


def _grid(heading: str, points: dict[str, dict[int, str]], first: Callable[[int], str], note: str) -> list[Noted]:
    """A row for each engine, a column for each value."""
    values = sorted({value for found in points.values() for value in found})
    if not values:
        return []
    table = _table(heading, "engine", *map(first, values))
    for name, found in points.items():
        table.add_row(title_of(name), *(found.get(value, "") for value in values))
    return [(table, note)]


def _restore(summary: Sample) -> list[Noted]:
    table = _table(
        "Restore: into an existing model and optimizer, s",
        "engine",
        *("warm", "p99", "x ours", "cold", "p99", "of the disk"),
    )
    for name, entry in _in_order(summary, "warm"):
        table.add_row(
            title_of(name),
            *(_seconds(entry[key]) for key in ("warm", "warm_p99")),
            _ratio(entry["times_ours"]),
            *(_seconds(entry[key]) for key in ("cold", "cold_p99")),
            _share(entry["of_ceiling"]),
        )
    return [(table, _RESTORE)]


_RESTORE = """\
warm: the page cache holds the files. cold: it was dropped before. of the disk: seconds of a raw read of as many bytes beside
it (4 x 16 MiB in flight), of cold. Ours checks sizes, not hashes, as `load` does unless told otherwise."""


TABLES = {
    "cost": _cost,
    "stall": _stall,
    "durable": _durable,
    "memory": _memory,
    "scaling": _scaling,
    "restore": _restore,
}
