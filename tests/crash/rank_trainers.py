"""One rank of a DDP training that does what the test tells it, in a child of a nursery."""

from __future__ import annotations

import json
import logging
import os
import random
import time
import warnings
from typing import TYPE_CHECKING, Any

import anyio._backends._asyncio  # noqa: F401  (so that no child has to)
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.parallel

import vembed_async_ckpt._engine.patience as patience_of_ranks
from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, SaveHandle, load

if TYPE_CHECKING:
    from .nursery import Talk


class Position:
    """A data loader's place, as far as a checkpoint sees it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "seen": torch.tensor([self.value]) if isinstance(self.value, int) else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Rank:
    checkpointer: AsyncCheckpointer

    def __init__(self, root: str, rank: int, world_size: int, port: int, floats: int, options: dict[str, Any]) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
        dist.init_process_group("gloo")
        self.rank = rank
        self.root = root
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(rank)
        self.model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(floats, 1, bias=False))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.position = Position(100 + rank)
        self.options = options
        self.handles: dict[int, SaveHandle] = {}
        self.calls: list[float] = []
        self.said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("vembed_async_ckpt").addHandler(handler)

    def make(self) -> str:
        self.checkpointer = AsyncCheckpointer(self.root, **self.options)
        return "made"

    def warned(self) -> str:
        """What was logged since it was asked last."""
        said, self.said = self.said, []
        return json.dumps(said)

    def step(self) -> str:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, self.model.module.in_features)).sum().backward()
        self.optimizer.step()
        return "done"

    def save(self, step: int, position: Any = None, extra: Any = None) -> str:
        if position is not None:
            self.position.value = {"unsavable": object(), "large": "x" * (11 << 20)}.get(position, position)
        extra = object() if extra == "unsavable" else extra
        begun = time.monotonic()
        try:
            self.handles[step] = self.checkpointer.save(
                step, model=self.model, optimizer=self.optimizer, dataloader=self.position, extra=extra
            )
        except CheckpointError as error:
            return f"{type(error).__name__}: {error}"
        self.calls.append(time.monotonic() - begun)
        return "called"

    def longest_call(self) -> str:
        """Seconds of the longest `save()` but for the first, which is cold."""
        return str(max(self.calls[1:]))

    def result(self, step: int) -> str:
        try:
            info = self.handles[step].result(60)
        except (CheckpointError, TimeoutError) as error:
            return f"{self.handles[step].state.name} {type(error).__name__}: {error}"
        assert info.step == step
        return f"COMMITTED {info.path} {sorted(info.files)}"

    def staged(self, step: int) -> str:
        self.handles[step].wait_staged(60)
        return "staged"

    def rest(self, seconds: float) -> str:
        time.sleep(seconds)
        return "rested"

    def draw(self) -> str:
        return json.dumps([random.random(), float(np.random.rand()), torch.rand(1).item(), self.position.value])

    def restore(self, path: str) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(path, model=self.model, optimizer=self.optimizer, dataloader=self.position)
        return " ".join(["restored", *(str(warning.message) for warning in caught)])

    def keys(self) -> str:
        engine: Any = self.checkpointer._engine
        return str(engine._ranks._server.num_keys())

    def writer(self) -> str:
        return str(self.checkpointer.statistics()["writer_pid"])

    def close(self) -> str:
        self.checkpointer.close(60)
        return "closed"


def run(
    talk: Talk,
    root: str,
    rank: int,
    world_size: int,
    port: int,
    floats: int = 1000,
    patience: dict[str, float] | None = None,
    makers: list[int] | None = None,
    **options: Any,
) -> None:
    """Make a checkpointer, on the ranks among `makers` (None: all).

    Do what is said (`[method, arguments]` as JSON), and say what came of it, until nothing is said any more."""
    for name, seconds in (patience or {}).items():
        setattr(patience_of_ranks, name, seconds)
    self = Rank(root, rank, world_size, port, floats, options)
    if makers is None or rank in makers:
        self.make()
    talk.say("READY")
    while message := talk.listen():
        method, arguments = json.loads(message)
        talk.say(f"ANSWER {getattr(self, method)(*arguments)}")
