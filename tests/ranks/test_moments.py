"""FSDP models saved after an evaluation, between forward and backward, in mixed precision, and changed while they are copied."""

from __future__ import annotations

from pathlib import Path

from .launch import run_ranks


def test_awkward_moments_and_changes_during_the_copy(tmp_path: Path) -> None:
    """Six kinds of FSDP on two ranks: each file holds what torch gathers, and the losses are those without saves.

    A change of a parameter or of its local tensor while it is copied fails the save on both ranks; the next save is exact. A
    step of AdamW, however it is implemented, waits for the copy.
    """
    for report in run_ranks("moments.py", 2, str(tmp_path)):
        assert len(report) == 8
        for way, seen in report.items():
            assert len(seen) >= 5, way
            assert all(seen.values()), (way, seen)
