"""Restore: a committed checkpoint back into live objects, in place. Nothing is unpickled here.

Weights and optimizer tensors are mapped from their files at the offsets that header and manifest give, and copied once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ._arena.barrier import GATE
from ._plan import safetensors
from ._plan.plan import is_safe_relative
from ._plan.safetensors import BITS
from ._request import accelerator as accelerators
from ._request import random_state, tree
from ._request.dtypes import TO_TORCH
from ._request.model import sharded
from ._request.model import unwrap as unwrap_model
from ._request.optimizer import unwrap as unwrap_optimizer
from ._request.places import has_no_storage
from ._request.request import named
from ._request.training_state import parse_rank
from ._store import manifest as manifests
from ._store import names
from ._store.fs import open_regular, read_regular
from ._store.manifest import Manifest, Verify
from .errors import CheckpointError, CorruptCheckpoint

_T = TypeVar("_T")
_Plan = tuple[list[Callable[[], None]], Any, Any, Any]  # what will restore each object; random states, config, extra
_MOMENT = 0.05  # seconds that a directory which made way without an exchange is given to come back


@dataclass(frozen=True)
class Restored:
    """What a checkpoint says besides the states that were put back: its step, config, extra and metrics."""

    step: int | None
    config: Any
    extra: Any
    metrics: Mapping[str, float]


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
) -> Restored:
    """Put a checkpoint back into the objects given, as they were given to `save()` (one object, or a mapping of names).

    The random number generators are set too when anything but a model is given: training goes on exactly where it was.
    With `accelerator`, its prepared models, optimizers, schedulers and scaler take the place of those not given; its registered
    objects, places in dataloaders and count of micro-batches are restored too, if they were saved. `verify`: compare "size"s,
    "full" hashes, or "none", before anything is changed. The checkpoint is safe from retention while it is read; where another
    process saves the same step meanwhile, what is restored is one of the two, never a mixture.

    Raises `CorruptCheckpoint` naming file and reason, and `CheckpointError` when the objects do not fit what was saved; both
    before any object is changed.
    """

    def plan(source: _Source) -> _Plan:
        return _plan(source, model, optimizer, scheduler, dataloader, scaler, accelerator)

    with contextlib.ExitStack() as stack:
        source, planned = _of_one_save(os.fspath(path), verify, stack, plan)
        return _restore(source, planned)


def read(path: str | os.PathLike[str], *, verify: Verify = "size") -> tuple[dict[str, torch.Tensor], Restored]:
    """A checkpoint for hosts that put states back themselves: copies of the weights under the names that their files have
    (of tied ones every name, sharing one tensor), and what `load` returns. Raises `CorruptCheckpoint` as `load` does."""

    def plan(source: _Source) -> tuple[dict[str, torch.Tensor], _Plan]:
        weights: dict[str, torch.Tensor] = {}
        for described in source.manifest.names.values():
            for file in described["files"]:
                weights |= {key: source.tensor(file, key).clone() for key in source.entries(file)}
            weights |= {alias: weights[kept] for alias, kept in described["ties"].items() if kept in weights}
        return weights, _plan(source, None, None, None, None, None, None)

    with contextlib.ExitStack() as stack:
        source, (weights, planned) = _of_one_save(os.fspath(path), verify, stack, plan)
        return weights, _restore(source, planned)


def _of_one_save(
    directory: str, verify: Verify, stack: contextlib.ExitStack, plan: Callable[[_Source], _T]
) -> tuple[_Source, _T]:
    """A checkpoint's files, held by `stack`, and what `plan` makes of them: all of one save, whoever replaces it meanwhile.

    Where another save took the name while the files were opened, all is done once more. Raises what `plan` raises,
    `CorruptCheckpoint`, and `CheckpointError` if the name is taken by yet another save.
    """
    for _ in range(2):
        before = None
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(_held(directory))
                manifest = manifests.read(directory)
                before = manifest.save_id
                manifests.check(directory, manifest, verify)
                source = _Source(directory, manifest)
                with _making_sense(directory):
                    planned = plan(source)
            except CheckpointError:
                if not _has_changed(directory, before):
                    raise
                continue
            if not _has_changed(directory, before):
                stack.push(held.pop_all())
                return source, planned
    raise CheckpointError(
        f"{directory}: was replaced twice while it was read; load it when nobody saves under its name"
    )


def _has_changed(directory: str, save_id: str | None) -> bool:
    """Whether the directory holds another save now; where there was none (None), it is given a moment to come."""
    if save_id is None:
        time.sleep(_MOMENT)
    try:
        return manifests.read(directory).save_id != save_id
    except CheckpointError:
        return save_id is not None


def _restore(source: _Source, planned: _Plan) -> Restored:
    steps, rng, config, extra = planned
    wait_for_copies()
    for step in steps:
        step()
    if rng is not None:
        random_state.restore(rng)
    return Restored(source.manifest.step, config, extra, source.manifest.metrics)


@contextlib.contextmanager
def _making_sense(directory: str) -> Iterator[None]:
    """What is well formed may still say what cannot be: of a tensor that is nowhere, of a list where a name should be."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: cannot be put back: {type(error).__name__}: {error}") from error


def _plan(
    source: _Source, model: Any, optimizer: Any, scheduler: Any, dataloader: Any, scaler: Any, accelerator: Any
) -> _Plan:
    """(what will restore each object, random states, config, extra). Raises before anything is changed."""
    saved = source.training_state()
    if accelerator is not None:
        if model is None and source.manifest.names:  # else a save hook took the models out
            model = _in_order(accelerator._models, source.manifest.names)
        optimizer = _in_order(accelerator._optimizers, saved["optimizers"]) if optimizer is None else optimizer
        scheduler = _in_order(accelerator._schedulers, saved["schedulers"]) if scheduler is None else scheduler
        scaler = getattr(accelerator, "scaler", None) if scaler is None else scaler
    steps: list[Callable[[], None]] = []
    for name, value in named("model", model).items():
        steps.append(_plan_model(source, name, unwrap_model(value)))
    for name, value in named("optimizer", optimizer).items():
        entry = _saved(saved["optimizers"], name, "optimizer")
        steps.append(_plan_optimizer(source, entry, name, unwrap_optimizer(value)))
    for name, value in named("scheduler", scheduler).items():
        state = tree.decode(_saved(saved["schedulers"], name, "scheduler"), source.training_tensor)
        steps.append(lambda value=value, state=state: value.load_state_dict(state))  # type: ignore[misc]
    resumes = any(part is not None for part in (optimizer, scheduler, dataloader, scaler, accelerator))
    rng, position = _of_this_rank(source, saved) if resumes else (None, None)
    scaling = tree.decode(saved["scaler"], source.training_tensor)
    if accelerator is not None and scaling is None:
        scaler = None
    if position is None and saved["dataloader"] is not None:
        dataloader = None  # more ranks than saved: this one has no place of its own, and was warned
    for what, value, state in (("dataloader", dataloader, position), ("scaler", scaler, scaling)):
        if value is not None:
            if state is None:
                raise CheckpointError(f"{source.directory}: was saved without a {what}; load it without {what}=")
            steps.append(lambda value=value, state=state: value.load_state_dict(state))  # type: ignore[misc]
    if accelerator is not None:
        steps += _plan_accelerator(source, saved, accelerator)
    return steps, rng, source.config(), tree.decode(saved["extra"], source.training_tensor)


def wait_for_copies() -> None:
    """Return when no save of this process is still copying what is about to change."""
    for snapshot in GATE.pending:
        snapshot.barrier()


def _plan_accelerator(source: _Source, saved: Mapping[str, Any], accelerator: Any) -> list[Callable[[], None]]:
    """What will restore registered objects, dataloaders and step. Raises before anything is changed."""
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
        state = tree.decode(entry["rest"], functools.partial(source.listed_copy, entry["file"]))
        steps.append(lambda value=value, state=state: value.load_state_dict(state))  # type: ignore[misc]
    return [*steps, lambda: accelerators.restore(accelerator, known)]


def _of_this_rank(source: _Source, saved: Mapping[str, Any]) -> tuple[Any, Any]:
    """(random states, dataloader position) of this rank; with a warning, None for a rank that had none."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if world_size != source.manifest.world_size:
        warnings.warn(
            f"{source.directory}: was saved by {source.manifest.world_size} ranks and is loaded by {world_size}: "
            "random states and the order of the data cannot go on exactly",
            stacklevel=6,
        )
    if rank == 0:
        get = source.training_tensor
        return tree.decode(saved["rng"], get), tree.decode(saved["dataloader"], get)
    if names.rank_state(rank) not in source.manifest.files:
        return None, None
    return parse_rank(source.json(names.rank_state(rank)))


def _in_order(values: Sequence[Any], saved: Mapping[str, Any]) -> Any:
    """accelerate's objects have no names: they are matched with what was saved by their order."""
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


@contextlib.contextmanager
def _held(directory: str) -> Iterator[None]:
    """Retention leaves a checkpoint alone while somebody holds a shared lock on its manifest."""
    try:
        fd = open_regular(os.path.join(directory, names.MANIFEST))
    except OSError:
        yield  # the manifest's own reader says what is wrong
        return
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


class _Source:
    """The files of one checkpoint, mapped when they are first needed."""

    def __init__(self, directory: str, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._maps: dict[str, mmap.mmap] = {}
        self._entries: dict[str, dict[str, safetensors.Entry]] = {}

    def path(self, name: str) -> str:
        if name not in self.manifest.files or not is_safe_relative(name):
            raise CorruptCheckpoint(f"{self.directory}: {name!r} is needed, but the manifest does not list it")
        manifests.refuse_linked_parents(self.directory, name)
        return os.path.join(self.directory, *name.split("/"))

    def json(self, name: str) -> Any:
        path = self.path(name)
        try:
            return json.loads(read_regular(path))
        except (ValueError, RecursionError, OSError) as error:
            raise CorruptCheckpoint(f"{path}: cannot be read: {error}") from error

    def config(self) -> Any:
        return self.json(names.CONFIG) if names.CONFIG in self.manifest.files else None

    def training_state(self) -> dict[str, Any]:
        state = self.json(names.TRAINING_STATE)
        needed = ("optimizers", "schedulers", "scaler", "dataloader", "extra", "rng")
        if not isinstance(state, dict) or any(key not in state for key in needed):
            raise CorruptCheckpoint(f"{self.path(names.TRAINING_STATE)}: does not hold {', '.join(needed)}")
        return state

    def training_tensor(self, name: str) -> torch.Tensor:
        """A copy of one of the small tensors."""
        return self.tensor(names.TRAINING_TENSORS, name).clone()

    def entries(self, file: str) -> dict[str, safetensors.Entry]:
        if file not in self._entries:
            data = self._map(file)
            length = safetensors.header_length(data[:8], len(data), file=self.path(file))
            self._entries[file] = safetensors.parse(data[: 8 + length], len(data), file=self.path(file))[0]
        return self._entries[file]

    def tensor(self, file: str, name: str) -> torch.Tensor:
        """A tensor of a safetensors file, as a view of the mapped file."""
        entry = self.entries(file).get(name)
        if entry is None:
            raise CorruptCheckpoint(f"{self.path(file)}: has no tensor {name!r}")
        return self._view(file, entry.dtype, entry.shape, entry.offset, entry.nbytes)

    def listed_tensor(self, file: str, key: str) -> torch.Tensor:
        """A tensor of a file whose tensors stand in the manifest, as a view of the mapped file."""
        try:
            dtype, shape, offset = self.manifest.tensors[file][key]
            element = getattr(torch, dtype).itemsize if dtype not in BITS else BITS[dtype] / 8
            count = 1
            for n in shape:
                count *= n
            return self._view(file, dtype, tuple(shape), offset, int(count * element))
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
            raise CorruptCheckpoint(
                f"{self.path(file)}: the manifest's entry for {key!r} cannot be used: {error}"
            ) from error

    def listed_copy(self, file: str, key: str) -> torch.Tensor:
        return self.listed_tensor(file, key).clone()

    def _view(self, file: str, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> torch.Tensor:
        data = self._map(file)
        if offset < 0 or offset + nbytes > len(data):
            raise CorruptCheckpoint(
                f"{self.path(file)}: {offset}..{offset + nbytes} lies outside its {len(data)} bytes"
            )
        kind = TO_TORCH.get(dtype) or getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise CheckpointError(f"{self.path(file)}: this version of torch has no dtype {dtype}")
        if dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        if nbytes == 0:
            return torch.empty(shape, dtype=kind)
        raw = torch.frombuffer(data, dtype=torch.uint8, count=nbytes, offset=offset)
        if offset % kind.itemsize:
            raw = raw.clone()
        return raw.view(kind).view(shape)

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            path = self.path(file)
            try:
                fd = open_regular(path)
            except OSError as error:
                raise CorruptCheckpoint(f"{path}: cannot be read: {error.strerror}") from error
            try:
                # Copy on write: torch wants writable memory, the file must stay as it is.
                self._maps[file] = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CorruptCheckpoint(f"{path}: cannot be mapped: {error}") from error
            finally:
                os.close(fd)
        return self._maps[file]


# -- models


def _plan_model(source: _Source, name: str, module: torch.nn.Module) -> Callable[[], None]:
    """What will restore `module`. Raises before anything is changed."""
    described = _saved(source.manifest.names, name, "model")
    share = sharded(module)
    if share is not None:
        raise CheckpointError(f"{source.directory}: {share}: load into the whole model, before it is sharded")
    if not described["by_name"]:
        return _plan_computed(source, name, module, described)
    places = _Places(module, described["ties"])
    for file in (*described["files"], *described["uncovered"]):
        renamed, computed = described["renamed"].get(file, {}), described["computed"].get(file, ())
        for key in source.entries(file):
            if key not in computed:
                target, part = renamed.get(key, (key, None))
                places.fill(target, part, source.tensor(file, key))
    _refuse_misfits(source, name, places.wrong + places.missing(described["left_out"]))
    return lambda: _copy_all(places.moves)


class _Places:
    """The parameters and buffers of a module, each to get what was saved of it. `wrong`: what does not fit."""

    def __init__(self, module: torch.nn.Module, ties: Mapping[str, str]) -> None:
        """`ties`: names that were not stored because they shared memory with another, and that other."""
        self._module = module
        self._live = dict(_live_tensors(module))
        self._tied: dict[str, list[str]] = {}
        for alias, kept in ties.items():
            self._tied.setdefault(kept, []).append(alias)
        self._covered: set[str] = set()
        self._filled: dict[Any, tuple[str, torch.Tensor]] = {}
        self.moves: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.wrong: list[str] = []

    def fill(self, name: str, part: Any, saved: torch.Tensor) -> None:
        """Let `name`, or the `part` of it, get `saved`; its aliases too, where they are not tied to it any more."""
        if name not in self._live:
            self.wrong.append(f"{name} is not in the model")
            return
        for target in (name, *(alias for alias in self._tied.get(name, ()) if alias in self._live)):
            self._covered.add(target)
            if target == name or self._memory(target) != self._memory(name):
                self._fill(target, part, saved)

    def _fill(self, name: str, part: Any, saved: torch.Tensor) -> None:
        place = self._live[name]
        if place.is_meta:
            self.wrong.append(f"{name} is on the meta device and has no memory")
            return
        if part is not None:
            if not place.is_contiguous():
                self.wrong.append(f"{name} is not contiguous, so the parts of it that were saved have no place")
                return
            size, stride, offset = part
            if offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) > place.numel():
                self.wrong.append(f"{name} has shape {tuple(place.shape)}, too small for the parts that were saved")
                return
            place = place.as_strided(size, stride, place.storage_offset() + offset)
        if place.shape != saved.shape:
            self.wrong.append(f"{name} has shape {tuple(place.shape)}, saved was {tuple(saved.shape)}")
            return
        if 0 in place.stride():  # expanded: many elements in one place
            once = tuple(slice(1) if step == 0 else slice(None) for step in place.stride())
            if not torch.equal(saved[once].expand_as(saved), saved):
                self.wrong.append(f"{name} is expanded, but was saved with different values in one place")
                return
            place, saved = place[once], saved[once]
        if place.numel():
            other, value = self._filled.setdefault((place.data_ptr(), place.shape, place.stride()), (name, saved))
            if value is not saved and not _same_bytes(value, saved):
                self.wrong.append(f"{name} and {other} share memory, but were saved with different values")
        self.moves.append((place, saved))

    def missing(self, left_out: Sequence[str]) -> list[str]:
        """What belongs to the module's state and gets nothing, though it was not left out when it was saved."""
        ignored = set(getattr(self._module, "_keys_to_ignore_on_save", None) or ()).union(left_out)
        expected = set(self._module.state_dict()) & self._live.keys()
        held = {self._memory(name) for name in self._covered}
        return [
            f"{name} was not saved"
            for name in sorted(expected - ignored - self._covered)
            if not self._live[name].numel() or self._memory(name) not in held
        ]

    def _memory(self, name: str) -> tuple[int, torch.Size]:
        tensor = self._live[name]
        return (0 if has_no_storage(tensor) else tensor.data_ptr()), tensor.shape


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


def _refuse_misfits(source: _Source, name: str, wrong: Sequence[str]) -> None:
    if wrong:
        shown = "; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise CheckpointError(f"{source.directory}: does not fit the model{' ' + name if name else ''}: {shown}")


def _live_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for key, parameter in module.named_parameters(remove_duplicate=False):
        yield key, parameter.detach()
    for key, buffer in module.named_buffers(remove_duplicate=False):
        yield key, buffer.detach()


def _copy_all(moves: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    if moves:
        with torch.no_grad():
            torch._foreach_copy_([place for place, _ in moves], [saved for _, saved in moves])


def _plan_computed(
    source: _Source, name: str, module: torch.nn.Module, described: Mapping[str, Any]
) -> Callable[[], None]:
    """The files hold values that saving computed: the model's own way back computes them anew."""
    state: dict[str, Any]
    if not described["from_pretrained"]:
        state = {key: source.tensor(file, key) for file in described["files"] for key in source.entries(file)}
        state |= {alias: state[kept] for alias, kept in described["ties"].items() if kept in state}
    else:
        directory = os.path.join(source.directory, name) if name else source.directory
        with torch.random.fork_rng(devices=()):
            kind: Any = type(module)
            state = kind.from_pretrained(directory, dtype=_widest_dtype(module)).state_dict()
    wanted = module.state_dict()
    wrong = [f"{key} was not saved" for key in wanted.keys() - state.keys()]
    wrong += [f"{key} is not in the model" for key in state.keys() - wanted.keys()]
    wrong += [
        f"{key} has shape {tuple(wanted[key].shape)}, saved was {tuple(value.shape)}"
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
        and isinstance(wanted.get(key), torch.Tensor)
        and wanted[key].shape != value.shape
    ]
    _refuse_misfits(source, name, sorted(wrong))
    return lambda: _load_state_dict(module, state)


def _widest_dtype(module: torch.nn.Module) -> torch.dtype:
    """A floating point dtype that holds every value of the module, for what casts all of them to one."""
    kinds = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()}
    if len(kinds) == 1:
        return kinds.pop()
    return torch.float64 if torch.float64 in kinds else torch.float32


def _load_state_dict(module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    with torch.no_grad():
        module.load_state_dict(state)


# -- optimizers


def _plan_optimizer(source: _Source, entry: Mapping[str, Any], name: str, optimizer: Any) -> Callable[[], None]:
    """What will restore `optimizer`. Raises before anything is changed."""
    file = entry["file"]
    used: set[str] = set()

    def get(key: str) -> torch.Tensor:
        used.add(key)
        return source.listed_tensor(file, key).clone()

    state = tree.decode(entry["rest"], get)
    for key in source.manifest.tensors.get(file, {}):
        if key not in used:
            index, _, field = key.partition(".")
            state["state"][int(index)][field] = source.listed_tensor(file, key).clone()
    if isinstance(optimizer, torch.optim.Optimizer):
        saved = [len(group["params"]) for group in state["param_groups"]]
        has = [len(group["params"]) for group in optimizer.param_groups]
        if saved != has:
            raise CheckpointError(
                f"{source.directory}: the optimizer{' ' + name if name else ''} has parameter groups of {has} parameters, "
                f"saved were {saved}"
            )
    return lambda: _restore_optimizer(optimizer, state)


def _restore_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    # torch casts floating point state to its parameter's dtype; what was saved in another one comes back as it was.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [index for group in state["param_groups"] for index in group["params"]]
    for index, parameter in zip(order, parameters, strict=True):
        for key, value in state["state"].get(index, {}).items():
            held = optimizer.state[parameter].get(key)
            if isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor) and held.dtype is not value.dtype:
                optimizer.state[parameter][key] = value.to(held.device)
