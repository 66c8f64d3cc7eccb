"""The commit: `commit` is the only function that makes a finished work directory a checkpoint.

At any time, a directory under its final name is complete and durable. The previous checkpoint is not touched before the
new one is durable.
"""

from __future__ import annotations

import errno
import os
import stat

from .._format import names
from .._format.manifest import Manifest, too_large
from ..errors import CommitError, CorruptCheckpoint, WriteError
from . import filesystem as files
from .deletion import foreign_files
from .filesystem import Filesystem, make_directories, write_synced
from .manifests import check, read

_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM)


def commit(fs: Filesystem, root: str, name: str, work: str, manifest: Manifest) -> str | None:
    """Publish `work` as `root/name`. The files of `work` must be written and synced.

    When this returns, the checkpoint survives a power cut. If another directory had the name before, its new path is
    returned; pass it to `dispose`. Otherwise the result is None. Raises OSError or `WriteError` if nothing was
    published. Raises `CommitError` if the checkpoint was published but may not be durable or complete. Then nothing may
    be deleted. The save may be repeated, but only from the arena.
    """
    target = os.path.join(root, name)
    refuse_non_directory(target)
    # Foreign files go into the new directory before the exchange: so there is no moment without them.
    carry_over(fs, target, work)
    # The manifest is written last: so a work directory with a manifest is complete, even after a power cut.
    content = manifest.to_bytes()
    if excess := too_large(content):
        raise WriteError(f"{target}: its manifest would have {excess}")
    write_synced(fs, os.path.join(work, names.MANIFEST), content)
    # Without this, file names could be missing in the published directory after a power cut, although the contents are
    # safe.
    for directory in files.walk_directories(work):
        fs.sync_directory(directory)
    # If somebody moved or replaced a file while it was written, it would be missing or wrong under the final name.
    if wrong := _not_what_was_written(work, manifest):
        raise WriteError(f"somebody else changed {work} while it was written; nothing was published: {wrong}")
    replaced = _publish(fs, root, name, work, manifest.save_id)
    if wrong := _not_what_was_written(target, manifest):
        raise CommitError(f"{target}: somebody else changed it while it was published: {wrong}")
    try:
        # Without this, a power cut could undo the rename after the save was acknowledged. The work directory lost an
        # entry too.
        fs.sync_directory(root)
        fs.sync_directory(names.work_directory(root))
    except OSError as error:
        raise CommitError(f"{target}: published, but its parent could not be synced: {error}") from error
    return replaced


def _not_what_was_written(directory: str, manifest: Manifest) -> str:
    """Return which file is missing or has another kind or size than when it was written; empty if none."""
    try:
        check(directory, manifest, "size")
    except CorruptCheckpoint as error:
        return str(error)
    return "it is a symbolic link" if os.path.islink(directory) else ""


def refuse_non_directory(target: str) -> None:
    """Raise `WriteError` if something other than a directory has the final name. Symbolic links are not followed."""
    if os.path.islink(target) or (os.path.lexists(target) and not os.path.isdir(target)):
        raise WriteError(f"{target}: exists and is not a directory; move it away or save under another name")


def carry_over(fs: Filesystem, target: str, work: str) -> None:
    """Put into `work` the files of `target` that its manifest does not name: as hard links, else as synced copies.

    Files with a name that one of our plans can make are left out: they would be read as part of the new checkpoint.
    """
    for relative, source in foreign_files(target):
        if names.is_plan_name(relative):
            continue
        destination = os.path.join(work, *relative.split("/"))
        if os.path.lexists(destination):
            continue  # the new checkpoint has a file of that name; the old one stays in `replaced/`
        make_directories(fs, os.path.dirname(destination))
        try:
            fs.link(source, destination)
        except OSError:
            if stat.S_IFMT(os.lstat(source).st_mode) in (
                stat.S_IFREG,
                stat.S_IFLNK,
            ):  # a pipe or device stays in `replaced/`
                _copy_synced(fs, source, destination)


def _copy_synced(fs: Filesystem, source: str, destination: str) -> None:
    if os.path.islink(source):
        fs.symlink(os.readlink(source), destination)
        return
    with open(files.open_regular(source), "rb", buffering=0) as file:
        write_synced(fs, destination, file, stat.S_IMODE(os.fstat(file.fileno()).st_mode))


def _publish(fs: Filesystem, root: str, name: str, work: str, save_id: str) -> str | None:
    """Rename `work` to its final name. Return the new path of the directory that had the name, or None."""
    target = os.path.join(root, name)
    try:
        if not os.path.lexists(target):
            try:
                fs.rename(work, target, "noreplace")
                return None
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        fs.rename(work, target, "exchange")
        return work
    except OSError as error:
        if _is_published(target, save_id):
            return work if os.path.lexists(work) else None
        if error.errno not in _CANNOT:
            raise
    return _publish_without_exchange(fs, root, name, work, save_id)


def _publish_without_exchange(fs: Filesystem, root: str, name: str, work: str, save_id: str) -> str | None:
    """Publish on file systems without exchange (NFS, FUSE): two renames under the root's lock.

    After a crash between the two, the next start brings the old checkpoint back (`sweep`).
    """
    target = os.path.join(root, name)
    swap = None
    if os.path.lexists(target):
        swap = names.swap_directory(root, save_id, name)
        make_directories(fs, os.path.dirname(swap))
    try:
        if swap is not None:
            fs.rename(target, swap, "plain")
            fs.sync_directory(os.path.dirname(swap))
        fs.rename(work, target, "plain")
    except OSError:
        if _is_published(target, save_id):
            return swap
        if swap is not None and not os.path.lexists(target):
            fs.rename(swap, target, "plain")  # bring the old checkpoint back before the error is reported
        raise
    return swap


def _is_published(target: str, save_id: str) -> bool:
    """Return whether the save is published although the rename reported an error.

    Over a network the answer of a successful rename can be lost.
    """
    try:
        return read(target).save_id == save_id
    except CorruptCheckpoint:
        return False
