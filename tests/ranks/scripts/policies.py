"""One of several ranks that ask `should_save()` under policies that clocks, requests and metrics decide. Prints JSON."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from vembed_async_ckpt import AsyncCheckpointer, StageError
from vembed_async_ckpt._engine import patience
from vembed_async_ckpt.policies import SavePolicy, before_time_limit, budget, every, on_best, on_request

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
ROOT = Path(sys.argv[1])


def train(name: str, policy: SavePolicy, seconds: float, *, together: bool = True, metrics: bool = False) -> list[int]:
    """The steps at which this rank saved. With `together` each step waits for the others."""
    model = torch.nn.Linear(8, 8)
    saved = []
    pace = random.Random(RANK)
    over = torch.zeros(1)
    with AsyncCheckpointer(ROOT / name, policy=policy) as checkpointer:
        begun = time.monotonic()
        for step in range(1, sys.maxsize):
            time.sleep(pace.uniform(0.0, 0.004))
            if together:
                dist.all_reduce(torch.ones(1))
            # each rank has its own loss: that of the first one counts
            loss = {"loss": abs(20.0 - step) + RANK * random.random()} if metrics else None
            if checkpointer.should_save(step, loss):
                if name != "request" or RANK == 0:  # or only the first rank saves
                    checkpointer.save(step, model=model, metrics=loss)
                saved.append(step)
            if name == "request" and step == 40 and RANK == WORLD - 1:
                signal.raise_signal(signal.SIGUSR2)
            if step % 20 == 0:
                over.fill_(time.monotonic() - begun > seconds)
                dist.broadcast(over, 0)
                if over:
                    break
        checkpointer.wait(60)
    return saved


def main() -> None:
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=RANK, world_size=WORLD)
    patience.HOLD = 0.5
    saved = {
        "minutes": train("minutes", every(minutes=0.3 / 60) | every(steps=100), 2.0),
        "apart": train("apart", every(minutes=0.3 / 60), 2.0, together=False),
        "budget": train("budget", budget(percent=30), 3.0),
        "limit": train("limit", before_time_limit(minutes=0, end=time.time() + 1.0), 2.0),
        "request": train("request", on_request(), 3.0),
        "best": train("best", on_best("loss"), 0.5, metrics=True),
    }
    patience.AGREE = 0.5
    with AsyncCheckpointer(ROOT / "silent", policy=on_best("loss")) as checkpointer:
        said = ""
        try:
            if RANK:
                checkpointer.should_save(1, {"loss": 1.0})
        except StageError as error:
            said = str(error)
        dist.barrier()
    print(json.dumps({"saved": saved, "said": said}))
    dist.destroy_process_group()


main()
