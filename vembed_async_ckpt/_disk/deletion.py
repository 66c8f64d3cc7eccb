"""Deletes directories that were replaced, that retention does not keep, or that a crash left behind.

Only what we wrote is deleted. A file that the manifest does not name stays; if its directory is deleted, the file stays
in `replaced/`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from .._format import names
from .._format.manifest import Manifest
from ..errors import CorruptCheckpoint
from ..events import logger
from ..retention import Policy
from . import filesystem as files
from . import manifests, notes
from .catalog import Entry, list_replaced, scan
from .filesystem import Filesystem, make_directories

_CHUNK = 16 << 20


def foreign_files(directory: str) -> Iterable[tuple[str, str]]:
    """Yield (relative name, path) of the files in a checkpoint directory that its manifest does not name."""
    if not os.path.isdir(directory):
        return
    ours = _own_files(directory)
    for relative, entry in files.walk_files(directory):
        if relative not in ours:
            yield relative, entry.path


def _own_files(directory: str) -> Collection[str]:
    try:
        return {*manifests.read(directory).files, names.MANIFEST}
    except CorruptCheckpoint:
        return ()  # nothing proves that any of the files is ours


def dispose(fs: Filesystem, root: str, directory: str, name: str, save_id: str, carried_to: str | None = None) -> None:
    """Delete what we wrote of a directory that is no longer a checkpoint. Keep the rest in `replaced/`.

    Deletes the files that its own manifest names, and the manifest last: so after a crash the deletion can be
    continued. Files that were carried over to the directory `carried_to` stay there and are deleted here.
    """
    known = _own_files(directory)
    # List the directory; do not trust the names in the manifest: a link inside may lead out of the directory.
    ours = [name for name, _ in files.walk_files(directory) if name in known and name != names.MANIFEST]
    for relative in ours:
        _unlink_if_there(fs, os.path.join(directory, *relative.split("/")))
    if carried_to is not None:
        for relative, path in foreign_files(directory):
            other = os.path.join(carried_to, *relative.split("/"))
            if not names.is_plan_name(relative) and _same_content(path, other):
                _unlink_if_there(fs, path)
    if _own_files(directory):
        # Without this, a power cut could remove the manifest first. Then nothing would prove that the other files are
        # ours.
        for inner in files.walk_directories(directory):
            fs.sync_directory(inner)
        _unlink_if_there(fs, os.path.join(directory, names.MANIFEST))
    for inner in list(files.walk_directories(directory)):
        try:
            fs.remove_directory(inner)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    if os.path.lexists(directory):
        keep(fs, root, directory, save_id, name)


def _same_content(path: str, other: str) -> bool:
    try:
        if os.path.samestat(os.lstat(path), os.lstat(other)):
            return True
        with open(files.open_regular(path), "rb") as one, open(files.open_regular(other), "rb") as another:
            while (chunk := one.read(_CHUNK)) == another.read(_CHUNK):
                if not chunk:
                    return True
    except OSError:
        pass
    return False


def _unlink_if_there(fs: Filesystem, path: str) -> None:
    try:
        fs.unlink(path)
    except FileNotFoundError:
        pass


def remove_work(fs: Filesystem, directory: str, save_id: str) -> None:
    """Delete the whole work directory of a save that was not published. We made every name in it.

    A directory that holds another save is left alone: then an exchange took place although an error was reported.
    """
    if not os.path.islink(directory) and _save_id(directory) in (None, save_id):
        _remove_all(fs, directory)


def remove_rotated(fs: Filesystem, root: str, name: str, identity: str) -> None:
    """Delete all of `root/name`, a checkpoint that Trainer itself wrote and that `save_total_limit` does not keep.

    After a crash, `sweep` deletes the rest.
    """
    rotated = names.rotated_directory(root, identity)
    make_directories(fs, os.path.dirname(rotated))
    # One rename hides the whole directory: nobody can resume from a half-deleted checkpoint.
    fs.rename(os.path.join(root, name), rotated, "plain")
    # Without this, a power cut could bring the name back with files missing.
    fs.sync_directory(root)
    _remove_all(fs, rotated)
    _remove_if_empty(fs, os.path.dirname(rotated))


def _remove_all(fs: Filesystem, directory: str) -> None:
    for _, entry in list(files.walk_files(directory)):
        _unlink_if_there(fs, entry.path)
    for inner in list(files.walk_directories(directory)):
        try:
            fs.remove_directory(inner)
        except FileNotFoundError:
            pass  # a rotation and a sweep may delete the same directory


def prune(
    fs: Filesystem,
    root: str,
    policy: Policy,
    committed: Collection[tuple[str, Manifest]],
    allowed: Callable[[], object],
    gave_way: Callable[[notes.Note], object] = lambda note: logger.warning("%s", gave_way_text(note)),
) -> list[str]:
    """Delete the checkpoints that `policy` does not keep. Each is moved to the trash first. Returns their names.

    `committed`: (path, manifest) of the checkpoints; the newest must be durable. These are never deleted: the newest
    complete checkpoint, incomplete ones, one with a manifest that a reader has locked, one that is still to be shipped,
    and directories with names that are not ours. If more wait to be shipped than is allowed, the oldest give way:
    `gave_way` is called for each. `allowed` is called before each deletion and raises if nothing may be deleted any
    more. Raises the first OSError after all others were tried.
    """
    unkept = _unkept(policy, committed)
    for note in notes.giving_way(_unshipped(unkept)):
        allowed()
        notes.remove(fs, root, note.save_id)
        gave_way(note)
    gone: list[str] = []
    failures: list[OSError] = []
    for path in expendable(policy, committed):
        name = os.path.basename(path)
        allowed()
        try:
            discard(fs, root, name, unkept[path].save_id)
            gone.append(name)
        except OSError as error:
            failures.append(error)  # go on with the other checkpoints
    if failures:
        raise failures[0]
    return gone


def gave_way_text(note: notes.Note) -> str:
    """Return one line for people about a checkpoint that was deleted before it was shipped."""
    return (
        f"{note.name} was deleted and was not shipped: retention does not keep it, and more than {note.most} such checkpoints "
        "were waiting to be shipped (max_unshipped)"
    )


def discard(fs: Filesystem, root: str, name: str, save_id: str) -> None:
    """Delete the checkpoint `root/name` that save `save_id` made.

    It is moved to the trash first. Then what we wrote of it is deleted.
    """
    # Delete a predecessor that still waits for deletion first. Otherwise the next start would bring it back, as if it
    # had never been replaced.
    _finish_swaps(fs, root, [name])
    replaced = names.replaced_directory(root)
    if os.path.isdir(replaced) and not os.path.islink(replaced):
        # Without this, a power cut could bring back the half-deleted predecessor when this checkpoint is gone.
        fs.sync_directory(replaced)
    trash = names.trash_directory(root, save_id)
    make_directories(fs, os.path.dirname(trash))
    # One rename hides the whole directory: no reader sees a half-deleted checkpoint.
    fs.rename(os.path.join(root, name), trash, "plain")
    # Without this, a power cut could bring the name back with files missing.
    fs.sync_directory(root)
    dispose(fs, root, trash, name, save_id)
    _remove_if_empty(fs, os.path.dirname(trash))


def _remove_if_empty(fs: Filesystem, directory: str) -> None:
    """Remove a work directory that was made for one deletion only. One in use is not empty: it has the lock file."""
    if not os.listdir(directory):
        with contextlib.suppress(OSError):  # something was put into it just now
            fs.remove_directory(directory)


def expendable(policy: Policy, committed: Collection[tuple[str, Manifest]]) -> list[str]:
    """Return the checkpoints that `prune` would delete, newest first.

    A checkpoint with missing or truncated files is neither counted nor deleted: it must not take the place of a
    complete one.
    """
    unkept = _unkept(policy, committed)
    gives_way = {note.save_id for note in notes.giving_way(_unshipped(unkept))}
    waiting = {save_id for root in _roots(unkept) for save_id in notes.waiting(root)} - gives_way
    return [path for path, found in unkept.items() if found.save_id not in waiting and not in_use(path)]


def _unkept(policy: Policy, committed: Collection[tuple[str, Manifest]]) -> dict[str, Manifest]:
    """Return the complete checkpoints that `policy` does not keep, newest first."""
    ours = [item for item in committed if names.parse_checkpoint(os.path.basename(item[0])) is not None]
    newest_first = sorted(ours, key=lambda item: item[1].order, reverse=True)
    if not _not_kept(policy, newest_first):
        return {}
    whole = [item for item in newest_first if _is_whole(*item)]
    return {path: dict(whole)[path] for path in _not_kept(policy, whole)}


def _unshipped(checkpoints: Mapping[str, Manifest]) -> list[notes.Note]:
    """Return the notes of these checkpoints, as far as they can be read."""
    save_ids = {manifest.save_id for manifest in checkpoints.values()}
    return [note for root in _roots(checkpoints) for note in notes.readable(root) if note.save_id in save_ids]


def _roots(checkpoints: Iterable[str]) -> set[str]:
    return {os.path.dirname(path) for path in checkpoints}


def _not_kept(policy: Policy, newest_first: Sequence[tuple[str, Manifest]]) -> list[str]:
    kept = policy.keep([manifest for _, manifest in newest_first])
    return [path for path, manifest in newest_first[1:] if manifest.save_id not in kept]


def _is_whole(path: str, manifest: Manifest) -> bool:
    try:
        manifests.check(path, manifest, "size")
    except CorruptCheckpoint:
        return False
    return True


def in_use(directory: str) -> bool:
    """Return whether a reader holds the checkpoint (has a shared lock on its manifest)."""
    try:
        # Open for writing: NFS refuses an exclusive lock on a read-only descriptor.
        fd = os.open(os.path.join(directory, names.MANIFEST), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no locks on this file system, so readers have none either
    finally:
        os.close(fd)
    return False


def sweep(fs: Filesystem, root: str) -> list[str]:
    """Clean up what a crash left in the work directory.

    Drops unpublished saves, empties the trash, and brings back a checkpoint whose replacement was never published. Only
    the holder of the root's lock may call this. Entries whose names are not ours stay. Returns one line for each thing
    that was done. Raises the first OSError after all entries were tried.
    """
    work_root = names.work_directory(root)
    done = []
    # The decisions below depend on what is visible now, so make that durable first.
    fs.sync_directory(root)
    fs.sync_directory(work_root)
    done += _orphans_failures(fs, root)
    done += _heal_swaps(fs, root)
    visible = scan(root)
    committed = {entry.manifest.save_id: entry.path for entry in visible if entry.manifest}
    first: OSError | None = None
    for entry in sorted(os.listdir(work_root)):
        try:
            done += _sweep_entry(fs, root, entry, visible, committed)
        except OSError as error:  # go on with the other entries
            first = first or error
    if first is not None:
        raise first
    return done


def _sweep_entry(
    fs: Filesystem, root: str, entry: str, visible: Sequence[Entry], committed: Mapping[str, str]
) -> list[str]:
    path = os.path.join(names.work_directory(root), entry)
    if names.is_new_link(entry) and os.path.islink(path):
        fs.unlink(path)
        return []
    parsed = names.parse_work_entry(entry)
    if parsed is None or os.path.islink(path) or not os.path.isdir(path):
        return []
    if parsed.kind == "scratch" and _is_locked(path):
        return []  # a process renders files there
    if parsed.kind in ("rotated", "scratch"):
        _remove_all(fs, path)
        return [f"finished deleting {entry}"]
    if parsed.kind == "work" and parsed.save_id not in committed:
        inside = _save_id(path)
        if inside not in (None, parsed.save_id):
            # The directory holds the checkpoint that this save replaced by an exchange. That one is complete, and the
            # new one cannot be read.
            keep(fs, root, path, parsed.save_id, "checkpoint")
            return [f"kept the replaced checkpoint in {entry}: the one that replaced it cannot be read"]
        if inside is None and any(_may_be_published(other) for other in visible):
            return [f"left {entry} alone: checkpoints beside it cannot be read, so nothing proves it unpublished"]
        remove_work(fs, path, parsed.save_id)
        return [f"dropped the unfinished save {entry}"]
    home = committed.get(parsed.save_id) if parsed.kind == "work" else None
    name = os.path.basename(home) if home else "checkpoint"
    dispose(fs, root, path, name, parsed.save_id, carried_to=home)
    return [f"finished deleting {entry}"]


def _is_locked(directory: str) -> bool:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no locks for directories on this file system
    finally:
        os.close(fd)
    return False


def _orphans_failures(fs: Filesystem, root: str) -> list[str]:
    """Return what the writer of a dead trainer could not save, from its log.

    The log is deleted, so each line is returned once.
    """
    log = os.path.join(names.work_directory(root), names.ORPHAN_LOG)
    try:
        lines = files.read_regular(log).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"left {names.ORPHAN_LOG} alone: it cannot be read ({error.strerror})"]
    fs.unlink(log)
    return lines


def _may_be_published(entry: Entry) -> bool:
    """Return whether an unreadable checkpoint may have been published: a published one always has a manifest file."""
    return entry.manifest is None and os.path.lexists(os.path.join(entry.path, names.MANIFEST))


def _save_id(directory: str) -> str | None:
    try:
        return manifests.read(directory).save_id
    except CorruptCheckpoint:
        return None


def keep(fs: Filesystem, root: str, directory: str, save_id: str, name: str) -> None:
    """Move a directory that we may not delete to `replaced/`."""
    kept = names.kept_directory(root, save_id, name)
    make_directories(fs, os.path.dirname(kept))
    fs.rename(directory, kept, "plain")


def _swaps(root: str) -> dict[str, tuple[str, str]]:
    """Return the directories that were moved away without an exchange and are not deleted yet.

    The result is {path: (id of the save that replaces it, checkpoint name)}.
    """
    replaced = names.replaced_directory(root)
    parsed = {os.path.join(replaced, entry): names.parse_swap(entry) for entry in list_replaced(root)}
    return {path: swap for path, swap in parsed.items() if swap is not None}


def _finish_swaps(fs: Filesystem, root: str, replaced: Collection[str]) -> list[str]:
    """Delete the predecessors of the checkpoints named in `replaced`. These checkpoints must exist."""
    done = []
    for swap, (save_id, name) in _swaps(root).items():
        if name in replaced:
            dispose(fs, root, swap, name, save_id, carried_to=os.path.join(root, name))
            done.append(f"finished replacing {name}")
    return done


def _heal_swaps(fs: Filesystem, root: str) -> list[str]:
    done, replaced = [], []
    for swap, (_, name) in _swaps(root).items():
        target = os.path.join(root, name)
        if os.path.lexists(target):
            replaced.append(name)
        else:
            fs.rename(swap, target, "plain")
            fs.sync_directory(root)
            done.append(f"brought {name} back, whose replacement was never published")
    return done + _finish_swaps(fs, root, replaced)
