"""Trainer's `save_total_limit`, for our checkpoints and for those that Trainer wrote before.

A `checkpoint-N` may be deleted if it has our manifest, or if it has none and its `trainer_state.json` proves that it is
Trainer's own checkpoint of that step. Every other `checkpoint-*` is a directory of the user's: neither counted nor
deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import threading
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from .._disk.catalog import Committed
from .._disk.deletion import prune, remove_rotated
from .._disk.filesystem import FILESYSTEM_OVERRIDE, Filesystem, LocalFilesystem, read_regular
from .._format import bounded_json, names
from .._format.manifest import Manifest
from ..events import logger
from ..retention import Policy, unknown_metrics
from .shared import refuse_to_delete

_OF_A_STEP = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclasses.dataclass(frozen=True)
class _Chosen(Policy):
    """Keeps exactly these checkpoints."""

    save_ids: frozenset[str]

    def keep(self, newest_first: Sequence[Manifest]) -> set[str]:
        return set(self.save_ids)


class Rotation:
    """Deletes old checkpoints of one root, on a thread of its own. This process must hold the root's lock."""

    def __init__(self, root: str, limit: int | None, policy: Policy | None) -> None:
        """`limit`: as `save_total_limit`. `policy`: if given, it decides instead, and only about our checkpoints."""
        self._root = root
        self._limit = limit if limit is not None and limit > 0 else None
        self._policy = policy
        self._fs: Filesystem = FILESYSTEM_OVERRIDE.get() or LocalFilesystem()
        self._committed = Committed(root)
        self._thread: threading.Thread | None = None
        self._said: set[str] = set()  # what was warned of

    def start(self, protected: Collection[str], only: str | None = None) -> None:
        """Start to delete the checkpoints that neither the rule nor `protected` (names of directories) keeps.

        Deletions that are running are finished first. The newest checkpoint always stays. `only`: given at the end of a
        training with a limit of one; the name of the checkpoint that stays instead, if it exists.
        """
        if self._limit is None and self._policy is None:
            return
        before = self._thread
        self._thread = threading.Thread(
            target=self._run, args=(before, frozenset(protected), only), name="vembed-ckpt-rotation", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Wait until no deletion is running."""
        thread = self._thread  # meanwhile a signal handler that saves may join or start another thread
        if thread is not None:
            thread.join()
            if self._thread is thread:
                self._thread = None

    def _run(self, before: threading.Thread | None, protected: frozenset[str], only: str | None) -> None:
        if before is not None:
            before.join()
        try:
            self._rotate(protected, only)
        except Exception as error:  # the next rotation tries again
            logger.warning("%s: old checkpoints could not be deleted: %s: %s", self._root, type(error).__name__, error)

    def _rotate(self, protected: frozenset[str], only: str | None) -> None:
        committed = {
            os.path.basename(path): (path, manifest)
            for path, manifest in self._committed.refresh()
            if _OF_A_STEP.fullmatch(os.path.basename(path))
        }
        if only in committed:
            # `prune` never deletes the newest. So the one that must stay is made the newest here.
            path, manifest = committed[only]
            last = max(manifest.sequence for _, manifest in committed.values())
            committed[only] = (path, dataclasses.replace(manifest, sequence=last + 1))
        newest_first = sorted(committed, key=lambda name: committed[name][1].order, reverse=True)
        older = _trainers_own(self._root, committed)
        if self._policy is not None:
            self._warn_of_metrics(self._policy, [committed[name][1] for name in newest_first])
        kept = self._kept([*newest_first, *older], protected, [committed[name][1] for name in newest_first])
        chosen = _Chosen(frozenset(committed[name][1].save_id for name in newest_first if name in kept))
        first: OSError | None = None
        for name in older if self._policy is None else ():
            if name not in kept:
                refuse_to_delete(self._root)
                try:
                    remove_rotated(self._fs, self._root, name, uuid.uuid4().hex)
                except OSError as error:  # go on with the others and with ours
                    first = first or error
        prune(self._fs, self._root, chosen, list(committed.values()), lambda: refuse_to_delete(self._root))
        if first is not None:
            raise first

    def _warn_of_metrics(self, policy: Policy, ours: Sequence[Manifest]) -> None:
        for problem in unknown_metrics(policy, ours):
            if len(ours) > 1 and problem not in self._said:
                self._said.add(problem)
                logger.warning("%s: retention: %s. By that rule all are kept", self._root, problem)

    def _kept(self, newest_first: Sequence[str], protected: frozenset[str], ours: Sequence[Manifest]) -> set[str]:
        safe = {name for name in newest_first if name in protected} | set(newest_first[:1])
        if self._policy is not None:
            ids = self._policy.keep(ours)
            return safe | {name for name, manifest in zip(newest_first, ours, strict=False) if manifest.save_id in ids}
        assert self._limit is not None
        others = [name for name in newest_first if name not in safe]
        return safe | set(others[: max(self._limit - len(safe), 0)])


def _trainers_own(root: str, ours: Collection[str]) -> list[str]:
    """Return the names of the checkpoints that Trainer itself wrote, latest step first.

    They are older than all of ours.
    """
    with os.scandir(root) as entries:
        found = [e.name for e in entries if e.name not in ours and e.is_dir(follow_symlinks=False)]
    steps = {name: int(match[1]) for name in found if (match := _OF_A_STEP.fullmatch(name)) is not None}
    own = [name for name, step in steps.items() if _is_trainers_own(os.path.join(root, name), step)]
    return sorted(own, key=steps.__getitem__, reverse=True)


def _is_trainers_own(directory: str, step: int) -> bool:
    if os.path.lexists(os.path.join(directory, names.MANIFEST)):
        return False  # ours and broken: do not touch it
    with contextlib.suppress(OSError, ValueError, RecursionError):
        state: Any = bounded_json.loads(read_regular(os.path.join(directory, names.TRAINER_STATE)))
        return isinstance(state, dict) and state.get("global_step") == step
    return False
