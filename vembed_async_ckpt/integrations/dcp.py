"""torch.distributed.checkpoint through us: `dcp.save` and `dcp.async_save` write a checkpoint of this library.

Every rank writes its own bytes into the files, and the first rank publishes the directory by one rename. What is
published is whole and durable, and every file has a hash. Nothing is gathered, and nothing is written twice.

    import torch.distributed.checkpoint as dcp
    from vembed_async_ckpt.integrations.dcp import StorageReader, StorageWriter

    state = {"model": model.state_dict(), "optimizer": optimizer_state}
    dcp.save(state, storage_writer=StorageWriter("run/checkpoint-5", prefix="model."))
    dcp.load(state, storage_reader=StorageReader("run/checkpoint-5"))

The tensors whose names begin with `prefix` are in `model.safetensors`, without the prefix. All other tensors are in
`vembed_dcp_state.safetensors`. The planner of torch.distributed.checkpoint pickles what is no tensor. Each such value is a
file in `vembed_dcp_objects/`; we never unpickle it, the planner does. Our own `load` restores the model from the
directory, but not what else is in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import planner as planners
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor
from torch.futures import Future

from .._capture.dtypes import FROM_TORCH, TO_TORCH
from .._capture.request import VERSIONS
from .._capture.shares import Sharding
from .._disk import commit as commits
from .._disk import deletion, manifests
from .._disk.catalog import Committed, interrupted
from .._disk.filesystem import LocalFilesystem, make_directories
from .._disk.lock import RootLock
from .._disk.manifests import Verify
from .._disk.reader import held, manifest_of
from .._disk.source import LocalFiles, Source
from .._format import names
from .._format.manifest import Manifest
from .._format.plan import is_safe_relative
from .._format.ranges import Box, extents, fault_of
from .._format.safetensors import TensorSpec, layout
from ..errors import CheckpointError, CorruptCheckpoint, PlanError


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where a rank writes: the directory that is being built, and for each name (file, offset, whole shape).

    A value that is no tensor has offset 0 and an empty shape.
    """

    directory: str
    of: Mapping[str, tuple[str, int, tuple[int, ...]]]


class _Locks:
    """The locks of the roots under which this process saves. Saves that run at the same time share one."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._held: dict[str, tuple[RootLock, int]] = {}

    def take(self, root: str) -> RootLock:
        """Return the lock of `root`. The first save under it sweeps what a crash left there."""
        with self._changing:
            lock, users = self._held.get(root, (None, 0))
            if lock is None:
                lock = RootLock.acquire(root)
                try:
                    deletion.sweep(LocalFilesystem(), root)
                except BaseException:
                    lock.release()
                    raise
            self._held[root] = lock, users + 1
            return lock

    def give_back(self, root: str) -> None:
        with self._changing:
            lock, users = self._held.pop(root)
            if users > 1:
                self._held[root] = lock, users - 1
            else:
                lock.release()


_LOCKS = _Locks()


class _Publication:
    """The first rank's part of one save: the root's lock, and the directory that is built and then published.

    Nobody tells a writer that a save failed. So a save that failed ends when its writer is used again or freed.
    """

    def __init__(self, path: str) -> None:
        """Take the lock and make the directory. Raises `CheckpointerBusy` if another process saves under the root."""
        self.target = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        self.root, self.name = os.path.split(self.target)
        self.save_id = os.urandom(16).hex()
        self.fs = LocalFilesystem()
        self._lock = _LOCKS.take(self.root)
        try:
            commits.refuse_non_directory(self.target)
            self.work = names.save_directory(self.root, self.save_id, 0)
            self.fs.make_directory(self.work)
        except BaseException:
            _LOCKS.give_back(self.root)
            raise

    def write(self, name: str, content: bytes, size: int | None = None) -> None:
        """Write a synced file. `size`: bytes of the whole file if the ranks write the rest of it."""
        path = os.path.join(self.work, *name.split("/"))
        make_directories(self.fs, os.path.dirname(path))
        with open(path, "xb") as file:
            file.write(content)
            file.truncate(len(content) if size is None else size)
            file.flush()
            os.fsync(file.fileno())

    def publish(self, files: Iterable[str], **described: Any) -> None:
        """Publish the directory with its manifest. Afterwards it survives a power cut."""
        self._lock.refuse_if_lost()
        before = [manifest.sequence for _, manifest in Committed(self.root).refresh()]
        before += [entry.order[0] for entry in interrupted(self.root)]
        manifest = Manifest(
            save_id=self.save_id,
            step=names.trailing_number(self.name),
            sequence=1 + max(before, default=0),
            time=time.time(),
            versions=VERSIONS,
            files={name: manifests.record_of(os.path.join(self.work, *name.split("/"))) for name in files},
            **described,
        )
        replaced = commits.commit(self.fs, self.root, self.name, self.work, manifest)
        if replaced is not None:
            deletion.dispose(self.fs, self.root, replaced, self.name, self.save_id, carried_to=self.target)

    def end(self) -> None:
        """Remove what was not published, and give the lock back. Call it once."""
        try:
            if os.path.isdir(self.work) and self._lock.is_held():
                deletion.remove_work(self.fs, self.work, self.save_id)
        finally:
            _LOCKS.give_back(self.root)


class StorageWriter(storage.StorageWriter):
    """Writes a checkpoint of this library for `dcp.save` and `dcp.async_save`.

    All ranks must be on one node. Planners that cache plans (`enable_plan_caching`) are refused.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, prefix: str = "", files: Mapping[str, bytes] | None = None
    ) -> None:
        """`path`: the checkpoint; `checkpoint_id=` of `dcp.save` replaces it.

        `prefix`: what the names of the model's tensors begin with, such as "model."; they are stored without it. "": all
        tensors are the model's.
        `files`: further files by name, such as {"config.json": ...}. Only the first rank needs them.

        Raises `PlanError` for a file name that this library needs or that leaves the directory.
        """
        self._path = None if path is None else os.path.abspath(path)
        self._prefix = prefix
        self._files = dict(files or {})
        for name in self._files:
            if not is_safe_relative(name) or name.startswith(names.DCP_OBJECTS + "/") or names.is_plan_name(name):
                raise PlanError(f"files: {name!r} cannot be the name of a further file; choose another one")
        self._publication: _Publication | None = None
        self._end = weakref.finalize(self, lambda: None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether it is a local path."""
        return "://" not in os.fspath(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save. Removes what an earlier one left that was not published."""
        self._end()
        self._publication = None
        if checkpoint_id is not None:
            self._path = os.path.abspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the first rank is known by its call of `prepare_global_plan`."""

    def prepare_local_plan(self, plan: planners.SavePlan) -> planners.SavePlan:
        """Add the name of this node."""
        return dataclasses.replace(plan, storage_data=os.uname().nodename)

    def prepare_global_plan(self, plans: list[planners.SavePlan]) -> list[planners.SavePlan]:
        """Lay out the files, and make the directory in which the ranks write.

        Raises `PlanError` for what cannot be saved; then nothing was touched. Raises `CheckpointerBusy` if somebody
        saves under the same root.
        """
        if self._path is None:
            raise PlanError("no path is given: use StorageWriter(path) or dcp.save(..., checkpoint_id=path)")
        nodes = {plan.storage_data for plan in plans}
        if any(not plan.usable for plan in plans):
            raise PlanError("the planner caches its plans; use DefaultSavePlanner(enable_plan_caching=False)")
        if len(nodes) > 1:
            raise PlanError(
                f"the ranks are on several nodes ({', '.join(sorted(map(str, nodes)))}); only one is supported"
            )
        specs, objects = self._specs(plans)
        layouts = {file: layout(tensors, {"format": "pt"}, file=file) for file, tensors in specs.items() if tensors}
        publication = self._publication = _Publication(self._path)
        self._end = weakref.finalize(self, publication.end)
        of: dict[str, tuple[str, int, tuple[int, ...]]] = {}
        for file, found in layouts.items():
            publication.write(file, found.prefix, found.size)
            for tensor in specs[file]:
                fqn = tensor.name if file != names.WEIGHTS else self._prefix + tensor.name
                of[fqn] = file, found.offsets[tensor.name], tensor.shape
        make_directories(publication.fs, os.path.join(publication.work, names.DCP_OBJECTS))
        of |= {fqn: (names.dcp_object(index), 0, ()) for index, fqn in enumerate(sorted(objects))}
        return [
            dataclasses.replace(
                plan,
                storage_data=_Places(publication.work, {item.index.fqn: of[item.index.fqn] for item in plan.items}),
            )
            for plan in plans
        ]

    def _specs(self, plans: Sequence[planners.SavePlan]) -> tuple[dict[str, list[TensorSpec]], set[str]]:
        """Return the tensors of each file, and the names of what is no tensor."""
        wholes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        parts: dict[str, list[Box]] = defaultdict(list)
        objects: set[str] = set()
        for item in (item for plan in plans for item in plan.items):
            data = item.tensor_data
            if data is None:
                objects.add(item.index.fqn)
                continue
            whole = data.properties.dtype, tuple(data.size)
            if wholes.setdefault(item.index.fqn, whole) != whole:
                raise PlanError(f"{item.index.fqn}: the ranks do not agree on its dtype and shape")
            parts[item.index.fqn].append(Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes)))
        specs: dict[str, list[TensorSpec]] = {names.WEIGHTS: [], names.DCP_STATE: []}
        for fqn, (dtype, shape) in wholes.items():
            if fault := fault_of(shape, parts[fqn]):
                raise PlanError(f"{fqn}: {fault}")
            if FROM_TORCH.get(dtype) in (None, "F4"):
                raise PlanError(f"{fqn}: has dtype {dtype}, which safetensors cannot hold; convert it first")
            is_models = fqn.startswith(self._prefix) and fqn != self._prefix
            name = fqn.removeprefix(self._prefix) if is_models else fqn
            specs[names.WEIGHTS if is_models else names.DCP_STATE].append(TensorSpec(name, FROM_TORCH[dtype], shape))
        return specs, objects

    def write_data(self, plan: planners.SavePlan, planner: planners.SavePlanner) -> Future[list[storage.WriteResult]]:
        """Write and sync this rank's parts. The future is done when this returns.

        Raises `PlanError` if a tensor does not lie where the plan says.
        """
        places: _Places = plan.storage_data
        by_file: dict[str, list[planners.WriteItem]] = defaultdict(list)
        for item in plan.items:
            by_file[places.of[item.index.fqn][0]].append(item)
        results = []
        for file, items in by_file.items():
            path = os.path.join(places.directory, *file.split("/"))
            is_object = items[0].tensor_data is None
            fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL) * is_object, 0o666)
            try:
                for item in items:
                    _, offset, shape = places.of[item.index.fqn]
                    value = planner.resolve_data(item)
                    if isinstance(value, io.BytesIO):
                        size = _write_all(fd, value.getbuffer(), 0)
                    else:
                        size = _write_part(fd, offset, shape, item, value, planner)
                    results.append(storage.WriteResult(item.index, size, None))
                os.fsync(fd)
            finally:
                os.close(fd)
        done: Future[list[storage.WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[storage.WriteResult]]) -> None:
        """Publish the checkpoint. When this returns, it survives a power cut. Only the first rank calls it."""
        publication = self._publication
        assert publication is not None
        try:
            objects = {
                fqn: names.dcp_object(index)
                for index, fqn in enumerate(
                    sorted(
                        fqn
                        for fqn, kind in metadata.state_dict_metadata.items()
                        if isinstance(kind, BytesStorageMetadata)
                    )
                )
            }
            weights = [
                file
                for file in (names.WEIGHTS, names.DCP_STATE)
                if os.path.exists(os.path.join(publication.work, file))
            ]
            described = {"prefix": self._prefix, "objects": objects, "paths": _paths(metadata.planner_data)}
            publication.write(names.DCP, json.dumps(described).encode())
            publication.write(names.TRAINING_STATE, json.dumps(_NO_TRAINING_STATE).encode())
            for name, content in self._files.items():
                publication.write(name, content)
            publication.publish(
                [*weights, *objects.values(), names.DCP, names.TRAINING_STATE, *self._files],
                world_size=len(results),
                names={"": _described_for_load(weights)} if names.WEIGHTS in weights else {},
            )
        finally:
            self._end()
            self._publication = None


# What our `load` needs to see beside the model.
_NO_TRAINING_STATE: dict[str, Any] = {
    "optimizers": {},
    "schedulers": {},
    "scaler": None,
    "dataloader": None,
    "extra": None,
    "rng": None,
    "accelerator": None,
    "registered": [],
}


def _described_for_load(weights: Sequence[str]) -> dict[str, Any]:
    """Return the entry of the model in the manifest: its tensors have their own names."""
    nothing: dict[str, Any] = {"uncovered": [], "renamed": {}, "ties": {}, "computed": {}, "left_out": []}
    return {"files": [names.WEIGHTS], **nothing, "by_name": True, "from_pretrained": False}


def _paths(planner_data: Any) -> dict[str, list[str | int]] | None:
    """Return where the planner found each name in the nested state, as JSON; None if it does not say so."""
    if not isinstance(planner_data, Mapping):
        return None
    paths = {fqn: list(path) for fqn, path in planner_data.items() if isinstance(path, tuple)}
    known = all(type(key) in (str, int) for path in paths.values() for key in path)
    return paths if known and len(paths) == len(planner_data) else None


def _write_part(
    fd: int,
    offset: int,
    shape: tuple[int, ...],
    item: planners.WriteItem,
    value: torch.Tensor,
    planner: planners.SavePlanner,
) -> int:
    assert item.tensor_data is not None
    chunk, fqn = item.tensor_data.chunk, item.index.fqn
    box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
    if tuple(value.shape) != box.size:
        raise PlanError(f"{fqn}: this rank holds {list(value.shape)}, its placements say {list(box.size)}")
    held_here = getattr(planner, "state_dict", {}).get(fqn)
    if (
        isinstance(held_here, DTensor)
        and box.count
        and Sharding(torch.nn.Module()).share(fqn, held_here).regions != (box,)
    ):
        raise PlanError(
            f"{fqn}: its placements {held_here.placements} give this rank several parts of it, and "
            "torch.distributed.checkpoint knows only one; save with AsyncCheckpointer instead"
        )
    data = value.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    memory = data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else memoryview(b"")
    at = 0
    for start, count in extents(shape, box, data.element_size()):
        _write_all(fd, memory[at : at + count], offset + start)
        at += count
    return at


def _write_all(fd: int, data: memoryview, offset: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
    return done


class StorageReader(storage.StorageReader):
    """Reads a checkpoint of this library for `dcp.load`: each rank only the bytes that it needs.

    Of a directory that `StorageWriter` did not write, it reads the models' weights.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, prefix: str | None = None, verify: Verify = "size"
    ) -> None:
        """`path`: the checkpoint; `checkpoint_id=` of `dcp.load` replaces it.

        `prefix`: what the names of the model's tensors begin with in the state to load; None: as it was saved.
        `verify`: "size" compares the files' sizes with the manifest, "full" also their hashes (on the first rank), and
            "none" nothing.
        """
        self._path = None if path is None else os.path.abspath(path)
        self._prefix = prefix
        self._verify: Verify = verify
        self._source: Source | None = None
        self._stored: dict[str, tuple[str, int, torch.dtype, tuple[int, ...]]] = {}
        self._objects: dict[str, str] = {}
        self._held = contextlib.ExitStack()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether it is a local path."""
        return "://" not in os.fspath(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load."""
        self._held.close()
        if checkpoint_id is not None:
            self._path = os.path.abspath(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return which tensors and other values the checkpoint has.

        Retention does not delete the checkpoint until it was read. Raises `CorruptCheckpoint` or `CheckpointError`.
        """
        if self._path is None:
            raise CheckpointError("no path is given: use StorageReader(path) or dcp.load(..., checkpoint_id=path)")
        self._held.close()
        self._held.enter_context(held(self._path))
        manifest = manifest_of(self._path)
        source = self._source = Source(LocalFiles(self._path), manifest, "none" if self._verify == "none" else "size")
        self._held.callback(source.close)
        described = (
            source.json(names.DCP) if names.DCP in manifest.files else {"prefix": "", "objects": {}, "paths": None}
        )
        try:
            prefix = described["prefix"] if self._prefix is None else self._prefix
            self._objects = {str(fqn): str(file) for fqn, file in described["objects"].items()}
            paths = described["paths"]
            planner_data = None if paths is None else {fqn: tuple(path) for fqn, path in paths.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpoint(f"{source.path(names.DCP)}: is unusable: {error!r}") from error
        self._stored = dict(self._tensors(source, manifest, prefix))
        found: dict[str, Any] = {fqn: BytesStorageMetadata() for fqn in self._objects}
        for fqn, (_, _, dtype, shape) in self._stored.items():
            size = torch.Size(shape)
            chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), size)
            found[fqn] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [chunk])
        return Metadata(found, planner_data=planner_data)

    def _tensors(
        self, source: Source, manifest: Manifest, prefix: str
    ) -> Iterable[tuple[str, tuple[str, int, torch.dtype, tuple[int, ...]]]]:
        files = [(file, model) for model in manifest.names.values() for file in model["files"]]
        for file, model in files:
            renamed = model["renamed"].get(file, {})
            for name, entry in source.entries(file).items():
                inside, part = renamed.get(name, (name, None))
                if part is None:  # else it is a part of a tensor, which has no name of its own in the model
                    yield prefix + inside, (file, entry.offset, TO_TORCH[entry.dtype], tuple(entry.shape))
        if names.DCP_STATE in manifest.files:
            for name, entry in source.entries(names.DCP_STATE).items():
                yield name, (names.DCP_STATE, entry.offset, TO_TORCH[entry.dtype], tuple(entry.shape))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """With `verify="full"`, check every hash on the first rank. Raises `CorruptCheckpoint`."""
        if is_coordinator and self._source is not None:
            manifests.check(self._source.directory, self._source.manifest, self._verify)

    def prepare_local_plan(self, plan: planners.LoadPlan) -> planners.LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[planners.LoadPlan]) -> list[planners.LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: planners.LoadPlan, planner: planners.LoadPlanner) -> Future[None]:
        """Read this rank's parts into their places. The future is done when this returns."""
        source = self._source
        assert source is not None
        try:
            for item in plan.items:
                if item.type is planners.LoadItemType.BYTE_IO:
                    file = source.file(self._objects[item.storage_index.fqn])
                    planner.load_bytes(item, io.BytesIO(file.read(file.size)))
                else:
                    self._read_part(source, item, planner)
        finally:
            self._held.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_part(self, source: Source, item: planners.ReadItem, planner: planners.LoadPlanner) -> None:
        file, offset, dtype, shape = self._stored[item.storage_index.fqn]
        box = Box(tuple(item.storage_offsets), tuple(item.lengths))
        place = planner.resolve_tensor(item)
        target = place.detach()
        direct = target.is_cpu and target.dtype is dtype and target.is_contiguous() and not target.is_conj()
        data = target if direct else torch.empty(box.size, dtype=dtype)
        if data.numel():
            memory = data.view(-1).view(torch.uint8).numpy().data
            parts, at = [], 0
            for start, count in extents(shape, box, dtype.itemsize):
                parts.append((file, offset + start, memory[at : at + count]))
                at += count
            source.read_into(parts)
        if not direct:
            target.copy_(data)
        planner.commit_tensor(item, target)
