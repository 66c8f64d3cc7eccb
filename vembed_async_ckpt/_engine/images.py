"""A plan laid out in an arena: where the tensors go, and the bytes that are the same in every save of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._capture.request import Request
from .._capture.training_state import TrainingState
from .._format.plan import SavePlan, pages
from .._format.safetensors import Layout
from .._memory.arena import Arena
from .._memory.barrier import CopyPlan
from .._memory.host_copy import SmallPlaces
from .._memory.places import Destinations, Place
from .._memory.staging import LatePlaces
from .assembly import FixedJson


@dataclass(frozen=True)
class Targets:
    """The arena tensors into which the tensors of a `CopyPlan` are copied."""

    small: SmallPlaces
    now: list[torch.Tensor]
    late: LatePlaces


@dataclass
class Image:
    """The places of this process's tensors in an arena. `divided`: the last copy plan and its targets."""

    plan: SavePlan
    destinations: Destinations
    divided: tuple[CopyPlan, Targets] | None = None

    def targets(self, copy_plan: CopyPlan) -> Targets:
        if self.divided is None or self.divided[0] is not copy_plan:
            tensors = self.destinations.tensors
            late = LatePlaces(copy_plan, copy_plan.late.of(tensors))
            self.divided = copy_plan, Targets(SmallPlaces(copy_plan.small.of(tensors)), copy_plan.now.of(tensors), late)
        return self.divided[1]


@dataclass
class FileImage(Image):
    """The image of a whole checkpoint, on the rank that writes it.

    The headers and the files with constant content are in the arena. `training`: the last layout of the training state,
    which lies behind the plan, and the places of its tensors.
    """

    fixed: FixedJson | None = None
    training: tuple[Layout, Destinations] | None = None

    def training_targets(self, arena: Arena, state: TrainingState) -> list[torch.Tensor]:
        if self.training is None or self.training[0] is not state.layout:
            places = [Place(self.plan.end + state.layout.offsets[name]) for name in state.tensors]
            self.training = state.layout, Destinations(arena, list(state.tensors.values()), places)
        return self.training[1].tensors


def place_tensors(arena: Arena, plan: SavePlan, request: Request, places: Sequence[Place]) -> Image:
    """Return the image of this process's part of `plan` in `arena`; make it if need be."""
    image = arena.image
    if not isinstance(image, Image) or image.plan is not plan:
        image = arena.image = Image(plan, Destinations(arena, request.tensors, places))
    return image


def lay_out(arena: Arena, plan: SavePlan, request: Request, places: Sequence[Place]) -> FileImage:
    """Return the image of `plan` in `arena`; make it if need be.

    Afterwards every byte that is the same for all saves of the plan is in place.
    """
    image = arena.image
    if isinstance(image, FileImage) and image.plan is plan:
        return image
    arena.image = None
    for position, data in plan.pieces:
        arena.write(position, data)
    for file in plan.files:
        arena.clear(file.start + file.size, file.start + pages(file.size))
    arena.image = FileImage(plan, Destinations(arena, request.tensors, places), fixed=FixedJson(plan, request))
    return arena.image  # type: ignore[no-any-return]
