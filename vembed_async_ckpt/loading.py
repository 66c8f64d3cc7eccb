"""Restores a committed checkpoint into live objects, in place. Nothing is unpickled here.

The headers and the manifest say where the tensors are in the files. All reads are planned first and then done together.
Tensors in host memory are read directly into their place.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ._capture import accelerator as accelerators
from ._capture import random_state, tree
from ._capture.model import unwrap as unwrap_model
from ._capture.modes import in_neutral_modes
from ._capture.optimizer import unwrap as unwrap_optimizer
from ._capture.parameters import names_of
from ._capture.request import named
from ._capture.sharding import KNOWN_SHARES, share_of
from ._capture.training_state import parse_rank
from ._disk import latest_link
from ._disk.manifests import Verify
from ._disk.reader import has_changed, held, manifest_of
from ._disk.source import Files, LocalFiles
from ._format import names
from ._format.manifest import Manifest
from ._format.urls import is_url
from ._restore.accelerated import by_name, load_hooks, models_to_load
from ._restore.agreement import Agreement, among, divided, is_distributed
from ._restore.models import plan_model
from ._restore.optimizers import plan_optimizer, rewritable_state
from ._restore.schedulers import plan_scaler, plan_scheduler
from ._restore.selection import Selection, check_names
from ._restore.targets import Targets, ranks_that_share
from ._restore.tensors import Move, Tensors
from .errors import CheckpointError, warn

if TYPE_CHECKING:
    from ._ship.remote import RemoteFiles

_T = TypeVar("_T")


@dataclass(frozen=True)
class Restored:
    """The parts of a checkpoint that are returned, not restored into objects: step, config, extra and metrics."""

    step: int | None
    config: Any
    extra: Any
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class _Planned:
    """A planned restore: do the moves, then the steps, then set the random states (`rng`).

    `config` and `extra` go to the caller.
    """

    moves: list[Move]
    steps: list[Callable[[], None]]
    rng: Any
    config: Any
    extra: Any


@in_neutral_modes
def load(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    dataloader: Any = None,
    scaler: Any = None,
    accelerator: Any = None,
    verify: Verify = "size",
    strict: bool = True,
    exclude: str | Iterable[str] = (),
) -> Restored:
    """Restore a checkpoint into the given objects.

    Give them as they were given to `save()`: one object, or a mapping of names.

    The random number generators are set too if anything but a model is given, so that the training continues exactly
    where it was.

    `path`: the directory of the checkpoint, or the URL of an uploaded one. From there only what is needed is read.
    `accelerator`: its prepared models, optimizers, schedulers and scaler are restored where none are given. Its
        registered objects, dataloader positions and micro-batch counter are restored too, if they were saved. Its load
        hooks are called first and may remove models from their list, as with `accelerator.load_state`.
    `verify`: compare file sizes ("size"), hashes ("full") or nothing ("none") before anything is changed. Files that
        are not needed may be missing.
    `strict`: if False, load the parameters and buffers of each model that fit, leave an optimizer, scheduler or other
        object that does not fit as it is, and warn about everything that was not loaded.
    `exclude`: names of what stays as it is: parameters and buffers, modules (with everything inside), patterns such as
        "*.lora_A.*", or "optimizer", "scheduler", "dataloader", "scaler", "rng". A name that matches nothing is an
        error. The state of an optimizer is not divided: to leave out the state of some parameters, exclude "optimizer".

    Retention does not delete the checkpoint while it is read. If another process saves the same step meanwhile, the
    result is one of the two checkpoints, never a mixture.

    A model may have other wrappers than when it was saved: torch.compile, activation checkpointing,
    DistributedDataParallel, or hooks that rename its state_dict.

    A model may be divided among the ranks of the job: by FSDP (version 2, or version 1 with `use_orig_params=True`), HSDP
    or tensor parallelism. Every rank calls `load`, as it also does for DistributedDataParallel, and reads only what it
    holds. Who saved the checkpoint does not matter: one process, or more or fewer ranks. If one rank cannot load it,
    no rank does. With `verify="full"` the ranks divide the files among them. If there are more ranks than were saved,
    the random states of the others are derived from those of the first rank, with a warning.

    Optimizer state goes to the parameter of the same name if both sides know names. They do if the models are passed to
    `save()` and `load` with the optimizer, or if the optimizer was made from `named_parameters()`. The order and the
    parameter groups may then differ from the saved ones. Every parameter keeps the hyper-parameters with which it was
    saved. A group is refused if its parameters were saved with different hyper-parameters. Without names the order
    decides, and the groups must have the same sizes.

    Tensors of the model are overwritten in place. So is the state of torch's optimizers that have stepped before,
    unless a state_dict that was taken before also holds it.

    Raises `CorruptCheckpoint` naming file and reason, and `CheckpointError` if the objects do not fit what was saved,
    both before any object is changed. Only if the disk fails while tensors are read, some objects are changed already:
    then load another checkpoint.
    """

    names_to_exclude = check_names(exclude)

    def plan(source: Tensors) -> _Planned:
        others = (optimizer, scheduler, dataloader, scaler, accelerator)
        models = model
        if accelerator is not None and model is None:
            if load_hooks(accelerator):  # report what does not fit before the hooks change anything
                _plan(source, {}, *others, Selection(strict=strict, exclude=names_to_exclude))
            models = by_name(models_to_load(accelerator, source.manifest.names, source.directory))
        selection = Selection(strict=strict, exclude=names_to_exclude)
        planned = _plan(source, models, *others, selection)
        selection.tell(source.directory)
        return planned

    given_models = _modules(model if accelerator is None or model is not None else accelerator._models)
    given_optimizers = list(named("optimizer", optimizer).values())
    if accelerator is not None and optimizer is None:
        given_optimizers = list(accelerator._optimizers)
    agreement = among(ranks_that_share(given_models, map(unwrap_optimizer, given_optimizers)))
    with contextlib.ExitStack() as stack:
        source, planned = _of_one_save(path, verify, stack, plan, agreement)
        return _restore(source, planned, agreement)


@in_neutral_modes
def read(path: str | os.PathLike[str], *, verify: Verify = "size") -> tuple[dict[str, torch.Tensor], Restored]:
    """Read a checkpoint for programs that restore states themselves.

    Returns copies of the weights under the names in their files, and what `load` returns. Tied weights have every name
    and share one tensor. Raises `CorruptCheckpoint` as `load` does.
    """

    def plan(source: Tensors) -> tuple[dict[str, torch.Tensor], _Planned]:
        weights: dict[str, torch.Tensor] = {}
        for described in source.manifest.names.values():
            weights |= source.weights(described["files"])
            weights |= {alias: weights[kept] for alias, kept in described["ties"].items() if kept in weights}
        return weights, _plan(source, None, None, None, None, None, None, Selection())

    with contextlib.ExitStack() as stack:
        source, (weights, planned) = _of_one_save(path, verify, stack, plan)
        return weights, _restore(source, planned)


def _of_one_save(
    path: str | os.PathLike[str],
    verify: Verify,
    stack: contextlib.ExitStack,
    plan: Callable[[Tensors], _T],
    agreement: Agreement | None = None,
) -> tuple[Tensors, _T]:
    """Open a checkpoint, in a directory or at a URL, and call `plan` on it.

    Everything comes from one save, even if another save replaces the checkpoint meanwhile. With an `agreement` that
    holds for all of its ranks.

    Returns the open files, which `stack` will close, and what `plan` returned. If another save took the name while the
    files were opened, this starts again once. Raises what `plan` raises, `CorruptCheckpoint`, and `CheckpointError` if
    the checkpoint was replaced twice. With an `agreement`, an error on one rank is an error on all.
    """
    uploaded = _uploaded(os.fspath(path)) if is_url(path) else None
    directory = os.fspath(path) if is_url(path) else latest_link.resolve(path)
    for _ in range(2):
        with contextlib.ExitStack() as inner:
            lock = inner.enter_context(held(directory)) if uploaded is None else None
            error: BaseException | None = None
            try:
                manifest = manifest_of(directory) if uploaded is None else uploaded.manifest()
                files = uploaded or LocalFiles(directory)
                source = inner.enter_context(contextlib.closing(_opened(files, manifest, verify, agreement)))
                with _making_sense(directory):
                    planned = plan(source)
            except CheckpointError as raised:
                error = raised
            except BaseException as raised:
                if agreement is not None:
                    agreement.on_one_save(directory, None, raised)
                raise
            changed = uploaded is None and has_changed(directory, lock)
            if agreement is not None:
                changed = not agreement.on_one_save(
                    directory, None if changed else manifest.save_id, None if changed else error
                )
            elif error is not None and not changed:
                raise error
            if not changed:
                stack.push(inner.pop_all())
                return source, planned
    raise CheckpointError(
        f"{directory}: was replaced twice while it was read; load it when nobody saves under its name"
    )


def _uploaded(url: str) -> RemoteFiles:
    """Return the files of a checkpoint that was uploaded. No other save ever takes its place."""
    from ._ship.remote import RemoteFiles

    return RemoteFiles(url)


def _opened(files: Files, manifest: Manifest, verify: Verify, agreement: Agreement | None) -> Tensors:
    """Return the files of a checkpoint. The ranks of an agreement divide among them which files to hash."""
    if agreement is None:
        return Tensors(files, manifest, verify)
    sizes = {name: record.size for name, record in manifest.files.items()}
    return Tensors(files, manifest, verify, divided(sizes, agreement.place, agreement.size))


def _restore(source: Tensors, planned: _Planned, agreement: Agreement | None = None) -> Restored:
    try:
        wait_for_copies()
        source.fill(planned.moves)
        for step in planned.steps:
            step()
        if planned.rng is not None:
            random_state.restore(planned.rng)
    except BaseException as error:
        if agreement is not None:
            agreement.on_the_end(source.directory, error)
        raise
    if agreement is not None:
        agreement.on_the_end(source.directory, None)
    return Restored(source.manifest.step, planned.config, planned.extra, source.manifest.metrics)


@contextlib.contextmanager
def _making_sense(directory: str) -> Iterator[None]:
    """Context manager: turn the errors that inconsistent data causes into `CheckpointError`.

    A well-formed checkpoint may still contain a contradiction: a tensor that is in no file, or a list in the place of a
    name.
    """
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: cannot be put back: {type(error).__name__}: {error}") from error


def _plan(
    source: Tensors,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    dataloader: Any,
    scaler: Any,
    accelerator: Any,
    selection: Selection,
) -> _Planned:
    """Plan the restore of each object. Raises `CheckpointError` or `CorruptCheckpoint` before anything is changed."""
    saved = source.training_state()
    resumes = any(part is not None for part in (optimizer, scheduler, dataloader, scaler, accelerator))
    if accelerator is not None:
        prepared = accelerator._optimizers, accelerator._schedulers
        if optimizer is None and not selection.excludes("optimizer"):
            optimizer = selection.attempt(lambda: _in_order(prepared[0], saved["optimizers"]))
        if scheduler is None and not selection.excludes("scheduler"):
            scheduler = selection.attempt(lambda: _in_order(prepared[1], saved["schedulers"]))
        scaler = getattr(accelerator, "scaler", None) if scaler is None else scaler
    moves: list[Move] = []
    steps: list[Callable[[], None]] = []
    models = {name: unwrap_model(value) for name, value in named("model", model).items()}
    targets = _targets(source.directory, model, accelerator)
    optimizers = {
        name: unwrap_optimizer(value)
        for name, value in named("optimizer", optimizer).items()
        if not selection.excludes(f"optimizer.{name}".rstrip("."))
    }
    for name, module in models.items():
        described = selection.attempt(lambda name=name: _saved(source.manifest.names, name, "model"))  # type: ignore[misc]
        if described is not None:
            more, step = plan_model(source, described, name, module, selection, targets)
            moves += more
            steps += [] if step is None else [step]
    if resumes:
        source.verify_all(but=_not_asked_for(source, saved, models, optimizers))
    rewritable = rewritable_state(models.values(), optimizers.values())
    regrouped: dict[int, Any] = {}
    known = _names(models, accelerator, source.manifest.names)

    def of_optimizer(name: str, value: Any) -> Any:
        described = _saved(saved["optimizers"], name, "optimizer")
        return plan_optimizer(source, described, name, value, rewritable, known, targets)

    def of_scheduler(name: str, value: Any) -> Callable[[], None]:
        return plan_scheduler(source, saved, name, _saved(saved["schedulers"], name, "scheduler"), value, regrouped)

    for name, value in optimizers.items():
        planned = selection.attempt(functools.partial(of_optimizer, name, value))
        if planned is not None:
            moves += planned.moves
            steps.append(planned.step)
            if planned.sources is not None:
                regrouped[id(value)] = planned.sources
    for name, value in named("scheduler", scheduler).items():
        if not selection.excludes(f"scheduler.{name}".rstrip(".")):
            step = selection.attempt(functools.partial(of_scheduler, name, value))
            steps += [] if step is None else [step]
    rng, position = _of_this_rank(source, saved) if resumes else (None, None)
    scaling = tree.decode(saved["scaler"], source.training_tensor)
    if accelerator is not None and scaling is None:
        scaler = None
    if position is None and saved["dataloader"] is not None:
        dataloader = None  # more ranks than were saved: this rank has no saved position, and a warning said so
    for what, value, state in (("dataloader", dataloader, position), ("scaler", scaler, scaling)):
        if value is not None and not selection.excludes(what):
            state = selection.attempt(functools.partial(_not_without, source, what, state))
            if state is not None:
                steps.append(
                    plan_scaler(source, state, value)
                    if what == "scaler"
                    else functools.partial(value.load_state_dict, state)
                )
    if accelerator is not None:
        steps += selection.attempt(lambda: _plan_accelerator(source, saved, accelerator)) or []
    extra = tree.decode(saved["extra"], source.training_tensor)
    return _Planned(moves, steps, None if selection.excludes("rng") else rng, source.config(), extra)


def _targets(directory: str, model: Any, accelerator: Any) -> Targets:
    """Return what is known of the models, or of the accelerator's if none is given: its optimizers step those.

    Raises `CheckpointError` for a model of which this process holds a share that nobody can tell.
    """
    models = _modules(model) or _modules(getattr(accelerator, "_models", None))
    for module in models:
        share = share_of(module, KNOWN_SHARES)
        if share is not None:
            raise CheckpointError(f"{directory}: {share}: load into the whole model, before it is sharded")
    return Targets(models)


def _modules(models: Any) -> list[torch.nn.Module]:
    values = models if isinstance(models, list) else named("model", models).values()
    return [model for model in values if isinstance(model, torch.nn.Module)]


def _not_asked_for(
    source: Tensors, saved: Mapping[str, Any], models: Mapping[str, Any], optimizers: Mapping[str, Any]
) -> set[str]:
    """Return the files of the models and optimizers that are not restored."""
    files = {entry["file"] for name, entry in saved["optimizers"].items() if name not in optimizers}
    for name, described in source.manifest.names.items():
        if name not in models:
            files.update(described["files"], described["uncovered"])
    return files


def _not_without(source: Tensors, what: str, state: Any) -> Any:
    if state is None:
        raise CheckpointError(f"{source.directory}: was saved without a {what}; load it without {what}=")
    return state


def _names(
    models: Mapping[str, torch.nn.Module], accelerator: Any, saved: Mapping[str, Any]
) -> Mapping[int, Sequence[str]]:
    """Return the names of each parameter, by its id.

    These are its names in the given models, or in those of the accelerator if none is given.
    """
    known: list[tuple[str, torch.nn.Module]] = list(models.items())
    if not known and accelerator is not None and len(accelerator._models) == len(saved):
        known = [(name, unwrap_model(model)) for name, model in zip(saved, accelerator._models, strict=True)]
    result: dict[int, list[str]] = {}
    for name, parameter in names_of(known).items():
        result.setdefault(id(parameter), []).append(name)
    return result


def wait_for_copies() -> None:
    """Return when no save of this process is still copying tensors that are about to change."""
    barrier = sys.modules.get("vembed_async_ckpt._memory.barrier")  # not imported in a process that only reads
    for snapshot in barrier.STEP_BARRIER.pending if barrier is not None else ():
        snapshot.barrier()


def _plan_accelerator(source: Tensors, saved: Mapping[str, Any], accelerator: Any) -> list[Callable[[], None]]:
    """Return the steps that will restore registered objects, dataloaders and the step counter.

    Raises before anything is changed.
    """
    known = tree.decode(saved.get("accelerator"), source.training_tensor)
    if known is None:
        return []
    objects, entries = accelerator._custom_objects, saved["registered"]
    if len(objects) != len(entries):
        raise CheckpointError(
            f"{source.directory}: holds {len(entries)} registered objects, the accelerator has {len(objects)}"
        )
    steps: list[Callable[[], None]] = []
    for value, entry in zip(objects, entries, strict=True):
        if entry["rest"] is None:
            raise CheckpointError(
                f"{source.directory}: {entry['file']} is a pickle, because the state of the registered "
                f"{type(value).__qualname__} is more than data: only accelerator.load_state restores it"
            )
        state = tree.decode(entry["rest"], functools.cache(functools.partial(source.listed_copy, entry["file"])))
        steps.append(lambda value=value, state=state: value.load_state_dict(state))  # type: ignore[misc]
    return [*steps, lambda: accelerators.restore(accelerator, known)]


def _of_this_rank(source: Tensors, saved: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return (random states, dataloader position) of this rank.

    For a rank that was not saved, warn. If there are more ranks than were saved, its random states are derived from
    those of the first rank. Otherwise both are None, and it goes on with what it has.
    """
    rank, world_size = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_distributed() else (0, 1)
    )
    had = source.manifest.world_size
    if world_size != had:
        more = f", and those of the ranks from {had} on are derived from those of rank 0" if world_size > had else ""
        warn(
            f"{source.directory}: was saved by {had} ranks and is loaded by {world_size}: "
            f"random states and the order of the data cannot go on exactly{more}"
        )
    if rank and names.rank_state(rank) in source.manifest.files:
        return parse_rank(source.json(names.rank_state(rank)))
    if 0 < rank < had:
        warn(
            f"{source.directory}: was saved without rank {rank}: its random states and its place in the data go on as they are "
            "now, not as they were"
        )
        return None, None
    get = source.training_tensor
    rng = random_state.checked(tree.decode(saved["rng"], get), source.directory)
    return (random_state.derived(rng, rank), None) if rank else (rng, tree.decode(saved["dataloader"], get))


def _in_order(values: Sequence[Any], saved: Mapping[str, Any]) -> Any:
    """Return accelerate's objects by their saved names. They have no names of their own, so their order decides."""
    if not values:
        return None
    if len(values) != len(saved):
        raise CheckpointError(
            f"the accelerator has {len(values)} objects where {len(saved)} were saved ({list(saved)})"
        )
    return values[0] if list(saved) == [""] else dict(zip(saved, values, strict=True))


def _saved(saved: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in saved:
        known = ", ".join(repr(other) if other else "one without a name" for other in saved) or "none"
        raise CheckpointError(f"the checkpoint has no {what} {name!r}; it has {known}")
    return saved[name]
