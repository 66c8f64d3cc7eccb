"""Sharded models on two ranks (gloo, on the CPU): refused on both, and the training goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vembed_async_ckpt

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


@pytest.mark.parametrize("how", ["root", "blocks", "accelerate"])
def test_a_sharded_model_is_refused_on_every_rank_and_trains_on(tmp_path: Path, how: str):
    """After an evaluation the parameters of an FSDP2 model look whole. save() raises PlanError on both ranks, the parameters stay
    as they were, and the losses of the next steps are those of a run without a save."""
    for report in run(how, tmp_path):
        assert "Parameter" in report["before"], "the evaluation left the root's parameters whole"
        assert "sharded by FSDPModule" in report["raised"]
        assert report["after"] == report["before"]
        assert report["goes on"]
