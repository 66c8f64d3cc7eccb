"""Reads tensors from the files of a checkpoint into their places.

All reads are planned first and then done together.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .._capture import memory_format
from .._capture.dtypes import TO_TORCH
from .._capture.tensor_map import has_no_storage
from .._disk.source import Source
from .._format import names
from .._format.ranges import Box, Region, Run, boxes_of, extents
from .._format.safetensors import BITS
from ..errors import CheckpointError, CorruptCheckpoint

_STAGING_BYTES = 64 << 20  # staging memory for what cannot be read directly into its place
_ALIGNMENT = 64
_STRETCHES = 1 << 17  # stretches of files that are read at once; each takes about 300 bytes of memory meanwhile


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor in a file of the checkpoint.

    `offset`, `nbytes`: its bytes in the file.
    `strides`: the strides with which it was saved, or None if it was contiguous. Its bytes lie in the order of the
        strides.
    `region`: if this is only a part of a tensor, which part of it. `whole` is then the shape of that tensor, and
        `offset` its first byte.
    """

    file: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    region: Region | None = None
    whole: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    def part(self, region: Region, shape: Sequence[int]) -> Saved:
        """Return a region of this contiguous tensor, as a tensor of this shape."""
        nbytes = region.count * self.dtype.itemsize
        return replace(self, nbytes=nbytes, shape=tuple(shape), region=region, whole=self.shape)

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Yield (offset in the file, bytes) of its bytes, in their order in the tensor."""
        if self.region is None:
            yield self.offset, self.nbytes
        else:
            for start, count in extents(self.whole, self.region, self.dtype.itemsize):
                yield self.offset + start, count

    def into(self, memory: memoryview) -> Iterator[tuple[str, int, memoryview]]:
        """Yield what to read into the memory: (file, offset, the part of the memory)."""
        if self.region is None:
            yield self.file, self.offset, memory
            return
        at = 0
        for offset, count in self.stretches():
            yield self.file, offset, memory[at : at + count]
            at += count

    def empty(self, device: torch.device) -> torch.Tensor:
        """Return a new, uninitialized tensor for it on `device`."""
        strides = memory_format.contiguous(self.shape) if self.strides is None else self.strides
        return torch.empty_strided(self.shape, strides, dtype=self.dtype, device=device)


Move = tuple[torch.Tensor, "Saved | torch.Tensor"]  # the place, and what is written to it


def region_moves(piece: torch.Tensor, saved: Saved, region: Region) -> Iterator[Move]:
    """Yield the moves that fill `piece` with a region of a saved tensor."""
    if saved.strides is None:
        yield piece, saved.part(region, piece.shape)
        return
    order = memory_format.order(saved.strides)
    in_file = replace(saved, shape=tuple(saved.shape[dimension] for dimension in order), strides=None)
    at = 0
    for box in boxes_of(saved.shape, region) if isinstance(region, Run) else (region,):
        part = piece if box is region else piece[at : at + box.count].view(box.size)
        at += box.count
        turned = Box(*(tuple(sides[dimension] for dimension in order) for sides in (box.start, box.size)))
        yield part.permute(order), in_file.part(turned, turned.size)


def part_moves(
    piece: torch.Tensor, saved: Saved, region: Region, whole: tuple[int, ...], offset: int
) -> Iterator[Move]:
    """Yield the moves that fill a contiguous `piece`, which holds a region of a tensor of the shape `whole`.

    Only a part of that tensor was saved: its elements from `offset` on. What else the piece holds stays as it is.
    """
    flat, at = piece.as_strided((piece.numel(),), (1,)), 0
    stored = replace(saved, shape=(saved.count,))
    for start, count in extents(whole, region, 1):
        first, end = max(start, offset), min(start + count, offset + saved.count)
        if first < end:
            place = flat[at + first - start : at + end - start]
            yield place, stored.part(Run(first - offset, end - first), place.shape)
        at += count


class Tensors(Source):
    """The files of a checkpoint, and the tensors in them."""

    def tensor(self, file: str, name: str) -> Saved:
        """Return a tensor of a safetensors file. Raises `CorruptCheckpoint` if the file does not have it."""
        entry = self.entries(file).get(name)
        if entry is None:
            raise CorruptCheckpoint(f"{self.path(file)}: has no tensor {name!r}")
        return self._saved(file, entry.dtype, entry.shape, entry.offset, entry.nbytes)

    def listed(self, file: str, key: str) -> Saved:
        """Return a tensor of a file whose tensors are listed in the manifest.

        Raises `CorruptCheckpoint` if its entry is unusable.
        """
        try:
            dtype, shape, offset, *rest = self.manifest.tensors[file][key]
            element = getattr(torch, dtype).itemsize if dtype not in BITS else BITS[dtype] / 8
            count = 1
            for n in shape:
                count *= n
            if type(offset) is not int:
                raise TypeError(f"its offset is {offset!r}")
            saved = self._saved(file, dtype, tuple(shape), offset, int(count * element))
            torch.empty(saved.shape, dtype=saved.dtype, device="meta")  # raises if no tensor can have this shape
            return saved if not rest else replace(saved, strides=memory_format.checked(saved.shape, *rest))
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
            raise CorruptCheckpoint(
                f"{self.path(file)}: the manifest's entry for {key!r} cannot be used: {error}"
            ) from error

    def keys(self, file: str) -> list[str]:
        """Return the names of the tensors in a file that holds an optimizer."""
        return list(self.entries(file) if file.endswith(".safetensors") else self.manifest.tensors.get(file, {}))

    def stored(self, file: str, key: str) -> Saved:
        """Return a tensor of a file that holds an optimizer. Raises `CorruptCheckpoint` as `tensor` and `listed` do."""
        return self.tensor(file, key) if file.endswith(".safetensors") else self.listed(file, key)

    def _saved(self, file: str, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> Saved:
        size = self.file(file).size
        if offset < 0 or nbytes < 0 or offset + nbytes > size:
            raise CorruptCheckpoint(f"{self.path(file)}: {offset}..{offset + nbytes} lies outside its {size} bytes")
        kind = TO_TORCH.get(dtype) or getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise CheckpointError(f"{self.path(file)}: this version of torch has no dtype {dtype}")
        if dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        return Saved(file, offset, nbytes, kind, shape)

    def read(self, saved: Sequence[Saved]) -> list[torch.Tensor]:
        """Read into new tensors on the CPU."""
        tensors = [each.empty(torch.device("cpu")) for each in saved]
        self.fill(zip(tensors, saved, strict=True))
        return tensors

    def weights(self, files: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read all tensors of these safetensors files into new tensors on the CPU. Return them by name."""
        found = {key: self.tensor(file, key) for file in files for key in self.entries(file)}
        return dict(zip(found, self.read(list(found.values())), strict=True))

    @functools.cached_property
    def _training(self) -> dict[str, torch.Tensor]:
        return {}

    def training_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of the training state. Return the same tensor for every place with this name."""
        if name not in self._training:
            self._training[name] = self.read([self.tensor(names.TRAINING_TENSORS, name)])[0]
        return self._training[name]

    def listed_copy(self, file: str, key: str) -> torch.Tensor:
        return self.read([self.listed(file, key)])[0]

    def fill(self, moves: Iterable[Move]) -> None:
        """Carry out the moves. Raises `CorruptCheckpoint` if a file cannot be read; some places are filled by then."""
        straight: list[tuple[torch.Tensor, Saved]] = []
        staged: list[tuple[torch.Tensor, Saved]] = []
        with torch.no_grad():
            for place, value in moves:
                if isinstance(value, Saved) and value.strides is not None:
                    place, value = _in_order_of_file(place, value, value.strides)
                if isinstance(value, torch.Tensor):
                    place.copy_(value)
                elif place.numel() == 0:
                    pass
                elif not _is_flat(place, value):
                    staged.append((place, value))
                elif _is_on_host(place):
                    straight.append((place, value))
                else:
                    staged += _pieces(place, value)
            self._read_places(straight)
            torch.autograd.graph.increment_version([place for place, _ in straight])
            if staged:
                self._fill_staged(staged)

    def _read_places(self, places: Iterable[tuple[torch.Tensor, Saved]]) -> None:
        """Read into contiguous places on the host, a limited number of stretches at once."""
        stretches = itertools.chain.from_iterable(saved.into(_memory(place)) for place, saved in places)
        while batch := list(itertools.islice(stretches, _STRETCHES)):
            self.read_into(batch)

    def _fill_staged(self, moves: Sequence[tuple[torch.Tensor, Saved]]) -> None:
        """Carry out moves through staging memory on the host, pinned if the places are on a GPU.

        The memory takes at most `_STAGING_BYTES`, or the size of one tensor.
        """
        pin = any(place.is_cuda for place, _ in moves)
        staging = torch.empty(
            min(sum(map(_room, moves)), _STAGING_BYTES), dtype=torch.uint8, device="cpu", pin_memory=pin
        )
        for group in _groups(moves):
            rooms = list(map(_room, group))
            memory = (
                staging if sum(rooms) <= staging.nbytes else torch.empty(sum(rooms), dtype=torch.uint8, device="cpu")
            )
            values = [
                room[: saved.nbytes].view(saved.dtype).view(saved.shape)
                for room, (_, saved) in zip(torch.split(memory[: sum(rooms)], rooms), group, strict=True)
            ]
            self._read_places((value, saved) for value, (_, saved) in zip(values, group, strict=True))
            for value, (place, _) in zip(values, group, strict=True):
                place.copy_(value)


def _in_order_of_file(place: torch.Tensor, saved: Saved, strides: tuple[int, ...]) -> tuple[torch.Tensor, Saved]:
    """Return the same move with its dimensions permuted to the order in which the elements lie in the file."""
    order = memory_format.order(strides)
    shape = tuple(saved.shape[dimension] for dimension in order)
    return place.permute(order), replace(saved, shape=shape, strides=None)


def _is_flat(place: torch.Tensor, saved: Saved) -> bool:
    """Return whether the bytes in the file equal the bytes of the place, in the same order."""
    return (
        place.dtype is saved.dtype
        and place.layout is torch.strided
        and place.is_contiguous()
        and not place.is_conj()
        and not place.is_neg()
        and not has_no_storage(place)
    )


def _is_on_host(place: torch.Tensor) -> bool:
    return place.is_cpu


def _pieces(place: torch.Tensor, saved: Saved) -> Iterator[tuple[torch.Tensor, Saved]]:
    """Yield the same move as moves that fit into the staging memory, if their tensors can be cut into such parts."""
    stretches = list(itertools.islice(saved.stretches(), 2))
    if len(stretches) > 1 and isinstance(saved.region, Box):
        (row, *others), (count, *size) = saved.region.start, saved.region.size
        rows = max(1, _STAGING_BYTES * count // saved.nbytes)
        for first in range(0, count, rows):
            part = place[first : first + rows]
            box = Box((row + first, *others), (part.shape[0], *size))
            yield part, replace(saved, nbytes=part.nbytes, shape=box.size, region=box)
        return
    flat = _bytes_of(place)
    for start in range(0, saved.nbytes, _STAGING_BYTES):
        part = flat[start : start + _STAGING_BYTES]
        yield part, Saved(saved.file, stretches[0][0] + start, part.nbytes, torch.uint8, (part.nbytes,))


def _room(move: tuple[torch.Tensor, Saved]) -> int:
    return -(-move[1].nbytes // _ALIGNMENT) * _ALIGNMENT


def _groups(moves: Sequence[tuple[torch.Tensor, Saved]]) -> Iterator[list[tuple[torch.Tensor, Saved]]]:
    """Yield as many moves at once as fit into the staging memory, but at least one."""
    group: list[tuple[torch.Tensor, Saved]] = []
    size = 0
    for move in moves:
        if group and size + _room(move) > _STAGING_BYTES:
            yield group
            group, size = [], 0
        group.append(move)
        size += _room(move)
    if group:
        yield group


def _memory(tensor: torch.Tensor) -> memoryview:
    return _bytes_of(tensor).numpy().data


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor. A single element may have any strides."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
