"""A step compiled as a whole still passes through the hook, and its tensors are copied late."""

from __future__ import annotations

from typing import Any

import torch

from .common import Say, Setting, State, change
from .correctness import rounds


def run(setting: Setting, say: Say) -> None:
    steps: dict[int, Any] = {}

    def after(state: State, number: int) -> None:
        if id(state[1]) not in steps:
            steps[id(state[1])] = torch.compile(state[1].step, backend="eager" if setting.tiny else "inductor")
        change(state, number, steps[id(state[1])])

    found = rounds(setting, "foreach", after=after)
    say(**found)
