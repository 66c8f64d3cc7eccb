"""Assemble a save: its small files, the offsets of everything in the arena, and the job.

The tensors of models and optimizers are placed by the plan already. The job is the JSON that describes the whole save
to the writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._capture.request import Request
from .._capture.training_state import rough_size
from .._format import names, torch_zip
from .._format.plan import PlannedFile, SavePlan, pages
from .._shared.protocol import FileSlot
from ..errors import StageError


class FixedJson:
    """The large parts of a job's JSON that are the same for every save of a plan. They are rendered once."""

    def __init__(self, plan: SavePlan, request: Request) -> None:
        zips = [(file, optimizer) for file, optimizer in zip(zip_files(plan), request.optimizers, strict=True)]
        self.records = {file.name: to_json(_layout(file).records()) for file, _ in zips}
        self.tables = {file.name: to_json(optimizer.table(_layout(file).data)) for file, optimizer in zips}
        self.names = to_json(request.manifest["names"])


@dataclass(frozen=True)
class Assembly:
    """An assembled save.

    `files`: the files of the save, ordered by their start in the arena. `pieces`: (start, bytes) to write besides the
    plan's own pieces. `job`: the job as JSON. `end`: the offset behind the last file, rounded up to a page.
    """

    files: list[FileSlot]
    pieces: list[tuple[int, bytes]]
    job: bytes
    end: int


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def zip_files(plan: SavePlan) -> list[PlannedFile]:
    return [file for file in plan.files if file.zip is not None]


def _layout(file: PlannedFile) -> torch_zip.ZipLayout:
    assert file.zip is not None
    return file.zip


def required_bytes(plan: SavePlan, request: Request) -> int:
    """Return the arena size in bytes that this save needs: the plan, its slack, and the parts whose size varies."""
    tables = 300 * len(request.tensors)  # the job names every tensor and every record of optimizer.bin
    varying = pages(request.state.layout.size) + rough_size(request.state, [data for _, data in request.files]) + tables
    return max(plan.capacity, plan.end + varying)


def assemble(
    request: Request,
    further: Sequence[tuple[str, bytes]],
    plan: SavePlan,
    after: Mapping[str, Any],
    fixed: FixedJson,
    *,
    without: Sequence[int] = (),
    waves: int = 0,
) -> Assembly:
    """Render the parts that are known only now, and describe the whole save to the writer.

    Assigns an offset to each of these parts and to each of the `further` files. `after`: what the writer does after the
    commit. `without`: the ranks whose state is not in the save. `waves`: bytes of each part if the save passes through
    the arena in parts, else 0. Raises `StageError` if the description of a zip file no longer fits.
    """
    training = request.state.layout  # it starts where the plan ends
    files: list[FileSlot] = [{"name": names.TRAINING_TENSORS, "start": plan.end, "size": training.size}]
    pieces = [(plan.end, training.prefix)]
    taken = {file.name for file in plan.files}
    for name, data in [*request.state.render(), *further]:
        if name in taken:
            continue  # another rank's file of the same name
        taken.add(name)
        start = files[-1]["start"] + pages(files[-1]["size"])
        files.append({"name": name, "start": start, "size": len(data)})
        pieces.append((start, data))
    planned: list[FileSlot] = []
    checksums = []
    optimizers = iter(request.optimizers)
    for file in plan.files:
        size = file.size
        if file.zip is not None:
            tail, central = torch_zip.tail(file.zip, next(optimizers).pickled())
            size = file.zip.end + len(tail)
            if size > file.size:
                raise StageError(f"{file.name}: its description grew from {file.size} to {size} bytes; save again")
            pieces.append((file.start + file.zip.end, tail))
            checksums.append(f'{to_json(file.name)}:{{"central_start":{central},"records":{fixed.records[file.name]}}}')
        planned.append({"name": file.name, "start": file.start, "size": size})
    files = planned + files
    job = _job(request, files, after, checksums, fixed, without, waves)
    return Assembly(files, pieces, job, files[-1]["start"] + pages(files[-1]["size"]))


def _job(
    request: Request,
    files: Sequence[FileSlot],
    after: Mapping[str, Any],
    checksums: Sequence[str],
    fixed: FixedJson,
    without: Sequence[int],
    waves: int,
) -> bytes:
    head = {
        "save_id": request.save_id,
        "step": request.step,
        "name": request.directory,
        "files": files,
        "links": request.links,
        **after,
        "waves": waves,
    }
    manifest = {key: value for key, value in request.manifest.items() if key != "names"}
    if without:
        manifest["ranks"] = [rank for rank in range(manifest["world_size"]) if rank not in without]
    tables = ",".join(f"{to_json(name)}:{table}" for name, table in fixed.tables.items())
    return (
        f'{to_json(head)[:-1]},"checksums":{{{",".join(checksums)}}},'
        f'"manifest":{to_json(manifest)[:-1]},"names":{fixed.names},"tensors":{{{tables}}}}}}}'
    ).encode()
