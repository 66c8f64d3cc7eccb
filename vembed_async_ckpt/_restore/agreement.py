"""Lets the ranks that share a model load a checkpoint together, or all of them refuse it.

Each rank plans its own part. Then it writes into the job's store what it found, and waits for the others. The first
rank that has heard them all, or has waited too long, decides for all with one `compare_set`. So every rank gets the
same answer, whatever happens in between. The keys, all under `vembed_async_ckpt/load/` and the ranks' numbers:

- `{round}/{rank}`: the report of a rank.
- `{round}/decision`: what all ranks do.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import CheckpointError, CorruptCheckpoint

PATIENCE = 600.0  # seconds that a rank waits for the others; torch waits as long for a collective
_SHOWN = 3  # refusals in one message
_ROUNDS: Counter[str] = Counter()  # rounds that this process began, by the prefix of their keys


class Agreement:
    """The ranks that load together. Every one of them must make the same calls in the same order."""

    def __init__(self, store: Any, rank: int, ranks: Sequence[int]) -> None:
        """`store`: a torch.distributed.Store. `rank`: this rank. `ranks`: all of them, ascending."""
        from torch.distributed.distributed_c10d import PrefixStore

        self._prefix = "vembed_async_ckpt/load/" + ",".join(map(str, ranks))
        self._store = PrefixStore(self._prefix, store)
        self._rank = rank
        self._ranks = ranks

    @property
    def place(self) -> int:
        """The index of this rank among those that load together."""
        return self._ranks.index(self._rank)

    @property
    def size(self) -> int:
        return len(self._ranks)

    def on_one_save(self, directory: str, save_id: str | None, error: BaseException | None) -> bool:
        """Tell the others what this rank planned. Return whether all of them can go on with the same save.

        `save_id`: of the checkpoint that this rank has opened; None if another one has taken its place meanwhile.
        `error`: why this rank cannot load it, or None.

        False means that another save took the directory's place while the ranks opened it: all of them must open it
        again. Raises `CheckpointError` or `CorruptCheckpoint` on all ranks if one of them has an error, opens another
        directory, or does not call `load` in time. On a rank with an error that error is raised.
        """
        report = {"directory": directory, "save_id": save_id, **_told(error)}
        decision = self._decide(report, error, _on_plans)
        if decision["refused"]:
            raise _raised(decision, f"{directory}: not loaded, and nothing was changed, because")
        return bool(decision["same"])

    def on_the_end(self, directory: str, error: BaseException | None) -> None:
        """Tell the others whether this rank has read its part. Return when all have.

        Raises on all ranks if one of them could not; some objects are changed then.
        """
        decision = self._decide(_told(error), error, _on_ends)
        if decision["refused"]:
            raise _raised(
                decision, f"{directory}: some objects are changed already, so load another checkpoint on all ranks:"
            )

    def _decide(self, report: dict[str, Any], error: BaseException | None, rule: Any) -> dict[str, Any]:
        """Return what is decided for all ranks. Raises `error`, if there is one, once the others know it."""
        number = _ROUNDS[self._prefix]
        _ROUNDS[self._prefix] += 1
        try:
            self._store.set(f"{number}/{self._rank}", json.dumps(report))
            if error is not None:
                raise error
            reports = self._reports(number)
            decision = self._store.compare_set(f"{number}/decision", "", json.dumps(rule(reports)))
            self._forget(number - 1)
        except (RuntimeError, ValueError) as broken:
            if error is not None:
                raise error from None
            raise CheckpointError(f"the ranks cannot speak to each other while they load: {broken}") from broken
        found: dict[str, Any] = json.loads(decision)
        return found

    def _reports(self, number: int) -> dict[int, dict[str, Any] | None]:
        """Return the report of each rank; None for one that sent none in time."""
        keys = {rank: f"{number}/{rank}" for rank in self._ranks}
        with contextlib.suppress(RuntimeError):  # the time is over
            self._store.wait(list(keys.values()), timedelta(seconds=PATIENCE))
        return {
            rank: json.loads(self._store.get(key)) if self._store.check([key]) else None for rank, key in keys.items()
        }

    def _forget(self, number: int) -> None:
        """Remove what this rank wrote in a round that every rank has left: each of them has begun a later one."""
        if number >= 0:
            self._store.delete_key(f"{number}/{self._rank}")
            if self._rank == self._ranks[0]:
                self._store.delete_key(f"{number}/decision")


Reports = dict[int, "dict[str, Any] | None"]


def _on_plans(reports: Reports) -> dict[str, Any]:
    refused = _refusals(reports)
    plans = {rank: report for rank, report in reports.items() if report is not None}
    directories = {rank: plan["directory"] for rank, plan in plans.items()}
    first, *others = directories
    for rank in others:
        if not refused and directories[rank] != directories[first]:
            refused = [f"rank {rank} loads {directories[rank]}, rank {first} loads {directories[first]}"]
    ids = {plan["save_id"] for plan in plans.values()}
    return {"refused": refused, "corrupt": _is_corrupt(reports), "same": len(ids) == 1 and None not in ids}


def _on_ends(reports: Reports) -> dict[str, Any]:
    return {"refused": _refusals(reports), "corrupt": _is_corrupt(reports)}


def _refusals(reports: Reports) -> list[str]:
    absent = [
        f"rank {rank} did not call load() within {PATIENCE:.0f} s" for rank, said in reports.items() if said is None
    ]
    refused = [f"rank {rank}: {said['error']}" for rank, said in reports.items() if said is not None and said["error"]]
    return [*refused, *absent]


def _is_corrupt(reports: Reports) -> bool:
    return any(said is not None and said["corrupt"] for said in reports.values())


def _told(error: BaseException | None) -> dict[str, Any]:
    text = "" if error is None else str(error) if isinstance(error, CheckpointError) else repr(error)
    return {"error": text, "corrupt": isinstance(error, CorruptCheckpoint)}


def _raised(decision: dict[str, Any], what: str) -> CheckpointError:
    refusals = decision["refused"]
    more = f"; and {len(refusals) - _SHOWN} more ranks" if len(refusals) > _SHOWN else ""
    kind = CorruptCheckpoint if decision["corrupt"] else CheckpointError
    return kind(f"{what} {'; '.join(refusals[:_SHOWN])}{more}")


def among(ranks: Iterable[int]) -> Agreement | None:
    """Return the agreement among these ranks of the job; None if there are not several or this one is not among them."""
    chosen = sorted(set(ranks))
    if len(chosen) < 2 or not is_distributed() or dist.get_rank() not in chosen:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    shared = _get_default_store()
    # Before 2.8, torch cannot clone a store. Then waiting here keeps the other threads of this process from using it.
    return Agreement(shared.clone() if hasattr(shared, "clone") else shared, dist.get_rank(), chosen)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def divided(sizes: dict[str, int], place: int, count: int) -> set[str]:
    """Return the files that one of `count` ranks hashes: every file goes to one rank, the large ones are spread."""
    load = [0] * count
    mine = set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = load.index(min(load))
        load[least] += sizes[name]
        if least == place:
            mine.add(name)
    return mine
