"""Ranks of one node save what is divided among them: one directory, exact bytes, and every rank knows how it ended."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vembed_async_ckpt import verify
from vembed_async_ckpt._disk.catalog import scan

from ..crash.nursery import Child, Nursery
from .divided import STEP, layout, start_value

SHORT = {"BEAT": 0.2, "SILENCE": 2.0, "ARRIVAL": 3.0}  # seconds, instead of minutes
WORLD = 4


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery("divided", os.path.dirname(__file__))
    yield nursery
    nursery.close()


class Job:
    """The ranks, told what to do one by one or all at once."""

    def __init__(self, ranks: list[Child], rows: int) -> None:
        self.ranks = ranks
        self.rows = rows

    def tell(self, rank: int, method: str, *arguments: Any) -> None:
        self.ranks[rank].tell(json.dumps([method, arguments]))

    def answer(self, rank: int) -> str:
        return self.ranks[rank].expect("ANSWER")

    def ask(self, rank: int, method: str, *arguments: Any) -> str:
        self.tell(rank, method, *arguments)
        return self.answer(rank)

    def all(self, method: str, *arguments: Any, ranks: list[int] | None = None) -> list[str]:
        chosen = range(len(self.ranks)) if ranks is None else ranks
        for rank in chosen:
            self.tell(rank, method, *arguments)
        return [self.answer(rank) for rank in chosen]

    def has_free_arena(self) -> bool:
        """Whether the only arena becomes free, once the other ranks have said that they do not copy."""
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            if json.loads(self.ask(0, "statistics"))["arenas_free"] == 1:
                return True
        return False

    def continue_stopped(self, rank: int) -> None:
        """Let a rank go on that stops itself."""
        child = self.ranks[rank]
        deadline = time.monotonic() + 60.0
        while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, "it does not stop"
            time.sleep(0.01)
        child.kill(signal.SIGCONT)

    def save(self, step: int, order: str = "this", **extra: Any) -> list[str]:
        """Save on all ranks. Return how the save ended for each."""
        called = self.all("save", step, order, extra or None)
        return [
            self.ask(rank, "result", step) if answer.startswith("called") else answer
            for rank, answer in enumerate(called)
        ]


@contextmanager
def job(nursery: Nursery, root: Path, world_size: int = WORLD, rows: int = 64, **arguments: Any) -> Iterator[Job]:
    with ExitStack() as stack:
        store = stack.enter_context(nursery.child("serve_store"))
        port = int(store.expect("PORT"))
        ranks = [
            stack.enter_context(
                nursery.child(
                    "run",
                    root=str(root),
                    rank=rank,
                    world_size=world_size,
                    port=port,
                    rows=rows,
                    **{"patience": SHORT, **arguments},
                )
            )
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.expect("READY")
        yield Job(ranks, rows)


def differing(path: Path, world_size: int, rows: int, steps: int, order: str = "this") -> list[str]:
    """The names of the tensors that are not, bit for bit, what `steps` optimizer steps make of them."""
    verify(path)
    found = load_file(path / "model.safetensors")
    expected = {name: start_value(shape) + STEP * steps for name, shape in layout(world_size, rows, order).items()}
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def steps_of(root: Path) -> list[int | None]:
    return [entry.manifest.step for entry in scan(os.fspath(root)) if entry.manifest]


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_directory_of_all_ranks(nursery: Nursery, root: Path, world_size: int) -> None:
    """Rows, columns and runs of elements, late and at once, while training goes on; what every rank adds is there too."""
    rows = 1001  # every part but the smallest is copied late
    with job(nursery, root, world_size, rows) as ranks:
        ranks.all("step")
        for step in (1, 2, 3):
            called = ranks.all("save", step)
            ranks.all("step")  # waits for the late copies
            assert all(answer.startswith("called") for answer in called), called
            results = ranks.all("result", step)
            assert len(set(results)) == 1
            assert results[0].startswith("COMMITTED"), results
            assert differing(root / f"checkpoint-{step}", world_size, rows, step) == []
        overlaps = [json.loads(answer)["overlap"] for answer in ranks.all("statistics")]
        assert overlaps == [True] * world_size
        ranks.all("close")
    names = set(os.listdir(root / "checkpoint-3"))
    assert {f"vembed_rank_state_{rank}.json" for rank in range(1, world_size)} <= names


def test_bad_input_is_refused_on_every_rank_and_the_next_save_works(nursery: Nursery, root: Path) -> None:
    """In the call, as PlanError, before anything is touched: what one rank cannot save, plans that differ, claims that do not
    fit. A plan that all agreed on is not discussed again, and what ranks tell each other while they plan arrives."""
    with job(nursery, root) as ranks:
        for extra, said in (
            ({"refuse": 2}, "cannot be saved on rank 2"),
            ({"refuse": 0}, "cannot be saved on rank 0"),
            ({"differ": 3}, "rank 3 plans other tensors than rank 0: 'model.safetensors: renamed' where rank 0 has"),
            ({"misfit": 1}, "the claims do not fit"),
        ):
            answers = ranks.all("save", 1, "this", extra)
            assert all(answer.startswith(("PlanError", "RefusedElsewhere")) for answer in answers), answers
            assert all(said in answer for answer in answers), answers
            assert steps_of(root) == []
            assert not (root / "checkpoint-1").exists()
        assert all(answer.startswith("COMMITTED") for answer in ranks.save(1, gather=True))
        refused = ranks.save(2, refuse=3)  # agreed before, so the others do not wait for rank 3
        assert refused[3].startswith("PlanError")
        assert all("cannot be saved on rank 3" in answer for answer in refused), refused
        different = ranks.save(3, differ=0)
        assert all("plans other tensors" in answer for answer in different), different
        assert all(answer.startswith("COMMITTED") for answer in ranks.save(4))
        assert differing(root / "checkpoint-4", WORLD, 64, 0) == []
        ranks.all("close")
    assert steps_of(root) == [1, 4]


def test_another_step_is_told_at_once(nursery: Nursery, root: Path) -> None:
    """Whether a rank tries the same again or has left a call out: the save after next is common again."""
    with job(nursery, root) as ranks:
        assert all(answer.startswith("COMMITTED") for answer in ranks.save(1))
        begun = time.monotonic()
        for rank in range(WORLD):
            ranks.tell(rank, "save", 2 if rank != 3 else 3)
        called = [ranks.answer(rank) for rank in range(WORLD)]
        results = [ranks.ask(rank, "result", 2) for rank in range(3) if called[rank].startswith("called")]
        assert time.monotonic() - begun < 2.0  # and not after the limit, which is 3 s here
        told = [*results, *(answer for answer in called if not answer.startswith("called"))]
        assert all("rank 3 saves step 3 to checkpoint-3, rank 0 step 2 to checkpoint-2" in text for text in told), told
        behind = ranks.save(3)  # the first save of step 3 for all but rank 3
        assert not any(answer.startswith("COMMITTED") for answer in behind), behind
        answers = ranks.save(4)
        assert all(answer.startswith("COMMITTED") for answer in answers), answers
        for odd, others in ((3, (0, 1, 2)), (0, (1, 2, 3))):  # the one has left out step 10, or step 20
            step = 10 if odd else 20
            for rank in range(WORLD):
                ranks.tell(rank, "save", step + (rank == odd))
            first = [ranks.answer(rank) for rank in range(WORLD)]
            read = [
                ranks.ask(rank, "result", step + (rank == odd))
                for rank in range(WORLD)
                if first[rank].startswith("called")
            ]
            begun = time.monotonic()
            second = ranks.all("save", step + 1, ranks=[*others])
            assert time.monotonic() - begun < 2.0
            failed = [
                ranks.ask(rank, "result", step + 1)
                for rank in others
                if second[others.index(rank)].startswith("called")
            ]
            assert all("COMMITTED" not in answer for answer in (*first, *read, *second, *failed)), (
                first,
                read,
                second,
                failed,
            )
            answers = ranks.save(step + 2)
            assert all(answer.startswith("COMMITTED") for answer in answers), answers
        ranks.all("close")


def test_a_rank_that_does_not_come(nursery: Nursery, root: Path) -> None:
    """The others are told which one, wait no longer than the limit, and save with it again when it comes back."""
    with job(nursery, root) as ranks:
        assert all(answer.startswith("COMMITTED") for answer in ranks.save(1))
        called = ranks.all("save", 2, ranks=[0, 1, 2])
        assert all(answer.startswith("called") and float(answer.split()[1]) < 1.0 for answer in called), called
        results = [ranks.ask(rank, "result", 2) for rank in range(3)]
        assert all("rank 3 did not call save() within 3 s" in answer for answer in results), results
        assert ranks.has_free_arena(), "nobody copies"
        assert "rank 3 did not call save() within 3 s" in ranks.ask(3, "save", 2), "it hears what the others heard"
        assert all(answer.startswith("COMMITTED") for answer in ranks.save(3))
        late = [ranks.ask(rank, "save", 4) for rank in (1, 2)]
        assert all("rank 0 did not save it within 3 s" in answer for answer in late), late
        ranks.tell(3, "save", 5)
        ranks.tell(0, "save", 5)
        assert [ranks.ask(rank, "save", 5)[:6] for rank in (1, 2)] == ["called"] * 2
        assert [ranks.answer(rank)[:6] for rank in (0, 3)] == ["called"] * 2
        assert all(ranks.ask(rank, "result", 5).startswith("COMMITTED") for rank in range(WORLD))
        ranks.all("close")


def test_a_rank_that_cannot_copy_fails_the_save_everywhere(nursery: Nursery, root: Path) -> None:
    with job(nursery, root, on_error="warn") as ranks:
        for rank in (2, 0):
            ranks.ask(rank, "fail_to_copy")
            answers = ranks.save(1)
            assert all("FAILED" in answer and "planted" in answer for answer in answers), answers
        assert all(answer.startswith("COMMITTED") for answer in ranks.save(2))
        ranks.all("close")
    assert steps_of(root) == [2]


def test_what_changes_while_it_is_copied_fails_the_save(nursery: Nursery, root: Path) -> None:
    """On one rank, beside its optimizer: no rank has a checkpoint of it, and that rank copies at once from then on."""
    with job(nursery, root, rows=1001) as ranks:
        ranks.all("step")
        ranks.ask(1, "stop_in_late_copy")
        ranks.all("save", 1)
        ranks.continue_stopped(1)
        ranks.ask(1, "change")
        ranks.ask(1, "go")
        results = ranks.all("result", 1)
        assert all("was changed while it was being copied" in answer for answer in results), results
        assert json.loads(ranks.ask(1, "statistics"))["overlap"] is False
        assert steps_of(root) == []


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "planted bug"])
def test_a_stopped_rank_does_not_tear_the_next_save(nursery: Nursery, root: Path, planted: bool) -> None:
    """It is stopped in the middle of a late copy, and that save fails. It goes on, copies the next state at once, and only then
    writes the rest of the old one. The planted bug, an arena that is used again at once, shows in the bytes."""
    rows = 1001
    with job(nursery, root, rows=rows) as ranks:
        if planted:
            ranks.ask(0, "reuse_at_once")
        ranks.all("step")
        assert all(answer.startswith("COMMITTED") for answer in ranks.save(1))
        ranks.ask(2, "stop_in_late_copy")
        ranks.all("save", 2)
        assert ranks.all("state", 2, ranks=[0, 1, 3]) == ["STAGING"] * 3, "not all ranks have copied"
        results = [ranks.ask(rank, "result", 2) for rank in (0, 1, 3)]
        assert all("rank 2 has not been heard of" in answer for answer in results), results
        ranks.continue_stopped(2)
        assert "FAILED" in ranks.ask(2, "result", 2)
        ranks.all("step", ranks=[0, 1, 3])
        ranks.ask(2, "copy_now")
        ranks.ask(2, "replace")
        called = ranks.all("save", 3)
        assert all("rank 2" in answer or answer.startswith("called") for answer in called)
        ranks.ask(2, "go")
        results = ranks.all("result", 3)
        assert all(answer.startswith("COMMITTED") for answer in results), results
        wrong = differing(root / "checkpoint-3", WORLD, rows, 2)
        assert (wrong != []) == planted, wrong
        assert ranks.has_free_arena()
        ranks.all("close")


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a forked child"])
def test_a_rank_that_dies_in_the_middle_of_its_copy(nursery: Nursery, root: Path, forked: bool) -> None:
    """The others are told within a second, also when a child of it has its connection; the arena is free again at once, and what
    they save later is refused with the reason, without a wait."""
    with job(nursery, root) as ranks:
        assert all(answer.startswith("COMMITTED") for answer in ranks.save(1))
        if forked:
            ranks.ask(2, "fork")
        ranks.ask(2, "die_in_copy")
        for rank in range(WORLD):
            ranks.tell(rank, "save", 2)
        called = [ranks.answer(rank) for rank in (0, 1, 3)]
        assert all(answer.startswith("called") for answer in called), called
        assert ranks.ranks[2].wait() == -signal.SIGKILL
        for rank in (0, 1, 3):
            answer = ranks.ask(rank, "result", 2)
            assert answer.startswith("FAILED"), answer
            assert float(answer.split()[1]) < 1.0, answer
            assert "rank 2" in answer
        assert ranks.has_free_arena()
        assert "rank 2 has ended" in ranks.ask(0, "save", 3)
        ranks.all("close", ranks=[0, 1, 3])
    assert steps_of(root) == [1]


def test_the_first_rank_dies(nursery: Nursery, root: Path) -> None:
    """The others are told within a second, in the call and on the handle."""
    with job(nursery, root) as ranks:
        assert all(answer.startswith("COMMITTED") for answer in ranks.save(1))
        ranks.ask(0, "die_in_copy")
        for rank in range(WORLD):
            ranks.tell(rank, "save", 2)
        answers = [ranks.answer(rank) for rank in (1, 2, 3)]
        ended = [
            ranks.ask(rank, "result", 2) if answer.startswith("called") else answer
            for rank, answer in zip((1, 2, 3), answers, strict=True)
        ]
        assert all("rank 0, which writes," in answer for answer in ended), ended
        assert all(float(answer.split()[1]) < 1.0 for answer in (*answers, *ended)), ended


@pytest.mark.parametrize(
    ("when_busy", "told"), [("skip", "SKIPPED"), ("error", "CheckpointerBusy"), ("wait", "called")]
)
def test_all_ranks_wait_skip_or_raise_together(nursery: Nursery, root: Path, when_busy: str, told: str) -> None:
    """While the writer, which is stopped, has the only arena."""
    with job(nursery, root, when_busy=when_busy, patience={}) as ranks:
        assert all(answer.startswith("COMMITTED") for answer in ranks.save(1))
        writer = int(ranks.ask(0, "writer"))
        os.kill(writer, signal.SIGSTOP)
        assert all(answer.startswith("called") for answer in ranks.all("save", 2))
        for rank in range(WORLD):
            ranks.tell(rank, "save", 3)
        if when_busy == "wait":
            before = [len(rank.messages) for rank in ranks.ranks]
            for rank in ranks.ranks:
                rank.listen(0.1)
            assert [len(rank.messages) for rank in ranks.ranks] == before, "the calls wait"
            os.kill(writer, signal.SIGCONT)
        answers = [ranks.answer(rank) for rank in range(WORLD)]
        if when_busy == "skip":
            assert ranks.all("state", 3) == [told] * WORLD
        else:
            assert all(answer.startswith(told) for answer in answers), answers
        os.kill(writer, signal.SIGCONT)
        for step in (2, 3) if when_busy == "wait" else (2,):
            assert all(answer.startswith("COMMITTED") for answer in ranks.all("result", step))
        assert all(answer.startswith("COMMITTED") for answer in ranks.save(4))
        counts = [json.loads(answer) for answer in ranks.all("statistics")]
        assert [count["skipped"] for count in counts] == [int(when_busy != "wait")] * WORLD
        ranks.all("close")


def test_a_state_that_does_not_fit_is_refused_on_all_ranks(nursery: Nursery, root: Path) -> None:
    with job(nursery, root, world_size=2, rows=60_000, max_host_bytes=16 << 20) as ranks:
        answers = ranks.all("save", 1)
        assert all(answer.startswith(("StageError", "RaisedElsewhere")) for answer in answers), answers
        assert all("raise max_host_bytes" in answer for answer in answers), answers
        assert steps_of(root) == []
        ranks.all("close")


def test_interpreters_that_exit_finish_their_saves(nursery: Nursery, root: Path) -> None:
    """Nobody closes a checkpointer: the exit of each rank waits until its save has ended everywhere."""
    with job(nursery, root, rows=1001) as ranks:
        ranks.all("step")
        for step in (1, 2):
            assert all(answer.startswith("called") for answer in ranks.all("save", step))
        for rank in (3, 0, 1, 2):
            ranks.tell(rank, "leave")
        assert [rank.wait() for rank in ranks.ranks] == [0] * WORLD, [str(rank) for rank in ranks.ranks]
    assert steps_of(root) == [1, 2]
    assert differing(root / "checkpoint-2", WORLD, 1001, 1) == []
