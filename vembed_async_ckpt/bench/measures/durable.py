"""From the call to a checkpoint that survives a power cut, against the raw disk in the same minute."""

from __future__ import annotations

import random
import time

from ..engines import create
from ..machine import Disk, Others, bytes_on_disk, sync_tree
from ..visits import Say
from .common import Bench, Sample, Setting, rounds, settle


def measure(bench: Bench) -> list[Sample]:
    """A visit to every engine each round."""
    return [{"round": number, **bench.visit(visit, engine)} for number, engine in rounds(bench, bench.engines)]


def visit(say: Say, setting: Setting, name: str, directory: str) -> Sample:
    """Saves with nothing beside them and as many raw writes of as many bytes, in random order within each pair."""
    options, state = setting.options, setting.spec.build()
    disk = Disk(directory, state.nbytes)
    engine = create(name, directory, state)
    state.step()
    samples = []
    for number in range(options.warm_up + options.saves):
        settle(options.patience)
        others = Others()
        raw_first = random.random() < 0.5
        raw = disk.write() if raw_first else 0.0
        begun = time.perf_counter()
        handle = engine.save(number)
        returned = time.perf_counter()
        handle.wait()
        written = time.perf_counter()
        if not engine.syncs:
            sync_tree(engine.path(number))
        durable = time.perf_counter()
        size = bytes_on_disk(engine.path(number))
        engine.remove(number)
        raw = raw or disk.write()
        if number >= options.warm_up:
            samples.append(
                {
                    "save": returned - begun,
                    "written": written - begun,
                    "durable": durable - begun,
                    "raw": raw,
                    "bytes": size,
                    "others": others.share(),
                }
            )
    engine.close()
    return {"bytes": state.nbytes, "direct": disk.direct, "saves": samples}
