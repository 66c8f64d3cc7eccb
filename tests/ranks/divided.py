"""One rank of a training whose tensors are divided among the ranks, without a model and without collectives.

Run as a child of a nursery. The test tells it what to do. What a rank holds follows from its number, and every element
from its position and the number of optimizer steps: so the test knows every byte that a checkpoint must hold.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio._backends._asyncio  # noqa: F401  (so that no child has to)
import torch
import torch.distributed as dist

import vembed_async_ckpt._engine.patience as patience_of_ranks
from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, KeepLast, SaveHandle
from vembed_async_ckpt._capture import request as requests
from vembed_async_ckpt._capture import training_state
from vembed_async_ckpt._engine import copying, node_exchange, sharded_follower
from vembed_async_ckpt._engine import leader as leaders
from vembed_async_ckpt._engine.ranks import Ranks
from vembed_async_ckpt._format.plan import TensorContent
from vembed_async_ckpt._format.ranges import Box, Run
from vembed_async_ckpt._format.safetensors import TensorSpec
from vembed_async_ckpt._memory import staging
from vembed_async_ckpt._tensor_guard import TensorGuard
from vembed_async_ckpt.errors import PlanError

if __package__:
    from . import networks
else:  # imported by the nursery, so that no child has to
    import networks
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel

if TYPE_CHECKING:
    from ..crash.nursery import Talk

STEP = 1000.0  # what an optimizer step adds to every element


def layout(world_size: int, rows: int, order: str) -> dict[str, tuple[int, ...]]:
    """Whole shapes by name: cut by rows, by columns, and as a run of elements that ends anywhere in a row."""
    shapes = {"a.rows": (rows, 96), "b.columns": (rows, 16 * world_size), "c.flat": (rows + 1, 7)}
    return dict(reversed(shapes.items())) if order == "other" else shapes


def start_value(shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 997).reshape(shape).float()


def cut(size: int, parts: int, number: int) -> tuple[int, int]:
    """The first index and the count of one part, as torch.chunk cuts."""
    step = -(-size // parts)
    first = min(size, number * step)
    return first, min(size, first + step) - first


class Part:
    """What this rank holds of all tensors: parameters of an optimizer, so that they can be copied late."""

    def __init__(self, rank: int, world_size: int, rows: int, order: str) -> None:
        self.shapes = layout(world_size, rows, order)
        self.regions: dict[str, Box | Run] = {}
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for name, shape in self.shapes.items():
            whole = start_value(shape)
            if name == "c.flat":
                first, count = cut(whole.numel(), world_size, rank)
                region: Box | Run = Run(first, count)
                local = whole.reshape(-1)[first : first + count]
            else:
                dim = int(name == "b.columns")
                first, count = cut(shape[dim], world_size, rank)
                start, size = [0, 0], list(shape)
                start[dim], size[dim] = first, count
                region, local = Box(tuple(start), tuple(size)), whole.narrow(dim, first, count)
            if local.numel():
                self.regions[name] = region
                self.parameters[name] = torch.nn.Parameter(local.contiguous().clone())
        self.optimizer = torch.optim.SGD(self.parameters.values(), lr=1.0)

    def step(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = torch.full_like(parameter, -STEP)
        self.optimizer.step()


@dataclass(frozen=True)
class Request(requests.Request):
    names: list[str] = field(default_factory=list)
    claimed: str = ""

    def outline(self) -> list[str]:
        return [f"model.safetensors: {name}" for name in self.names]

    def claims(self) -> bytes:
        return self.claimed.encode()

    def check_claims(self, claims: list[bytes]) -> str | None:
        return "the claims do not fit" if b"misfit" in claims else None


class Reader:
    """Stands for the reader of models and optimizers. `model` is a `Part`."""

    def __init__(self, *arguments: Any, rank: int = 0, gather: Any = None, **options: Any) -> None:
        self.rank = rank
        self.gather = gather
        self.contents: dict[tuple[str, ...], tuple[TensorContent, ...]] = {}

    def read(self, directory: str, step: int | None, objects: Any) -> Request:
        part: Part = objects.model
        extra = objects.extra or {}
        if extra.get("refuse") == self.rank:
            raise PlanError(f"weight: cannot be saved on rank {self.rank}")
        if extra.get("gather"):
            told = self.gather(f"rank {self.rank}".encode())
            assert told == [f"rank {rank}".encode() for rank in range(len(told))], told
        names = list(part.shapes)
        if extra.get("differ") == self.rank:
            names[0] = "renamed"
        specs = tuple(TensorSpec(name, "F32", shape) for name, shape in part.shapes.items())
        contents = self.contents.setdefault(
            tuple(names), (TensorContent("model.safetensors", specs, {"format": "pt"}),)
        )
        order = [name for name in part.shapes if name in part.regions]
        owners = [part.parameters[name] for name in order]
        tensors = [parameter.detach() for parameter in owners]
        state = training_state.capture(objects.dialect, 1, step, {}, {}, None, None, {"rank": 0}, {}, None)
        described: Any = SimpleNamespace(labels=order, owners=owners, tensors=tensors, looks=TensorGuard(tensors))
        return Request(
            directory=directory,
            step=step,
            save_id=os.urandom(16).hex(),
            contents=contents,
            parts=[described],
            tensors=list(tensors),
            volatile=frozenset(),
            optimizers=(),
            state=state,
            files=[],
            links=[],
            manifest={"world_size": 1, "time": time.time(), "versions": {}, "metrics": {}, "names": {}},
            regions=[(list(part.shapes).index(name), part.regions[name]) for name in order],
            wrappers=[None] * len(order),
            digest="/".join(names).encode(),
            names=names,
            claimed="misfit" if extra.get("misfit") == self.rank else "fits",
        )


class Rank:
    checkpointer: AsyncCheckpointer

    def __init__(self, root: str, rank: int, world_size: int, port: int, rows: int, options: dict[str, Any]) -> None:
        self.root, self.rank, self.world_size, self.rows, self.options = root, rank, world_size, rows, options
        store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=20))
        Ranks.of_this_process = classmethod(  # type: ignore[method-assign, assignment]
            lambda cls, root: cls(dist.PrefixStore(f"test{root}", store.clone()), rank, world_size, store)
        )
        requests.Objects.is_sharded = lambda self: True  # type: ignore[method-assign]
        leaders.RequestReader = sharded_follower.RequestReader = Reader  # type: ignore[misc, assignment]
        self.parts = {order: Part(rank, world_size, rows, order) for order in ("this", "other")}
        self.handles: dict[int, SaveHandle] = {}
        self.go_on = threading.Event()
        self.answered = threading.Event()  # what was asked last has been answered
        self.said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("vembed_async_ckpt").addHandler(handler)

    def make(self) -> str:
        self.checkpointer = AsyncCheckpointer(self.root, **self.options)
        return "made"

    def warned(self) -> str:
        said, self.said = self.said, []
        return json.dumps(said)

    def step(self, order: str = "this") -> str:
        self.parts[order].step()
        return "done"

    def save(self, step: int, order: str = "this", extra: dict[str, Any] | None = None) -> str:
        """Save, and say how the call ended and how long it took in seconds."""
        begun = time.monotonic()
        try:
            self.handles[step] = self.checkpointer.save(step, model=self.parts[order], extra=extra)
        except CheckpointError as error:
            return f"{type(error).__name__} {time.monotonic() - begun:.2f}: {error}"
        return f"called {time.monotonic() - begun:.2f}"

    def result(self, step: int) -> str:
        begun = time.monotonic()
        try:
            info = self.handles[step].result(60)
        except (CheckpointError, TimeoutError) as error:
            name = self.handles[step].state.name
            return f"{name} {time.monotonic() - begun:.2f} {type(error).__name__}: {error}"
        return f"COMMITTED {sorted(info.files)}"

    def state(self, step: int) -> str:
        return self.handles[step].state.name

    def fork(self) -> str:
        """Fork a child behind Python's back, as libraries do: it keeps every descriptor, and lives for some seconds."""
        libc = ctypes.CDLL(None)
        if libc.fork() == 0:
            libc.sleep(15)
            libc._exit(0)
        return "forked"

    def statistics(self) -> str:
        return json.dumps(self.checkpointer.statistics())

    def writer(self) -> str:
        return str(self.checkpointer.statistics()["writer_pid"])

    def change(self, order: str = "this") -> str:
        """Change a tensor without an optimizer step, as it may be copied now."""
        for parameter in self.parts[order].parameters.values():
            parameter.data.add_(1)
        return "changed"

    def replace(self, order: str = "this") -> str:
        """A step that gives every parameter new memory, and does not wait for copies."""
        for parameter in self.parts[order].parameters.values():
            parameter.data = parameter.data + STEP
        return "done"

    def copy_now(self) -> str:
        """From now on nothing is copied late."""
        engine: Any = self.checkpointer._engine
        planner = engine._planner if self.rank == 0 else engine._sharded._planner
        planner.overlap = False
        return "done"

    def stop_in_late_copy(self) -> str:
        """The next late copy stops this process when half is copied, and goes on when it is told to."""
        real = staging.copy_group

        def copy(to: list[torch.Tensor], of: list[torch.Tensor]) -> None:
            staging.copy_group = real
            real(to[:1], of[:1])
            assert self.answered.wait(60), "the call of save() has not returned"
            os.kill(os.getpid(), signal.SIGSTOP)
            assert self.go_on.wait(60)
            real(to[1:], of[1:])

        staging.copy_group = copy
        return "will"

    def go(self) -> str:
        self.go_on.set()
        return "gone on"

    def fail_to_copy(self) -> str:
        """The next copy raises."""
        real = copying.copy_blocking

        def copy(to: Any, of: Any) -> None:
            copying.copy_blocking = real  # type: ignore[attr-defined]
            raise RuntimeError("planted")

        copying.copy_blocking = copy  # type: ignore[attr-defined]
        return "will"

    def die_in_copy(self) -> str:
        def copy(to: Any, of: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        copying.copy_blocking = copy  # type: ignore[attr-defined]
        return "will"

    def reuse_at_once(self) -> str:
        """Plant the bug that an arena is used again while another rank may still copy into it."""
        node_exchange.NodeExchange.hand_back = lambda self, arena, release, retire: release(arena)  # type: ignore[method-assign]
        return "planted"

    def close(self) -> str:
        self.checkpointer.close(60)
        return "closed"


def run(
    talk: Talk,
    root: str,
    rank: int,
    world_size: int,
    port: int,
    rows: int = 64,
    patience: dict[str, float] | None = None,
    **options: Any,
) -> None:
    """Do what is said (`[method, arguments]` as JSON), and say what came of it, until nothing is said any more."""
    for name, seconds in (patience or {}).items():
        setattr(patience_of_ranks, name, seconds)
    self = Rank(root, rank, world_size, port, rows, options)
    self.make()
    talk.say("READY")
    while message := talk.listen():
        self.answered.clear()
        method, arguments = json.loads(message)
        if method == "leave":
            return  # the interpreter exits, and nobody has closed the checkpointer
        talk.say(f"ANSWER {getattr(self, method)(*arguments)}")
        self.answered.set()


def serve_store(talk: Talk) -> None:
    """The process with the job's store."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    talk.say(f"PORT {store.port}")
    talk.listen()


def save_on(
    talk: Talk,
    root: str,
    rank: int,
    world_size: int,
    port: int,
    rows: int,
    first: int,
    patience: dict[str, float],
    **options: Any,
) -> None:
    """Train and save until something fails or the test has heard enough. Say each state of each save."""
    for name, seconds in patience.items():
        setattr(patience_of_ranks, name, seconds)
    self = Rank(root, rank, world_size, port, rows, {**options, "retention": KeepLast(3)})
    self.make()
    part = self.parts["this"]
    for parameter in part.parameters.values():
        parameter.data += first * STEP
    part.step()  # from now on its optimizer is known at the barrier
    talk.say(f"READY {self.writer()}")
    talk.listen()
    for step in range(first + 1, first + 1000):
        try:
            handle = self.checkpointer.save(step, model=part)
            part.step()
            handle.wait_staged(60)
            talk.say(f"STAGED {step}")
            handle.result(60)
            talk.say(f"COMMITTED {step}")
        except (CheckpointError, TimeoutError) as error:
            talk.say(f"FAILED {step} {type(error).__name__}: {error}")
            return


def train_on(
    talk: Talk, root: str, rank: int, world_size: int, port: int, first: int, way: str, patience: dict[str, float]
) -> None:
    """Train a network that is divided among the ranks, with collectives, and save each step. Say each state of each save."""
    for name, seconds in patience.items():
        setattr(patience_of_ranks, name, seconds)
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=20))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=20))
    training = networks.Training(0, networks.WAYS[way])
    training.step(first)  # now every group of ranks is connected
    checkpointer = AsyncCheckpointer(root, retention=KeepLast(3))
    talk.say(f"READY {checkpointer.statistics()['writer_pid']}")
    talk.listen()
    handle: SaveHandle | None = None
    for step in range(first + 1, first + 1000):
        try:
            training.step(step)
            handle = checkpointer.save(step, **training.parts())
            handle.wait_staged(60)
            talk.say(f"STAGED {step}")
            handle.result(60)
            talk.say(f"COMMITTED {step}")
        except (CheckpointError, TimeoutError) as error:
            talk.say(f"FAILED {step} {type(error).__name__}: {error}")
            return
        except RuntimeError as error:  # a collective lost a rank
            if handle is not None:
                handle.exception(60)
            talk.say(f"FAILED {step} in a collective: {error}")
            return
