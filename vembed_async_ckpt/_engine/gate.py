"""A gate: the training thread's side of an agreement on a step (see `agreement`)."""

from __future__ import annotations

import math
import threading
import time


class Gate:
    """Where the training thread shows its step, and waits while the ranks agree.

    At the end of each step the training thread writes `position` and then reads `closed`. Whoever closes the gate sets
    `closed` and then reads `position`. So after `close()` has returned p, this thread does not get past a step above p
    without knowing what was agreed.
    """

    def __init__(self) -> None:
        self.position = -1  # the step that the training thread has shown last
        self.closed = False  # there is something to look at: a round under way, or an agreed step
        # Reentrant, because a signal handler may decide while its own thread looks.
        self._changed = threading.Condition()
        # guarded by _changed:
        self._round = 0  # number of the round under way, else 0
        # agreed steps that the training thread has not taken yet; replaced, never changed
        self._steps: frozenset[float] = frozenset()

    def close(self, number: int) -> int:
        """Begin round `number`. Return the position that holds back this thread from now on."""
        with self._changed:
            self._round = number
            self.closed = True
            return int(self.position)

    def decide(self, step: float | None) -> None:
        """End the round. The ranks agreed on `step`; None: on nothing that concerns this rank."""
        with self._changed:
            self._round = 0
            if step is not None:
                self._steps |= {step}
            self.closed = bool(self._steps)
            self._changed.notify_all()

    def decide_here(self) -> None:
        """Agree with nobody: this rank acts at its next step."""
        self.decide(-math.inf)

    def wait(self, timeout: float) -> bool:
        """Wait for the end of a round under way. Return False if it has not ended after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._round:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def reached(self, step: int) -> bool:
        """Return whether `step` is at or past a step that was agreed on."""
        return any(agreed <= step for agreed in self._steps)

    def take(self, step: int) -> None:
        """Forget the agreed steps up to `step`."""
        with self._changed:
            self._steps = frozenset(agreed for agreed in self._steps if agreed > step)
            self.closed = bool(self._steps or self._round)
