"""`vembed-ckpt bench`: what a save costs a training, this library's and its peers', on your machine and with your model.

    options -> session: check first, then measure by measure, each engine in a process of its own -> samples (JSON)
    samples -> summary: medians, p99, ratios -> report (tables), plots

`catalog` says what there is to measure and with what; it loads no torch, so a command line can be checked at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import MEASURES, Options, Refused

if TYPE_CHECKING:
    from .session import run

__all__ = ["MEASURES", "Options", "Refused", "run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from .session import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
