"""One of two ranks: loads into an FSDP2 model what cannot be loaded there, or not by both ranks.

refusing.py DIRECTORY. Prints, by case, what was raised and whether anything changed, as JSON.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import networks

from vembed_async_ckpt import CheckpointError, load, loading
from vembed_async_ckpt._disk import manifests, reading
from vembed_async_ckpt._restore import agreement

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Rank:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "checkpoint-7"
        self.training = networks.Training(1, networks.fsdp2)
        self.training.step(99)
        self.report: dict[str, Any] = {}

    def state(self) -> list[torch.Tensor]:
        entries = self.training.optimizer.state.values()
        tensors = [*self.training.model.parameters(), *(value for entry in entries for value in entry.values())]
        return [(t.to_local() if hasattr(t, "to_local") else t).clone() for t in tensors]

    def attempt(self, case: str, call: Callable[[], Any], **facts: Any) -> None:
        before = self.state()
        try:
            call()
            raised = "nothing"
        except CheckpointError as error:
            raised = f"{type(error).__name__}: {error}"
        unchanged = all(map(torch.equal, before, self.state()))
        self.report[case] = {"raised": raised, "unchanged": unchanged, **facts}
        dist.barrier()

    def load(self, path: Path | None = None, **options: Any) -> Any:
        return load(path or self.path, **{**self.training.parts(), **options})

    def one_refuses(self) -> None:
        options = {"exclude": "no.such.name"} if RANK else {}
        self.attempt("one refuses", lambda: self.load(**options))

    def one_is_late(self) -> None:
        agreement.PATIENCE = 1.0
        if RANK:
            dist.barrier()
            self.attempt("one is late", self.load)
        else:
            self.attempt("one is late", self.load)
            dist.barrier()
        agreement.PATIENCE = 60.0

    def other_directories(self) -> None:
        self.attempt("other directories", lambda: self.load(self.directory / f"checkpoint-{7 + RANK}"))

    def another_model(self) -> None:
        def other(net: networks.Net) -> Any:
            net.blocks[0].up = torch.nn.Linear(networks.WIDTH, 17)
            return networks.fsdp2(net)

        other_model = networks.Training(3, other)
        self.attempt("another model", lambda: load(self.path, model=other_model.model))
        expected = torch.load(self.directory / "expected.pt", weights_only=True)["state"]
        load(self.path, model=other_model.model, strict=False, exclude="blocks.1")
        head = torch.equal(other_model.model.head.weight.full_tensor(), expected["head.weight"])
        kept = torch.equal(other_model.model.blocks[1].up.weight.full_tensor(), expected["blocks.1.up.weight"])
        self.report["another model"]["what fits"] = head and not kept

    def changed_bytes(self) -> None:
        """Every rank is told of a file that one of them has hashed, and no file is hashed twice."""
        hashed: list[str] = []
        plain = manifests._hash

        def counted(fd: int, path: str, *rest: Any) -> str:
            hashed.append(os.path.basename(path))
            return plain(fd, path, *rest)

        manifests._hash = counted  # type: ignore[assignment]
        self.attempt("whole", lambda: self.load(verify="full"))
        files = list(hashed)
        damaged = self.directory / "damaged"
        if RANK == 0:
            shutil.copytree(self.path, damaged)
            with (damaged / "optimizer.bin").open("r+b") as file:
                file.seek(-2000, os.SEEK_END)
                byte = file.read(1)[0]
                file.seek(-2000, os.SEEK_END)
                file.write(bytes([byte ^ 1]))
        dist.barrier()
        self.attempt("changed bytes", lambda: self.load(damaged, verify="full"), hashed=files)
        manifests._hash = plain

    def a_failing_disk(self) -> None:
        plain = loading._restore

        def failing(*args: Any) -> Any:
            def fail(fd: int, buffers: Any, offset: int) -> int:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            read, reading._preadv = reading._preadv, fail if RANK else reading._preadv
            try:
                return plain(*args)
            finally:
                reading._preadv = read

        loading._restore = failing
        self.attempt("a failing disk", self.load)
        loading._restore = plain

    def another_save_takes_the_name(self) -> None:
        """Rank 1 opens the directory after another save has taken the name, rank 0 before: both load the later one."""
        store = dist.distributed_c10d._get_default_store()
        shutil.copytree(self.path, self.directory / "later", dirs_exist_ok=True) if RANK == 0 else None
        dist.barrier()
        if RANK == 0:
            plan = loading._plan

            def planned(*args: Any) -> Any:
                found = plan(*args)
                store.set("planned", "yes")
                store.wait(["swapped"])
                return found

            loading._plan = planned
        else:
            manifest_of = loading.manifest_of

            def swapped(directory: str) -> Any:
                if not store.check(["swapped"]):
                    store.wait(["planned"])
                    (self.directory / "checkpoint-7").rename(self.directory / "earlier")
                    (self.directory / "checkpoint-8").rename(self.directory / "checkpoint-7")
                    store.set("swapped", "yes")
                return manifest_of(directory)

            loading.manifest_of = swapped
        restored: list[Any] = []
        self.attempt("another save", lambda: restored.append(self.load()))
        self.report["another save"]["step"] = restored[0].step

    def goes_on(self) -> None:
        losses = self.training.steps(range(3))
        self.report["goes on"] = all(loss == loss for loss in losses)


def main(directory: Path) -> None:
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=RANK, world_size=WORLD)
    rank = Rank(directory)
    rank.one_refuses()
    rank.one_is_late()
    rank.other_directories()
    rank.another_model()
    rank.changed_bytes()
    rank.a_failing_disk()
    rank.another_save_takes_the_name()
    rank.goes_on()
    print(json.dumps(rank.report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]))
