"""Models: which files `save_pretrained` would write, and where each tensor in them lives in the model.

This is learned once, on the caller's thread. `save_pretrained` runs while the writer of safetensors is replaced for
that thread. The result is reused until structure, identity, dtype or shape changes. A tensor that does not resolve to
live storage was computed by the save itself (a conversion between formats). A model with such tensors is read again for
every save.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from .._format import names
from .._format.plan import BytesContent, Content
from .._tensor_guard import TensorGuard
from ..errors import CheckpointError, PlanError
from .fingerprint import Fingerprint
from .interception import INTERCEPTOR, Captured, Files
from .pickles import Replay
from .processor import read_files
from .scratch import in_scratch
from .sharding import refuse_share
from .tensor_map import (
    ModelTensor,
    Part,
    TensorMap,
    changed_by_forward,
    has_no_storage,
    is_fake,
    live_tensors,
    memory_of,
    ties_of,
    uncovered,
)
from .wrappers import innermost, unwrapped_inside


@dataclass(frozen=True)
class ModelState:
    """A model as it will be on disk.

    `contents`: the files with a known layout. It is the same object as long as only values changed.
    `tensors`: the tensors to copy, in the order of the contents.
    `labels`: the name of each tensor in errors.
    `owners`: the parameter or buffer of each tensor; None if the tensor was computed for this save.
    `volatile`: ids of owners that the forward pass changes.
    `names`: what the manifest records so that `load` finds the place of each tensor. It is the same object as long as
        the structure of the model is the same.
    `looks`: the same object as long as each of the tensors and owners looks the same.
    `files`: (name, bytes) of files that hold values as they are now.
    """

    contents: tuple[Content, ...]
    tensors: list[torch.Tensor]
    labels: Sequence[str]
    owners: Sequence[torch.Tensor | None]
    volatile: frozenset[int]
    names: Mapping[str, Any]
    looks: TensorGuard
    files: Sequence[tuple[str, bytes]] = ()


def unwrap(model: Any) -> torch.nn.Module:
    """Return the module inside DistributedDataParallel, torch.compile and similar wrappers.

    Raises `PlanError` if it is no module.
    """
    if isinstance(model, torch.nn.Module):
        return innermost(model)
    raise PlanError(f"model: a {type(model).__module__}.{type(model).__qualname__} is not a torch.nn.Module")


@dataclass
class Learned:
    """What stays valid for every save as long as the `fingerprint` matches.

    `contents`, `labels`, `names`, `volatile`: as in `ModelState`.
    `owners`: the live tensor, or None, in the order of the contents.
    `tensors`: the tensors to copy, in the same order. Where `parts` says so, a new view replaces the tensor.
    `parts`: (index in `tensors`, index in `divided`, part) of each such tensor.
    `divided`: the live tensors that are stored in parts.
    `fingerprint`: None if the result is valid for this save only. Then `tensors` contains values of this call, or only
        `save_pretrained` can make a file again.
    `files`: (name, bytes) of files that hold values of this call.
    `replays`: make these files again for later saves.
    """

    contents: tuple[Content, ...]
    labels: list[str]
    names: dict[str, Any]
    volatile: frozenset[int]
    owners: list[torch.Tensor | None]
    tensors: list[torch.Tensor]
    parts: list[tuple[int, int, Part]]
    divided: list[torch.Tensor]
    fingerprint: Fingerprint | None
    files: list[tuple[str, bytes]]
    replays: list[tuple[str, Replay]]

    def says_the_same(self, other: Learned) -> bool:
        """Return whether nothing but values differs."""
        return (
            self.contents == other.contents
            and self.names == other.names
            and self.volatile == other.volatile
            and len(self.owners) == len(other.owners)
            and all(map(is_, self.owners, other.owners))
        )


class ModelReader:
    """Reads one model repeatedly. Keeps nothing of a model that has been deleted."""

    def __init__(
        self,
        prefix: str,
        max_shard_size: str | int,
        save_original_format: bool,
        state_dict_file: str | None = None,
        *,
        as_it_is: bool = True,
    ) -> None:
        """`prefix`: directory of the model's files inside the checkpoint, "" for the top.
        `state_dict_file`: if given, save the state_dict to this one file instead of what `save_pretrained` writes.
        `as_it_is`: keep the names that wrappers give in that state_dict.
        """
        self._prefix = prefix
        self._state_dict_file = state_dict_file
        self._as_it_is = as_it_is
        self._options = {"max_shard_size": max_shard_size, "save_original_format": save_original_format}
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._wrapped: weakref.ref[torch.nn.Module] | None = None
        self._learned: Learned | None = None
        self._looks = TensorGuard([])  # of a model that is learned anew for each save

    def read(self, model: Any) -> ModelState:
        """Return the model as it is now. Raises `PlanError` naming the tensor that cannot be saved."""
        module = unwrap(model)
        learned = self._learned if self._model is not None and self._model() is module else None
        if self._state_dict_file is not None and (self._wrapped is None or self._wrapped() is not model):
            learned = None  # its wrappers may give other names
        if learned is not None and learned.fingerprint is not None and learned.fingerprint.matches():
            files = [(name, replay.bytes()) for name, replay in learned.replays]
        else:
            learned = self._learn(module, model, learned)
            files, learned.files = learned.files, []
        tensors = learned.tensors.copy()
        if learned.parts:
            wholes = [(owner.detach(), owner.storage_offset()) for owner in learned.divided]
            for place, index, (size, stride, offset) in learned.parts:
                whole, start = wholes[index]
                tensors[place] = whole.as_strided(size, stride, start + offset)
        if learned.fingerprint is None:
            learned.tensors = []
            looked_at = [*tensors, *(owner for owner in learned.owners if owner is not None)]
            if not self._looks.holds(looked_at):
                self._looks = TensorGuard(looked_at)
        return ModelState(
            contents=learned.contents,
            tensors=tensors,
            labels=learned.labels,
            owners=learned.owners,
            volatile=learned.volatile,
            names=learned.names,
            looks=self._looks if learned.fingerprint is None else learned.fingerprint.looks,
            files=files,
        )

    def _learn(self, module: torch.nn.Module, model: torch.nn.Module, before: Learned | None) -> Learned:
        refuse_share(model)
        files = None
        if self._state_dict_file is not None:
            files = {self._state_dict_file: plain_file(module, model, as_it_is=self._as_it_is)}
        learned = learn(module, self._prefix, self._options, files)
        if before is not None and before.says_the_same(learned):
            learned.contents = before.contents

        def forget(model: Any) -> None:
            if self._model is model:  # the deleted model is the current one, not an earlier one
                self._learned = None

        self._model = weakref.ref(module, forget)
        self._wrapped = weakref.ref(model)
        self._learned = learned
        return learned


def learn(
    module: torch.nn.Module,
    prefix: str,
    options: Mapping[str, Any],
    plain: Files | None = None,
    *,
    stand_ins: bool = False,
) -> Learned:
    """Learn the files of a model.

    `plain`: these files and no others, instead of what `save_pretrained` writes.
    `stand_ins`: its tensors on the meta device stand for tensors that are divided among ranks (see `stand_ins`).
    """
    live = list(live_tensors(module))
    for item in live:
        if is_lazy(item.tensor):
            raise PlanError(f"model: {item.name} is not initialized yet; run a forward pass first")
        if is_fake(item.tensor):
            raise PlanError(
                f"model: {item.name} is a FakeTensor, which has no values; make the model without FakeTensorMode"
            )
    with unwrapped_inside(module):
        captured, side_files = _files_of(module, options) if plain is None else (Captured(plain), ())
    book = TensorMap(live, prefix + "/" if prefix else "", stand_ins=stand_ins)
    for file, (tensors, metadata) in captured.files.items():
        book.add_file(file, tensors, metadata)
    stored_in = list(book.file_names)
    left_out: list[ModelTensor] = []
    saves_itself = plain is None and callable(getattr(module, "save_pretrained", None))
    own = saves_itself and _is_transformers_own(module)
    foreign = saves_itself and not own
    if foreign:
        with unwrapped_inside(module):
            missing, left_out = uncovered(module, live, book.covered, captured.serialized)
        if missing:
            book.add_file(names.UNCOVERED, {item.name: item.tensor for item in missing}, {"format": "pt"})
    fixed: list[BytesContent] = []
    passing: list[BytesContent] = []
    for content in side_files:
        holds_values = _holds_values(content) or content.name in captured.pickles
        (passing if holds_values else fixed).append(BytesContent(book.where + content.name, content.data))
    replays = [(content.name, book.replay(content, captured.pickles)) for content in passing]
    aliases, ties = ties_of(live, book.covered)
    fingerprint = Fingerprint(
        module,
        watched=list({id(owner): owner for owner in book.owners if owner is not None}.values()),
        empty=[item.tensor for item in live if not item.tensor.numel()],
        left_out=[item.tensor for item in left_out if isinstance(item.tensor, torch.nn.Parameter)],
        ties=ties,
    )
    lasting = (
        not book.computed
        and fingerprint.stable
        and all(replay is not None for _, replay in replays)
        and not (foreign and captured.looked)
    )
    return Learned(
        contents=(*book.contents, *fixed),
        labels=book.labels,
        names={
            "files": stored_in,
            "uncovered": book.file_names[len(stored_in) :],
            "renamed": book.renamed,
            "ties": aliases,
            "computed": book.computed,
            "by_name": foreign or not book.computed,
            "from_pretrained": own,
            "left_out": [item.name for item in left_out],
        },
        volatile=frozenset(id(item.tensor) for item in live if changed_by_forward(item)),
        owners=book.owners,
        tensors=book.tensors,
        parts=book.parts,
        divided=book.divided,
        fingerprint=fingerprint if lasting else None,
        files=[(content.name, content.data) for content in passing],
        replays=[(name, replay) for name, replay in replays if replay is not None],
    )


def _is_transformers_own(module: torch.nn.Module) -> bool:
    """Return whether `save_pretrained` is that of transformers and writes the whole model.

    `from_pretrained` can then restore the model.
    """
    transformers = sys.modules.get("transformers.modeling_utils")
    return (
        transformers is not None
        and isinstance(module, transformers.PreTrainedModel)
        and type(module).save_pretrained is transformers.PreTrainedModel.save_pretrained
        and "save_pretrained" not in vars(module)
        and not getattr(module, "_hf_peft_config_loaded", False)
    )


def _files_of(module: torch.nn.Module, options: Mapping[str, Any]) -> tuple[Captured, tuple[BytesContent, ...]]:
    """Return what `save_pretrained` of a model saves, and the files that it wrote itself.

    A `save_pretrained` that is neither transformers' nor PEFT's may write anything, including its own pickles. It runs
    on this thread. Safetensors files are intercepted; every other file is taken as it wrote it.
    """
    save_pretrained = getattr(module, "save_pretrained", None)
    if not callable(save_pretrained):
        return Captured({names.WEIGHTS: (_plain_state(module), {"format": "pt"})}), ()
    accepted = inspect.signature(save_pretrained).parameters
    chosen = {key: value for key, value in options.items() if key in accepted or "kwargs" in accepted}
    if "save_original_format" not in accepted:
        chosen.pop("save_original_format", None)  # older versions of transformers do not have it
    INTERCEPTOR.install()
    try:
        try:
            captured, side_files = _captured(save_pretrained, chosen, in_place=True)
            compute = _parts_would_be_sharded(captured.files, options["max_shard_size"])
        except RuntimeError:
            compute = True  # a conversion needed the contiguous copy, which `in_place` does not make
        if compute:  # this must then be done again for every save
            captured, side_files = _captured(save_pretrained, chosen, in_place=False)
    except CheckpointError:
        raise
    except Exception as error:
        raise PlanError(
            f"model: {type(module).__qualname__}.save_pretrained failed: {type(error).__name__}: {error}"
        ) from error
    if not captured.files and not captured.pickles and not any(_holds_values(content) for content in side_files):
        raise PlanError(
            f"model: {type(module).__qualname__}.save_pretrained wrote no weights; "
            "this version of safetensors or transformers is not supported"
        )
    return captured, side_files


def _captured(
    save_pretrained: Callable[..., Any], options: Mapping[str, Any], *, in_place: bool
) -> tuple[Captured, tuple[BytesContent, ...]]:
    def render(directory: str) -> tuple[Captured, tuple[BytesContent, ...]]:
        with INTERCEPTOR.collecting(in_place=in_place) as captured:
            save_pretrained(directory, **options)
        captured.files = {os.path.relpath(path, directory): file for path, file in captured.files.items()}
        captured.pickles = {os.path.relpath(path, directory): pickle for path, pickle in captured.pickles.items()}
        return captured, read_files(directory)

    return in_scratch(render)


def _parts_would_be_sharded(files: Files, max_shard_size: str | int) -> bool:
    """Return whether several tensors share memory and the files have several shards.

    transformers puts tensors that share memory into one shard. It would not do so with copies of them.
    """
    from transformers.utils.hub import convert_file_size_to_int

    tensors = [tensor for file, _ in files.values() for tensor in file.values() if tensor.numel()]
    storages = set(map(memory_of, tensors))
    size = sum(tensor.nbytes for tensor in tensors)
    return len(storages) < len(tensors) and size > convert_file_size_to_int(max_shard_size)


def _holds_values(content: BytesContent) -> bool:
    """Return whether a file that `save_pretrained` wrote itself contains weights as they were at the call."""
    return content.name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle", ".npz", ".npy", ".h5", ".msgpack"))


def plain_file(
    module: torch.nn.Module, model: torch.nn.Module, *, as_it_is: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the state_dict of `model` as (tensors, metadata). `model` may be `module` inside wrappers."""
    if not as_it_is:
        with unwrapped_inside(module):
            return _plain_state(module), {"format": "pt"}
    where = next(path for path, part in model.named_modules() if part is module)
    prefix = where + "." if where else ""
    return {prefix + name: tensor for name, tensor in _plain_state(module).items()}, {"format": "pt"}


def _plain_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state_dict of a module, with each memory once.

    Of names that share all of it the first is kept, as accelerate does.
    """
    kept: dict[str, torch.Tensor] = {}
    seen: set[Any] = set()
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise PlanError(
                f"model: {name!r} in the state_dict is a {type(tensor).__qualname__}, not a tensor; "
                "safetensors holds tensors only, pass it in extra="
            )
        has_strides = tensor.layout is torch.strided and not tensor.is_nested
        if tensor.numel() and has_strides and not has_no_storage(tensor):
            place = (tensor.device, memory_of(tensor), tensor.storage_offset())
            identity = (*place, tensor.dtype, tensor.shape, tensor.stride())
            if identity in seen:
                continue
            seen.add(identity)
        kept[name] = tensor
    return kept
