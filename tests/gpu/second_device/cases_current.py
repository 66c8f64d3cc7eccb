"""Which device is made current, in a process that has used none. Run by tests/gpu/test_second_device.py."""

from __future__ import annotations

from pathlib import Path

import torch

from vembed_async_ckpt import AsyncCheckpointer, load
from vembed_async_ckpt._memory import devices

from .cases_copies import trained
from .device import Control


def test_no_other_device_is_made_current(root: Path, device: Control) -> None:
    """A training on the second of two devices, from threads whose current device is the first: that one gets no context."""
    assert not device.has_context(0)
    model, optimizer, step = trained(2, "second:1")
    assert not device.has_context(0)
    with AsyncCheckpointer(root) as checkpointer:
        step()
        for number in (1, 2):
            handle = checkpointer.save(number, model=model, optimizer=optimizer)
            step()
            handle.result(60)
        checkpointer.prewarm(model=model, optimizer=optimizer)
    assert devices.in_use() == torch.device("second", 1)
    restored, restored_optimizer, _ = trained(0, "second:1")
    load(handle.path, model=restored, optimizer=restored_optimizer)
    assert not device.has_context(0)
