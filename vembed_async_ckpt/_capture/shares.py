"""What this rank holds of tensors that are divided among ranks.

Three kinds are known. A `DTensor` (FSDP2, HSDP, tensor parallelism) says by its placements what its local tensor is. A
parameter inside FSDP version 1 is a run of elements in the unit's flat parameter; the unit says which. Any other tensor
is whole on every rank.

What FSDP version 1 says is private to torch (torch/distributed/fsdp/_flat_param.py: `FlatParameter`,
`_ShardParamInfo`). So its structure is checked, and anything unexpected is refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from .._format.ranges import Ambiguous, Box, Region, Run, Split, boxes, spans
from ..errors import PlanError
from .dtypes import FROM_TORCH, TO_TORCH


@dataclass(frozen=True)
class Share:
    """What this rank holds of one tensor.

    `shape`: the shape of the whole.
    `local`: the plain tensor on this rank.
    `regions`: where its elements are in the whole; none if this rank holds nothing.
    `starts`: the first index in `local` of each region.
    `replicas`: how many groups of ranks hold the same, and may write it instead of each other.
    `replica`: the number of this rank's group; None if this rank never writes the tensor.
    `wrapper`: the tensor of which `local` is a view, if it counts its changes itself.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    local: torch.Tensor
    regions: tuple[Region, ...]
    starts: tuple[tuple[int, ...], ...]
    replicas: int
    replica: int | None
    wrapper: torch.Tensor | None = None

    @property
    def is_divided(self) -> bool:
        """Whether no rank may hold all of it."""
        return self.regions != (_all_of(self.shape),)

    def pieces(self, local: torch.Tensor | None = None) -> Iterator[tuple[Region, torch.Tensor]]:
        """Yield each region with the view of `local` that holds its elements.

        `local`: a tensor of the same shape as `self.local`, which is the default.

        The view of a `Box` has its size. The view of a `Run` has one dimension.
        """
        local = self.local if local is None else local
        for region, start in zip(self.regions, self.starts, strict=True):
            if isinstance(region, Run):
                yield region, local.view(-1)
                continue
            view = local
            for dim, (first, count) in enumerate(zip(start, region.size, strict=True)):
                if count != view.shape[dim]:
                    view = view.narrow(dim, first, count)
            yield region, view


def written(shares: Sequence[Share]) -> list[bool]:
    """Return for each tensor of a save whether this rank writes what it holds of it.

    Whole tensors are divided among replicas, by size. The result is the same choice on every rank.
    """
    loads: dict[int, list[int]] = {}
    result = []
    for share in shares:
        load = loads.setdefault(share.replicas, [0] * share.replicas)
        chosen = load.index(min(load))
        load[chosen] += math.prod(share.shape) * share.dtype.itemsize
        result.append(share.replica == chosen)
    return result


def reshard(models: Iterable[torch.nn.Module]) -> None:
    """Let the FSDP2 units show their shares again, on this rank only. Nothing is communicated.

    After an evaluation a unit may show whole parameters. The next forward pass gathers them again.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", ())
    for model in models:
        for part in model.modules():
            if isinstance(part, kind):
                part.reshard()


class Sharding:
    """How the parameters and buffers of modules are divided among the ranks."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        """Look for FSDP units in the modules.

        Raises `PlanError` if a flat parameter of FSDP version 1 does not say what this rank holds of its parameters.
        """
        self.pieces = list(
            chain.from_iterable(map(flat_pieces, modules))
        )  # a tied parameter has one for each of its names
        self.flat = {id(piece.parameter): piece for piece in self.pieces}
        self._in_fsdp = set(chain.from_iterable(map(_parameters_of_fsdp2, modules)))
        self._whole_in_fsdp = set(chain.from_iterable(map(_whole_parameters_of_fsdp1, modules)))

    def is_divided(self, tensor: torch.Tensor) -> bool:
        """Return whether a parameter or buffer may be divided among the ranks."""
        return is_dtensor(tensor) or id(tensor) in self.flat

    def share(self, name: str, tensor: torch.Tensor) -> Share:
        """Return this rank's share of a parameter or buffer.

        Raises `PlanError` naming the tensor, the rank and what to do, if what the rank holds is not certain.
        """
        piece = self.flat.get(id(tensor))
        if piece is not None:
            return piece.share(name)
        if is_dtensor(tensor):
            return _of_dtensor(name, tensor, in_order=id(tensor) in self._in_fsdp)
        if getattr(tensor, "_fsdp_flattened", False) and id(tensor) not in self._whole_in_fsdp:
            raise PlanError(
                f"{name}: it belongs to an FSDP unit that is not in the model that was passed, so rank {_rank()} cannot tell what "
                "it holds of it; pass the model as FullyShardedDataParallel returned it"
            )
        return _of_plain(name, tensor)

    def share_of_state(self, name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> Share:
        """Return this rank's share of a tensor in an optimizer's state of `parameter`.

        Raises `PlanError` as `share` does, and for a tensor that belongs to this rank's part of the parameter but is not
        divided like it.
        """
        if is_dtensor(tensor):
            return _of_dtensor(name, tensor, in_order=id(parameter) in self._in_fsdp)
        piece = self.flat.get(id(parameter))
        if piece is not None:
            return piece.share_of_state(name, tensor)
        if is_dtensor(parameter) and tensor.dim():
            raise PlanError(
                f"{name}: on rank {_rank()} it is a plain tensor of shape {list(tensor.shape)}, but its parameter is divided "
                "among the ranks, so it is not known what it is a part of; use an optimizer that keeps DTensors"
            )
        return _of_plain(name, tensor)


def dtype_name(share: Share) -> str:
    """Return safetensors' name of the dtype. Raises `PlanError` if a file cannot hold pieces of such a tensor."""
    name = FROM_TORCH.get(share.dtype)
    if name is None:
        raise PlanError(f"{share.name} has dtype {share.dtype}, which safetensors cannot hold; convert it first")
    if name == "F4" and share.is_divided:
        raise PlanError(f"{share.name}: a float4 tensor that is divided among ranks cannot be saved; convert it first")
    return name


class Addresses:
    """Notices when one of many tensors, or this rank's share of it, lies elsewhere than before."""

    def __init__(self, sharding: Sharding, tensors: Iterable[torch.Tensor]) -> None:
        """`tensors`: parameters, buffers or tensors of an optimizer's state. They are kept."""
        self._pieces: list[FlatPiece] = []
        self._divided: list[Any] = []
        self._plain: list[torch.Tensor] = []
        for tensor in tensors:
            if id(tensor) in sharding.flat:
                self._pieces.append(sharding.flat[id(tensor)])
            else:
                (self._divided if is_dtensor(tensor) else self._plain).append(tensor)
        self._handles = list({id(piece.handle): piece.handle for piece in self._pieces}.values())
        self._seen = self._look()

    def are_same(self) -> bool:
        return bool(self._look() == self._seen)

    def _look(self) -> Any:
        local = [tensor._local_tensor for tensor in self._divided]
        gathered = [not handle.is_sharded(handle.flat_param) for handle in self._handles]
        flat = [_shard_of(handle) for handle in self._handles]
        shown = [] if any(gathered) else [piece.parameter for piece in self._pieces if piece.run.count]
        tensors = [*local, *self._plain, *flat, *shown]
        return (
            list(map(id, local)),
            [tensor._spec for tensor in self._divided],
            gathered,
            list(map(torch.Tensor.data_ptr, tensors)),
            list(map(torch.Tensor.size, tensors)),
            list(map(torch.Tensor.stride, tensors)),
        )


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Return whether it is a DTensor. Does not import what defines them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _all_of(shape: Sequence[int]) -> Box:
    return Box((0,) * len(shape), tuple(shape))


def _of_plain(name: str, tensor: torch.Tensor) -> Share:
    """The tensor is whole on every rank. Rank 0 writes it, as replicas may differ in their last bits."""
    shape = tuple(tensor.shape)
    regions = (_all_of(shape),) if tensor.numel() else ()
    starts = ((0,) * len(shape),) * len(regions)
    return Share(name, shape, tensor.dtype, tensor.detach(), regions, starts, 1, None if _rank() else 0)


# -- DTensor


def _of_dtensor(name: str, tensor: Any, *, in_order: bool) -> Share:
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    with torch.no_grad():
        local = tensor.to_local()
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is not in the mesh
        return Share(name, shape, tensor.dtype, local, (), (), 1, None)
    splits = [_split(name, placement) for placement in tensor.placements]
    sizes = tuple(mesh.shape)
    order = _stated_order(tensor, splits)
    try:
        held = spans(shape, sizes, coordinate, splits, order=order, in_order=in_order)
    except Ambiguous as error:
        raise PlanError(
            f"{name}: rank {_rank()} cannot tell which elements it holds: its placements are {tensor.placements}, and {error}; "
            "redistribute it to Shard first"
        ) from error
    expected = [sum(count for _, count in spans_of_dim) for spans_of_dim in held]
    if list(local.shape) != expected and (local.numel() or math.prod(expected)):
        raise PlanError(
            f"{name}: rank {_rank()} holds {list(local.shape)}, but its placements {tensor.placements} say {expected}; "
            "make the tensor with torch.distributed.tensor.distribute_tensor, or save the model before it is divided"
        )
    found = list(boxes(held)) if local.numel() else []
    replica, replicas = 0, 1
    for size, at, split in zip(sizes, coordinate, splits, strict=True):
        if split is None:
            replica, replicas = replica * size + at, replicas * size
    writes = 0 in mesh.mesh if mesh.size() < torch.distributed.get_world_size() else True
    return Share(
        name,
        shape,
        tensor.dtype,
        local,
        tuple(box for box, _ in found),
        tuple(start for _, start in found),
        replicas,
        replica if writes else None,  # of equal meshes beside each other, that of rank 0 writes
        tensor,
    )


def _split(name: str, placement: Any) -> Split | None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, _StridedShard):
        return Split(placement.dim, int(placement.split_factor))
    if type(placement) is Shard:
        return Split(placement.dim)
    if isinstance(placement, Partial):
        raise PlanError(
            f"{name}: on rank {_rank()} its placement is {type(placement).__name__}: a reduction is pending; "
            "redistribute it to Replicate or Shard first"
        )
    kind = f"{type(placement).__module__}.{type(placement).__qualname__}"
    raise PlanError(
        f"{name}: on rank {_rank()} its placement is a {kind}, which is not known; redistribute it to Replicate or Shard first"
    )


def _stated_order(tensor: Any, splits: Sequence[Split | None]) -> list[int] | None:
    """Return the order in which the mesh dimensions divide the tensor, if its spec has one. Older versions have none."""
    entries = getattr(tensor._spec, "shard_order", None)
    if not entries or any(split is not None and split.factor > 1 for split in splits):
        return None
    return [place for entry in entries for place in entry.mesh_dims]


def _parameters_of_fsdp2(module: torch.nn.Module) -> set[int]:
    """Return the ids of the parameters that FSDP2 divides. It divides after tensor parallelism, in that order."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return set()
    return {
        id(parameter)
        for part in module.modules()
        if isinstance(part, fsdp.FSDPModule)
        for parameter in part.parameters()
        if is_dtensor(parameter)
    }


# -- FSDP version 1


def _whole_parameters_of_fsdp1(module: torch.nn.Module) -> Iterator[int]:
    """Yield the ids of parameters in units that divide nothing (NO_SHARD, or a single rank)."""
    for _, unit in _fsdp1_units(module):
        handle = unit._handle
        if handle is not None and not handle.uses_sharded_strategy:
            yield from map(id, handle.flat_param._params or ())


def _fsdp1_units(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each FSDP version 1 module inside one, with its path."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for path, part in module.named_modules():
            if isinstance(part, fsdp.FullyShardedDataParallel):
                yield path or "the model", part


@dataclass(frozen=True)
class FlatPiece:
    """What this rank holds of a parameter inside a unit of FSDP version 1.

    `owner`, `key`: the module that has the parameter, and its name there.
    `parameter`: the object that the optimizer steps.
    `shape`: the shape of the whole.
    `run`: the elements of the whole that this rank holds.
    `offset`: the place of the first of them in the unit's shard.
    `handle`: the unit's own record.
    `replica`, `replicas`: as in `Share`.
    """

    owner: torch.nn.Module
    key: str
    parameter: torch.Tensor
    shape: tuple[int, ...]
    run: Run
    offset: int
    handle: Any
    replica: int | None
    replicas: int

    def local(self) -> torch.Tensor:
        """Return the elements that this rank holds, in one dimension.

        While the unit is gathered, the parameter shows the whole of it, so they are taken from the unit's shard.
        """
        if self.run.count and self.handle.is_sharded(self.handle.flat_param):
            return self.parameter.detach().view(-1)
        return _shard_of(self.handle).detach()[self.offset : self.offset + self.run.count]

    @property
    def is_first(self) -> bool:
        """Whether this rank holds the first element."""
        return self.run.count > 0 and self.run.start == 0

    def share_elsewhere(self, name: str, dtype: str, shape: tuple[int, ...]) -> Share:
        """Return the share of a state tensor that only other ranks have. `dtype` is safetensors' name."""
        nothing = torch.empty(0, dtype=TO_TORCH[dtype])
        return Share(name, shape, nothing.dtype, nothing, (), (), self.replicas if shape == self.shape else 1, None)

    def share(self, name: str) -> Share:
        local = self.local()
        if local.numel() != self.run.count:
            raise PlanError(
                f"{name}: rank {_rank()} holds {local.numel()} elements, but FSDP says {self.run.count}; "
                "do not replace the data of a parameter inside FSDP"
            )
        return self._share(name, local, self.parameter)

    def share_of_state(self, name: str, tensor: torch.Tensor) -> Share:
        if tensor.dim() == 0:
            # Only the ranks that hold a piece of the parameter have this number. The rank with its first element writes it.
            first = self.run.count > 0 and self.run.start == 0
            return Share(
                name, (), tensor.dtype, tensor.detach(), (Box((), ()),), ((),), 1, self.replica if first else None
            )
        if tuple(tensor.shape) != (self.run.count,):
            raise PlanError(
                f"{name}: on rank {_rank()} it has shape {list(tensor.shape)}, but the rank holds {self.run.count} elements of its "
                "parameter, so it is not known what it is a part of; use an optimizer whose state has the shape of the parameter"
            )
        return self._share(name, tensor.detach())

    def _share(self, name: str, local: torch.Tensor, wrapper: torch.Tensor | None = None) -> Share:
        regions = (self.run,) if self.run.count else ()
        starts = ((0,),) * len(regions)
        return Share(name, self.shape, local.dtype, local, regions, starts, self.replicas, self.replica, wrapper)


def _shard_of(handle: Any) -> torch.Tensor:
    """Return this rank's part of a unit's flat parameter, also while the unit is gathered."""
    flat = handle.flat_param
    shard: torch.Tensor = flat if handle.is_sharded(flat) else flat._local_shard
    return shard


def flat_pieces(module: torch.nn.Module) -> Iterator[FlatPiece]:
    """Yield every parameter of the FSDP version 1 units in `module`.

    Raises `PlanError` if a unit does not say what this rank holds of its parameters.
    """
    for path, unit in _fsdp1_units(module):
        try:
            yield from _pieces_of(path, unit)
        except (AttributeError, TypeError, ValueError) as error:
            raise PlanError(
                f"{path}: this version of torch does not say which elements of its FSDP parameters rank {_rank()} "
                f"holds ({error}); use FSDP2 (fsdp_version: 2)"
            ) from error


def _pieces_of(path: str, unit: Any) -> Iterator[FlatPiece]:
    handle = unit._handle
    if handle is None:
        return  # it has no parameters of its own
    flat = handle.flat_param
    if flat._params is None:
        raise PlanError(
            f"{path} is sharded by FSDP with use_orig_params=False, which keeps no state per parameter; "
            "wrap it with use_orig_params=True (fsdp_use_orig_params: true)"
        )
    if not handle.uses_sharded_strategy:
        return  # its parameters are whole on every rank
    if handle._training_state.name == "SUMMON_FULL_PARAMS":
        raise PlanError(f"{path} is inside summon_full_params, which may still change it; leave that before the save")
    between = getattr(unit, "_inter_node_pg", None)  # of HYBRID_SHARD: the ranks that hold the same
    replicas = 1 if between is None else torch.distributed.get_world_size(between)
    replica: int | None = 0 if between is None else torch.distributed.get_rank(between)
    if between is None and 0 not in torch.distributed.get_process_group_ranks(unit.process_group):
        replica = None  # of equal groups beside each other, that of rank 0 writes
    infos = zip(flat._param_infos, flat._shard_param_infos, flat._shapes, flat._params, flat._contiguities, strict=True)
    found = []
    for info, shard, shape, parameter, contiguous in infos:
        run, offset = Run(0, 0), 0
        if not contiguous:
            raise PlanError(
                f"{path}: {info.param_name} was not contiguous when FSDP took it over, so its elements lie in another order; "
                "make the parameter contiguous before wrapping the model, or use FSDP2 (fsdp_version: 2)"
            )
        if shard.in_shard:
            first, last, offset = shard.intra_param_start_idx, shard.intra_param_end_idx, shard.offset_in_shard
            run = Run(first, last - first + 1)
            fits = 0 <= first <= last < math.prod(shape) and run.count == shard.numel_in_shard
            if not fits or not 0 <= offset <= flat._sharded_size.numel() - run.count:
                raise PlanError(
                    f"{path}: FSDP says that rank {_rank()} holds elements {first} to {last} of {info.param_name}, of shape "
                    f"{list(shape)}, at {offset} of its shard, which does not add up; use FSDP2 (fsdp_version: 2)"
                )
        found.append(
            FlatPiece(info.module, info.param_name, parameter, tuple(shape), run, offset, handle, replica, replicas)
        )
    yield from found
    by_place = {(id(piece.owner), piece.key): piece for piece in found}
    shared = zip(flat._shared_param_infos, flat._shared_params, strict=True)
    for info, parameter in shared:  # other names of parameters above
        piece = by_place[id(info.prim_module), info.prim_param_name]
        yield FlatPiece(
            info.module, info.param_name, parameter, piece.shape, piece.run, piece.offset, handle, replica, replicas
        )
