"""The URLs below which checkpoints can be stored."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlsplit

SCHEMES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "file")
_WITH_CONTAINER = ("abfs", "abfss")  # abfss://container@account.dfs.core.windows.net/run


def is_url(path: Any) -> bool:
    """Whether `path` is a URL, which as a path would be a directory of an odd name below the current one."""
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fsdecode(path)) is not None


def checked_url(url: Any) -> str:
    """Return the URL of a run, or of a checkpoint, without a slash at its end.

    Raises ValueError if checkpoints cannot be stored below it. Does not repeat what may be a secret.
    """
    if not isinstance(url, str):
        raise ValueError(f"{url!r} is not a URL")
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"a URL of the kind {parts.scheme!r} cannot be used; use one of {', '.join(SCHEMES)}")
    named = parts.username is not None and parts.scheme not in _WITH_CONTAINER
    if named or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            f"the {parts.scheme} URL holds a user name, a password, a query or a fragment; credentials come from the environment"
        )
    if parts.scheme == "file" and parts.netloc:
        raise ValueError(f"{url!r}: a folder is named with three slashes: file:///{parts.netloc}{parts.path}")
    if not (parts.path.strip("/") if parts.scheme == "file" else parts.netloc):
        raise ValueError(f"{url!r}: names no {'folder' if parts.scheme == 'file' else 'bucket'}")
    return url.rstrip("/")
