"""A training loop that is interrupted by signals at random moments; the handler saves, and sometimes waits, too.

    signals.py ROOT COUNT [--inside N] [--staging overlap|blocking] [--host plain|accelerate]

It sends COUNT signals, and more (20 times as many at most) until N of them have interrupted a call of `save()`. How many do depends
on the speed of the machine.

Every save notes a digest of the weights at its call, in the loop and in the handler. At the end each checkpoint is read back and
compared. Prints one JSON object: signals, how many of them interrupted a call of `save()`, saves of the loop and of the handler,
what was refused (none is expected), and what is missing or differs.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, load, verify

PATIENCE = 60.0  # seconds for any one wait


def digest(model: torch.nn.Module) -> str:
    """All weights, as one hash."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


class Run:
    def __init__(self, root: Path, count: int, inside: int, staging: str) -> None:
        self.root = root
        self.count = count
        self.least_inside = inside
        self.signals = self.inside = self.number = 0
        self.saved: dict[str, dict[int, str]] = {"loop": {}, "handler": {}}
        self.refused: collections.Counter[str] = collections.Counter()
        self.in_handler = False
        self.model = torch.nn.Sequential(*(torch.nn.Linear(24, 24) for _ in range(8)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.chance = random.Random(0)

    def save(self, step: int) -> Any:
        raise NotImplementedError

    def wait(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def one(self, who: str) -> Any:
        self.number += 1
        step, expected = self.number, digest(self.model)
        try:
            handle = self.save(step)
        except CheckpointError as error:
            self.refused[f"{who}: {type(error).__name__}: {error}"[:200]] += 1
            return None
        self.saved[who][step] = expected
        return handle

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 24)).square().sum().backward()
        self.optimizer.step()

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.in_handler:
            return
        self.in_handler = True
        try:
            self.signals += 1
            while frame is not None:
                if frame.f_code.co_name in ("save_as", "save_checkpoint", "save_state"):
                    self.inside += 1
                    break
                frame = frame.f_back
            handle = self.one("handler")
            what = self.chance.random()
            if what < 0.1 and handle is not None:
                handle.result(PATIENCE)
            elif what < 0.2:
                self.wait()
        finally:
            self.in_handler = False
            self.arm()

    def is_enough(self) -> bool:
        return self.signals >= self.count and (self.inside >= self.least_inside or self.signals >= 20 * self.count)

    def arm(self) -> None:
        if not self.is_enough():
            signal.setitimer(signal.ITIMER_REAL, self.chance.uniform(0.0002, 0.02))

    def run(self) -> dict[str, Any]:
        self.step()
        self.one("loop")
        signal.signal(signal.SIGALRM, self.on_signal)
        begun = time.monotonic()
        self.arm()
        while not self.is_enough():
            self.step()
            self.one("loop")
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.close()
        took = time.monotonic() - begun
        wrong = [f"{who} {step}" for who, saves in self.saved.items() for step in saves if not self.is_right(who, step)]
        return {
            "signals": self.signals,
            "inside_save": self.inside,
            "loop": len(self.saved["loop"]),
            "handler": len(self.saved["handler"]),
            "refused": dict(self.refused),
            "wrong": wrong,
            "seconds": round(took, 1),
        }

    def is_right(self, who: str, step: int) -> bool:
        path = self.root / f"checkpoint-{step}"
        if not path.exists():
            return False
        verify(path)
        twin = torch.nn.Sequential(*(torch.nn.Linear(24, 24) for _ in range(8)))
        load(path, model=twin)
        return digest(twin) == self.saved[who][step]


class Plain(Run):
    def __init__(self, root: Path, count: int, inside: int, staging: Any) -> None:
        super().__init__(root, count, inside, staging)
        self.checkpointer = AsyncCheckpointer(root, staging=staging)

    def save(self, step: int) -> Any:
        return self.checkpointer.save(step, model=self.model, optimizer=self.optimizer)

    def wait(self) -> None:
        self.checkpointer.wait(PATIENCE)

    def close(self) -> None:
        self.checkpointer.close(PATIENCE)


class Accelerated(Run):
    """The same with accelerate and `save_state`."""

    def __init__(self, root: Path, count: int, inside: int, staging: str) -> None:
        super().__init__(root, count, inside, staging)
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def save(self, step: int) -> Any:
        from vembed_async_ckpt.integrations.accelerate import save_state

        return save_state(self.accelerator, str(self.root / f"checkpoint-{step}"))

    def wait(self) -> None:
        from vembed_async_ckpt.integrations.shared import wait_for_all

        wait_for_all(os.path.realpath(self.root))

    def close(self) -> None:
        self.accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--inside", type=int, default=0)
    parser.add_argument("--staging", default="overlap")
    parser.add_argument("--host", default="plain", choices=["plain", "accelerate"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    kind = {"plain": Plain, "accelerate": Accelerated}[arguments.host]
    json.dump(kind(arguments.root, arguments.count, arguments.inside, arguments.staging).run(), sys.stdout)


if __name__ == "__main__":
    main()
