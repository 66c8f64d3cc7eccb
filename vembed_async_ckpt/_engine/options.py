"""The options of a checkpointer, checked once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .._capture.arguments import size_in_bytes
from .._disk.filesystem import FILESYSTEM_OVERRIDE
from .._format.urls import is_url
from ..events import Sink
from ..policies import SavePolicy
from ..retention import Policy
from .after_commit import AfterCommit
from .after_commit import check as check_after_commit

WhenBusy = Literal["wait", "skip", "error"]
OnError = Literal["raise", "warn"]
Staging = Literal["overlap", "blocking"]
WriterKind = Literal["process", "thread"]


@dataclass(frozen=True)
class Options:
    """`AsyncCheckpointer` documents each option."""

    root: str
    retention: Policy | None
    when_busy: WhenBusy
    on_error: OnError
    staging: Staging
    writer: WriterKind
    max_in_flight: int
    max_host_bytes: int | None
    max_shard_size: str | int
    save_original_format: bool
    sinks: Sequence[Sink]
    policy: SavePolicy | None = None
    latest_link: bool = False
    progress: bool = False
    after_commit: Sequence[AfterCommit] = ()
    max_unshipped: int | None = None

    def __post_init__(self) -> None:
        """Check every option.

        Raises TypeError or ValueError that names the option, its value and the allowed values.
        """
        for name, allowed in (
            ("when_busy", WhenBusy),
            ("on_error", OnError),
            ("staging", Staging),
            ("writer", WriterKind),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(allowed):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; use one of {', '.join(map(repr, get_args(allowed)))}"
                )
        if self.writer == "process" and FILESYSTEM_OVERRIDE.get() is not None:
            raise ValueError("writer is 'process', which use_filesystem() does not reach; use writer='thread'")
        if self.retention is not None and not isinstance(self.retention, Policy):
            raise TypeError(
                f"retention is {self.retention!r}; use KeepLast, KeepEvery, KeepBest, combined with |, or None"
            )
        for name in ("latest_link", "progress", "save_original_format"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; use True or False")
        if self.policy is not None and not isinstance(self.policy, SavePolicy):
            raise TypeError(
                f"policy is {self.policy!r}; use those of vembed_async_ckpt.policies, combined with |, or None"
            )
        if type(self.max_in_flight) is not int or not 1 <= self.max_in_flight <= 16:
            raise ValueError(f"max_in_flight is {self.max_in_flight!r}; use a whole number from 1 to 16")
        if not callable(getattr(self.sinks, "__iter__", None)) or not all(map(callable, self.sinks)):
            raise TypeError(
                f"sinks is {self.sinks!r}; use a list of functions that take an Event, or of vembed_async_ckpt.sinks"
            )
        object.__setattr__(self, "sinks", tuple(self.sinks))
        object.__setattr__(self, "after_commit", check_after_commit(self.after_commit))
        if self.max_unshipped is not None and (type(self.max_unshipped) is not int or self.max_unshipped < 1):
            raise ValueError(f"max_unshipped is {self.max_unshipped!r}; use a whole number of at least 1, or None")
        shard_size = size_in_bytes("max_shard_size", self.max_shard_size)
        if shard_size < 1:
            raise ValueError(f"max_shard_size is {self.max_shard_size!r}; use at least one byte")
        object.__setattr__(self, "max_shard_size", shard_size)
        if self.max_host_bytes is not None:
            host_bytes = size_in_bytes("max_host_bytes", self.max_host_bytes)
            if host_bytes < MIN_HOST_BYTES:
                raise ValueError(
                    f"max_host_bytes is {self.max_host_bytes!r}; at least {MIN_HOST_BYTES} are needed, or None"
                )
            object.__setattr__(self, "max_host_bytes", host_bytes)


MIN_HOST_BYTES = 16 << 20  # the smallest arena through which a large state can pass in parts


def root_path(root: Any) -> str:
    """Return the root as an absolute path without symbolic links.

    Raises TypeError or ValueError if `root` is not a path.
    """
    if not isinstance(root, str | bytes | os.PathLike):
        raise TypeError(f"root is {root!r}; use the path of a directory")
    path = os.fsdecode(root)
    if not path or "\0" in path:
        raise ValueError(f"root is {root!r}; use the path of a directory, '.' for the current one")
    if is_url(path):
        raise ValueError(f"root is {root!r}, a URL; use the path of a directory on this machine")
    return os.path.realpath(path)
