"""Integration of Lightning's Trainer: a `CheckpointIO` plugin that saves in the background.

    trainer = Trainer(plugins=[VembedCheckpointIO()], callbacks=[ModelCheckpoint(monitor="loss", save_top_k=2, save_last=True)])
    trainer.fit(model, ckpt_path="last")
    model = MyModule.load_from_checkpoint(checkpoint.best_model_path)

Each `.ckpt` is a directory. `model.safetensors` has the tensors of `state_dict` under their names. The rest of
Lightning's dict is stored beside it as JSON and safetensors. Nothing in it is ever unpickled. Stock `.ckpt` files still
load. A program without the plugin calls `load_from_checkpoint(MyModule, path)` of this module.

Works for `lightning` and `pytorch_lightning`, whichever is imported.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .. import _signals
from .. import loading as restore
from .._capture.dialect import Own
from .._capture.request import Objects
from .._disk import deletion as removal
from .._disk import manifests
from .._disk.filesystem import LocalFilesystem
from .._disk.lock import wait_for_orphan
from .._engine.options import OnError, Options, WhenBusy, WriterKind
from .._engine.session import EXIT_DEADLINE
from .._format import names
from ..checkpointer import AsyncCheckpointer
from ..errors import CheckpointError, CommitError, CorruptCheckpoint, PlanError
from ..events import Sink, logger
from ..handle import SaveHandle, SaveState
from ..policies import SavePolicy
from . import lightning_host as host
from . import lightning_values as values
from .shared import close_shared, open_at, refuse_to_delete, shared

__all__ = ["VembedCheckpointIO", "read_checkpoint", "load_from_checkpoint"]

_EXTRA = "lightning"  # the key in `extra`
_MAX_ROOTS = 4  # directories that have a writer of their own at the same time
_BUSY: set[VembedCheckpointIO] = set()  # plugins that have saved since their last teardown

Module = TypeVar("Module")


@dataclass(frozen=True)
class _PendingDeletion:
    """A deletion that waits until the save `after` is durable; None means delete at once.

    If that save fails, nothing is deleted. Then, if the path was moved away for that save, it is moved back to `home`.
    """

    after: SaveHandle | None
    home: str | None = None


class VembedCheckpointIO:
    """A plugin for `Trainer(plugins=[...])`. It saves in the background; a visible checkpoint is always complete.

    A save of a `ModelCheckpoint` is written in the background: `save_checkpoint` returns as soon as the state is
    copied. For every other caller of `trainer.save_checkpoint` (you, Lightning's requeueing on Slurm, a signal
    handler), the checkpoint is on disk when the call returns. Lightning calls `remove_checkpoint` right after it has
    saved a successor. The deletion happens only when that successor is durable, and never if it fails. `teardown`, at
    the end of `fit`, waits for everything pending and raises failures; so does the next save. With Fabric, call
    `teardown` yourself.

    The options are those of `AsyncCheckpointer`; each directory of checkpoints has one. `max_in_flight` is 2, because
    `save_last=True` saves twice at a step. Each save under way takes host memory of the size of the state. How many
    checkpoints to keep is decided by `ModelCheckpoint`.

    With several processes, the first one saves its own copy of the state, as in Lightning, and all of them load.

    With `save_last="link"` Lightning sets the link at once: until the save is durable it points to nothing. A directory
    on another machine (`s3://...`) is refused when the training begins.
    """

    def __init__(
        self,
        *,
        when_busy: WhenBusy = "wait",
        on_error: OnError = "raise",
        writer: WriterKind = "process",
        max_in_flight: int = 2,
        max_host_bytes: int | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        options: dict[str, Any] = {
            "when_busy": when_busy,
            "on_error": on_error,
            "writer": writer,
            "max_in_flight": max_in_flight,
            "max_host_bytes": max_host_bytes,
            "sinks": tuple(sinks),
            "staging": "blocking",  # a dict does not tell which object its tensors belong to
        }
        Options(root="", retention=None, max_shard_size="50GB", save_original_format=True, **options)
        self._start(options)

    def __getstate__(self) -> dict[str, Any]:
        return self._options

    def __setstate__(self, options: dict[str, Any]) -> None:
        self._start(options)

    def _start(self, options: dict[str, Any]) -> None:
        """Start with nothing pending. Called by the constructor, and in a process that was spawned or forked."""
        self._options = options
        self._roots: list[str] = []  # roots with a checkpointer of this plugin; the one used last is at the end
        self._policies: dict[str, SavePolicy | None] = {}  # by root: those of callbacks, whose checkpointers stay open
        # the exception that was being handled before the first of these saves
        self._handled_outside: BaseException | None = None
        # Take these locks with signals held back: a handler that saves must not wait for the thread that it interrupts.
        self._deleting = threading.Lock()  # only one thread at a time deletes
        self._lock = threading.Lock()
        # guarded by _lock:
        self._newest: SaveHandle | None = None
        self._saves: dict[str, SaveHandle] = {}  # the newest save of each path, since the last teardown
        self._further_owners: Counter[str] = Counter()  # by path: how many more callbacks chose it at the same step
        self._doomed: dict[str, _PendingDeletion] = {}
        self._going: set[str] = set()  # paths that are being deleted now
        host.adapt(VembedCheckpointIO, _opened)

    # -- what Lightning calls

    @_signals.held()
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save `checkpoint` as the directory `path`; an existing one is replaced.

        Returns when the state is copied, or when the checkpoint is durable if the caller relies on that. Raises
        `PlanError` that names the key of a value that is not data, before anything is touched. Also raises what
        `AsyncCheckpointer.save` raises.
        """
        if storage_options is not None:
            raise TypeError("storage_options are not supported: checkpoints are saved to local directories")
        target = _mounted(path)
        weights, rest = values.pack(checkpoint)
        step = checkpoint.get("global_step") if isinstance(checkpoint, Mapping) else None
        objects = Objects(tensors=weights, extra={_EXTRA: rest}, dialect=Own(), of_every_rank=False)
        root, directory = os.path.split(target)
        was_open = open_at(root) is not None
        checkpointer = self._checkpointer(root)
        self._spare(target)
        aside = _move_aside(target)
        try:
            handle = checkpointer.save_as(directory, step if type(step) is int and step >= 0 else None, objects)
        except BaseException:
            if aside is not None:
                os.rename(aside, target)
            raise
        self._note(target, handle, aside)
        if host.is_waited_for(sys._getframe(1)):
            self._finish(root, handle, was_open)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the dict that was saved as `path`.

        It reads a directory of ours (see `read_checkpoint`); Lightning loads all else.
        """
        target = _local(path)
        if target is not None:
            try:
                _wait_for(target)
            finally:
                _meet()
            if _is_ours(target):
                return read_checkpoint(target, map_location)
            if os.path.islink(target) and not os.path.exists(target):
                raise FileNotFoundError(
                    f"{target}: links to {os.path.realpath(target)}, which was not saved completely; "
                    f"vembed_async_ckpt.latest({os.path.dirname(target)!r}) is the newest checkpoint that was"
                )
        further = {} if weights_only is None else {"weights_only": weights_only}
        return _stock().load_checkpoint(path, map_location=map_location, **further)  # type: ignore[no-any-return]

    @_signals.held()
    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the checkpoint `path` when the newest save is durable. It is not deleted if that save fails."""
        target = _local(path)
        if target is None:
            _stock().remove_checkpoint(path)
            return
        if _is_ours(target):
            self._checkpointer(os.path.dirname(target))  # only the holder of the directory's lock deletes in it
        with self._lock:
            if self._further_owners[target]:
                self._further_owners[target] -= 1  # two callbacks chose the name, and one still needs it
                return
            after = self._newest
            self._doomed[target] = _PendingDeletion(after)
        if after is None or after.done():
            self._settle()

    @_signals.held()
    def teardown(self) -> None:
        """Wait until every save is durable and every pending deletion is done. May be called again.

        Raises the failure of a save. But if an exception has ended the training, that one goes on, and the failure is
        logged.
        """
        ended_by = sys.exc_info()[1]
        try:
            self._drain()
        except Exception:
            if ended_by is None or ended_by is self._handled_outside:
                raise
            logger.exception("saves failed while another exception ended the training")

    def _drain(self) -> None:
        roots, self._roots = self._roots, []
        self._policies.clear()
        _BUSY.discard(self)
        try:
            for checkpointer in filter(None, map(open_at, roots)):
                checkpointer._session.drain(EXIT_DEADLINE)
            self._settle()
        finally:
            with self._lock:
                self._saves.clear()
            close_shared(roots=roots)

    def refuse_remote(self, path: str | os.PathLike[str]) -> None:
        """Raise `PlanError` for a URL of another machine."""
        _mounted(path)

    @_signals.held()
    def is_under_way(self, path: str | os.PathLike[str]) -> bool:
        """Return whether `path` is being saved: it does not exist yet, but its name is in use."""
        with self._lock:
            handle = self._saves.get(_local(path) or "")
        return handle is not None and not handle.done()

    # -- bookkeeping

    def _finish(self, root: str, handle: SaveHandle, stays_open: bool) -> None:
        """Wait until the save is durable. Raises its failure, unless `on_error` is "warn".

        Closes the checkpointer if it was opened for this save (`stays_open` is False).
        """
        try:
            handle.result()
            self._settle()
        except CheckpointError:
            if self._options["on_error"] != "warn":
                raise
        finally:
            if not stays_open:
                self._roots.remove(root)
                close_shared(roots=[root])

    def _checkpointer(self, root: str) -> AsyncCheckpointer:
        if not self._roots:
            self._handled_outside = sys.exc_info()[1]
            _BUSY.add(self)
        if root in self._roots:
            self._roots.remove(root)
        self._roots.append(root)
        if len(self._roots) > _MAX_ROOTS:  # a slash in a metric's name makes a new directory for every save
            oldest = next((root for root in self._roots if root not in self._policies), None)
            if oldest is not None:
                self._roots.remove(oldest)
                close_shared(roots=[oldest])
        return shared(root, {**self._options, "policy": self._policies.get(root)})

    @_signals.held()
    def checkpointer_with(self, root: str, policy: SavePolicy | None) -> AsyncCheckpointer:
        """Return the checkpointer of `root`, with `policy`, for a callback. It is open until `teardown`."""
        self._policies[root] = policy
        return self._checkpointer(root)

    def _spare(self, target: str) -> None:
        """Cancel a pending deletion of `target`, and wait for a running one."""
        with self._lock:
            self._doomed.pop(target, None)
            going = target in self._going
        if going:
            with self._deleting:
                pass

    def _note(self, target: str, handle: SaveHandle, aside: str | None) -> None:
        with self._lock:
            before = self._saves.get(target)
            if before is not None and before.step is not None and before.step == handle.step:
                self._further_owners[target] += 1
            self._newest = handle
            if handle.state is not SaveState.SKIPPED:
                self._saves[target] = handle
            if aside is not None:
                self._doomed[aside] = _PendingDeletion(handle, target)
        handle.add_done_callback(lambda _: self._settle())

    def _settle(self) -> None:
        """Delete or restore each pending path, now that the save it waited for has ended."""
        with self._deleting:
            while due := self._take_due():
                for path, doom in due.items():
                    self._judge(path, doom)

    def _take_due(self) -> dict[str, _PendingDeletion]:
        with self._lock:
            due = {path: doom for path, doom in self._doomed.items() if doom.after is None or doom.after.done()}
            for path in due:
                del self._doomed[path]
            self._going = set(due)
            return due

    def _judge(self, path: str, doom: _PendingDeletion) -> None:
        try:
            if doom.after is None or doom.after.state is SaveState.COMMITTED:
                _delete(path)
            elif doom.home is None:
                logger.warning("%s stays: the save that was to make it superfluous failed", path)
            else:
                self._put_back(path, doom.home, doom.after)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", path, error)

    def _put_back(self, path: str, home: str, failed: SaveHandle) -> None:
        with self._lock:
            newer = self._saves.get(home)
            if newer is not None and newer is not failed:
                self._doomed[path] = _PendingDeletion(newer, home)  # the newer save needs the path too
            elif not os.path.lexists(home):
                os.rename(path, home)

    @_signals.held()
    def _wait_for(self, target: str) -> None:
        with self._lock:
            handle = self._saves.get(target)
        if handle is None:
            return
        try:
            handle.result()
        except CheckpointError:
            with self._lock:
                if self._saves.get(target) is handle:
                    del self._saves[target]  # raise it once; afterwards the earlier checkpoint may be loaded
            raise


# -- reading


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Return the dict that Lightning saved as the directory `path`, without a Trainer.

    Waits if a save of it is still under way. `map_location`: as in `torch.load`; every tensor comes from "cpu".
    `torch.save(read_checkpoint(path), "stock.ckpt")` makes a file that Lightning opens without this plugin.

    Raises `CorruptCheckpoint` that names the file and the reason, and `CheckpointError` if Lightning did not save the
    checkpoint.
    """
    target = os.path.realpath(_local(path) or path)
    _wait_for(target)
    weights, restored = restore.read(target)
    if not isinstance(restored.extra, dict) or _EXTRA not in restored.extra:
        raise CheckpointError(f"{target}: was not saved by Lightning; use vembed_async_ckpt.load")
    mover = _Mover(map_location)
    return values.unpack(restored.extra[_EXTRA], weights, mover.move)  # type: ignore[no-any-return]


def load_from_checkpoint(
    module: type[Module], path: str | os.PathLike[str], map_location: Any = None, **arguments: Any
) -> Module:
    """Return `module.load_from_checkpoint(path, map_location, **arguments)`. `path` may also be a directory of ours.

    For programs that do not use the plugin.
    """
    host.adapt(VembedCheckpointIO, _opened)
    return module.load_from_checkpoint(path, map_location=map_location, **arguments)  # type: ignore[attr-defined,no-any-return]


def _opened(path: Any, map_location: Any) -> dict[str, Any] | None:
    """Return the checkpoint if `path` is a directory of ours, else None."""
    if not isinstance(path, str | os.PathLike) or str(path).startswith("http"):
        return None
    target = _local(path)
    if target is None:
        return None
    _wait_for(target)
    return read_checkpoint(target, "cpu" if map_location is None else map_location) if _is_ours(target) else None


class _Mover:
    """Applies `map_location` of torch.load to tensors that are on the CPU."""

    def __init__(self, map_location: Any) -> None:
        if isinstance(map_location, Mapping):
            map_location = map_location.get("cpu", "cpu")
        self._where = "cpu" if map_location is None else map_location

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        if not callable(self._where):
            return tensor.to(self._where)
        storage = self._where(tensor.untyped_storage(), "cpu")
        if storage is None or storage.device == tensor.device:
            return tensor
        moved = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        return moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _wait_for(target: str) -> None:
    """Wait for a save of `target` by this process or by the writer of a dead one. Raises its failure."""
    target = os.path.realpath(target)
    for plugin in list(_BUSY):
        plugin._wait_for(target)
    wait_for_orphan(os.path.dirname(target))


def _meet() -> None:
    """Wait for all ranks: Lightning loads on every rank, but only the first rank knows which saves are under way."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


# -- files and directories


def _local(path: str | os.PathLike[str]) -> str | None:
    """Return the absolute path, with links resolved in its parents but not in its last part.

    None for a URL of another machine.

    Raises `PlanError` if the path cannot be the directory of a checkpoint.
    """
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if separator:
        if scheme not in ("file", "local"):
            return None
        text = rest
    parent, name = os.path.split(os.path.abspath(text))
    if not name or name == names.WORK:
        raise PlanError(f"path is {os.fspath(path)!r}, which cannot be the directory of a checkpoint; name another one")
    return os.path.join(os.path.realpath(parent), name)


def _mounted(path: str | os.PathLike[str]) -> str:
    """Return `_local` of a path to save to. Raises `PlanError` for a URL of another machine."""
    target = _local(path)
    if target is None:
        raise PlanError(f"{os.fspath(path)!r} is not on a mounted file system; save to a local directory")
    return target


def _is_ours(path: str | os.PathLike[str]) -> bool:
    return os.path.lexists(os.path.join(os.path.realpath(_local(path) or path), names.MANIFEST))


def _move_aside(target: str) -> str | None:
    """Rename a stock file or a link that has the name, and return its new path; else None.

    Its new name is chosen so that "last" still finds it.
    """
    if not os.path.islink(target) and not os.path.isfile(target):
        return None
    stem, extension = os.path.splitext(target)
    number = 0
    while os.path.lexists(aside := f"{stem}-replaced{number or ''}{extension}"):
        number += 1
    os.rename(target, aside)
    return aside


def _delete(path: str) -> None:
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
    elif not os.path.isdir(path):
        return
    elif not _is_ours(path):
        shutil.rmtree(path)  # Lightning's own plugin does the same with files of another plugin
    else:
        _discard(path)


def _discard(path: str) -> None:
    root, name = os.path.split(path)
    try:
        manifest = manifests.read(path)
    except CorruptCheckpoint as error:
        logger.warning("%s stays: nothing proves that it is ours to delete (%s)", path, error)
        return
    if removal.in_use(path):
        logger.warning("%s stays: somebody is reading it", path)
        return
    try:
        refuse_to_delete(root)
    except CommitError as error:
        logger.warning("%s stays: %s", path, error)
        return
    removal.discard(LocalFilesystem(), root, name, manifest.save_id)


# -- Lightning


def _stock() -> Any:
    torch_io = values.fabric("plugins.io.torch_io")
    if torch_io is None:
        raise CheckpointError("Lightning is not installed: only directories of ours can be read")
    return torch_io.TorchCheckpointIO()


if host.is_loaded():
    host.adapt(VembedCheckpointIO, _opened)  # for command lines that check the class before they make an instance


def _forget_in_child() -> None:
    """In a forked child nothing is pending: pending saves belong to the parent."""
    for plugin in list(_BUSY):
        plugin._start(plugin._options)
    _BUSY.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@atexit.register
def _tear_down_at_exit() -> None:
    for plugin in list(_BUSY):
        try:
            plugin.teardown()
        except Exception as error:  # go on with the other plugins
            print(f"vembed_async_ckpt: at exit: {type(error).__name__}: {error}", file=sys.stderr)
