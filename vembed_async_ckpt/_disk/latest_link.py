"""Reads the link `latest` in a root.

The link is for shell scripts: it is relative and points to one of our checkpoints.

`link_update` moves it.
"""

from __future__ import annotations

import os

from .._format import names


def target(root: str) -> str | None:
    """Return the name of the checkpoint that `root/latest` points to.

    None if there is no such link, or it is not one of ours.

    A link is ours if its text is the name of a checkpoint in the same root. That checkpoint may have been deleted.
    """
    try:
        text = os.readlink(os.path.join(root, names.LATEST))
    except OSError:
        return None
    return text if _is_checkpoint(root, text) else None


def resolve(path: str | os.PathLike[str]) -> str:
    """Return `path`. If it is our link `latest`, return the path of the checkpoint that it points to."""
    given = os.fspath(path)
    root, name = os.path.split(given.rstrip("/"))
    found = target(root or ".") if name == names.LATEST else None
    return given if found is None else os.path.join(root, found)


def _is_checkpoint(root: str, text: str) -> bool:
    if "/" in text or text in ("", ".", ".."):
        return False
    return names.parse_checkpoint(text) is not None or os.path.lexists(os.path.join(root, text, names.MANIFEST))
