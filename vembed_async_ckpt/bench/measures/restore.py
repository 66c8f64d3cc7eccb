"""Loading a checkpoint into an existing model and optimizer, with and without the page cache's help."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from ..engine import Engine, create
from ..machine import Disk, Others, drop_cache, files_of, sync_tree
from ..visits import Say
from .common import Bench, Sample, Setting, rounds, settle


def measure(bench: Bench) -> Iterator[Sample]:
    """A visit to every engine each round."""
    for number, engine in rounds(bench, bench.engines):
        yield {"round": number, **bench.visit(visit, engine)}


def visit(say: Say, setting: Setting, name: str, directory: str) -> Sample:
    """One save; then it is loaded again and again: warm, cold, and the raw disk read beside it."""
    options, state = setting.options, setting.spec.build()
    disk = Disk(directory, state.nbytes)
    disk.write(keep=True)
    engine = create(name, os.path.join(directory, "engine"), state)
    handle = engine.save(0)
    handle.barrier()
    handle.wait()
    sync_tree(engine.path(0))
    samples = []
    for number in range(options.warm_up + options.saves):
        settle(options.patience)
        others = Others()
        loads = load_back(engine, 0)
        raw = disk.read()
        if number >= options.warm_up:
            samples.append({**loads, "raw": raw, "others": others.share()})
    engine.remove(0)
    engine.close()
    return {"bytes": state.nbytes, "direct": disk.direct, "loads": samples}


def load_back(engine: Engine, number: int) -> Sample:
    """Seconds to load a checkpoint that has been synced: with its files in the page cache, and with none of them there."""
    files = files_of(engine.path(number))
    for path in files:
        _read(path)
    warm = _seconds(engine, number)
    drop_cache(files)
    return {"warm": warm, "cold": _seconds(engine, number)}


def _seconds(engine: Engine, number: int) -> float:
    begun = time.perf_counter()
    engine.load(number)
    return time.perf_counter() - begun


def _read(path: str) -> None:
    """Have the page cache hold all of it."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
