"""The second device type is worth believing: copies with one step left out are noticed. Run by tests/gpu/test_second_device.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, load
from vembed_async_ckpt._memory import devices
from vembed_async_ckpt._memory.devices import DeviceCopies

from .cases_copies import differing, state_of, trained
from .device import Control


@pytest.fixture
def device() -> Iterator[Control]:
    """In place of the plugin's, which demands that nothing was released early."""
    yield torch.second.control  # type: ignore[attr-defined]
    torch.accelerator.synchronize()


class NoWait(DeviceCopies):
    def wait(self) -> None:
        self._held.clear()


class NoHoldBack(DeviceCopies):
    def hold_back(self) -> None:
        pass


class ReleasedEarly(DeviceCopies):
    def issue(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        super().issue(destinations, sources)
        self._held.clear()


class WrongStream(DeviceCopies):
    """The event behind the copies is recorded on the caller's stream."""

    def _issue_chunk(self, device: Any, side: Any, places: Any, aliases: Any) -> None:
        super()._issue_chunk(device, torch.Stream(device), places, aliases)


class Unresolved(DeviceCopies):
    """Conjugate views are copied as they are."""

    def _issue_chunk(self, device: Any, side: Any, places: Any, aliases: Any) -> None:
        self._copy(places, aliases)
        self._done.append((device, devices._mark(self._modules[device], side)))


MUTANTS = [DeviceCopies, NoWait, NoHoldBack, ReleasedEarly, WrongStream, Unresolved]


@pytest.mark.parametrize("copies", MUTANTS)
def test_a_mutant_is_noticed(
    tmp_path: Path, device: Control, monkeypatch: pytest.MonkeyPatch, copies: type[DeviceCopies]
) -> None:
    """With a step at once or without: by other bytes in the checkpoint, or by memory that was released under a copy. The copies as
    they are pass."""
    monkeypatch.setattr("vembed_async_ckpt._engine.copying.DeviceCopies", copies)
    noticed = [shows(tmp_path / str(steps), device, monkeypatch, copies, steps=steps) for steps in (False, True)]
    assert any(noticed) is (copies is not DeviceCopies)


def shows(
    root: Path, device: Control, monkeypatch: pytest.MonkeyPatch, copies: type[DeviceCopies], *, steps: bool
) -> bool:
    stepped, wait = threading.Event(), copies.wait

    def wait_after_the_step(self: DeviceCopies) -> None:
        assert stepped.wait(20)
        wait(self)

    model, optimizer, step = trained(2)
    conjugate = torch.tensor([1 + 2j] * 9).to("second").conj()
    released = device.released_early()
    with monkeypatch.context() as patch, AsyncCheckpointer(root) as checkpointer:
        step()
        patch.setattr(copies, "wait", wait_after_the_step)
        expected = state_of(model, optimizer)
        handle = checkpointer.save(1, model=model, optimizer=optimizer, extra={"conjugate": conjugate})
        for parameter in model[2:].parameters():
            parameter.data = torch.zeros_like(parameter)
        if steps:
            step()
        stepped.set()
        path = handle.result(60).path
        torch.accelerator.synchronize()  # what a mutant left behind comes while the arena is there
    restored, restored_optimizer, _ = trained(1)
    found = load(path, model=restored, optimizer=restored_optimizer)
    return (
        differing(expected, state_of(restored, restored_optimizer)) != []
        or not torch.equal(found.extra["conjugate"], torch.tensor([1 - 2j] * 9))
        or device.released_early() > released
    )
