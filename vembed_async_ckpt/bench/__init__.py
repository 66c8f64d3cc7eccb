"""`vembed-ckpt bench`: what a save costs a training, this library's and its peers', on your machine and with your state.

    options -> checks (no torch) -> session: measure by measure, each engine in a process of its own -> samples -> results
    (JSON) samples -> figures -> answers: sentences, table, page; compare; check.      samples -> summary -> report: the details

`catalog` says which engines there are, `engine` what one is: an engine of one's own is a subclass of `Engine`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import MEASURES, Options, Refused

if TYPE_CHECKING:
    from .engine import Engine, Handle
    from .session import run

__all__ = ["Engine", "Handle", "MEASURES", "Options", "Refused", "run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from .session import run

        return run
    if name in ("Engine", "Handle"):
        from . import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
