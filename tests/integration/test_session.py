"""Checkpointers that nobody closed: made twice for one directory, dropped, pickled by accident. Notebooks do all of it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, CheckpointerClosed, StallMeter, latest
from vembed_async_ckpt._engine.session import open_sessions
from vembed_async_ckpt.integrations.shared import close_shared, shared

BOUND = 20.0


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ours() -> list[str]:
    """What this process has for checkpointers: threads, writer processes, memory and locks."""
    # "Dummy" is what `threading` calls a thread that it did not start.
    threads = [t.name for t in threading.enumerate() if t.name.startswith(("vembed-ckpt", "Dummy"))]
    children = [str(child.pid) for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    files = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if "vembed_async_ckpt" in target:
            files.append(target)
    return [*threads, *children, *files]


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_the_cell_that_makes_it_runs_twice(root: Path, writer: Any) -> None:
    """The later one gets the directory, after a warning; the earlier one's saves are finished, and it says why it is closed."""
    model = torch.nn.Linear(8, 8)
    first = AsyncCheckpointer(root, writer=writer)
    handle = first.save(1, model=model)
    with pytest.warns(UserWarning, match="not closed") as caught:
        second = AsyncCheckpointer(root, writer=writer)
    assert caught[0].filename == __file__
    assert handle.done()
    assert second.save(2, model=model).result(BOUND).step == 2
    with pytest.raises(CheckpointerClosed, match="a later one was made"):
        first.save(3, model=model)
    first.close()
    assert second.save(4, model=model).result(BOUND).step == 4
    second.close()
    assert latest(root) == root / "checkpoint-4"


def test_one_that_an_integration_made_gives_way(root: Path) -> None:
    """And the integration makes a new one when it saves again."""
    model = torch.nn.Linear(8, 8)
    shared(str(root)).save(1, model=model)
    with pytest.warns(UserWarning, match="not closed"), AsyncCheckpointer(root) as checkpointer:
        checkpointer.save(2, model=model).result(BOUND)
    assert shared(str(root)).save(3, model=model).result(BOUND).step == 3
    close_shared()


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_one_that_is_dropped_ends(root: Path, writer: Any) -> None:
    """Its saves are finished, then threads, writer, memory and lock are gone; nobody waits for the interpreter's exit."""
    before = ours()
    checkpointer = AsyncCheckpointer(root, writer=writer)
    handle = checkpointer.save(1, model=torch.nn.Linear(500, 500))
    assert ours() != before
    del checkpointer
    assert handle.result(BOUND).step == 1
    until(lambda: ours() == before)
    assert open_sessions() == []


def test_one_that_is_dropped_in_a_cycle_ends(root: Path) -> None:
    """The garbage collector finds it."""
    before = ours()
    holder: list[Any] = [AsyncCheckpointer(root)]
    holder.append(holder)
    holder[0].save(1, model=torch.nn.Linear(8, 8))
    del holder
    gc.collect()
    until(lambda: ours() == before)
    assert latest(root) == root / "checkpoint-1"


def test_one_that_is_dropped_gives_way_without_a_word(root: Path) -> None:
    """`del checkpointer`, and the cell again at once."""
    checkpointer = AsyncCheckpointer(root)
    handle = checkpointer.save(1, model=torch.nn.Linear(500, 500))
    del checkpointer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with AsyncCheckpointer(root) as again:
            assert handle.result(0).step == 1
            again.save(2, model=torch.nn.Linear(8, 8)).result(BOUND)


LOST = """
import sys, torch
from vembed_async_ckpt import AsyncCheckpointer
open(sys.argv[1] + "/checkpoint-1", "w").close()
AsyncCheckpointer(sys.argv[1], writer="thread").save(1, model=torch.nn.Linear(2, 2))
"""


def test_what_a_dropped_one_could_not_save_is_told(tmp_path: Path) -> None:
    """Nobody has its handle: the failure is logged, printed at exit, and the exit code says it."""
    child = subprocess.run(
        [sys.executable, "-c", LOST, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == 120, child.stderr
    assert "vembed_async_ckpt: at exit: CommitError" in child.stderr or "at exit: WriteError" in child.stderr


def test_a_sweep_of_trials_leaves_nothing(tmp_path: Path) -> None:
    """One checkpointer for each trial, never closed."""
    model = torch.nn.Linear(300, 300)
    before = ours()
    for number in range(8):
        checkpointer = AsyncCheckpointer(tmp_path / str(number))
        checkpointer.save(1, model=model).result(BOUND)
    del checkpointer
    until(lambda: ours() == before)


def test_what_a_save_gives_back_is_data(root: Path) -> None:
    """It can be pickled, copied, turned into a dict and into JSON, and not be changed."""
    meter = StallMeter()
    with AsyncCheckpointer(root, sinks=[meter]) as checkpointer:
        info = checkpointer.save(1, model=torch.nn.Linear(2, 2)).result(BOUND)
    for value in (info, info.timings, meter.report()):
        for again in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
            assert again == value
            assert type(again) is type(value)
        json.dumps(dataclasses.asdict(value), default=str)
    files = copy.deepcopy(info).files
    assert dataclasses.asdict(info)["files"] == info.files == files
    for change in (
        lambda: files.update(a=1),
        lambda: files.__setitem__("a", 1),
        lambda: files.pop("a"),
        lambda: files.clear(),
        lambda: files.setdefault("a", 1),
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_lives_says_that_it_cannot_be_copied(
    root: Path, how: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """By its name, and what to do instead; it works as before."""
    caplog.set_level(logging.ERROR)
    with AsyncCheckpointer(root) as checkpointer:
        handle = checkpointer.save(1, model=torch.nn.Linear(2, 2))
        for value, name in ((checkpointer, "AsyncCheckpointer"), (handle, "SaveHandle")):
            with pytest.raises(TypeError, match=f"{name}.* cannot be pickled or copied"):
                how(value)
        assert handle.result(BOUND).step == 1
    assert caplog.records == []
