"""From the call to a checkpoint that survives a power cut, against the raw disk in the same minute."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

from ..engine import create
from ..machine import Disk, Others
from ..visits import Say
from .common import Bench, Sample, Setting, rounds, settle
from .finish import save_alone


def measure(bench: Bench) -> Iterator[Sample]:
    """A visit to every engine each round."""
    for number, engine in rounds(bench, bench.engines):
        yield {"round": number, **bench.visit(visit, engine)}


def visit(say: Say, setting: Setting, name: str, directory: str) -> Sample:
    """Saves with nothing beside them and as many raw writes of as many bytes, in random order within each pair."""
    options, state = setting.options, setting.spec.build()
    disk = Disk(directory, state.nbytes)
    engine = create(name, os.path.join(directory, "engine"), state)
    state.step()
    samples = []
    for number in range(options.warm_up + options.saves):
        settle(options.patience, state)
        others = Others()
        raw_first = random.random() < 0.5
        raw = disk.write() if raw_first else 0.0
        sample = save_alone(engine, number)
        engine.remove(number)
        raw = raw or disk.write()
        if number >= options.warm_up:
            samples.append({**sample, "raw": raw, "others": others.share()})
    engine.close()
    return {"bytes": state.nbytes, "direct": disk.direct, "saves": samples}
