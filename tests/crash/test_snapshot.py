"""A thousand saves, each overwritten by the training right after the call: every checkpoint is the state at its call.

Plus what the state may be made of, and `latest` at every moment of it.
"""

from __future__ import annotations

import random
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from vembed_async_ckpt import AsyncCheckpointer, CheckpointerClosed, KeepLast, SaveHandle, latest, load, verify
from vembed_async_ckpt._disk import lock, manifests
from vembed_async_ckpt._disk.catalog import scan
from vembed_async_ckpt._format.manifest import Manifest
from vembed_async_ckpt._memory import host_copy
from vembed_async_ckpt._memory.barrier import STEP_BARRIER

from .conftest import Tally

STEP_BARRIER.install()  # as a checkpointer does: the optimizers of these tests step before theirs is made
PATIENCE = 60.0
SAVES = 250  # for each of four ways
LOOKS = 3000  # of `latest`


class Odd(torch.nn.Module):
    """Tied, transposed, sliced, empty, scalar; float32, bfloat16, float8, integers, complex."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.brain = torch.nn.Parameter(torch.randn(3, 5).bfloat16())
        self.transposed = torch.nn.Parameter(torch.randn(5, 3).t())
        whole = torch.randn(8, 6)
        self.view = torch.nn.Parameter(whole[2:4])
        self.strided = torch.nn.Parameter(whole[4:, ::2])
        self.none = torch.nn.Parameter(torch.empty(0, 3))
        self.register_buffer("eight", torch.randn(9).to(torch.float8_e4m3fn))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("wave", torch.randn(2, dtype=torch.complex64))

    def loss(self) -> torch.Tensor:
        tensors = [p for p in self.parameters() if p.numel()]
        return torch.stack([(p.float() * torch.randn_like(p.float())).sum() for p in tensors]).sum()


class Training:
    """A model, an optimizer and a scheduler; the generators are the process's."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Odd()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.999)
        for _ in range(2):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model.loss().backward()
        self.optimizer.step()
        self.scheduler.step()

    def buffers(self) -> None:
        """Other values in all that no optimizer changes."""
        self.model.count += 1
        self.model.mask.logical_not_()
        self.model.wave += 1
        self.model.eight.copy_(torch.randn(9).to(torch.float8_e4m3fn))

    def overwrite(self) -> None:
        """Garbage in every tensor there is, at once and in place."""
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.copy_(torch.randint(0, 2, tensor.shape).to(tensor.dtype))
        self.scheduler.step()

    def tensors(self) -> list[torch.Tensor]:
        found = [*self.model.parameters(), *self.model.buffers()]
        return found + [value for state in self.optimizer.state.values() for value in state.values()]

    def digest(self) -> str:
        """A hash of every bit of the state, the generators' too."""
        digest = xxhash.xxh3_128()
        for tensor in self.tensors():
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(repr(self.scheduler.state_dict()).encode())
        digest.update(repr(self.optimizer.param_groups[0]["lr"]).encode())
        digest.update(torch.get_rng_state().numpy().tobytes())
        digest.update(repr(random.getstate()).encode())
        digest.update(np.random.get_state()[1].tobytes())
        return digest.hexdigest()

    def save(self, checkpointer: AsyncCheckpointer, step: int) -> SaveHandle:
        return checkpointer.save(step, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)


@pytest.mark.parametrize("staging", ["blocking", "overlap"])
@pytest.mark.parametrize("writer", ["thread", "process"])
def test_everything_is_overwritten_right_after_the_call(
    tally: Tally, memory: Path, writer: str, staging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hash of what comes back equals the hash at the call: tensors, step, learning rate, scheduler and generators."""
    if writer == "process":
        monkeypatch.setattr(host_copy, "SMALL_BYTES", 7)  # else all of this model is copied at once
    training, back = Training(1), Training(2)
    tied = back.model.embedding.weight.data_ptr()
    seen = set()
    with AsyncCheckpointer(memory / "root", writer=writer, staging=staging, retention=KeepLast(1)) as checkpointer:
        for n in range(SAVES):
            random.random()
            np.random.random()
            torch.rand(1)
            expected = training.digest()
            handle = training.save(checkpointer, n)
            if staging == "overlap":
                training.buffers()
                training.step()
                handle.wait_staged(PATIENCE)
            training.overwrite()
            random.random()
            path = handle.result(PATIENCE).path
            before = torch.get_rng_state(), random.getstate(), np.random.get_state()
            restored = load(path, model=back.model, optimizer=back.optimizer, scheduler=back.scheduler, verify="full")
            problems = [] if back.digest() == expected else ["not the state at the call"]
            if (restored.step, handle.step) != (n, n):
                problems.append(f"step {restored.step}")
            if expected in seen:
                problems.append("the training stood still: this tests nothing")
            seen.add(expected)
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])
            tally.fault(n, problems)
    assert back.model.head.weight.data_ptr() == back.model.embedding.weight.data_ptr() == tied
    assert checkpointer.statistics()["committed"] == SAVES
    tally.settle(at_least=SAVES)


def test_two_threads_save_one_training(tally: Tally, memory: Path) -> None:
    """What both say is true at the same time: each checkpoint is the state that its thread saw at its call."""
    training = Training(3)
    turn, failed = threading.Lock(), []
    expected: dict[int, str] = {}
    with AsyncCheckpointer(memory / "root", writer="thread", staging="blocking", max_in_flight=2) as checkpointer:

        def work(which: int) -> None:
            try:
                for n in range(10):
                    with turn:  # the training is one; only waiting for the arena, and what follows, is at once
                        expected[10 * which + n] = training.digest()
                        handle = training.save(checkpointer, 10 * which + n)
                        training.overwrite()
                        training.step()
                    handle.result(PATIENCE)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert not failed
    back = Training(4)
    for step, digest in expected.items():
        load(
            memory / "root" / f"checkpoint-{step}",
            model=back.model,
            optimizer=back.optimizer,
            scheduler=back.scheduler,
            verify="full",
        )
        tally.fault(step, [] if back.digest() == digest else ["not the state at the call"])
    tally.settle(at_least=20)


@pytest.mark.parametrize("writer", ["thread", "process"])
def test_a_second_checkpointer_on_the_root(tally: Tally, memory: Path, writer: str) -> None:
    """In the same process it takes the root over: the saves that are under way are finished, and the first one takes no more."""
    model = Odd()
    first = AsyncCheckpointer(memory / "root", writer=writer)
    handle = first.save(1, model=model)
    with pytest.warns(UserWarning, match="was not closed"):
        second = AsyncCheckpointer(memory / "root", writer=writer)
    with second:
        verify(handle.result(PATIENCE).path)
        with pytest.raises(CheckpointerClosed):
            first.save(2, model=model)
        verify(second.save(3, model=model).result(PATIENCE).path)
    tally.fault(writer, [])
    tally.settle(at_least=1)


def test_latest_while_a_trainer_starts(tally: Tally, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds the lock is not written down yet at the first look, and is at the second: a living trainer is not waited for."""
    held = lock.RootLock.acquire(str(memory / "root"))
    real, first = lock._holder, iter([True])
    monkeypatch.setattr(lock, "_holder", lambda fd: None if next(first, False) else real(fd))
    try:
        assert latest(memory / "root") is None
    finally:
        held.close()
    tally.fault("start", [])
    tally.settle(at_least=1)


def test_latest_of_a_name_that_is_given_again_while_it_looks(
    tally: Tally, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone when the manifest is read, another checkpoint there when it asks whether the directory is: nothing is broken."""
    root, read = memory / "root", manifests.read
    with AsyncCheckpointer(root) as checkpointer:
        for step in (0, 1):
            checkpointer.save(step, model=torch.nn.Linear(2, 2)).result(PATIENCE)
    newest = root / "checkpoint-1"
    spares = [shutil.copytree(newest, memory / f"spare-{n}") for n in range(2)]

    def unlucky(directory: str) -> Manifest:
        if directory != str(newest) or not spares:
            return read(directory)
        newest.rename(memory / f"gone-{len(spares)}")
        try:
            return read(directory)
        finally:
            spares.pop().rename(newest)

    monkeypatch.setattr(manifests, "read", unlucky)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = latest(root)
    tally.fault(
        "given again", [str(w.message) for w in said] + ([] if (found, spares) == (newest, []) else [f"{found}"])
    )
    tally.settle(at_least=1)


@pytest.mark.parametrize("writer", ["thread", "process"])
def test_latest_at_any_moment(tally: Tally, memory: Path, writer: str) -> None:
    """While saves, replacements and retention run: whole, never older than what was acknowledged, and nothing to warn of."""
    root = memory / "root"
    model = torch.nn.Linear(16, 16)
    stop, acknowledged = threading.Event(), [0]
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with AsyncCheckpointer(root, writer=writer, retention=KeepLast(2)) as checkpointer:
                n = 0
                while not stop.is_set():
                    n += 1
                    with torch.no_grad():
                        model.weight.fill_(n)
                    info = checkpointer.save(n % 3, model=model, metrics={"n": n}).result(PATIENCE)
                    assert info.step == n % 3
                    acknowledged[0] = n
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    looks, seen = 0, set()
    try:
        while thread.is_alive() and (looks < LOOKS or len(seen) < 20):
            least = acknowledged[0]
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = latest(root, verify="size" if looks % 4 else "full")
            problems = [str(warning.message) for warning in said]
            if found is None:
                problems += ["None"] if least else []
            else:
                newest = max((e.manifest.metrics["n"] for e in scan(str(root)) if e.manifest), default=0)
                seen.add(newest)
                problems += [] if newest >= least else [f"{newest} after {least}"]
            looks += 1
            tally.fault(looks, problems)
    finally:
        stop.set()
        thread.join(PATIENCE)
    assert not failed
    tally.what = "looks"
    tally.settle(at_least=LOOKS)
