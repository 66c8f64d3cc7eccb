"""Processes of a sharded save are killed at random moments: ranks, the first rank, the writer, the process with the store.

What is visible is whole and exact, the newest checkpoint is at least the one that a rank knew to be staged, and every rank
that lives is told.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vembed_async_ckpt import verify

from ..crash.nursery import Child, Nursery
from .test_node import SHORT, differing, steps_of

WORLD, ROWS = 4, 1001
SECONDS = 0.8  # of saving, at most, before somebody is killed
TOLD = 10.0  # seconds after which every rank that lives must know; on a machine of its own it takes a tenth of one
COLLECTIVE = 30.0  # the same where a collective may wait for the dead rank first, until its own limit of 20 s
VICTIMS = {
    "rank": (1, 2, 3),
    "first rank": (0,),
    "all ranks": (0, 1, 2, 3),
    "store": (),
    "first rank and store": (0,),
    "writer": (),
    "first rank and writer": (0,),
    "a rank and writer": (1, 2, 3),
}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery("divided", os.path.dirname(__file__))
    yield nursery
    nursery.close()


def one_death(nursery: Nursery, root: Path, draw: random.Random, way: str | None = None) -> tuple[str, float]:
    """Save with four ranks, kill, and check all that was promised. Return who was killed, and in how many seconds the last of the
    others was told. `way`: how a network is divided, that is trained with collectives; None: there is no network."""
    who = draw.choice(list(VICTIMS))
    before = max((step or 0 for step in steps_of(root)), default=0) if root.exists() else 0
    with ExitStack() as stack:
        store = stack.enter_context(nursery.child("serve_store"))
        arguments = {"root": str(root), "world_size": WORLD, "port": int(store.expect("PORT")), "first": before}
        arguments |= {"patience": SHORT, **({"rows": ROWS} if way is None else {"way": way})}
        function = "save_on" if way is None else "train_on"
        ranks = [stack.enter_context(nursery.child(function, rank=rank, **arguments)) for rank in range(WORLD)]
        writer = int(ranks[0].expect("READY"))
        for rank in ranks[1:]:
            rank.expect("READY")
        for rank in ranks:
            rank.tell("go")
        time.sleep(draw.random() * SECONDS)
        chosen = VICTIMS[who] if who == "all ranks" else draw.sample(VICTIMS[who], min(1, len(VICTIMS[who])))
        victims = [ranks[number] for number in chosen]
        if "writer" in who:
            os.kill(writer, signal.SIGKILL)
        if "store" in who:
            store.kill()
        for victim in victims:
            victim.kill()
        killed = time.monotonic()
        others = [rank for rank in ranks if rank not in victims]
        if victims:
            for rank in others:
                rank.expect("FAILED", TOLD if way is None else COLLECTIVE)
        else:
            _expect_progress(others, met=who == "writer")
        told = time.monotonic() - killed
    # the children are dead now, and a writer that has accepted a save finishes it
    assert nursery.left_alive(30.0) == []
    said = [message for rank in ranks for message in rank.messages]
    staged = max((int(m.split()[1]) for m in said if m.startswith("STAGED")), default=before)
    committed = max((int(m.split()[1]) for m in said if m.startswith("COMMITTED")), default=before)
    visible = steps_of(root)
    for step in visible:
        assert step is not None
        if way is not None:
            verify(root / f"checkpoint-{step}")
        elif step > before:
            assert differing(root / f"checkpoint-{step}", WORLD, ROWS, step) == [], (who, step)
    newest = max((step or 0 for step in visible), default=0)
    assert newest >= committed, (who, visible, said)
    if "writer" not in who or not victims:
        assert newest >= staged, (who, visible, said)
    return who, told


def _expect_progress(ranks: list[Child], *, met: bool) -> None:
    """Later saves of every rank are committed: nobody noticed. The store is needed once, until the ranks have `met`."""
    for rank in ranks:
        rank.listen(0)
    seen = max(rank.last("COMMITTED") for rank in ranks)
    if not seen and not met and {rank.expect("", TOLD).partition(" ")[0] for rank in ranks} == {"FAILED"}:
        return
    for rank in ranks:
        while int(rank.expect("COMMITTED", TOLD)) < seen + 2:
            pass


def deaths(nursery: Nursery, root: Path, count: int, seed: int, *ways: str | None) -> list[tuple[str, float]]:
    draw = random.Random(seed)
    return [one_death(nursery, root, draw, draw.choice(ways or (None,))) for _ in range(count)]


def test_deaths_at_random_moments(nursery: Nursery, root: Path) -> None:
    deaths(nursery, root, 8, seed=8)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("count", "ways"), [(1000, ()), (60, ("fsdp2", "fsdp1", "fsdp2_tp"))], ids=["tensors", "networks"]
)
def test_many_deaths(
    nursery: Nursery, root: Path, capsys: pytest.CaptureFixture[str], count: int, ways: tuple[str, ...]
) -> None:
    """Prints how often each was killed, and the longest time until the last rank was told."""
    found = deaths(nursery, root, int(os.environ.get("DEATHS", count)), 13, *ways)
    with capsys.disabled():
        for who, count in sorted(Counter(who for who, _ in found).items()):
            longest = max(told for name, told in found if name == who)
            print(f"\n{count:5} x {who}: told within {longest:.2f} s", end="")
