"""Models that are divided among the ranks of a node: which files they become, and what this rank holds of each tensor.

Every rank learns the same files from names and global shapes. It needs no data for that and asks no other rank.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from .._format.plan import Content, TensorContent
from ..errors import PlanError
from .dtypes import check_storage
from .fingerprint import Fingerprint
from .model import Learned, learn, plain_file, unwrap
from .parameters import names_of
from .sharding import KNOWN_SHARES, share_of
from .shares import Addresses, Sharding, Share, dtype_name, reshard
from .stand_ins import FSDP1, standing_in
from .tensor_map import changed_by_forward, is_fake, live_tensors


@dataclass(frozen=True)
class DividedState:
    """A model or an optimizer of which each rank holds a share, as it will be on disk.

    `contents`: the files with its tensors, the same on every rank.
    `shares`: what this rank holds of each tensor, in the order of the contents. It is the same object as long as every
        tensor lies where it did.
    `owners`: the parameter, buffer or optimizer of each; None if the tensor was computed for this save.
    `further`: files without tensors.
    `volatile`, `names`: as in `ModelState`.
    `named`: the name of each parameter of the model, by its id.
    """

    contents: tuple[TensorContent, ...]
    shares: Sequence[Share]
    owners: Sequence[Any]
    further: tuple[Content, ...] = ()
    volatile: frozenset[int] = frozenset()
    names: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[int, str] = field(default_factory=dict)


class DividedModelReader:
    """Reads one divided model repeatedly. Keeps nothing of a model that has been deleted."""

    def __init__(
        self,
        prefix: str,
        max_shard_size: str | int,
        save_original_format: bool,
        state_dict_file: str | None = None,
        *,
        as_it_is: bool = True,
    ) -> None:
        """The arguments are those of `ModelReader`."""
        self._prefix = prefix
        self._state_dict_file = state_dict_file
        self._as_it_is = as_it_is
        self._options = {"max_shard_size": max_shard_size, "save_original_format": save_original_format}
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._learned: _Learned | None = None

    def read(self, model: Any) -> DividedState:
        """Return the model as it is now. Its FSDP2 units show their shares afterwards, on this rank.

        Raises `PlanError` naming the tensor that cannot be saved.
        """
        reshard([model])
        learned = self._learned if self._model is not None and self._model() is model else None
        if learned is None or not learned.is_valid():
            learned = self._learn(model, learned)
        return learned.state

    def _learn(self, model: torch.nn.Module, before: _Learned | None) -> _Learned:
        share = share_of(model, KNOWN_SHARES)
        if share is not None:
            raise PlanError(
                f"model: {share}: this process holds only a share of it, and nothing says which. "
                "Gather the whole model first, or save it with torch.distributed.checkpoint"
            )
        learned = self._read(model, unwrap(model))
        if before is not None and before.state.contents == learned.state.contents:
            contents = before.state.contents  # the same object as long as only values changed
            learned.state = dataclasses.replace(learned.state, contents=contents)

        def forget(model: Any) -> None:
            if self._model is model:  # the deleted model is the current one, not an earlier one
                self._learned = None

        self._model = weakref.ref(model, forget)
        self._learned = learned
        return learned

    def _read(self, model: torch.nn.Module, module: torch.nn.Module) -> _Learned:
        sharding = Sharding(model)
        live = {item.name: item.tensor for item in live_tensors(module)}
        for name, tensor in live.items():
            _check(name, tensor, sharding)
        volatile = frozenset(id(item.tensor) for item in live_tensors(module) if changed_by_forward(item))
        with standing_in(module, sharding) as wholes:
            plain = None
            if self._state_dict_file is not None:
                tensors, metadata = plain_file(module, model, as_it_is=self._as_it_is)
                # FSDP version 1 leaves its own part of a name out of a state_dict, too.
                tensors = {name.replace(f"{FSDP1}.", ""): tensor for name, tensor in tensors.items()}
                plain = {self._state_dict_file: (tensors, metadata)}
            found = learn(module, self._prefix, self._options, plain, stand_ins=True)
            named: dict[int, str] = {}
            for name, shown in names_of([("", module)]).items():
                named.setdefault(id(wholes.get(id(shown), shown)), name)
        if found.files:
            raise PlanError(
                f"model: {type(module).__qualname__}.save_pretrained writes weights to {found.files[0][0]} itself, but the model "
                "is divided among the ranks; gather it first, or save it with torch.distributed.checkpoint"
            )
        sources = _sources(found, wholes)
        owners = [None if owner is None else wholes.get(id(owner), owner) for owner in found.owners]
        shares = [sharding.share(label, source) for label, source in zip(found.labels, sources, strict=True)]
        state = DividedState(
            contents=tuple(content for content in found.contents if isinstance(content, TensorContent)),
            shares=shares,
            owners=owners,
            further=tuple(content for content in found.contents if not isinstance(content, TensorContent)),
            volatile=volatile,
            names=found.names,
            named=named,
        )
        whole = [owner for owner in owners if owner is not None and not sharding.is_divided(owner)]
        fingerprint = Fingerprint(
            module,
            watched=list({id(owner): owner for owner in whole}.values()),
            empty=[tensor for tensor in live.values() if not tensor.numel() and not sharding.is_divided(tensor)],
            left_out=[live[name] for name in found.names["left_out"] if isinstance(live.get(name), torch.nn.Parameter)],
            ties=[
                (live[one], live[other]) for one, other in found.names["ties"].items() if one in live and other in live
            ],
        )
        lasting = found.fingerprint is not None and fingerprint.stable
        return _Learned(
            state,
            fingerprint if lasting else None,
            Addresses(sharding, [owner for owner in owners if owner is not None]),
        )


@dataclass
class _Learned:
    """What stays valid for every save as long as the `fingerprint` matches and no tensor lies elsewhere.

    `fingerprint`: None if it is valid for this save only.
    """

    state: DividedState
    fingerprint: Fingerprint | None
    addresses: Addresses

    def is_valid(self) -> bool:
        return self.fingerprint is not None and self.fingerprint.matches() and self.addresses.are_same()


def _check(name: str, tensor: torch.Tensor, sharding: Sharding) -> None:
    """Raise `PlanError` for a tensor that has no data."""
    if is_lazy(tensor):
        raise PlanError(f"model: {name} is not initialized yet; run a forward pass first")
    if is_fake(tensor):
        raise PlanError(f"model: {name} is a FakeTensor, which has no values; make the model without FakeTensorMode")
    if not sharding.is_divided(tensor):
        return
    share = sharding.share(name, tensor)
    dtype_name(share)
    if share.local.numel():
        check_storage(name, share.local, file="model")


def _sources(found: Learned, wholes: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
    """Return the live tensor, or the part of it, of which each tensor in the files has the values.

    Raises `PlanError` if a tensor is computed from divided ones, or is only a part of one.
    """
    parts = {place: part for place, _, part in found.parts}
    sources = []
    for place, (label, owner) in enumerate(zip(found.labels, found.owners, strict=True)):
        tensor, part = found.tensors[place], parts.get(place)
        divided = id(owner) in wholes if owner is not None else tensor.is_meta and tensor.numel()
        if divided and (owner is None or part is not None):
            raise PlanError(
                f"{label}: save_pretrained computes it from weights that are divided among the ranks; "
                "pass save_original_format=False, which saves them as the model holds them"
            )
        if owner is not None:
            tensor = wholes.get(id(owner), owner)
        elif tensor.is_meta:
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype)  # it has no elements
        if part is not None:
            size, stride, offset = part
            tensor = tensor.detach().as_strided(size, stride, tensor.storage_offset() + offset)
        sources.append(tensor)
    return sources
