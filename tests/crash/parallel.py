"""A sweep in this process takes one processor; shared out among forked ones it takes all."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Work = Callable[[Path, Iterable[int]], Iterable[T]]


def shared(work: Work[T], directory: Path) -> Iterator[T]:
    """What `work(place, numbers)` yields, which goes from number to number until there is nothing left to try.

    The numbers are 1, 2 and so on, dealt out to one process for each processor, forked so that it has all that this one has;
    `place` is a directory of its own.
    """
    forked = multiprocessing.get_context("fork")
    parts = len(os.sched_getaffinity(0))
    running = []
    for part in range(parts):
        place = directory / f"part-{part}"
        place.mkdir()
        ours, theirs = forked.Pipe(duplex=False)
        process = forked.Process(
            target=_work, args=(theirs, work, place, itertools.count(1 + part, parts)), daemon=True
        )
        process.start()
        theirs.close()
        running.append((process, ours))
    for process, ours in running:
        found, error = ours.recv()
        process.join()
        ours.close()
        assert not error, error
        yield from found


def _work(answer: Connection, work: Work[T], place: Path, numbers: Iterable[int]) -> None:
    try:
        answer.send((list(work(place, numbers)), ""))
    except BaseException:
        answer.send(([], traceback.format_exc()))
