"""Commit: the one function that makes a finished work directory a checkpoint, and the ways in which a directory leaves.

Whatever happens, a directory under its final name is complete and durable, the previous checkpoint is not touched before the
new one is durable, and nothing is deleted that we did not write.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import replace

from .._store import fs as files
from .._store import manifest as manifests
from .._store import names
from .._store.catalog import scan
from .._store.fs import Filesystem
from .._store.manifest import Manifest
from .._store.retention import Policy
from ..errors import CommitError, CorruptCheckpoint, WriteError

_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY)


def commit(fs: Filesystem, root: str, name: str, work: str, manifest: Manifest) -> str | None:
    """Publish `work`, whose files are written and synced, as `root/name`.

    When this returns the checkpoint survives a power cut. Returns where the directory now lies that had the name before, if
    any: pass it to `dispose`. Raises OSError with nothing published, or `CommitError` when it is published but doubtful: then
    nothing may be deleted, and the save may only be repeated from the arena.
    """
    target = os.path.join(root, name)
    refuse_non_directory(target)
    # Foreign files go into the new directory before the exchange: never is there a moment without them.
    carry_over(fs, target, work)
    # The manifest is last: a work directory with a manifest is whole, whenever the power went.
    _write_synced(fs, os.path.join(work, names.MANIFEST), manifest.to_bytes())
    # Else after a power cut the published directory could miss names whose contents are safe.
    for directory in files.walk_directories(work):
        fs.sync_directory(directory)
    replaced = _publish(fs, root, name, work, manifest.save_id)
    try:
        # Else the rename itself could be undone after it was acknowledged; the work directory lost an entry too.
        fs.sync_directory(root)
        fs.sync_directory(names.work_directory(root))
    except OSError as error:
        raise CommitError(f"{target}: published, but its parent could not be synced: {error}") from error
    return replaced


def refuse_non_directory(target: str) -> None:
    """Raise `WriteError` if something that is not a directory has the final name. Symbolic links are not followed."""
    if os.path.islink(target) or (os.path.lexists(target) and not os.path.isdir(target)):
        raise WriteError(f"{target}: exists and is not a directory; move it away or save under another name")


def carry_over(fs: Filesystem, target: str, work: str) -> None:
    """Give `work` the files of `target` that its manifest does not name: hard links, else copies, synced.

    Names that a plan of ours can make are left out: they would be read as part of the new checkpoint.
    """
    for relative, source in foreign_files(target):
        if names.is_plan_name(relative):
            continue
        destination = os.path.join(work, *relative.split("/"))
        if os.path.lexists(destination):
            continue  # the new checkpoint has a file of that name; the old one stays in `replaced/`
        os.makedirs(os.path.dirname(destination), exist_ok=True)
        try:
            fs.link(source, destination)
        except OSError:
            _copy_synced(fs, source, destination)


def foreign_files(directory: str) -> Iterable[tuple[str, str]]:
    """(relative name, path) of the files in a checkpoint directory that its manifest does not name."""
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
        return ()  # nothing proves that we wrote any of it


def _write_synced(fs: Filesystem, path: str, content: bytes) -> None:
    fd = fs.create(path, direct=False)
    try:
        done = 0
        while done < len(content):
            done += fs.write(fd, memoryview(content)[done:], done)
        fs.sync(fd)
    finally:
        fs.close(fd)


def _copy_synced(fs: Filesystem, source: str, destination: str) -> None:
    if os.path.islink(source):
        os.symlink(os.readlink(source), destination)
        return
    _write_synced(fs, destination, files.read_regular(source))
    shutil.copymode(source, destination)


def _publish(fs: Filesystem, root: str, name: str, work: str, save_id: str) -> str | None:
    """Rename `work` to its final name; returns where the directory that had the name went, if there was one."""
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
        if error.errno not in _CANNOT:
            raise
    return _publish_without_exchange(fs, root, name, work, save_id)


def _publish_without_exchange(fs: Filesystem, root: str, name: str, work: str, save_id: str) -> str | None:
    """NFS, FUSE: two renames under the root's lock. A crash between them is healed by the next start (`sweep`)."""
    target = os.path.join(root, name)
    swap = None
    if os.path.lexists(target):
        swap = names.swap_directory(root, save_id, name)
        _make_directories(fs, os.path.dirname(swap))
        fs.rename(target, swap, "plain")
        fs.sync_directory(os.path.dirname(swap))
    fs.rename(work, target, "plain")
    return swap


def _make_directories(fs: Filesystem, path: str) -> None:
    if not os.path.isdir(path):
        fs.make_directory(path)
        fs.sync_directory(os.path.dirname(path))


def dispose(fs: Filesystem, root: str, directory: str, name: str, save_id: str, carried_to: str | None = None) -> None:
    """Delete what we wrote of a directory that is no checkpoint any more; keep what remains in `replaced/`.

    Deletes the files its own manifest names, the manifest last, so that a crash on the way is taken up again. Files that were
    carried over to the directory `carried_to` live on there and go here.
    """
    ours = [relative for relative in _own_files(directory) if relative != names.MANIFEST]
    for relative in ours:
        _unlink_if_there(fs, os.path.join(directory, *relative.split("/")))
    if carried_to is not None:
        for relative, path in foreign_files(directory):
            other = os.path.join(carried_to, *relative.split("/"))
            if not names.is_plan_name(relative) and _same_content(path, other):
                _unlink_if_there(fs, path)
    if _own_files(directory):
        _unlink_if_there(fs, os.path.join(directory, names.MANIFEST))
    for inner in list(files.walk_directories(directory)):
        try:
            fs.remove_directory(inner)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    if os.path.lexists(directory):
        kept = names.kept_directory(root, save_id, name)
        _make_directories(fs, os.path.dirname(kept))
        fs.rename(directory, kept, "plain")


def _same_content(path: str, other: str) -> bool:
    try:
        if os.path.samestat(os.lstat(path), os.lstat(other)):
            return True
        return files.read_regular(path) == files.read_regular(other)
    except OSError:
        return False


def _unlink_if_there(fs: Filesystem, path: str) -> None:
    try:
        fs.unlink(path)
    except FileNotFoundError:
        pass


def remove_work(fs: Filesystem, directory: str) -> None:
    """Delete a work directory that was never published, all of it: every name in it was made by us."""
    for _, entry in list(files.walk_files(directory)):
        fs.unlink(entry.path)
    for inner in list(files.walk_directories(directory)):
        fs.remove_directory(inner)


def prune(fs: Filesystem, root: str, policy: Policy, committed: Collection[tuple[str, Manifest]]) -> list[str]:
    """Move the checkpoints that `policy` does not keep to the trash, then delete them; returns their names.

    `committed` are (path, manifest), the newest among them durable. The newest is never deleted, nor one whose manifest a
    reader has locked, nor a directory whose name is not one of ours.
    """
    manifests_of = dict(committed)
    gone = []
    for path in expendable(policy, committed):
        name, manifest = os.path.basename(path), manifests_of[path]
        trash = names.trash_directory(root, manifest.save_id)
        # In one step out of sight: no reader ever sees a checkpoint that is half deleted.
        fs.rename(path, trash, "plain")
        # Else a power cut could bring the name back with files missing.
        fs.sync_directory(root)
        dispose(fs, root, trash, name, manifest.save_id)
        gone.append(name)
    return gone


def expendable(policy: Policy, committed: Collection[tuple[str, Manifest]]) -> list[str]:
    """The checkpoints that `prune` would delete, newest first."""
    newest_first = sorted(committed, key=lambda item: item[1].order, reverse=True)
    keep = policy.keep([manifest for _, manifest in newest_first])
    return [
        path
        for path, manifest in newest_first[1:]
        if manifest.save_id not in keep
        and names.parse_checkpoint(os.path.basename(path)) is not None
        and not in_use(path)
    ]


def in_use(directory: str) -> bool:
    """Whether a reader holds the checkpoint (a shared lock on its manifest)."""
    try:
        fd = files.open_regular(os.path.join(directory, names.MANIFEST))
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def sweep(fs: Filesystem, root: str) -> list[str]:
    """Finish what a crash left in the work directory: drop unpublished saves, empty the trash, heal a missing target.

    Only the holder of the root's lock may call this. Entries whose names are not ours stay. Returns what was done.
    """
    work_root = names.work_directory(root)
    done = []
    # What is decided below rests on what is visible now; make that durable first.
    fs.sync_directory(root)
    fs.sync_directory(work_root)
    done += _heal_swaps(fs, root)
    committed = {entry.manifest.save_id: entry.path for entry in scan(root) if entry.manifest}
    for entry in sorted(os.listdir(work_root)):
        path = os.path.join(work_root, entry)
        parsed = names.parse_work_entry(entry)
        if parsed is None or os.path.islink(path):
            continue
        if parsed.kind == "work" and parsed.save_id not in committed:
            remove_work(fs, path)
            done.append(f"dropped the unfinished save {entry}")
        else:
            home = committed.get(parsed.save_id) if parsed.kind == "work" else None
            name = os.path.basename(home) if home else "checkpoint"
            dispose(fs, root, path, name, parsed.save_id, carried_to=home)
            done.append(f"finished deleting {entry}")
    return done


def _heal_swaps(fs: Filesystem, root: str) -> list[str]:
    replaced = names.replaced_directory(root)
    done = []
    for entry in sorted(os.listdir(replaced)) if os.path.isdir(replaced) else ():
        parsed = names.parse_swap(entry)
        if parsed is None:
            continue
        save_id, name = parsed
        target, swap = os.path.join(root, name), os.path.join(replaced, entry)
        if not os.path.lexists(target):
            fs.rename(swap, target, "plain")
            fs.sync_directory(root)
            done.append(f"brought {name} back, whose replacement was never published")
        else:
            dispose(fs, root, swap, name, save_id, carried_to=target)
            done.append(f"finished replacing {name}")
    return done


class Committed:
    """The manifests under a root, read once each: the tensor tables are dropped, they may be large."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._known: dict[str, tuple[tuple[int, ...], Manifest]] = {}

    def refresh(self) -> list[tuple[str, Manifest]]:
        """(path, manifest) of every checkpoint that has a usable manifest now."""
        found: dict[str, tuple[tuple[int, ...], Manifest]] = {}
        with os.scandir(self._root) as entries:
            paths = [e.path for e in entries if e.name != names.WORK and e.is_dir(follow_symlinks=False)]
        for path in paths:
            try:
                status = os.lstat(os.path.join(path, names.MANIFEST))
                key = (status.st_ino, status.st_size, status.st_mtime_ns)
                known = self._known.get(path)
                found[path] = known if known and known[0] == key else (key, _slim(manifests.read(path)))
            except (OSError, CorruptCheckpoint):
                continue  # not a checkpoint, or a broken one: neither counted nor deleted
        self._known = found
        return [(path, manifest) for path, (_, manifest) in found.items()]


def _slim(manifest: Manifest) -> Manifest:
    return replace(manifest, names={}, tensors={})
