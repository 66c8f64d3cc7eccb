"""From contents to a plan: every file of a checkpoint, its place in the arena, and every tensor's offset.

A pure function of names, dtypes and shapes. It moves nothing and touches no disk; what cannot be saved is refused here, in
the caller's stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import PlanError
from . import safetensors, torch_zip
from .safetensors import TensorSpec
from .torch_zip import ZipLayout

PAGE = 4096  # every file starts on a page of its own: O_DIRECT writes whole pages
START = PAGE  # the page before the first file is the arena's control page


@dataclass(frozen=True)
class TensorContent:
    """A safetensors file."""

    name: str
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ZipContent:
    """A torch zip whose storages hold one tensor each; `pickle_bytes` is the size of its `data.pkl` as far as known."""

    name: str
    sizes: tuple[int, ...]
    pickle_bytes: int


@dataclass(frozen=True)
class BytesContent:
    """A file whose bytes are known: config, tokenizer, processor."""

    name: str
    data: bytes


Content = TensorContent | ZipContent | BytesContent


@dataclass(frozen=True)
class PlannedFile:
    """One file: where it starts in the arena and its size in bytes. A zip's size is its room; the save says how much is used."""

    name: str
    start: int
    size: int
    zip: ZipLayout | None = None


@dataclass(frozen=True, eq=False)
class SavePlan:
    """The layout of an arena. All positions count from the start of the arena.

    `offsets`: where each tensor goes, in the order of the contents and of their tensors. `pieces`: bytes that are the same for
    every save: headers, descriptors, known files. `end`: where what varies from save to save begins.
    """

    files: tuple[PlannedFile, ...]
    offsets: tuple[int, ...]
    pieces: tuple[tuple[int, bytes], ...]
    end: int

    @property
    def capacity(self) -> int:
        """Bytes an arena needs for this plan, with slack for what grows from save to save."""
        return self.end + max(1 << 20, self.end // 100)


def pages(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def plan(contents: Sequence[Content]) -> SavePlan:
    """Lay out a checkpoint. Raises `PlanError` for names that clash or leave the directory and for what the formats refuse."""
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
    """Raise `PlanError` if two files have the same name, or if a name leaves the directory."""
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
    """Whether `name` is a relative path, with `/` between its parts, that cannot leave its directory."""
    parts = name.split("/")
    return (
        0 < len(name) <= 1024
        and "\0" not in name
        and "\\" not in name
        and not any(part in ("", ".", "..") or len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts)
    )
