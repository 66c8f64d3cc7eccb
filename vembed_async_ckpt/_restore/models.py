"""Restores the weights of a model."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .._capture import memory_format
from .._capture import tensor_map as live
from .._capture.shares import Share
from .._capture.tensor_map import has_no_storage, is_fake, shown
from .._capture.wrappers import spellings, unwrapped_inside
from ..errors import CheckpointError
from .selection import Selection
from .targets import Targets
from .tensors import Move, Saved, Tensors, part_moves, region_moves


def plan_model(
    source: Tensors,
    described: Mapping[str, Any],
    name: str,
    module: torch.nn.Module,
    selection: Selection,
    targets: Targets,
) -> tuple[Sequence[Move], Callable[[], None] | None]:
    """Plan the restore of `module` from what was `described`. Raises `CheckpointError` before anything is changed.

    `targets`: says what this rank holds of them.

    Returns the moves that fill its tensors, and a step to run after them or None.
    """
    excluded = functools.partial(selection.excludes, model=name)
    with unwrapped_inside(module):
        if not described["by_name"]:
            if any(map(targets.is_divided, (*module.parameters(), *module.buffers()))):
                raise CheckpointError(
                    f"{source.directory}: {name or 'the model'} is sharded, and its files hold values that the save "
                    "computed; load into the whole model, before it is sharded, or save with save_original_format=False"
                )
            return (), _plan_computed(source, described, name, module, selection)
        places = _Places(source, module, described["ties"], excluded, targets)
    for file in (*described["files"], *described["uncovered"]):
        renamed, computed = described["renamed"].get(file, {}), described["computed"].get(file, ())
        for key in source.entries(file):
            if key not in computed:
                target, part = renamed.get(key, (key, None))
                places.fill(key, target, part, source.tensor(file, key))
    selection.misfits(source.directory, name, places.wrong + places.missing(described["left_out"]))
    return places.moves, None


class _Places:
    """The parameters and buffers of a module, each with what was saved for it. `wrong` lists what does not fit."""

    def __init__(
        self,
        source: Tensors,
        module: torch.nn.Module,
        ties: Mapping[str, str],
        excluded: Callable[[str], bool],
        targets: Targets,
    ) -> None:
        """`ties`: names that were not stored because they shared memory with another name, mapped to that name.
        `excluded`: tells whether the parameter of a name stays as it is.
        """
        self._source = source
        self._targets = targets
        self._module = module
        self._excluded = excluded
        self._live = {item.name: item.tensor for item in live.live_tensors(module)}
        self._shown = shown(module)
        self._tied: dict[str, list[str]] = {}
        for alias, kept in ties.items():
            self._tied.setdefault(self._here(kept), []).append(self._here(alias))
        self._covered: set[str] = set()
        self._filled: dict[Any, tuple[str, Saved | torch.Tensor]] = {}
        self.moves: list[Move] = []
        self.wrong: list[str] = []

    def _here(self, name: str) -> str:
        """Return the parameter's name in this module, which may have other wrappers than the saved one."""
        return next((spelling for spelling in spellings(name) if spelling in self._live), name)

    def fill(self, key: str, name: str, part: Any, saved: Saved) -> None:
        """Plan that `name`, or the `part` of it, gets `saved`. Its aliases get it too if they are no longer tied to it.

        If the module has no such parameter, use the tensor that its state_dict has under `key`, the name in the file.
        """
        name = self._here(name)
        if name not in self._live:
            found = next((spelling for spelling in spellings(key) if spelling in self._shown), None)
            if found is None:
                if not self._excluded(name):
                    self.wrong.append(f"{name} is not in the model")
                return
            name, part = self._shown[found]
        for target in (name, *(alias for alias in self._tied.get(name, ()) if alias in self._live)):
            self._covered.add(target)
            if (target == name or self._memory(target) != self._memory(name)) and not self._excluded(target):
                self._fill(target, part, saved)

    def _fill(self, name: str, part: Any, saved: Saved) -> None:
        tensor = self._live[name]
        if tensor.is_meta:
            self.wrong.append(f"{name} is on the meta device and has no memory")
            return
        if is_fake(tensor):
            self.wrong.append(f"{name} is a FakeTensor and has no memory")
            return
        share = self._targets.share(name, tensor)
        if share is not None:
            for move in self._moves_into(share, name, part, saved):
                self._enter(name, *move)
            return
        place = tensor.detach()
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
            self.wrong.append(f"{name} has shape {tuple(place.shape)}, saved was {saved.shape}")
            return
        value: Saved | torch.Tensor = saved
        if 0 in place.stride():  # an expanded tensor: many elements share one place
            once = tuple(slice(1) if step == 0 else slice(None) for step in place.stride())
            (whole,) = self._source.read([saved])
            place, value = place[once], whole[once]
            if not torch.equal(value.expand_as(whole), whole):
                self.wrong.append(f"{name} is expanded, but was saved with different values in one place")
                return
        self._enter(name, place, value)

    def _moves_into(self, share: Share, name: str, part: Any, saved: Saved) -> Iterator[Move]:
        """Yield the moves that fill what this rank holds of a tensor, or of a part of it."""
        if part is None:
            if share.shape == saved.shape:
                for region, piece in share.pieces(share.local):
                    yield from region_moves(piece, saved, region)
            else:
                self.wrong.append(f"{name} has shape {share.shape}, saved was {saved.shape}")
            return
        size, stride, offset = part
        pieces = list(share.pieces(share.local))
        if tuple(stride) != memory_format.contiguous(size) or not all(piece.is_contiguous() for _, piece in pieces):
            self.wrong.append(f"{name} is sharded, so the parts of it that were saved have no place")
        elif tuple(size) != saved.shape or offset + saved.count > math.prod(share.shape):
            self.wrong.append(f"{name} has shape {share.shape}, which does not fit the parts that were saved")
        else:
            for region, piece in pieces:
                yield from part_moves(piece, saved, region, share.shape, offset)

    def _enter(self, name: str, place: torch.Tensor, value: Saved | torch.Tensor) -> None:
        """Add a move. Other values for the same place are wrong."""
        if place.numel():
            other, first = self._filled.setdefault((place.data_ptr(), place.shape, place.stride()), (name, value))
            if first is not value and not self._are_same(first, value):
                self.wrong.append(f"{name} and {other} share memory, but were saved with different values")
        self.moves.append((place, value))

    def _are_same(self, *values: Saved | torch.Tensor) -> bool:
        one, other = (
            (value if isinstance(value, torch.Tensor) else self._source.read([value])[0]).reshape(-1).view(torch.uint8)
            for value in values
        )
        return torch.equal(one, other)

    def missing(self, left_out: Sequence[str]) -> list[str]:
        """Return a message for each tensor of the module's state that gets nothing.

        Tensors that were left out when the module was saved are not reported.
        """
        ignored = set(getattr(self._module, "_keys_to_ignore_on_save", None) or ()).union(map(self._here, left_out))
        expected = {name for name, _ in self._shown.values()}
        held = {self._memory(name) for name in self._covered}
        return [
            f"{name} was not saved"
            for name in sorted(expected - ignored - self._covered)
            if (not self._live[name].numel() or self._memory(name) not in held) and not self._excluded(name)
        ]

    def _memory(self, name: str) -> tuple[int, torch.Size]:
        tensor = self._live[name]
        if self._targets.share(name, tensor) is not None:  # tied names have one tensor
            return id(tensor), tensor.shape
        return (0 if has_no_storage(tensor) else tensor.data_ptr()), tensor.shape


def live_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for item in live.live_tensors(module):
        yield item.name, item.tensor.detach()


def _plan_computed(
    source: Tensors, described: Mapping[str, Any], name: str, module: torch.nn.Module, selection: Selection
) -> Callable[[], None]:
    """Plan the restore of files with values that the save computed.

    The model's own loading code converts them back.
    """
    state: dict[str, Any]
    if not described["from_pretrained"]:
        state = dict(source.weights(described["files"]))
        state |= {alias: state[kept] for alias, kept in described["ties"].items() if kept in state}
    else:
        directory = os.path.join(source.directory, name) if name else source.directory
        for file in source.manifest.files:  # from_pretrained opens these files itself
            if file in described["files"] or (file.endswith(".json") and os.path.dirname(file) == name):
                source.path(file)
        with torch.random.fork_rng(devices=()):
            kind: Any = type(module)
            state = kind.from_pretrained(directory, dtype=_widest_dtype(module)).state_dict()
    wanted = module.state_dict()
    for key in wanted.keys() | state.keys():
        if selection.excludes(key, model=name):
            state.pop(key, None)
            state |= {key: wanted[key]} if key in wanted else {}
    wrong = [f"{key} was not saved" for key in wanted.keys() - state.keys()]
    wrong += [f"{key} is not in the model" for key in state.keys() - wanted.keys()]
    unlike = [
        key
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
        and isinstance(wanted.get(key), torch.Tensor)
        and wanted[key].shape != value.shape
    ]
    wrong += [f"{key} has shape {tuple(wanted[key].shape)}, saved was {tuple(state[key].shape)}" for key in unlike]
    selection.misfits(source.directory, name, sorted(wrong))
    fitting = {key: state[key] for key in state.keys() & wanted.keys() - set(unlike)}
    return lambda: _load_state_dict(module, fitting, strict=not wrong)


def _widest_dtype(module: torch.nn.Module) -> torch.dtype:
    """Return a floating point dtype that holds every value of the module.

    `from_pretrained` casts all values to one dtype.
    """
    kinds = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()}
    if len(kinds) == 1:
        return kinds.pop()
    return torch.float64 if torch.float64 in kinds else torch.float32


def _load_state_dict(module: torch.nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    with torch.no_grad(), unwrapped_inside(module):
        module.load_state_dict(state, strict=strict)
