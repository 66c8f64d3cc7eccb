"""Starts the ranks of a distributed training as processes of this machine, and returns what each of them reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import vembed_async_ckpt

SCRIPTS = Path(__file__).parent / "scripts"
PACKAGE = str(Path(vembed_async_ckpt.__file__).parents[1])


def kill(ranks: list[subprocess.Popen[str]]) -> None:
    for rank in ranks:
        rank.kill()


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
        outputs = [("", "")] * world_size
        try:
            with ThreadPoolExecutor(world_size) as threads:
                reading = {threads.submit(rank.communicate, timeout=patience): n for n, rank in enumerate(ranks)}
                for done in as_completed(reading):
                    outputs[reading[done]] = done.result()
                    if ranks[reading[done]].returncode:  # the others would wait for it
                        kill(ranks)
        finally:
            kill(ranks)
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(err for _, err in outputs)
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]
