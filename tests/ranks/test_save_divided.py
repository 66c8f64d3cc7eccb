"""Trainings that are divided among ranks save as one process does (gloo, on the CPU)."""

from __future__ import annotations

from pathlib import Path

import pytest

from .launch import run_ranks


@pytest.mark.parametrize(
    ("world_size", "ways"), [(2, ["fsdp2", "fsdp1", "tp"]), (4, ["fsdp2", "fsdp1", "hsdp", "fsdp2_tp"])]
)
def test_a_divided_training_is_saved_and_goes_on(tmp_path: Path, world_size: int, ways: list[str]):
    """Each file is what safetensors writes of the gathered state, bit for bit, after training steps, after an evaluation, and
    between forward and backward. The losses are those of a training that does not save. What one rank cannot save is
    refused on all of them."""
    reports = run_ranks("saving.py", world_size, str(tmp_path), *ways)
    for way in ways:
        for rank, report in enumerate(reports):
            of_way = report[way]
            assert of_way["losses equal"], (way, rank)
            assert of_way["steps"] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
            assert {"model.safetensors", "optimizer.safetensors"} <= set(of_way["files"])
            assert {f"vembed_rank_state_{n}.json" for n in range(1, world_size)} <= set(of_way["files"])
            assert all("object" in text for text in of_way["refused"]), of_way
            assert of_way["refused in"] < 10.0
        assert reports[0][way]["differing"] == [[], [], []], way
        assert reports[0][way]["rewritten"]
