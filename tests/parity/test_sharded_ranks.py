"""Sharded models on two ranks (gloo, on the CPU), saved when their parameters look whole: the training goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vembed_async_ckpt
from vembed_async_ckpt import verify

SCRIPT = Path(__file__).parent / "scripts" / "sharded_ranks.py"
PACKAGE = str(Path(vembed_async_ckpt.__file__).parents[1])
PATIENCE = 120.0  # seconds; it takes a tenth of that on an idle machine


def run(how: str, directory: Path) -> list[dict[str, Any]]:
    """What each rank reports."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGE, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), how, str(directory), str(rank)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=PATIENCE) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.parametrize("how", ["root", "blocks"])
def test_a_save_right_after_an_evaluation_leaves_the_training_as_it_is(tmp_path: Path, how: str):
    """After an evaluation the parameters of an FSDP2 model look whole. save() writes them all the same, and the losses of the next
    steps are those of a run without a save."""
    for report in run(how, tmp_path):
        assert "Parameter" in report["before"], "the evaluation left the root's parameters whole"
        assert report["raised"] == "nothing"
        assert set(report["after"]) == {"DTensor"}
        assert report["goes on"]
    assert len(verify(tmp_path / "checkpoints" / "checkpoint-1").files) > 3


def test_save_state_refuses_a_sharded_model_on_every_rank(tmp_path: Path):
    """Also after an evaluation. The parameters stay as they were, and the training goes on as without it."""
    for report in run("accelerate", tmp_path):
        assert "Parameter" in report["before"], "the evaluation left the root's parameters whole"
        assert "sharded by FSDPModule" in report["raised"]
        assert report["after"] == report["before"]
        assert report["goes on"]
