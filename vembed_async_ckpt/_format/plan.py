"""Computes the plan of a checkpoint: its files, their places in the arena, and the offset of every tensor.

The plan is a pure function of names, dtypes and shapes. It moves no data and uses no disk. What cannot be saved is
refused here, in the caller's stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import PlanError
from . import safetensors, torch_zip
from .safetensors import TensorSpec
from .torch_zip import ZipLayout

PAGE = 4096  # every file starts on a new page, because O_DIRECT writes whole pages
START = PAGE  # the page before the first file is the arena's control page


@dataclass(frozen=True)
class TensorContent:
    """A safetensors file: its name, tensors and metadata."""

    name: str
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ZipContent:
    """A torch zip file with one storage per tensor.

    `sizes`: bytes of each storage.
    `pickle_bytes`: the expected size of its `data.pkl`.
    """

    name: str
    sizes: tuple[int, ...]
    pickle_bytes: int


@dataclass(frozen=True)
class BytesContent:
    """A file whose bytes are already known: config, tokenizer or processor."""

    name: str
    data: bytes


Content = TensorContent | ZipContent | BytesContent


@dataclass(frozen=True)
class PlannedFile:
    """One planned file: its start in the arena and its size, in bytes.

    For a zip, `size` is the space reserved for it. The save decides how much of it is used.
    """

    name: str
    start: int
    size: int
    zip: ZipLayout | None = None


@dataclass(frozen=True, eq=False)
class SavePlan:
    """The layout of an arena. All positions are bytes from the start of the arena.

    `files`: the files, in the order of the contents.
    `offsets`: the position of each tensor, in the order of the contents and of the tensors in them.
    `pieces`: (position, bytes) that are the same in every save: headers, descriptors, files with known bytes.
    `end`: where the data begins that differs from save to save.
    """

    files: tuple[PlannedFile, ...]
    offsets: tuple[int, ...]
    pieces: tuple[tuple[int, bytes], ...]
    end: int

    @property
    def capacity(self) -> int:
        """Bytes that an arena needs for this plan, including reserve for data that grows from save to save."""
        return self.end + max(1 << 20, self.end // 100)


def pages(size: int) -> int:
    """Round `size` up to whole pages."""
    return -(-size // PAGE) * PAGE


def plan(contents: Sequence[Content]) -> SavePlan:
    """Lay out a checkpoint.

    Raises `PlanError` if names clash or leave the directory, or if a file format cannot hold a content.
    """
    check_names(content.name for content in contents)
    files: list[PlannedFile] = []
    offsets: list[int] = []
    pieces: list[tuple[int, bytes]] = []
    start = START
    for content in contents:
        size, zipped = _place(content, start, offsets, pieces)
        files.append(PlannedFile(content.name, start, size, zipped))
        start += pages(size)
    return SavePlan(tuple(files), tuple(offsets), tuple(pieces), start)


def _place(
    content: Content, start: int, offsets: list[int], pieces: list[tuple[int, bytes]]
) -> tuple[int, ZipLayout | None]:
    if isinstance(content, BytesContent):
        pieces.append((start, content.data))
        return len(content.data), None
    if isinstance(content, TensorContent):
        image = safetensors.layout(content.tensors, content.metadata, file=content.name)
        pieces.append((start, image.prefix))
        offsets += [start + image.offsets[tensor.name] for tensor in content.tensors]
        return image.size, None
    zipped = torch_zip.layout(content.sizes)
    pieces += [(start + at, data) for at, data in zipped.pieces]
    offsets += [start + at for at in zipped.data]
    return zipped.end + torch_zip.room_for_tail(zipped, content.pickle_bytes), zipped


def check_names(file_names: Iterable[str]) -> None:
    """Raise `PlanError` if names of files clash, or if a name leaves the directory.

    Names clash if two are equal, or if one is both a file and a directory.
    """
    seen: set[str] = set()
    for name in file_names:
        if not is_safe_relative(name):
            raise PlanError(f"the file name {name!r} is not a plain relative path")
        if name in seen:
            raise PlanError(
                f"two files of the checkpoint are named {name!r}; rename the model or the optimizer it comes from"
            )
        if any(other.startswith(name + "/") or name.startswith(other + "/") for other in seen):
            raise PlanError(f"{name!r} would be both a file and a directory")
        seen.add(name)


def is_safe_relative(name: str) -> bool:
    """Return whether `name` is a relative path, with `/` between its parts, that cannot leave its directory."""
    parts = name.split("/")
    return (
        0 < len(name) <= 1024
        and "\0" not in name
        and "\\" not in name
        and not any(part in ("", ".", "..") or len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts)
    )
