"""An assertion on the device while copies are pending: that save fails, the one that was staged is whole."""

from __future__ import annotations

import contextlib

import torch
from safetensors.torch import load_file

from vembed_async_ckpt import AsyncCheckpointer, StageError, verify

from .common import WAIT, Say, Setting, build, change, reference


def run(setting: Setting, say: Say) -> None:
    state = build(setting, "foreach")
    checkpointer = AsyncCheckpointer(setting.directory / "root", on_error="warn")
    change(state, 1)
    expected = {name: value.cpu() for name, value in reference(state).items()}
    first = checkpointer.save(1, model=state[0], optimizer=state[1])
    first.wait_staged(WAIT)
    error: BaseException | None
    try:
        torch.zeros(4, device=setting.device)[torch.tensor([9], device=setting.device)]
        error = checkpointer.save(2, model=state[0], optimizer=state[1]).exception(WAIT)
    except Exception as raised:
        error = raised
    say(said=f"{type(error).__name__}: {error}"[:400])
    first.result(WAIT)
    with contextlib.suppress(Exception):
        checkpointer.close(20)
    verify(first.path)
    weights = load_file(first.path / "model.safetensors")
    right = all(torch.equal(value.float(), expected[f"model.{name}"].float()) for name, value in weights.items())
    say(first_is_right=right, ok=right and isinstance(error, StageError))
