"""What a result says, in plain sentences and one table. Every word of comparison is computed from the figures and their noise.

Better peers are named first. "Longer", "more" and "later" are said only where the difference is larger than the noise
(`figures`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..ettr import Advice
from . import figures, words
from .advice import Assumptions, advice_for, lost_per_save
from .catalog import title_of
from .figures import FACTOR, Measured
from .options import DISK
from .samples import BUSY
from .workloads import WORKLOADS

Format = Callable[[float], str]
NAMED = 5  # peers that a sentence names one by one


@dataclass(frozen=True)
class Answers:
    """`heading`: what was measured on what. `sentences`. `columns`: the lines of each column's head. `rows`: a title and a
    cell for each column. `notes`: what did not go as it should."""

    heading: list[str]
    sentences: list[str]
    columns: list[tuple[str, str, str]]
    rows: list[tuple[str, list[str]]]
    notes: list[str]
    measured: Measured
    advice: dict[str, Advice]
    given: Assumptions


def answer(result: dict[str, Any], given: Assumptions) -> Answers:
    """Everything that is said about a result."""
    measured = figures.of(result)
    engines = measured.engines
    found = {name: advice_for(each, given) for name, each in engines.items()}
    advice = {name: each for name, each in found.items() if each is not None}
    saying = _Saying(measured, advice, given)
    return Answers(
        heading(result),
        [sentence for sentence in saying.sentences(result) if sentence],
        [column.head for column in COLUMNS if column.shown(measured, advice)],
        [
            (
                title_of(name),
                [column.cell(measured, advice, name) for column in COLUMNS if column.shown(measured, advice)],
            )
            for name in engines
        ],
        notes(result, measured),
        measured,
        advice,
        given,
    )


def heading(result: dict[str, Any]) -> list[str]:
    """State, machine and extent."""
    state, machine, options = result["state"], result["machine"], result["options"]
    saved = f"{words.size(state['bytes'])} in {words.amount(state['tensors'], 'tensor')}"
    kind = state["model"]
    if kind in WORKLOADS:
        saved += f" (sizes of {WORKLOADS[kind].title} at {options['scale']}; --model for yours)"
    else:
        saved += " (made up; --model for yours)" if kind == "synthetic" else f" ({kind})"
    place = f"{words.amount(machine['cpus'], 'CPU')}, {machine['gpu'] or 'no GPU'}, {machine['file_system']}"
    seconds = sum(measure["seconds"] for measure in result["measures"].values())
    count = words.amount(
        len({s["engine"] for m in result["measures"].values() for s in m["samples"]} - {DISK}), "engine"
    )
    spent = f"{count}, {words.amount(options['saves'], 'save')} a visit, {words.duration(seconds)} of measuring"
    return [f"{saved}, {place}", f"{spent}, {machine['date'][:10]}"]


def notes(result: dict[str, Any], measured: Measured) -> list[str]:
    """Failures, engines without a visit, and a run that was ended."""
    found = [f"{title_of(name)} failed: {error}" for name, error in measured.errors.items()]
    absent = [listed for listed in result["engines"].values() if not listed["installed"]]
    found += [f"{listed['title']} is not installed: pip install {listed['pip']}" for listed in absent]
    if result.get("left_out"):
        found.append(f"No time was left for {words.listing([title_of(name) for name in result['left_out']])}.")
    if not result["complete"]:
        found.append("The run was ended before everything was measured.")
    return found


# -- sentences


class _Saying:
    def __init__(self, measured: Measured, advice: dict[str, Advice], given: Assumptions) -> None:
        self.measured, self.advice, self.given = measured, advice, given
        self.engines = measured.engines
        self.reference = "ours" if "ours" in self.engines else next(iter(self.engines), "")
        self.title = title_of(self.reference)

    def sentences(self, result: dict[str, Any]) -> list[str]:
        if not self.engines:
            return ["Nothing was measured."]
        return [
            self.stops(),
            self.costs(),
            self.safe(),
            self.loads(),
            self.first(),
            self.interval(),
            self.loses(),
            self.now(),
            self.overhead(),
            self.money(),
            self.noise(result),
            self.quiet(),
        ]

    def stops(self) -> str:
        return self._ranked(
            "blocked",
            "ms",
            words.milliseconds,
            "{} stops your training for less: {}.",
            "{} stops your training for {}",
            "longer",
        )

    def costs(self) -> str:
        return self._ranked(
            "lost",
            "ms",
            words.milliseconds,
            "{} costs less training in all: {}.",
            "Until it is on the disk, a save with {} costs {} of training in all",
            "more",
        )

    def safe(self) -> str:
        beside = self.engines[self.reference].median("beside")
        more = "" if beside is None else f", {words.seconds(beside)} s while it trains"
        said = self._ranked(
            "durable",
            "s",
            words.seconds,
            "{} is safe from a power cut sooner: after {}.",
            "With {} a checkpoint is safe from a power cut {} after the call" + more,
            "later",
        )
        disk = self.measured.disk
        raw = "" if not said or disk is None or "durable" not in disk else words.seconds(disk["durable"].median)
        return said + (f" The raw disk takes {raw} s for as many bytes." if raw else "")

    def loads(self) -> str:
        cold = self.engines[self.reference].median("cold")
        more = "" if cold is None else f", {words.seconds(cold)} s from a cold disk"
        return self._ranked(
            "loaded",
            "s",
            words.seconds,
            "{} is loaded back sooner: in {}.",
            "A checkpoint of {} is loaded back in {}" + more,
            "longer",
        )

    def _ranked(self, key: str, unit: str, write: Format, better: str, own: str, worse: str) -> str:
        """Who is better than the reference, the reference with its range, who is about the same, who is worse."""
        mine = self.engines[self.reference]
        if key not in mine:
            return ""
        peers = [each for name, each in self.engines.items() if name != self.reference and key in each]
        groups: dict[str, list[tuple[str, str]]] = {"better": [], "same": [], "worse": []}
        for peer in sorted(peers, key=lambda each: each[key].median):
            kind = "better" if mine[key].above(peer[key]) else "worse" if peer[key].above(mine[key]) else "same"
            groups[kind].append((title_of(peer.engine), f"{write(peer[key].median)} {unit}"))
        text = ""
        if groups["better"]:
            who, value = (words.listing(list(parts)) for parts in zip(*groups["better"], strict=True))
            text = better.format(who, value) + " "
            if len(groups["better"]) > 1:
                text = text.replace(" stops ", " stop ").replace(" costs ", " cost ").replace(" is ", " are ")
        low, high = write(mine[key].low), write(mine[key].high)
        value = f"{write(mine[key].median)} {unit}" + (f" ({low} to {high})" if low != high else "")
        text += own.format(self.title, value)
        if groups["same"]:
            text += f"; no clear difference: {_pairs(groups['same'])}"
        if groups["worse"]:
            text += f"; {worse}: {_pairs(groups['worse'])}"
        return text + "."

    def first(self) -> str:
        mine = self.engines[self.reference]
        if "first" not in mine:
            return ""
        return (
            f"The first save of a run stops training for {words.milliseconds(mine['first'].median)} ms; all other figures are of "
            "later ones."
        )

    def interval(self) -> str:
        if self.reference not in self.advice:
            return ""
        advice = self.advice[self.reference]
        crash = f"With a crash every {words.duration(advice.mtbf)} ({self.given.source})"
        return f"{crash} it is best to save every {words.duration(advice.interval)} with {self.title}."

    def loses(self) -> str:
        if self.reference not in self.advice:
            return ""
        mine = self.advice[self.reference]
        text = f"That loses {_lost(mine.hours_lost)} in 30 days to saving and to work done again"
        groups: dict[str, list[tuple[str, str]]] = {"less": [], "no clear difference": [], "more": []}
        for name, advice in self.advice.items():
            if name != self.reference:
                own, peer = self.engines[self.reference]["lost"], self.engines[name]["lost"]
                kind = "less" if own.above(peer) else "more" if peer.above(own) else "no clear difference"
                groups[kind].append((title_of(name), _lost(advice.hours_lost)))
        text += "".join(f"; {word}: {_pairs(group)}" for word, group in groups.items() if group)
        if len(self.advice) > 1:
            text += " (each at its own best interval)"
        return text + "."

    def now(self) -> str:
        lost = {name: advice.now_hours_lost or 0.0 for name, advice in self.advice.items()}
        if not lost:
            return ""
        low, high = min(lost.values()), max(lost.values())
        every = f"A save every {words.duration(self.given.interval)} (--interval) loses"
        if words.digits(low) == words.digits(high) or high < 1.05 * low:
            return f"{every} {_lost((low + high) / 2)}, whichever of these engines makes it."
        best, worst = min(lost, key=lambda name: lost[name]), max(lost, key=lambda name: lost[name])
        return f"{every} {_lost(low)} ({title_of(best)}) to {_lost(high)} ({title_of(worst)})."

    def overhead(self) -> str:
        lost = lost_per_save(self.engines[self.reference])
        if self.given.overhead is None or lost is None or self.reference not in self.advice:
            return ""
        least = max(lost / self.given.overhead, self.engines[self.reference].median("beside") or 0.0)
        share = f"{100 * self.given.overhead:.2g} % of the time (--overhead)"
        return f"If saving may cost {share}, {self.title} can save every {words.duration(least)}."

    def money(self) -> str:
        if self.given.price is None or self.reference not in self.advice:
            return ""
        dollars = self.advice[self.reference].hours_lost * self.given.gpus * self.given.price
        rate = f"{words.amount(self.given.gpus, 'GPU')} at {self.given.price:g} USD an hour"
        return f"On {rate} that is {dollars:,.0f} USD in 30 days."

    def noise(self, result: dict[str, Any]) -> str:
        saves = max((len(each["blocked"].samples) for each in self.engines.values() if "blocked" in each), default=0)
        extent = f" of {words.amount(saves, 'save')} an engine" if saves else ""
        return f"Differences under {FACTOR - 1:.0%} are noise in a run{extent}; a longer --budget has less of it."

    def quiet(self) -> str:
        others = self.measured.others
        if others < BUSY:
            return f"The machine was quiet: other programs used {others:.0%} of it."
        return (
            f"The machine was not quiet: other programs used {others:.0%} of it. Measure again before you publish this."
        )


def _pairs(pairs: list[tuple[str, str]]) -> str:
    """The first ones; the others by their number and the largest value."""
    said = [f"{who} {value}" for who, value in pairs[:NAMED]]
    if len(pairs) > NAMED:
        said.append(f"and {len(pairs) - NAMED} more up to {pairs[-1][1]}")
    return ", ".join(said)


def _lost(hours: float) -> str:
    return words.duration(hours * 3600)


# -- the table


@dataclass(frozen=True)
class Column:
    """`key`: of a quantity; else `of` the advice."""

    head: tuple[str, str, str]
    key: str = ""
    write: Format = words.digits
    scale: float = 1.0
    of: Callable[[Advice], str] | None = None

    def shown(self, measured: Measured, advice: dict[str, Advice]) -> bool:
        return bool(advice) if self.of is not None else any(self.key in each for each in measured.engines.values())

    def cell(self, measured: Measured, advice: dict[str, Advice], name: str) -> str:
        """The median and half of the range, with a star where no engine is better beyond the noise."""
        if self.of is not None:
            return self.of(advice[name]) if name in advice else ""
        engines = measured.engines
        if self.key not in engines[name]:
            return ""
        quantity = engines[name][self.key]
        text = self.write(quantity.median * self.scale)
        if self.key == "written":
            return text
        spread = self.write(quantity.spread * self.scale)
        beaten = any(quantity.above(each[self.key]) for each in engines.values() if self.key in each)
        return text + (f"±{spread}" if len(quantity.samples) > 1 else "") + ("" if beaten else "*")


def _every(advice: Advice) -> str:
    number, unit = words.duration(advice.interval).split()
    return f"{number} {({'second': 's', 'minute': 'min', 'hour': 'h', 'day': 'd'})[unit.removesuffix('s')]}"


COLUMNS = (
    Column(("stops", "training", "ms"), "blocked", words.digits, 1e3),
    Column(("costs", "in all", "ms"), "lost", words.digits, 1e3),
    Column(("safe", "after", "s"), "durable", words.seconds),
    Column(("on", "disk", "MiB"), "written", words.digits, 2.0**-20),
    Column(("loaded", "back", "s"), "loaded", words.seconds),
    Column(("best", "to save", "every"), of=_every),
    Column(("lost in", "30 days", "hours"), of=lambda advice: words.digits(advice.hours_lost)),
)
LEGEND = "Medians ± half of the range. * no engine is better, beyond the noise."
