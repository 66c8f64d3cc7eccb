"""Loading a checkpoint into an existing model and optimizer, with and without the page cache's help."""

from __future__ import annotations

import time

from ..engines import create
from ..machine import Disk, Others, drop_cache, files_of, sync_tree
from ..visits import Say
from .common import Bench, Sample, Setting, rounds, settle


def measure(bench: Bench) -> list[Sample]:
    """A visit to every engine each round."""
    return [{"round": number, **bench.visit(visit, engine)} for number, engine in rounds(bench, bench.engines)]


def visit(say: Say, setting: Setting, name: str, directory: str) -> Sample:
    """One save; then it is loaded again and again: warm, cold, and the raw disk read beside it."""
    options, state = setting.options, setting.spec.build()
    disk = Disk(directory, state.nbytes)
    disk.write(keep=True)
    engine = create(name, directory, state)
    handle = engine.save(0)
    handle.barrier()
    handle.wait()
    sync_tree(engine.path(0))
    samples = []
    for number in range(options.warm_up + options.saves):
        settle(options.patience)
        others = Others()
        for path in files_of(engine.path(0)):
            _read(path)
        warm = _seconds(engine.load)
        drop_cache(files_of(engine.path(0)))
        cold = _seconds(engine.load)
        raw = disk.read()
        if number >= options.warm_up:
            samples.append({"warm": warm, "cold": cold, "raw": raw, "others": others.share()})
    engine.remove(0)
    engine.close()
    return {"bytes": state.nbytes, "direct": disk.direct, "loads": samples}


def _seconds(load: object) -> float:
    begun = time.perf_counter()
    load(0)  # type: ignore[operator]
    return time.perf_counter() - begun


def _read(path: str) -> None:
    """Have the page cache hold all of it."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
