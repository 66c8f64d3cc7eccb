"""Tensors from the files of a checkpoint into their places: planned first, read in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .._capture import memory_format
from .._capture.dtypes import TO_TORCH
from .._capture.tensor_map import has_no_storage
from .._disk.source import Source
from .._format import names
from .._format.safetensors import BITS
from ..errors import CheckpointError, CorruptCheckpoint

_STAGING_BYTES = 64 << 20  # through which passes what cannot be read straight into its place
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor in a file of the checkpoint. `strides`: as it was saved, its bytes in the file lie in their order; None if it was
    contiguous."""

    file: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def empty(self, device: torch.device) -> torch.Tensor:
        """A new tensor for it."""
        strides = memory_format.contiguous(self.shape) if self.strides is None else self.strides
        return torch.empty_strided(self.shape, strides, dtype=self.dtype, device=device)


Move = tuple[torch.Tensor, "Saved | torch.Tensor"]  # the place, and what comes there


class Tensors(Source):
    """A checkpoint's files, and the tensors in them."""

    def tensor(self, file: str, name: str) -> Saved:
        """A tensor of a safetensors file."""
        entry = self.entries(file).get(name)
        if entry is None:
            raise CorruptCheckpoint(f"{self.path(file)}: has no tensor {name!r}")
        return self._saved(file, entry.dtype, entry.shape, entry.offset, entry.nbytes)

    def listed(self, file: str, key: str) -> Saved:
        """A tensor of a file whose tensors stand in the manifest."""
        try:
            dtype, shape, offset, *rest = self.manifest.tensors[file][key]
            element = getattr(torch, dtype).itemsize if dtype not in BITS else BITS[dtype] / 8
            count = 1
            for n in shape:
                count *= n
            if type(offset) is not int:
                raise TypeError(f"its offset is {offset!r}")
            saved = self._saved(file, dtype, tuple(shape), offset, int(count * element))
            torch.empty(saved.shape, dtype=saved.dtype, device="meta")  # raises for a shape that no tensor has
            return saved if not rest else replace(saved, strides=memory_format.checked(saved.shape, *rest))
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
            raise CorruptCheckpoint(
                f"{self.path(file)}: the manifest's entry for {key!r} cannot be used: {error}"
            ) from error

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
        """New tensors on the CPU."""
        tensors = [each.empty(torch.device("cpu")) for each in saved]
        self.fill(zip(tensors, saved, strict=True))
        return tensors

    def weights(self, files: Iterable[str]) -> dict[str, torch.Tensor]:
        """New tensors on the CPU: all those of these safetensors files, by name."""
        found = {key: self.tensor(file, key) for file in files for key in self.entries(file)}
        return dict(zip(found, self.read(list(found.values())), strict=True))

    def training_tensor(self, name: str) -> torch.Tensor:
        """A new tensor: one of the small ones."""
        return self.read([self.tensor(names.TRAINING_TENSORS, name)])[0]

    def listed_copy(self, file: str, key: str) -> torch.Tensor:
        return self.read([self.listed(file, key)])[0]

    def fill(self, moves: Iterable[Move]) -> None:
        """Every place gets what comes there. Raises `CorruptCheckpoint` where a file cannot be read; then some places have it."""
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
            self.read_into((saved.file, saved.offset, _memory(place)) for place, saved in straight)
            torch.autograd.graph.increment_version([place for place, _ in straight])
            if staged:
                self._fill_staged(staged)

    def _fill_staged(self, moves: Sequence[tuple[torch.Tensor, Saved]]) -> None:
        """Through memory of the host, pinned for a GPU; no more of it than for `_STAGING_BYTES` or for one tensor."""
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
            self.read_into(
                (saved.file, saved.offset, _memory(value)) for value, (_, saved) in zip(values, group, strict=True)
            )
            for value, (place, _) in zip(values, group, strict=True):
                place.copy_(value)


def _in_order_of_file(place: torch.Tensor, saved: Saved, strides: tuple[int, ...]) -> tuple[torch.Tensor, Saved]:
    """The same move with the dimensions in the order in which the elements lie in the file."""
    order = memory_format.order(strides)
    shape = tuple(saved.shape[dimension] for dimension in order)
    return place.permute(order), replace(saved, shape=shape, strides=None)


def _is_flat(place: torch.Tensor, saved: Saved) -> bool:
    """Whether the bytes in the file are, in this order, those of the place."""
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
    """The same move as bytes, in parts that fit into the staging memory."""
    flat = place.view(-1).view(torch.uint8)
    for start in range(0, saved.nbytes, _STAGING_BYTES):
        part = flat[start : start + _STAGING_BYTES]
        yield part, Saved(saved.file, saved.offset + start, part.nbytes, torch.uint8, (part.nbytes,))


def _room(move: tuple[torch.Tensor, Saved]) -> int:
    return -(-move[1].nbytes // _ALIGNMENT) * _ALIGNMENT


def _groups(moves: Sequence[tuple[torch.Tensor, Saved]]) -> Iterator[list[tuple[torch.Tensor, Saved]]]:
    """As many at once as fit into the staging memory, at least one."""
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
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
