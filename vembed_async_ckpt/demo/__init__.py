"""`vembed-ckpt demo`: train a text embedder on the standard library's docstrings and show what background saves cost.

`corpus` makes pairs, tokenizer and batches, `training` takes the steps, `display` shows them, `report` measures and
prints, `session` puts them together. The constants are here so that a command line can show them without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import Refused

if TYPE_CHECKING:
    from .report import DemoReport
    from .session import run

DEFAULT_STEPS = 160
DEFAULT_SAVE_EVERY = 20
DEFAULT_SIZE = "small"
SIZE_NAMES = ("tiny", "small", "base")

__all__ = ["DEFAULT_SAVE_EVERY", "DEFAULT_SIZE", "DEFAULT_STEPS", "SIZE_NAMES", "DemoReport", "Refused", "run"]


def __getattr__(name: str) -> Any:
    if name in ("DemoReport", "run"):
        from . import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
