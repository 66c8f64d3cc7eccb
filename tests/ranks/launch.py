"""Starts the ranks of a distributed training as processes of this machine, and returns what each of them reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import vembed_async_ckpt

SCRIPTS = Path(__file__).parent / "scripts"
PACKAGE = str(Path(vembed_async_ckpt.__file__).parents[1])


def run_ranks(script: str, world_size: int, *arguments: str, patience: float = 240.0) -> list[dict[str, Any]]:
    """Run `scripts/SCRIPT` on `world_size` ranks. Return the JSON that each rank prints as its last line."""
    with tempfile.TemporaryDirectory() as directory:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGE, "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size), "RENDEZVOUS": f"file://{directory}/store",
        }  # fmt: skip
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(SCRIPTS / script), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [rank.communicate(timeout=patience) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(err for _, err in outputs)
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]
