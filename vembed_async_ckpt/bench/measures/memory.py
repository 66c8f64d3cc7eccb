"""Memory at the peak, beyond the same training."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from ..engine import create
from ..machine import peak_resident, reset_peaks
from ..visits import Say
from .common import Bench, Sample, Setting, between_steps, rounds, small_steps, steady
from .stall import steps_beside


def measure(bench: Bench) -> Iterator[Sample]:
    """A visit to every engine each round; the parent looks at the process tree every hundredth of a second."""
    for number, engine in rounds(bench, bench.engines):
        yield {"round": number, **bench.visit(visit, engine)}


def visit(say: Say, setting: Setting, name: str, directory: str) -> Sample:
    """Training alone, then the engine prepared and three saves beside the same training."""
    state = setting.spec.build()
    training = small_steps(state, setting)
    resident, device = {}, {}

    def phase(what: str) -> None:
        reset_peaks(os.getpid())
        if state.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        say(what)

    def end(what: str) -> None:
        say(None)
        resident[what] = peak_resident(os.getpid())
        device[what] = torch.cuda.max_memory_allocated() if state.device.type == "cuda" else 0

    steady(setting.options, training, between_steps(state, training))
    phase("training")
    state.drift()
    steady(setting.options, training, between_steps(state, training))
    end("training")
    phase("saving")
    engine = create(name, directory, state)
    state.step()
    for number in range(3):
        state.drift()
        steps_beside(engine, number, training)
    end("saving")
    engine.close()
    return {"bytes": state.nbytes, "resident": resident, "gpu": device}
