"""Weights back into a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .._request.places import has_no_storage
from .._request.sharding import share_of
from ..errors import CheckpointError
from .tensors import Move, Saved, Tensors


def plan_model(
    source: Tensors, described: Mapping[str, Any], name: str, module: torch.nn.Module
) -> tuple[Sequence[Move], Callable[[], None] | None]:
    """What will restore `module`: where everything comes that was `described`, or a step. Raises before anything is changed."""
    share = share_of(module)
    if share is not None:
        raise CheckpointError(f"{source.directory}: {share}: load into the whole model, before it is sharded")
    if not described["by_name"]:
        return (), _plan_computed(source, described, name, module)
    places = _Places(source, module, described["ties"])
    for file in (*described["files"], *described["uncovered"]):
        renamed, computed = described["renamed"].get(file, {}), described["computed"].get(file, ())
        for key in source.entries(file):
            if key not in computed:
                target, part = renamed.get(key, (key, None))
                places.fill(target, part, source.tensor(file, key))
    _refuse_misfits(source, name, places.wrong + places.missing(described["left_out"]))
    return places.moves, None


class _Places:
    """The parameters and buffers of a module, each to get what was saved of it. `wrong`: what does not fit."""

    def __init__(self, source: Tensors, module: torch.nn.Module, ties: Mapping[str, str]) -> None:
        """`ties`: names that were not stored because they shared memory with another, and that other."""
        self._source = source
        self._module = module
        self._live = dict(live_tensors(module))
        self._tied: dict[str, list[str]] = {}
        for alias, kept in ties.items():
            self._tied.setdefault(kept, []).append(alias)
        self._covered: set[str] = set()
        self._filled: dict[Any, tuple[str, Saved | torch.Tensor]] = {}
        self.moves: list[Move] = []
        self.wrong: list[str] = []

    def fill(self, name: str, part: Any, saved: Saved) -> None:
        """Let `name`, or the `part` of it, get `saved`; its aliases too, where they are not tied to it any more."""
        if name not in self._live:
            self.wrong.append(f"{name} is not in the model")
            return
        for target in (name, *(alias for alias in self._tied.get(name, ()) if alias in self._live)):
            self._covered.add(target)
            if target == name or self._memory(target) != self._memory(name):
                self._fill(target, part, saved)

    def _fill(self, name: str, part: Any, saved: Saved) -> None:
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
            self.wrong.append(f"{name} has shape {tuple(place.shape)}, saved was {saved.shape}")
            return
        value: Saved | torch.Tensor = saved
        if 0 in place.stride():  # expanded: many elements in one place
            once = tuple(slice(1) if step == 0 else slice(None) for step in place.stride())
            (whole,) = self._source.read([saved])
            place, value = place[once], whole[once]
            if not torch.equal(value.expand_as(whole), whole):
                self.wrong.append(f"{name} is expanded, but was saved with different values in one place")
                return
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


def _refuse_misfits(source: Tensors, name: str, wrong: Sequence[str]) -> None:
    if wrong:
        shown = "; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise CheckpointError(f"{source.directory}: does not fit the model{' ' + name if name else ''}: {shown}")


def live_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for key, parameter in module.named_parameters(remove_duplicate=False):
        yield key, parameter.detach()
    for key, buffer in module.named_buffers(remove_duplicate=False):
        yield key, buffer.detach()


def _plan_computed(
    source: Tensors, described: Mapping[str, Any], name: str, module: torch.nn.Module
) -> Callable[[], None]:
    """The files hold values that saving computed: the model's own way back computes them anew."""
    state: dict[str, Any]
    if not described["from_pretrained"]:
        state = dict(source.weights(described["files"]))
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
