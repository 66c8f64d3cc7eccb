"""A pytest plugin: `Accelerator.save_state` is ours, and `load_state` is attached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from accelerate import Accelerator

from vembed_async_ckpt.integrations.accelerate import attach, save_state
from vembed_async_ckpt.integrations.shared import close_shared

WAITED = os.environ["FOREIGN_SAVING"] == "waited"


def save(self: Accelerator, output_dir: Any = None, safe_serialization: bool = True, **further: Any) -> str:
    handle = save_state(self, output_dir, safe_serialization)
    if WAITED:
        handle.result(60)
        close_shared(60)
    return str(handle.path)


initialize = Accelerator.__init__


def initialize_and_attach(self: Accelerator, *args: Any, **kwargs: Any) -> None:
    initialize(self, *args, **kwargs)
    attach(self)


Accelerator.save_state = save
Accelerator.__init__ = initialize_and_attach


@pytest.fixture(autouse=True)
def drained() -> Iterator[None]:
    yield
    close_shared(60)
