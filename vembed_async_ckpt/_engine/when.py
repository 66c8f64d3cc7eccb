"""Evaluates the policy of a checkpointer: computes the answer of `should_save()`."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ..events import Reporter, logger
from ..policies import Rule, SavePolicy
from . import patience
from .agreement import SAVE, Agreement
from .figures import NEIGHBOURS, Figures
from .steps import StepClock


class Decider:
    """Answers `should_save()` for one checkpointer. Implements `policies.Run`. Only the training thread may call it.

    With several ranks, all get the same answer (see `SavePolicy.decided`).
    """

    def __init__(self, policy: SavePolicy, root: str, reporter: Reporter, agreement: Agreement | None = None) -> None:
        """`agreement`: of this rank with the others; None for a single rank, or if the policy needs none."""
        self.root = root
        self.before: int | None = None
        self.step = -1
        self.now = self.saved_at = time.perf_counter()
        self.metrics: Mapping[str, float] | None = None
        self._agreement = agreement
        self._rules: list[Rule] = []  # all that this rank asks
        self._deciding: list[Rule] = []  # those of them that decide here and now
        self._asking: list[Rule] = []  # those of them by which it asks all ranks to save
        self._answering: list[Rule] = []  # those by which the first rank answers for all
        self._awaited = False  # on another rank: it waits for such an answer
        self._clock: StepClock | None = None
        self._figures = Figures()
        self._saves = 0
        self._due = False
        own = [part for part in policy.parts() if self._is_asked_here(part)]
        if any(part.measures for part in own):
            reporter.add_sink(self._figures)
        try:
            for part in own:
                self._start(part)
        except BaseException:
            self.close()
            raise

    def _is_asked_here(self, part: SavePolicy) -> bool:
        if self._agreement is None or self._agreement.rank == 0:
            return True
        self._awaited |= part.decided == "metrics"
        return part.decided in ("everywhere", "any")

    def _start(self, part: SavePolicy) -> None:
        rule = part.start(self.root)
        self._rules.append(rule)
        if self._agreement is not None and part.decided in ("first", "any"):
            self._asking.append(rule)
        elif self._agreement is not None and part.decided == "metrics":
            self._answering.append(rule)
        else:
            self._deciding.append(rule)

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
        for rule in self._deciding:
            if rule.due(self):
                self._due = True
        if self._agreement is not None:
            self._due |= self._with_the_others(self._agreement)
        return self._due

    def _with_the_others(self, agreement: Agreement) -> bool:
        """Return what the ranks agreed for this step. Ask them for a save if one is due here."""
        gate, step = agreement.gates[SAVE], self.step
        gate.position = step  # first this, then look whether the gate is closed
        if not gate.closed and SAVE not in agreement.asking and not self._due:
            for rule in self._asking:
                if rule.due(self):
                    agreement.ask(SAVE)
                    break
        due = False
        if gate.closed:
            if not gate.wait(2 * patience.AGREE):
                logger.warning("step %d: the ranks did not agree in time whether to save; this one does not", step)
                gate.decide(None)
            due = gate.reached(step)
            gate.take(step)
            if due and agreement.rank:  # a request is answered, even if only the first rank calls save()
                for rule in self._asking:
                    rule.saved(step, None)
        if self.metrics is None:
            return due
        if self._answering:
            best = any(rule.due(self) for rule in self._answering)
            agreement.answer(step, best)
            return due or best
        return (self._awaited and agreement.answer_of_first_rank(step, 2 * patience.AGREE)) or due

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
