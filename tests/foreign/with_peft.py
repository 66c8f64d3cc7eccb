"""A pytest plugin: `PeftModel.save_pretrained` of one adapter saves with ours, into the very directory, which is then durable.

What ours does not offer (a pickle, some of the adapters, another place for embedding layers, the conversion of initial weights) is
left to PEFT. `OURS` counts the saves of each way; the counts are printed at the end.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from peft import PeftModel

from vembed_async_ckpt import AsyncCheckpointer
from vembed_async_ckpt._capture.dialect import Own
from vembed_async_ckpt._capture.request import Objects

OURS: Counter[str] = Counter()
original = PeftModel.save_pretrained
inside = threading.local()


def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **options: Any) -> None:
    rendered = getattr(inside, "rendered", False)  # ours asks PEFT for its files
    asked = {name: value for name, value in options.items() if (name, value) != ("safe_serialization", True)}
    if rendered or args or asked or os.path.isfile(save_directory):
        OURS["by PEFT"] += not rendered
        original(self, save_directory, *args, **options)
        return
    OURS["by ours"] += 1
    inside.rendered = True
    root, name = os.path.split(os.path.abspath(save_directory))
    try:
        with AsyncCheckpointer(root, writer="thread") as checkpointer:
            checkpointer.save_as(name, None, Objects(model=self, dialect=Own())).result(60)
    finally:
        inside.rendered = False


save_pretrained.__module__ = original.__module__  # as ours sees it, it is PEFT's own
PeftModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"saves: {dict(OURS)}, torch {torch.__version__}")


@pytest.fixture(autouse=True)
def ended() -> Any:
    yield
    inside.rendered = False
