"""Hundreds of saves leave nothing: descriptors, threads, processes, mappings and memory of trainer and writer are flat."""

from __future__ import annotations

import gc
import operator
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, KeepLast, PlanError, load

BOUND = 30


def mapped_arenas(process: psutil.Process) -> int:
    """Mappings of our memory in a process."""
    return sum("memfd:vembed_async_ckpt" in line for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines())


def descriptors(process: psutil.Process, root: Path) -> tuple[dict[str, int], int]:
    """(how many descriptors of what it has, how many on the way to `root` and below): these come and go while retention works."""
    found: Counter[str] = Counter()
    below = 0
    directory = f"/proc/{process.pid}/fd"
    for fd in os.listdir(directory):
        try:
            target = os.readlink(f"{directory}/{fd}")
        except FileNotFoundError:
            continue  # the listing's own
        if (target.startswith(str(root)) and not target.endswith("/lock")) or root.is_relative_to(target):
            below += 1
        else:
            found[target.partition("[")[0]] += 1  # without the inode of a socket or pipe
    return dict(found), below


class Usage:
    """What trainer and writer hold at this moment."""

    def __init__(self, root: Path, writer_pid: int | None = None) -> None:
        gc.collect()
        self.trainer = psutil.Process()
        self.processes = [self.trainer, *([psutil.Process(writer_pid)] if writer_pid else [])]
        found = [descriptors(process, root) for process in self.processes]
        self.files = sum(below for _, below in found)
        self.counts = {
            "descriptors": [others for others, _ in found],
            "threads": [process.num_threads() for process in self.processes],
            "arenas": [mapped_arenas(process) for process in self.processes],
            "children": sorted(child.pid for child in self.trainer.children(recursive=True)),
        }
        # Not Pss: when other processes with the same libraries end, more of these pages is ours. The pool tells of arenas.
        self.memory = [process.memory_full_info().uss for process in self.processes]

    def held_more_than(self, early: Usage) -> dict[str, Any]:
        """What is there now and was not then. A thread of an earlier test may end meanwhile, or a library's cache let go of a
        file: less is no leak."""
        more = {name: (early.counts[name], now) for name, now in self.counts.items() if now != early.counts[name]}
        opened = [
            Counter(now) - Counter(then)
            for now, then in zip(self.counts["descriptors"], early.counts["descriptors"], strict=True)
        ]
        if "descriptors" in more and not any(opened):
            del more["descriptors"]
        if "threads" in more and all(map(operator.le, self.counts["threads"], early.counts["threads"])):
            del more["threads"]
        return more


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_saves_leave_nothing_behind(root: Path, writer: Any):
    """After 100 saves and after 500 (250 in a thread) trainer and writer hold the same, to within 6 MiB of memory."""
    count = 500 if writer == "process" else 250
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(8, 16)
    with AsyncCheckpointer(root, writer=writer, retention=KeepLast(2)) as checkpointer:

        def saves(first: int, last: int) -> Usage:
            for step in range(first, last):
                optimizer.zero_grad()
                model(batch).sum().backward()
                optimizer.step()
                handle = checkpointer.save(step, model=model, optimizer=optimizer, extra={"t": torch.ones(3)})
            handle.result(BOUND)
            checkpointer.wait(BOUND)
            held.append(checkpointer.statistics()["host_bytes"])
            return Usage(root, checkpointer.statistics()["writer_pid"])

        held: list[int] = []
        early = saves(0, 100)
        late = saves(100, count)
        assert late.held_more_than(early) == {}
        assert held[0] == held[1]
        assert late.files < 20
        assert late.counts["arenas"] == [1, 1] if writer == "process" else [2]
        for before, after in zip(early.memory, late.memory, strict=True):
            assert after - before < 6 << 20
        assert checkpointer.statistics()["committed"] == count


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_checkpointers_that_come_and_go_leave_nothing_behind(tmp_path: Path, writer: Any):
    """Thirty of them, each with a save, an event stream's worth of sinks and a load: all their own goes with them."""
    model = torch.nn.Linear(8, 8)

    def one(number: int) -> None:
        with AsyncCheckpointer(tmp_path / str(number), writer=writer, sinks=[lambda event: None]) as checkpointer:
            path = checkpointer.save(1, model=model).result(BOUND).path
        load(path, model=model)

    for number in range(5):
        one(number)
    early = Usage(tmp_path)
    for number in range(5, 35):
        one(number)
    late = Usage(tmp_path)
    assert late.held_more_than(early) == {}
    assert late.counts["arenas"] == [0]
    assert late.files == 0
    assert late.memory[0] - early.memory[0] < 12 << 20


def test_a_plan_that_changes_with_every_save_leaves_nothing_behind(root: Path):
    """A model that is another one every time: old plans, arenas and models are let go."""
    with AsyncCheckpointer(root, writer="thread", retention=KeepLast(1)) as checkpointer:

        def saves(first: int, last: int) -> Usage:
            for step in range(first, last):
                model = torch.nn.Linear(200, 200 + step % 7)
                checkpointer.save(step, model=model).result(BOUND)
            checkpointer.wait(BOUND)
            return Usage(root)

        early = saves(0, 40)
        late = saves(40, 160)
        assert late.held_more_than(early) == {}
        assert late.memory[0] - early.memory[0] < 12 << 20


def test_failed_and_refused_saves_leave_nothing_behind(root: Path):
    """PlanErrors, and saves that fail to write, give back what they took."""
    model = torch.nn.Linear(8, 8)
    root.mkdir()
    (root / "checkpoint-1").write_text("in the way")
    with AsyncCheckpointer(root, writer="thread", on_error="warn") as checkpointer:

        def tries(count: int) -> Usage:
            for _ in range(count):
                with pytest.raises(PlanError):
                    checkpointer.save(0, model=model, extra=object())
                assert checkpointer.save(1, model=model).exception(BOUND) is not None
            checkpointer.wait(BOUND)
            return Usage(root)

        early = tries(5)
        late = tries(40)
        assert late.held_more_than(early) == {}
        assert checkpointer.statistics()["arenas_busy"] == 0
    (root / "checkpoint-1").unlink()


GARBAGE = """
import gc, mmap, os
from vembed_async_ckpt._shared.memory import MEMFD, address_of, map_arena

gc.disable()
SIZE = 1 << 20


class Node:
    pass


fd = os.memfd_create(MEMFD)
os.ftruncate(fd, SIZE)
node = Node()
node.itself, node.memory = node, map_arena(fd, SIZE)
at = address_of(node.memory)
del node
child = os.fork()
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
own = []
while not any(address_of(memory) <= at < address_of(memory) + SIZE for memory in own):
    own.append(mmap.mmap(-1, SIZE))
    assert len(own) < 1000, "the child never got memory in the place of the arena"
gc.collect()
own[-1][:4] = b"mine"
for entry in os.scandir("/proc/self/fd"):
    if os.path.lexists(entry.path):
        assert MEMFD not in os.readlink(entry.path), "the memory lives as long as the child"
"""


def test_an_arena_that_is_garbage_in_a_forked_child_unmaps_nothing() -> None:
    """DataLoader workers: the mapping is not there, and what the child has put in its place stays. Nor has it a descriptor
    that would hold the memory."""
    child = subprocess.run([sys.executable, "-c", GARBAGE], capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == 0, (child.returncode, child.stderr)
