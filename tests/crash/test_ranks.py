"""Several ranks of one DDP training: what all of them add is saved; a rank that does not take part costs only its own part."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from vembed_async_ckpt import latest, verify
from vembed_async_ckpt._disk.catalog import scan
from vembed_async_ckpt._disk.manifests import read
from vembed_async_ckpt._format.manifest import Manifest

from .nursery import Child, Nursery

SHORT = {"BEAT": 0.2, "SILENCE": 2.0, "HOLD": 3.0, "LATE": 0.5, "PATIENCE": 4.0}  # seconds, instead of minutes


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery("rank_trainers")
    yield nursery
    nursery.close()


class Job:
    """The ranks of one training, told what to do one by one or all at once."""

    def __init__(self, ranks: list[Child]) -> None:
        self.ranks = ranks

    def ask(self, rank: int, method: str, *arguments: Any) -> str:
        self.tell(rank, method, *arguments)
        return self.answer(rank)

    def tell(self, rank: int, method: str, *arguments: Any) -> None:
        self.ranks[rank].tell(json.dumps([method, arguments]))

    def answer(self, rank: int) -> str:
        return self.ranks[rank].expect("ANSWER")

    def all(self, method: str, *arguments: Any, ranks: list[int] | None = None) -> list[str]:
        chosen = range(len(self.ranks)) if ranks is None else ranks
        for rank in chosen:
            self.tell(rank, method, *arguments)
        return [self.answer(rank) for rank in chosen]


@contextlib.contextmanager
def job(nursery: Nursery, root: Path, world_size: int, **arguments: Any) -> Iterator[Job]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                nursery.child("run", root=str(root), rank=rank, world_size=world_size, port=port, **arguments)
            )
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.expect("READY")
        yield Job(ranks)


def visible(root: Path) -> list[int | None]:
    """The steps under the root, each verified."""
    entries = scan(os.fspath(root))
    for entry in entries:
        verify(entry.path)
    return [entry.manifest.step for entry in entries if entry.manifest]


def read_manifest(path: Path) -> Manifest:
    return read(os.fspath(path))


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_resumes_where_it_was(nursery: Nursery, root: Path, world_size: int) -> None:
    """Random states and data positions of every rank are in the directory; each takes back its own."""
    with job(nursery, root, world_size) as ranks:
        assert set(ranks.all("step")) == {"done"}
        assert set(ranks.all("save", 1)) == {"called"}
        drawn = ranks.all("draw")
        answers = ranks.all("result", 1)
        assert len(set(answers)) == 1, "every rank knows the same"
        assert answers[0].startswith("COMMITTED")
        ranks.all("draw")
        ranks.all("close")
    assert len(set(drawn)) == world_size
    names = {
        name for rank in range(world_size) for name in (f"random_states_{rank}.pkl", f"vembed_rank_state_{rank}.json")
    }
    assert names - {"vembed_rank_state_0.json"} <= set(os.listdir(root / "checkpoint-1"))
    with job(nursery, root, world_size) as ranks:
        assert set(ranks.all("restore", str(root / "checkpoint-1"))) == {"restored"}, "and no rank is warned"
        assert ranks.all("draw") == drawn
        ranks.all("close")


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_cannot_save_fails_everywhere(nursery: Nursery, root: Path, rank: int) -> None:
    """Its own call raises; the others' handles say who and why; nothing is visible, and the next save works."""
    with job(nursery, root, 2) as ranks:
        ranks.tell(1 - rank, "save", 1)
        refused = ranks.ask(rank, "save", 1, "unsavable")
        assert refused.startswith("PlanError")
        assert ranks.answer(1 - rank) == "called"
        failed = ranks.ask(1 - rank, "result", 1)
        assert failed.startswith("FAILED")
        assert "object" in failed
        assert rank == 0 or "rank 1" in failed
        assert visible(root) == []
        ranks.all("save", 2, 7)
        assert all(answer.startswith("COMMITTED") for answer in ranks.all("result", 2))
        ranks.all("close")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_refused_save_harms_no_other(nursery: Nursery, root: Path, rank: int) -> None:
    """The failure was seen where it was raised; no later call raises it again on one rank while the others save."""
    with job(nursery, root, 2) as ranks:
        ranks.tell(1 - rank, "save", 1)
        assert ranks.ask(rank, "save", 1, "unsavable").startswith("PlanError")
        ranks.answer(1 - rank)
        for step in (2, 3, 4):
            assert set(ranks.all("save", step, 7)) == {"called"}
            assert all(answer.startswith("COMMITTED") for answer in ranks.all("result", step))
        ranks.all("close")
    assert visible(root) == [2, 3, 4]


def test_a_rank_that_comes_late_hears_the_end(nursery: Nursery, root: Path) -> None:
    """The first refused long ago, and nobody else has read it yet: the other still learns why."""
    with job(nursery, root, 2, patience={**SHORT, "PATIENCE": 60.0}) as ranks:
        assert ranks.ask(0, "save", 1, None, "unsavable").startswith("PlanError")
        ranks.ask(0, "rest", 2 * SHORT["SILENCE"])
        ranks.ask(1, "save", 1)
        assert "rank 0 did not save" in ranks.ask(1, "result", 1)


def test_a_large_state_of_a_rank_goes_through_the_store(nursery: Nursery, root: Path) -> None:
    """More than the store takes in one piece: at the latest the second save has room for it."""
    with job(nursery, root, 2) as ranks:
        for step in (1, 2):
            ranks.all("save", step, "large")
            answers = ranks.all("result", step)
        assert all(answer.startswith("COMMITTED") for answer in answers)
        ranks.all("close")
    assert (root / "checkpoint-2" / "vembed_rank_state_1.json").stat().st_size > 10 << 20


@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_that_dies_before_it_comes_costs_only_its_part(nursery: Nursery, root: Path, rank: int) -> None:
    """The state is whole on the first rank: it is saved, without what only the dead rank knew."""
    with job(nursery, root, 3, patience={**SHORT, "HOLD": 60.0}) as ranks:
        ranks.all("save", 1)
        ranks.all("result", 1)
        ranks.ranks[rank].kill()
        others = [other for other in range(3) if other != rank]
        assert set(ranks.all("save", 2, ranks=others)) == {"called"}
        for answer in ranks.all("result", 2, ranks=others):
            assert answer.startswith("COMMITTED")
        (warning,) = json.loads(ranks.ask(0, "warned"))
        assert f"rank {rank} of 3" in warning
        assert visible(root) == [1, 2]
    assert read_manifest(root / "checkpoint-2").ranks == tuple(others)
    assert read_manifest(root / "checkpoint-1").ranks is None


def test_a_rank_that_does_not_call_costs_only_its_part(nursery: Nursery, root: Path) -> None:
    """The save is held for it, then goes on; the next one, which it calls at about the same moment, has all."""
    with job(nursery, root, 3, patience={**SHORT, "AGAIN_HOLD": 20.0}) as ranks:
        ranks.all("save", 1, ranks=[0, 1])
        assert all(answer.startswith("COMMITTED") for answer in ranks.all("result", 1, ranks=[0, 1]))
        (warning,) = json.loads(ranks.ask(0, "warned"))
        assert "rank 2 of 3 did not call save()" in warning
        assert "random states and data position" in warning
        ranks.all("save", 2, ranks=[0, 1])
        ranks.ask(0, "rest", 0.5)
        ranks.ask(2, "save", 2)
        assert all(answer.startswith("COMMITTED") for answer in ranks.all("result", 2))
        ranks.all("close")
    assert read_manifest(root / "checkpoint-1").ranks == (0, 1)
    assert read_manifest(root / "checkpoint-2").ranks is None


def test_the_first_rank_alone_saves_at_once(nursery: Nursery, root: Path) -> None:
    """`if is_main_process: checkpointer = AsyncCheckpointer(...)`: every checkpoint is there, one warning says what is not in
    them, no step waits, and a rank that is not in it is told so when it loads."""
    with job(nursery, root, 2, makers=[0]) as ranks:
        for step in (1, 2, 3, 4):
            ranks.all("step")
            assert ranks.ask(0, "save", step) == "called"
        for step in (1, 2, 3, 4):
            assert ranks.ask(0, "result", step).startswith("COMMITTED")
        (warning,) = json.loads(ranks.ask(0, "warned"))
        assert "rank 1 of 2" in warning
        assert float(ranks.ask(0, "longest_call")) < 1.5, "at most the hold of the first save, cut short by the step"
        assert ranks.ask(0, "close") == "closed"
        alone, other = ranks.all("restore", str(root / "checkpoint-4"))
        assert alone == "restored"
        assert "saved without rank 1" in other
    assert visible(root) == [1, 2, 3, 4]
    manifest = read_manifest(root / "checkpoint-4")
    assert (manifest.world_size, manifest.ranks) == (2, (0,))


def test_a_rank_that_never_calls_blocks_no_step(nursery: Nursery, root: Path) -> None:
    """It has made a checkpointer. The save that is held for it is let go as soon as the next one needs its memory."""
    with job(nursery, root, 2) as ranks:
        for step in (1, 2, 3):
            ranks.all("step")
            assert ranks.ask(0, "save", step) == "called"
        for step in (1, 2, 3):
            assert ranks.ask(0, "result", step).startswith("COMMITTED")
        assert len(json.loads(ranks.ask(0, "warned"))) == 1
        assert float(ranks.ask(0, "longest_call")) < 2.0
        assert set(ranks.all("close")) == {"closed"}
    assert visible(root) == [1, 2, 3]


def test_a_rank_that_calls_too_late_is_told(nursery: Nursery, root: Path) -> None:
    """The checkpoint went on without it. Its handle has the checkpoint, a warning says what is not in it, and the saves after
    that are complete, in whatever order the ranks come."""
    with job(nursery, root, 2, patience={**SHORT, "HOLD": 1.0}) as ranks:
        ranks.ask(0, "save", 1)
        assert ranks.ask(0, "result", 1).startswith("COMMITTED")
        ranks.ask(1, "save", 1)
        assert ranks.ask(1, "result", 1).startswith("COMMITTED")
        (warning,) = json.loads(ranks.ask(1, "warned"))
        assert "rank 1 called save() too late" in warning
        for step, first in ((2, 0), (3, 1), (4, 0)):
            ranks.ask(first, "save", step)
            ranks.ask(1 - first, "save", step)
            assert all(answer.startswith("COMMITTED") for answer in ranks.all("result", step))
        ranks.all("close")
    assert [read_manifest(root / f"checkpoint-{step}").ranks for step in (1, 2, 3, 4)] == [(0,), None, None, None]


@pytest.mark.parametrize("first", [0, 1])
def test_one_directory_is_saved_more_often_by_the_first_rank(nursery: Nursery, root: Path, first: int) -> None:
    """Three times alone, then by both, whoever is earlier: what both saved has the second rank's state of that moment."""
    with job(nursery, root, 2, patience={**SHORT, "HOLD": 1.0, "PATIENCE": 60.0}) as ranks:
        for _ in range(3):
            ranks.ask(0, "save", 1)
            assert ranks.ask(0, "result", 1).startswith("COMMITTED")
        ranks.ask(0, "rest", 2 * SHORT["LATE"])
        for number in range(2):  # the first of these is not held for a rank that was missed before
            ranks.ask(first, "save", 1, 1000 + number)
            ranks.ask(1 - first, "save", 1, 1000 + number)
            assert all(answer.startswith("COMMITTED") for answer in ranks.all("result", 1))
        assert read_manifest(root / "checkpoint-1").ranks is None
        ranks.all("restore", str(root / "checkpoint-1"))
        assert [json.loads(drawn)[-1] for drawn in ranks.all("draw")] == [1001, 1001]
        ranks.all("close")


def test_the_first_rank_that_does_not_call_is_not_waited_for_for_ever(nursery: Nursery, root: Path) -> None:
    """The other's handle fails, and its part does not get into what the first saves later."""
    with job(nursery, root, 2, patience=SHORT) as ranks:
        assert ranks.ask(1, "save", 1) == "called"
        assert "rank 0, which writes, did not call save()" in ranks.ask(1, "result", 1)
        ranks.ask(0, "save", 1)
        assert ranks.ask(0, "result", 1).startswith("COMMITTED")
    assert read_manifest(root / "checkpoint-1").ranks == (0,)


def test_the_first_rank_dies_before_all_came(nursery: Nursery, root: Path) -> None:
    """Nothing becomes visible, the others' handles fail, and a new job saves on."""
    with job(nursery, root, 2, patience={**SHORT, "HOLD": 60.0, "PATIENCE": 60.0}) as ranks:
        ranks.all("save", 1)
        ranks.all("result", 1)
        ranks.ask(0, "save", 2)
        ranks.ranks[0].kill()
        ranks.ranks[0].wait()
        ranks.ask(1, "save", 2)
        answer = ranks.ask(1, "result", 2)
        assert answer.startswith("FAILED StageError")
        assert "has not been heard of" in answer or "cannot speak to each other" in answer
    assert latest(root) == root / "checkpoint-1"
    with job(nursery, root, 2) as ranks:
        ranks.all("save", 3)
        ranks.all("result", 3)
        ranks.all("close")
    assert visible(root) == [1, 3]


def test_staged_survives_the_death_of_every_rank(nursery: Nursery, root: Path) -> None:
    """Once staged on the first rank the checkpoint, with every rank's state, is committed by the writer alone."""
    with job(nursery, root, 2, floats=1 << 20) as ranks:
        ranks.all("save", 1)
        ranks.all("staged", 1)
        for rank in ranks.ranks:
            rank.kill()
    assert latest(root) == root / "checkpoint-1"
    verify(root / "checkpoint-1")
    assert (root / "checkpoint-1" / "random_states_1.pkl").exists()


def test_a_skipped_save_is_skipped_everywhere(nursery: Nursery, root: Path) -> None:
    """While the writer stands still the second save finds no arena; no rank takes it for saved."""
    with job(nursery, root, 2, when_busy="skip") as ranks:
        ranks.all("save", 1)
        ranks.all("result", 1)
        writer = int(ranks.ask(0, "writer"))
        os.kill(writer, signal.SIGSTOP)
        try:
            ranks.all("save", 2)
            ranks.all("save", 3)
            for answer in ranks.all("result", 3):
                assert answer.startswith("SKIPPED CheckpointerBusy")
        finally:
            os.kill(writer, signal.SIGCONT)
        assert all(answer.startswith("COMMITTED") for answer in ranks.all("result", 2))
        ranks.all("close")
    assert visible(root) == [1, 2]


def test_nothing_piles_up_in_the_store(nursery: Nursery, root: Path) -> None:
    """The keys of a save are taken back when every rank has read its end; the same directory may be saved again."""
    with job(nursery, root, 2) as ranks:
        for step in (1, 1, 1):
            ranks.all("save", step)
            ranks.all("result", step)
        before = int(ranks.ask(0, "keys"))
        for step in (2, 3, 4, 5, 6, 7, 8, 9):
            ranks.all("save", step)
            ranks.all("result", step)
        assert int(ranks.ask(0, "keys")) <= before + 4, "at most the last save's keys and the beats"
        assert set(ranks.all("close")) == {"closed"}
        assert int(ranks.ask(1, "keys")) <= before


def test_a_state_that_passes_in_parts_has_every_rank(nursery: Nursery, root: Path) -> None:
    """A small arena: the first rank waits for the others inside the call, then passes all of it."""
    with job(nursery, root, 2, floats=6 << 20, max_host_bytes=16 << 20) as ranks:
        ranks.all("step")
        assert set(ranks.all("save", 1)) == {"called"}
        assert all(answer.startswith("COMMITTED") for answer in ranks.all("result", 1))
        ranks.all("close")
    assert (root / "checkpoint-1" / "vembed_rank_state_1.json").exists()
