"""Small things that the mixin needs of Trainer, and the check of its options."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from .._engine.options import Options
from ..checkpointer import AsyncCheckpointer

_PLACEHOLDER = "checkpoint-is-incomplete.txt"  # trainer_jit_checkpoint.py puts it into the directory before it saves


def check_options(options: Any) -> None:
    """Raise TypeError or ValueError that names an unknown option of `AsyncCheckpointer` or an invalid value."""
    if not isinstance(options, Mapping):
        raise TypeError(f"async_checkpoint_options is {options!r}; use a mapping of AsyncCheckpointer's options")
    known = {name: value.default for name, value in inspect.signature(AsyncCheckpointer).parameters.items()}
    del known["root"]
    for name in options:
        if name not in known:
            raise TypeError(f"async_checkpoint_options: {name!r} is no option; there are {', '.join(known)}")
    values = {**known, **options, "root": ""}
    Options(**{field.name: values[field.name] for field in dataclasses.fields(Options)})
    if values["policy"] is not None and any(part.asks_for_metrics for part in values["policy"].parts()):
        raise ValueError(f"policy {values['policy']!r}: Trainer saves the best itself, with save_strategy='best'")


def is_of_the_loop(frame: FrameType | None) -> bool:
    """Return whether Trainer's loop called `_save_checkpoint` after a step. `frame` is the frame of its caller."""
    while frame is not None and frame.f_code.co_name == "_save_checkpoint":
        frame = frame.f_back  # the method may be overridden
    return frame is not None and frame.f_code.co_name == "_maybe_log_save_evaluate"


def supported() -> tuple[type, ...]:
    if not is_peft_available():
        return (PreTrainedModel,)
    from peft import PeftModel

    return (PreTrainedModel, PeftModel)


@contextlib.contextmanager
def replaced(handler: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let `handler.name` be `function` inside the block."""
    before = vars(handler).get(name)
    setattr(handler, name, function)
    try:
        yield
    finally:
        delattr(handler, name)
        if before is not None:
            setattr(handler, name, before)


def remove_placeholder(directory: str) -> None:
    """Remove the placeholder of a just-in-time checkpoint: the directory must not exist before the commit."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(directory, _PLACEHOLDER))
        os.rmdir(directory)
