"""Moves the link `latest` of a root from one checkpoint to the next, atomically. What is not our link is left alone."""

from __future__ import annotations

import contextlib
import errno
import os

from .._format import names
from . import latest_link
from .filesystem import Filesystem

_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY)


def point(fs: Filesystem, root: str, name: str, save_id: str) -> str:
    """Make `root/latest` point to the checkpoint `name`, which must exist.

    Returns the reason if the link was left alone, else an empty text. `save_id` gives the temporary name of the new
    link. Raises OSError where links cannot be made.
    """
    link = os.path.join(root, names.LATEST)
    before = latest_link.target(root)
    if before == name:
        return ""
    theirs = f"{link} is not a link of ours to a checkpoint; it was left alone"
    if before is None and os.path.lexists(link):
        return theirs
    new = names.new_link(root, save_id)
    with contextlib.suppress(FileNotFoundError):
        fs.unlink(new)  # left by a writer that died during this save
    fs.symlink(name, new)
    try:
        if before is None:
            fs.rename(new, link, "noreplace")
            new = ""
        else:
            fs.rename(new, link, "exchange")
            if _text(new) != before:  # somebody put something else there meanwhile
                fs.rename(new, link, "exchange")
                return theirs
    except FileExistsError:
        return theirs
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        fs.rename(new, link, "plain")  # file systems without these modes: NFS, FUSE
        new = ""
    finally:
        if new:
            fs.unlink(new)
    fs.sync_directory(root)
    return ""


def heal(fs: Filesystem, root: str, newest: str | None, save_id: str) -> None:
    """Called after a checkpoint was deleted.

    If our link pointed to it, point it to `newest`, or remove it if that is None.
    """
    gone = latest_link.target(root)
    if gone is None or os.path.lexists(os.path.join(root, gone)):
        return
    if newest is None:
        fs.unlink(os.path.join(root, names.LATEST))
    else:
        point(fs, root, newest, save_id)


def _text(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
