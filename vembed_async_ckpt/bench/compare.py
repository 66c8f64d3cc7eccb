"""Two results held against each other, and one held against what it takes to be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import figures, words
from .catalog import title_of
from .figures import FACTOR, QUESTIONS, Quantity
from .samples import BUSY

LEAST = 1e-3  # seconds: visits that differ by less are steady enough


@dataclass(frozen=True)
class Difference:
    """One quantity of one engine, before and after. `verdict`: better, worse, or no difference beyond the noise."""

    engine: str
    question: str
    before: Quantity
    after: Quantity

    @property
    def verdict(self) -> str:
        if self.after.above(self.before):
            return "worse"
        return "better" if self.before.above(self.after) else "no difference"

    @property
    def change(self) -> float:
        """0.3 is 30 % more than before; infinite where there was nothing before."""
        before = self.before.median
        return self.after.median / before - 1 if before > 0 else float("inf")

    def __str__(self) -> str:
        write = words.milliseconds if self.question in ("blocked", "lost") else words.seconds
        unit = "ms" if self.question in ("blocked", "lost") else "s"
        change = "" if self.verdict == "no difference" or self.change == float("inf") else f" ({self.change:+.0%})"
        values = f"{write(self.before.median)} -> {write(self.after.median)} {unit}"
        return f"{title_of(self.engine)} {QUESTIONS[self.question]} {values}{change}"


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Difference]:
    """Every quantity that both results have, the worse ones first."""
    old, new = figures.of(before).engines, figures.of(after).engines
    found = [
        Difference(name, question, old[name][question], new[name][question])
        for name in old
        if name in new
        for question in QUESTIONS
        if question in old[name] and question in new[name]
    ]
    return sorted(found, key=lambda difference: ("worse", "better", "no difference").index(difference.verdict))


def unlike(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What makes the two results hard to compare: another state, another machine, one that was busy."""
    found = []
    states = [
        f"{words.size(r['state']['bytes'])} in {words.amount(r['state']['tensors'], 'tensor')}" for r in (before, after)
    ]
    if states[0] != states[1]:
        found.append(f"They did not save the same: {states[0]}, and {states[1]}.")
    machines = [
        f"{r['machine']['cpus']} x {r['machine']['cpu']}, {r['machine']['gpu'] or 'no GPU'}" for r in (before, after)
    ]
    if machines[0] != machines[1]:
        found.append(f"They ran on different machines: {machines[0]}, and {machines[1]}.")
    shares = [figures.of(result).others for result in (before, after)]
    if max(shares) >= BUSY:
        said = " and ".join(f"{share:.0%}" for share in shares)
        found.append(f"The machine was not quiet: other programs used {said} of it. Differences may be theirs.")
    return found


def doubts(result: dict[str, Any]) -> list[str]:
    """Why a result should not be trusted; nothing if it can be."""
    measured = figures.of(result)
    found = [f"{title_of(name)} failed: {error}." for name, error in measured.errors.items()]
    if not measured.engines:
        return [*found, "Nothing was measured."]
    if not result["complete"]:
        found.append("The run was ended before everything was measured.")
    if measured.others >= BUSY:
        found.append(f"Other programs used {measured.others:.0%} of the machine; less than {BUSY:.0%} is quiet.")
    if measured.used < 2:
        found.append("Each engine was visited once; two visits are needed to see the noise.")
    for name, engine in measured.engines.items():
        for question, said in QUESTIONS.items():
            if question in engine:
                low, high = min(engine[question].of_visits), max(engine[question].of_visits)
                if high > FACTOR * low and high - low > LEAST:
                    values = f"{words.milliseconds(low)} to {words.milliseconds(high)} ms"
                    found.append(f"{title_of(name)} {said} {values}, from visit to visit.")
    return found
