"""Evaluates the policy of a checkpointer: computes the answer of `should_save()`."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ..events import Reporter
from ..policies import SavePolicy
from .figures import NEIGHBOURS, Figures
from .steps import StepClock


def refuse_for_ranks(policy: SavePolicy | None, world_size: int) -> None:
    """Raise ValueError if ranks could get different answers from the policy.

    Then one rank would save and wait in vain for the others.
    """
    wrong = [] if policy is None or world_size == 1 else [part for part in policy.parts() if not part.agreed]
    if wrong:
        raise ValueError(
            f"policy {wrong[0]!r} may say one thing on one rank and another on the next, and all {world_size} ranks must save "
            "or none; use every(steps=...), or decide on one rank and broadcast the decision"
        )


class Decider:
    """Answers `should_save()` for one checkpointer. Implements `policies.Run`. Only the training thread may call it."""

    def __init__(self, policy: SavePolicy, root: str, reporter: Reporter) -> None:
        self.root = root
        self.before: int | None = None
        self.step = -1
        self.now = self.saved_at = time.perf_counter()
        self.metrics: Mapping[str, float] | None = None
        self._rules = []
        self._clock: StepClock | None = None
        self._figures = Figures()
        self._saves = 0
        self._due = False
        if any(part.measures for part in policy.parts()):
            reporter.add_sink(self._figures)
        try:
            for part in policy.parts():
                self._rules.append(part.start(root))
        except BaseException:
            self.close()
            raise

    @property
    def measured(self) -> bool:
        figures = self._figures
        return figures.measured >= self._saves and figures.steps >= NEIGHBOURS

    @property
    def cost(self) -> float | None:
        return self._figures.cost

    @property
    def durable(self) -> float:
        return self._figures.durable

    @property
    def step_seconds(self) -> float:
        return self._figures.step_seconds

    def time_steps_with(self, clock: StepClock | None) -> None:
        """Tell `clock` about each step."""
        self._clock = clock

    def ask(self, step: int, metrics: Mapping[str, float] | None) -> bool:
        """Return whether to save at `step`.

        Asking again for the same step gives the same answer, unless `metrics` are passed.
        """
        if step != self.step:
            self.before = None if self.step < 0 else self.step
            self.step = step
            self.now = now = time.perf_counter()
            if self._clock is not None:
                self._clock.tick(step, now)
        elif metrics is None:
            return self._due
        else:
            self.now = time.perf_counter()
        self.metrics = metrics
        self._due = False
        for rule in self._rules:
            if rule.due(self):
                self._due = True
        return self._due

    def saved(self, step: int | None, metrics: Mapping[str, float] | None, begun: float) -> None:
        """Note that a save began at `begun` (time.perf_counter())."""
        self.saved_at = begun
        self._saves += 1
        if metrics is None and step == self.step:
            metrics = self.metrics
        for rule in self._rules:
            rule.saved(step, metrics)

    def close(self) -> None:
        """Stop the rules. They give up their signal handlers and threads."""
        for rule in self._rules:
            rule.close()
