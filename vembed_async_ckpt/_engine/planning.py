"""Plans saves: where each tensor of a request goes, and what may be copied after `save()` has returned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_not

from .._capture.request import Request
from .._format.plan import Content, SavePlan, TensorContent, ZipContent, plan
from .._format.ranges import Region
from .._memory import devices
from .._memory.barrier import STEP_BARRIER, CopyPlan, OverlapPolicy, all_now
from .._memory.places import Place, place_of
from ..events import Reporter
from .options import Staging

_Known = tuple[tuple[Content, ...], bytes, SavePlan, list[Place], list[tuple[int, Region]] | None]


class Planner:
    """Plans the saves of one checkpointer. It keeps the last plan, for the next save of the same tensors.

    `overlap`: whether tensors may be copied late. `overlapped`: whether the newest save did so; before the first save,
    whether it is expected to.
    """

    def __init__(self, staging: Staging, reporter: Reporter) -> None:
        self._reporter = reporter
        self._policy = OverlapPolicy()
        self._known: _Known | None = None
        self.overlap = self.overlapped = staging == "overlap"

    def plan(self, request: Request) -> tuple[SavePlan, list[Place]]:
        """Return the plan of `request` and the place of each of its tensors. Both are the same objects while they hold."""
        known = self._known
        if (
            known is None
            or known[1] != request.digest
            or len(known[0]) != len(request.contents)
            or any(map(is_not, known[0], request.contents))
            or known[4] != request.regions
        ):
            with self._reporter.stage("plan", request.save_id, request.step):
                made = plan(request.contents)
                # keeps the contents alive: no other object can get their id meanwhile
                known = self._known = request.contents, request.digest, made, places(made, request), request.regions
            devices.notice(request.tensors)
        return known[2], known[3]

    def divide(self, request: Request, places: Sequence[Place]) -> CopyPlan:
        """Return which tensors are copied now and which may be copied late."""
        # A signal handler may save in the middle of a step, and the step goes on afterwards.
        if not self.overlap or STEP_BARRIER.is_stepping():
            return all_now(len(request.tensors))
        stepped = request.stepped()
        ids = list(map(id, (*request.contents, *(state.optimizer for state in stepped))))
        looks = [part.looks for part in request.parts]
        key = (ids, places if request.regions is not None else None, looks)
        return self._policy.divide(
            key,
            request.tensors,
            request.labels,
            request.owners,
            request.volatile,
            stepped,
            places if request.regions is not None else None,
        )


def places(plan: SavePlan, request: Request) -> list[Place]:
    """Return where each tensor of `request` goes."""
    if request.regions is None:
        return list(map(Place, plan.offsets))
    shapes = list(chain.from_iterable(map(_shapes, request.contents)))
    return [
        place_of(region, shapes[index] or tensor.shape, tensor.itemsize, plan.offsets[index])
        for tensor, (index, region) in zip(request.tensors, request.regions, strict=True)
    ]


def _shapes(content: Content) -> Iterable[tuple[int, ...]]:
    """Return the shape of each whole tensor; empty if the content does not say it, because its tensors are not divided."""
    if isinstance(content, TensorContent):
        return [spec.shape for spec in content.tensors]
    return [()] * len(content.sizes) if isinstance(content, ZipContent) else []


def own_parts(places: Sequence[Place], request: Request) -> list[tuple[int, int]] | None:
    """Return [start, end] of each place into which a device copies directly; None if the save is whole."""
    if request.regions is None:
        return None
    return [
        (place.start, place.end(tensor))
        for place, tensor in zip(places, request.tensors, strict=True)
        if place.strides is None
    ]
