"""Adapts Lightning to our plugin: its checkpoints are directories, and they appear some time after the call.

It adapts each of the packages `lightning` and `pytorch_lightning` that is loaded.
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

from . import lightning_values as values
from .worker_end import is_end_of_worker

PYTORCH = ("lightning.pytorch", "pytorch_lightning")


class Plugin(Protocol):
    def is_under_way(self, path: Any) -> bool: ...

    def refuse_remote(self, path: Any) -> None: ...

    def checkpointer_with(self, root: str, policy: Any) -> Any: ...


def adapt(plugin: type[Any], opened: Callable[..., Any]) -> None:
    """Adapt the loaded Lightning packages to `plugin`. May be called again.

    Afterwards `isinstance(plugin, CheckpointIO)` is true. `load_from_checkpoint` loads what
    `opened(path, map_location)` returns, unless that is None. `ModelCheckpoint` refuses a directory on another machine
    when it is set up, and does not use a name that is being saved. No Lightning module is imported here if one is
    loaded already.
    """
    _register(plugin)
    for package in values.PACKAGES:
        loading = sys.modules.get(f"{package}.utilities.cloud_io")
        if loading is not None:
            _wrap(loading, "_load", functools.partial(_opening, opened))
    for package in PYTORCH:
        saving = sys.modules.get(f"{package}.core.saving")
        if saving is not None:
            _wrap(saving, "pl_load", functools.partial(_opening, opened))
        callback = sys.modules.get(f"{package}.callbacks.model_checkpoint")
        if callback is not None:
            _wrap(callback.ModelCheckpoint, "setup", functools.partial(_refusing, plugin))
            _wrap(callback.ModelCheckpoint, "file_exists", functools.partial(_knowing, plugin))


def is_loaded() -> bool:
    """Return whether a Lightning package is loaded."""
    return any(package in sys.modules for package in values.PACKAGES)


def is_waited_for(frame: FrameType | None) -> bool:
    """Return whether the caller of `trainer.save_checkpoint` relies on the checkpoint being on disk afterwards.

    `frame` is inside that call. True unless the caller is a `ModelCheckpoint` or our callback: the user expects the
    checkpoint, and a handler of signals or exceptions may end the process afterwards.
    """
    trainers = _loaded("trainer.trainer", "Trainer")
    while frame is not None and not _is_save_of(frame, trainers):
        frame = frame.f_back
    while frame is not None and _is_save_of(frame, trainers):
        frame = frame.f_back  # a class of the user's may override the method
    if frame is None:
        return False
    caller = frame.f_locals.get("self")
    ours = getattr(type(caller), "saves_in_background", False)
    return not ours and not isinstance(caller, _loaded("callbacks.model_checkpoint", "ModelCheckpoint"))


def take_sigterm_from(trainer: Any) -> None:
    """Take out Lightning's own answer to SIGTERM, which ends each rank at a step of its own.

    It runs a collective in the signal handler. What else handles the signal stays, requeueing on Slurm too.
    """
    present: Any = signal.getsignal(signal.SIGTERM)
    handlers = getattr(present, "signal_handlers", None)
    if isinstance(handlers, list):
        own = trainer._signal_connector._sigterm_notifier_fn
        signal.signal(signal.SIGTERM, type(present)([handler for handler in handlers if handler != own]))


def end_training(trainer: Any, signals: Sequence[int]) -> None:
    """Let `trainer` leave its loops at the end of this step, as after a SIGTERM. The handlers of `signals` stay."""
    connector = trainer._signal_connector
    for signum in signals:
        if signum in connector._original_handlers:
            connector._original_handlers[signum] = signal.getsignal(signum)
    connector.received_sigterm = True


def catch_worker_errors(trainer: Any, end: Callable[[], int]) -> None:
    """Call `end()` when a DataLoader worker ends while `trainer` fetches a batch to train on.

    If it returns an exit code, the training ends as after a SIGTERM, with that code; if 0, the error goes on.
    """
    loop = trainer.fit_loop.epoch_loop
    advance = type(loop).advance

    def catching(*arguments: Any, **further: Any) -> Any:
        try:
            return advance(loop, *arguments, **further)
        except Exception as error:
            code = end() if is_end_of_worker(error) else 0
            if not code:
                raise
            package = type(trainer).__module__.partition(".trainer")[0]
            exceptions = sys.modules[f"{package}.utilities.exceptions"]
            raise exceptions.SIGTERMException(code) from error

    loop.advance = catching


def release_worker_errors(trainer: Any) -> None:
    """Undo `catch_worker_errors`."""
    vars(trainer.fit_loop.epoch_loop).pop("advance", None)


def _is_save_of(frame: FrameType, trainers: tuple[type, ...]) -> bool:
    return frame.f_code.co_name == "save_checkpoint" and isinstance(frame.f_locals.get("self"), trainers)


def _loaded(module: str, name: str) -> tuple[type, ...]:
    found = [sys.modules.get(f"{package}.{module}") for package in PYTORCH]
    return tuple(getattr(module, name) for module in found if module is not None)


def _register(plugin: type) -> None:
    module = "plugins.io.checkpoint_io"
    loaded = [sys.modules[f"{p}.{module}"] for p in values.PACKAGES if f"{p}.{module}" in sys.modules]
    for found in loaded or [values.fabric(module)]:
        if found is not None:
            found.CheckpointIO.register(plugin)


def _wrap(owner: Any, name: str, wrapping: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    function = getattr(owner, name, None)
    if function is None or hasattr(function, "_vembed_async_ckpt"):
        return
    wrapped: Any = functools.wraps(function)(wrapping(function))
    wrapped._vembed_async_ckpt = True
    setattr(owner, name, wrapped)


def _opening(opened: Callable[..., Any], pl_load: Callable[..., Any]) -> Callable[..., Any]:
    def load(path_or_url: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = opened(path_or_url, map_location)
        return pl_load(path_or_url, map_location, *args, **kwargs) if checkpoint is None else checkpoint

    return load


def _refusing(plugin: type[Any], setup: Callable[..., Any]) -> Callable[..., Any]:
    def set_up(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        result = setup(self, trainer, *args, **kwargs)
        used = plugin_of(trainer, plugin)
        if used is not None and self.dirpath is not None:
            used.refuse_remote(self.dirpath)
        return result

    return set_up


def _knowing(plugin: type[Any], file_exists: Callable[..., bool]) -> Callable[..., bool]:
    def exists(self: Any, filepath: Any, trainer: Any) -> bool:
        used = plugin_of(trainer, plugin)
        if used is None:
            return file_exists(self, filepath, trainer)
        # Ask this first: a save that is committed between the two questions then exists at the second.
        under_way = trainer.strategy.broadcast(used.is_under_way(filepath))
        return under_way or file_exists(self, filepath, trainer)

    return exists


def plugin_of(trainer: Any, plugin: type[Any]) -> Plugin | None:
    used: Any = getattr(getattr(trainer, "strategy", None), "checkpoint_io", None)
    if not isinstance(used, plugin):
        used = getattr(used, "checkpoint_io", None)  # inside Lightning's AsyncCheckpointIO
    return used if isinstance(used, plugin) else None
