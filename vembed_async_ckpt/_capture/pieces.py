"""The pieces that this rank writes of a state that is divided among the ranks of a node, and what all ranks must agree on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from .._format.plan import TensorContent
from .._format.ranges import Box, Region, Run, fault_of
from .._tensor_guard import TensorGuard
from .divided_model import DividedState
from .optimizer import OptimizerState
from .shares import written

Placed = tuple[int, Region]  # index of a whole tensor in the order of the contents, and a region of it


@dataclass(frozen=True)
class Pieces:
    """What this rank copies. The lists have the same order.

    `contents`: the files, the same on every rank.
    `tensors`: views of this rank's memory, none of them empty.
    `regions`: where each lies in the whole.
    `labels`: the name of each in errors.
    `owners`: the parameter, buffer or optimizer of each; None if it was computed for this save.
    `wrappers`: for each the parameter or state tensor of which it is a view, if that counts its changes itself; else None.
    `digest`: equal on two ranks if they plan the same files.
    `looks`: the same object as long as all tensors look the same.
    """

    contents: tuple[TensorContent, ...]
    tensors: list[torch.Tensor]
    regions: list[Placed]
    labels: list[str]
    owners: list[Any]
    wrappers: list[torch.Tensor | None]
    digest: bytes
    looks: TensorGuard

    def fresh(self) -> Pieces:
        """Return the same with lists of tensors that the caller may change."""
        changes: dict[str, Any] = {name: getattr(self, name).copy() for name in _LISTS}
        return replace(self, **changes)

    def with_more(self, other: Pieces) -> Pieces:
        """Return these pieces and those of `other`, as pieces of these contents."""
        changes: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in _LISTS}
        return replace(self, **changes, looks=TensorGuard(changes["tensors"]))

    def outline(self) -> list[str]:
        """Return one line for each file and tensor that all ranks plan."""
        return list(_outline(self.contents))

    def claims(self) -> bytes:
        """Return which regions this rank writes, for `fault_of_claims`."""
        return json.dumps([_claim(*placed) for placed in self.regions], separators=(",", ":")).encode()


_LISTS = ("tensors", "regions", "labels", "owners", "wrappers")


class Divider:
    """Divides the tensors of a save among the ranks. Makes new pieces only if a share has changed."""

    def __init__(self) -> None:
        self._states: list[DividedState] = []
        self._pieces: Pieces | None = None

    def pieces(self, states: Sequence[DividedState], zipped: Sequence[OptimizerState] = ()) -> Pieces:
        """Return what this rank copies.

        `zipped`: files that this rank writes alone. They come after those of the states.
        """
        known = self._states
        same = len(known) == len(states) and all(
            one.shares is other.shares and one.contents == other.contents
            for one, other in zip(states, known, strict=True)
        )
        if self._pieces is None or not same:
            self._states, self._pieces = list(states), _pieces(states)
        if not zipped:
            return self._pieces.fresh()
        alone = Pieces((), [], [], [], [], [], b"", TensorGuard([]))
        index = sum(len(content.tensors) for content in self._pieces.contents)
        for state in zipped:
            for tensor, label in zip(state.tensors, state.labels, strict=True):
                if tensor.numel():
                    _add(alone, tensor, (index, Box((0,) * tensor.dim(), tuple(tensor.shape))), label, None, None)
                index += 1
        return self._pieces.with_more(alone)


def _pieces(states: Sequence[DividedState]) -> Pieces:
    contents = tuple(content for state in states for content in state.contents)
    shares = list(chain.from_iterable(state.shares for state in states))
    owners = list(chain.from_iterable(state.owners for state in states))
    labels = [f"{content.name}: {tensor.name}" for content in contents for tensor in content.tensors]
    digest = hashlib.blake2b("\n".join(_outline(contents)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    pieces = Pieces(contents, [], [], [], [], [], digest, TensorGuard([]))
    all_of = zip(written(shares), shares, owners, labels, strict=True)
    for index, (writes, share, owner, label) in enumerate(all_of):
        for region, view in share.pieces() if writes else ():
            _add(pieces, view, (index, region), label, owner, share.wrapper)
    return replace(pieces, looks=TensorGuard(pieces.tensors))


def _add(
    pieces: Pieces, tensor: torch.Tensor, placed: Placed, label: str, owner: Any, wrapper: torch.Tensor | None
) -> None:
    for name, value in zip(_LISTS, (tensor, placed, label, owner, wrapper), strict=True):
        getattr(pieces, name).append(value)


def _outline(contents: Sequence[TensorContent]) -> Iterator[str]:
    for content in contents:
        yield f"{content.name} {json.dumps(dict(content.metadata), sort_keys=True)}"
        for tensor in content.tensors:
            yield f"{content.name}: {tensor.name} {tensor.dtype} {list(tensor.shape)}"


def _claim(index: int, region: Region) -> list[Any]:
    if isinstance(region, Run):
        return [index, region.start, region.count]
    return [index, list(region.start), list(region.size)]


def _region(start: Any, size: Any) -> Region:
    return Box(tuple(start), tuple(size)) if isinstance(start, list) else Run(start, size)


def fault_of_claims(contents: Sequence[TensorContent], claims: Sequence[bytes]) -> str | None:
    """Return what is wrong if the regions that all ranks claim do not cover every tensor exactly once, else None."""
    regions: dict[int, list[Region]] = {}
    for claimed in claims:
        for index, start, size in json.loads(claimed):
            regions.setdefault(index, []).append(_region(start, size))
    places = [(content.name, tensor) for content in contents for tensor in content.tensors]
    for index, (file, tensor) in enumerate(places):
        fault = fault_of(tensor.shape, regions.get(index, []))
        if fault is not None:
            return f"{file}: {tensor.name}: {fault}; save a model whose ranks together hold every tensor"
    return None
