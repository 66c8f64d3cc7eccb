"""Models: which files `save_pretrained` would write, under which names, and where each tensor of them lives.

Learned once on the caller's thread, by letting `save_pretrained` run with safetensors' writer replaced by a sink for that thread,
and replayed until structure, identity, dtype or shape changes. What does not resolve to live storage was computed by the save
itself (conversions between formats): such a model is read anew for every save.
"""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from .._plan.plan import BytesContent, Content, TensorContent
from .._store import names
from ..errors import PlanError
from .capture import SINK, Captured, Files, Pickle
from .dtypes import spec
from .pickles import Replay
from .processor import read_files


@dataclass(frozen=True)
class ModelState:
    """A model as it will stand on disk. `contents` is the same object as long as nothing but values changed.

    `tensors`, `labels`, `owners` run in parallel, in the order of the contents: the tensor to copy, its name in errors, and the
    parameter or buffer it belongs to (None: computed for this save). `volatile`: ids of owners that forward itself changes.
    `names`: what the manifest keeps so that `load` finds the way back. `files`: (name, bytes) of files that hold values of this
    moment.
    """

    contents: tuple[Content, ...]
    tensors: list[torch.Tensor]
    labels: Sequence[str]
    owners: Sequence[torch.Tensor | None]
    volatile: frozenset[int]
    names: Mapping[str, Any]
    files: Sequence[tuple[str, bytes]] = ()


def unwrap(model: Any) -> torch.nn.Module:
    """The module inside DistributedDataParallel, torch.compile and the like. Raises `PlanError` for what is no module."""
    while isinstance(model, torch.nn.Module):
        inner = model._modules.get("_orig_mod")  # not getattr: PEFT's models answer for their base
        if inner is None and isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner
    raise PlanError(f"model: a {type(model).__module__}.{type(model).__qualname__} is not a torch.nn.Module")


def sharded(module: torch.nn.Module) -> str | None:
    """What of a module this process holds only a share of, and why; None if it holds the whole."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for path, part in module.named_modules():
        if fsdp is not None and isinstance(part, fsdp.FullyShardedDataParallel):
            return f"{path or type(part.module).__qualname__} is wrapped by FullyShardedDataParallel"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if hasattr(tensor, "full_tensor"):
            return f"{name} is a DTensor"
        if hasattr(tensor, "ds_tensor"):
            return f"{name} is partitioned by DeepSpeed ZeRO-3"
    return None


_Part = tuple[torch.Size, tuple[int, ...], int]  # size, stride, offset in elements from the owner's first


@dataclass
class _Learned:
    """What holds for every save until `still_true` says otherwise.

    `owners` and `tensors` run in the order of the contents: the live tensor or None, and what is to be copied, to be replaced by
    a fresh view where `parts` says so: (place among the tensors, place among `divided`, part). `files` hold values of this very
    call; `replays` make them anew. `lasting`: holds for later saves too; otherwise values of this call are in `tensors` or in
    files that only `save_pretrained` can make.
    """

    contents: tuple[Content, ...]
    labels: list[str]
    names: dict[str, Any]
    volatile: frozenset[int]
    owners: list[torch.Tensor | None]
    tensors: list[torch.Tensor]
    parts: list[tuple[int, int, _Part]]
    divided: list[torch.Tensor]
    truth: _Truth
    files: list[tuple[str, bytes]]
    replays: list[tuple[str, Replay]]
    lasting: bool

    def says_the_same(self, other: _Learned) -> bool:
        """Whether nothing but values is different."""
        return (
            self.contents == other.contents
            and self.names == other.names
            and self.volatile == other.volatile
            and len(self.owners) == len(other.owners)
            and all(map(is_, self.owners, other.owners))
        )


class ModelReader:
    """Reads one model again and again. Holds on to nothing of a model that is gone."""

    def __init__(
        self, prefix: str, max_shard_size: str | int, save_original_format: bool, state_dict_file: str | None = None
    ) -> None:
        """`prefix`: directory of its files inside the checkpoint, "" for the top. `state_dict_file`: not as `save_pretrained`
        would, but the state_dict as it is, wrappers' prefixes included, in this one file."""
        self._prefix = prefix
        self._state_dict_file = state_dict_file
        self._options = {"max_shard_size": max_shard_size, "save_original_format": save_original_format}
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._learned: _Learned | None = None

    def read(self, model: Any) -> ModelState:
        """The model as it is now. Raises `PlanError` naming the tensor that cannot be saved."""
        module = unwrap(model)
        learned = self._learned if self._model is not None and self._model() is module else None
        if learned is not None and learned.lasting and learned.truth.holds():
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
        if not learned.lasting:
            learned.tensors = []
        return ModelState(
            learned.contents, tensors, learned.labels, learned.owners, learned.volatile, learned.names, files
        )

    def _learn(self, module: torch.nn.Module, model: torch.nn.Module, before: _Learned | None) -> _Learned:
        files = None if self._state_dict_file is None else {self._state_dict_file: _plain_file(module, model)}
        learned = _learn(module, self._prefix, self._options, files)
        if before is not None and before.says_the_same(learned):
            learned.contents = before.contents

        def forget(model: Any) -> None:
            if self._model is model:  # and not one that was read before it
                self._learned = None

        self._model = weakref.ref(module, forget)
        self._learned = learned
        return learned


class _Truth:
    """What was true of a module when it was learned. Looked at before every save, so all of it in loops that run in C."""

    def __init__(
        self,
        module: torch.nn.Module,
        watched: Sequence[torch.Tensor],
        divided: Sequence[torch.Tensor],
        empty: Sequence[torch.Tensor],
        left_out: Sequence[torch.Tensor],
        ties: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """`watched` are stored, `divided` are those of them that are stored in parts, `left_out` are frozen and not stored."""
        holders: list[dict[str, Any]] = [h for m in module.modules() for h in (m._modules, m._parameters, m._buffers)]
        entries = [(holder, key, value) for holder in holders for key, value in holder.items()]
        self._holders = [holder for holder, _, _ in entries]
        self._keys = [key for _, key, _ in entries]
        self._values = [value for _, _, value in entries]
        sets = [m._non_persistent_buffers_set for m in module.modules()]
        self._vacant = [holder for holder in (*holders, *sets) if not holder]
        self._filled = [holder for holder in holders if holder]
        self._counts = [len(holder) for holder in self._filled]
        self._sets = [names for names in sets if names]
        self._copies = [set(names) for names in self._sets]
        self._watched = list(watched)
        self._shapes = [tensor.shape for tensor in watched]
        self._dtypes = [tensor.dtype for tensor in watched]
        self._divided = list(divided)
        self._strides = [tensor.stride() for tensor in divided]
        self._empty = list(empty)
        self._left_out = list(left_out)
        self._one = [one for one, _ in ties]
        self._other = [other for _, other in ties]
        self._settings = _Settings(module)

    @property
    def stable(self) -> bool:
        return self._settings.stable

    def holds(self) -> bool:
        """Whether structure, identity, shape, dtype, ties and configuration are still those that were learned."""
        return (
            all(map(is_, map(dict.get, self._holders, self._keys), self._values))
            and not any(self._vacant)
            and list(map(len, self._filled)) == self._counts
            and self._sets == self._copies
            and list(map(torch.Tensor.size, self._watched)) == self._shapes
            and list(map(_DTYPE, self._watched)) == self._dtypes
            and list(map(torch.Tensor.stride, self._divided)) == self._strides
            and not any(map(torch.Tensor.numel, self._empty))
            and not any(map(_REQUIRES_GRAD, self._left_out))
            and list(map(torch.Tensor.data_ptr, self._one)) == list(map(torch.Tensor.data_ptr, self._other))
            and self._settings.unchanged()
        )


_DTYPE = attrgetter("dtype")
_REQUIRES_GRAD = attrgetter("requires_grad")


class _Settings:
    """The configs that a `save_pretrained` in the module writes, the containers in them, and plain attributes of parts that have
    a `save_pretrained` of their own, as they were."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._attributes: list[tuple[Any, str, Any]] = []
        self._plain: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        self._containers: dict[int, tuple[Any, Any, list[type]]] = {}
        for part in module.modules():
            save_pretrained = getattr(type(part), "save_pretrained", None)
            if part is module or callable(save_pretrained):
                for name in ("config", "generation_config", "peft_config"):
                    value = getattr(part, name, None)
                    self._attributes.append((part, name, value))
                    self._keep(value)
            if callable(save_pretrained) and save_pretrained.__module__.partition(".")[0] not in (
                "transformers",
                "peft",
            ):
                plain = _plain_attributes(part)
                self._plain.append((part, plain))
                self._keep(tuple(plain.values()))
        self.stable = self.unchanged()  # a config that is made anew at every look is not

    def _keep(self, value: Any) -> None:
        if isinstance(value, tuple):
            inner: Any = value
        elif isinstance(value, dict | list | set):
            if id(value) in self._containers:
                return
            inner = value.values() if isinstance(value, dict) else value
            self._containers[id(value)] = (value, value.copy(), list(map(type, inner)))
        elif callable(getattr(value, "to_dict", None)) and hasattr(value, "__dict__"):
            inner = (vars(value),)
        else:
            return
        for item in inner:
            self._keep(item)

    def unchanged(self) -> bool:
        try:
            return (
                all(getattr(part, name, None) is value for part, name, value in self._attributes)
                and all(_plain_attributes(part) == plain for part, plain in self._plain)
                and all(
                    live == copy and list(map(type, live.values() if isinstance(live, dict) else live)) == types
                    for live, copy, types in self._containers.values()
                )
            )
        except (ValueError, RuntimeError):  # what has no plain truth value was replaced
            return False


def _plain_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """What else a `save_pretrained` may write: the module's attributes that are data."""
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and isinstance(value, _DATA)
    }


_DATA = (int, float, str, bytes, dict, list, tuple, set, type(None))


@dataclass(frozen=True)
class _Live:
    """A parameter or buffer, its name in the whole module, and the module that it belongs to directly."""

    name: str
    tensor: torch.Tensor
    owner: torch.nn.Module


def _learn(module: torch.nn.Module, prefix: str, options: Mapping[str, Any], plain: Files | None = None) -> _Learned:
    """`plain`: these files and no others, instead of what `save_pretrained` writes."""
    share = sharded(module)
    if share is not None:
        raise PlanError(
            f"model: {share}: this process holds only a share of it. Gather the whole model first, "
            "or save it with accelerator.save_state or torch.distributed.checkpoint"
        )
    live = list(_live_tensors(module))
    for item in live:
        if is_lazy(item.tensor):
            raise PlanError(f"model: {item.name} is not initialized yet; run a forward pass first")
    captured, side_files = _files_of(module, options) if plain is None else (Captured(plain), ())
    book = _Book(live, prefix + "/" if prefix else "")
    for file, (tensors, metadata) in captured.files.items():
        book.enter(file, tensors, metadata)
    stored_in = list(book.file_names)
    left_out: list[_Live] = []
    saves_itself = plain is None and callable(getattr(module, "save_pretrained", None))
    own = saves_itself and _is_transformers_own(module)
    foreign = saves_itself and not own
    if foreign:
        missing, left_out = _uncovered(module, live, book.covered, captured.serialized)
        if missing:
            book.enter(names.UNCOVERED, {item.name: item.tensor for item in missing}, {"format": "pt"})
    passing = [content for content in side_files if _holds_values(content) or content.name in captured.pickles]
    fixed = [content for content in side_files if content not in passing]
    replays = [(book.where + content.name, book.replay(content, captured.pickles)) for content in passing]
    aliases, ties = _ties(live, book.covered)
    truth = _Truth(
        module,
        watched=list({id(owner): owner for owner in book.owners if owner is not None}.values()),
        divided=book.divided,
        empty=[item.tensor for item in live if not item.tensor.numel()],
        left_out=[item.tensor for item in left_out if isinstance(item.tensor, torch.nn.Parameter)],
        ties=ties,
    )
    return _Learned(
        contents=(*book.contents, *(BytesContent(book.where + content.name, content.data) for content in fixed)),
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
        volatile=frozenset(id(item.tensor) for item in live if _changed_by_forward(item)),
        owners=book.owners,
        tensors=book.tensors,
        parts=book.parts,
        divided=book.divided,
        truth=truth,
        files=[(book.where + content.name, content.data) for content in passing],
        replays=[(name, replay) for name, replay in replays if replay is not None],
        lasting=not book.computed
        and truth.stable
        and all(replay is not None for _, replay in replays)
        and not (foreign and captured.looked),
    )


class _Book:
    """The tensors of the files, one after the other, and where in the model each of them lives.

    `computed`: for each file the names that live nowhere. `renamed`: for each file {name: [its name in the model, part or None]}
    where it is not that name. `covered`: names of the live tensors that are in the files as a whole.
    """

    def __init__(self, live: Sequence[_Live], where: str) -> None:
        self.where = where
        self.contents: list[Content] = []
        self.file_names: list[str] = []
        self.labels: list[str] = []
        self.owners: list[torch.Tensor | None] = []
        self.tensors: list[torch.Tensor] = []
        self.parts: list[tuple[int, int, _Part]] = []
        self.divided: list[torch.Tensor] = []
        self.computed: dict[str, list[str]] = {}
        self.renamed: dict[str, dict[str, Any]] = {}
        self.covered: set[str] = set()
        self._numbers: dict[int, int] = {}  # id of a tensor: its place in `divided`
        self._by_storage: dict[int, list[_Live]] = {}
        self._filled: dict[str, dict[_Part, int]] = {}  # elements of a live tensor that its parts in the files cover
        self._empty = {item.name for item in live if not item.tensor.numel()}
        for item in live:
            if item.tensor.layout is torch.strided and not item.tensor.is_meta and not _has_no_storage(item.tensor):
                self._by_storage.setdefault(item.tensor.untyped_storage().data_ptr(), []).append(item)

    def enter(self, file: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Enter a file with its tensors by name. Raises `PlanError` for a tensor that cannot be saved."""
        file = self.where + file
        self.file_names.append(file)
        self.contents.append(
            TensorContent(file, tuple(spec(name, tensor, file=file) for name, tensor in tensors.items()), metadata)
        )
        for name, tensor in tensors.items():
            self._enter_tensor(file, name, tensor)

    def _enter_tensor(self, file: str, name: str, tensor: torch.Tensor) -> None:
        self.labels.append(f"{file}: {name}")
        if not tensor.numel():
            self.owners.append(None)
            self.tensors.append(torch.empty_like(tensor))
            self.covered |= {name} & self._empty
            return
        found = _resolve(name, tensor, self._by_storage)
        if found is None:
            self.owners.append(None)
            self.tensors.append(tensor)
            self.computed.setdefault(file, []).append(name)
            return
        item, part = found
        self.owners.append(item.tensor)
        self.tensors.append(item.tensor)
        if part is not None:
            self._note_part(item, part)
        else:
            self.covered.add(item.name)
        if part is not None or item.name != name:
            described = None if part is None else [list(part[0]), list(part[1]), part[2]]
            self.renamed.setdefault(file, {})[name] = [item.name, described]

    def replay(self, content: BytesContent, pickles: Mapping[str, Pickle]) -> Replay | None:
        """What makes this file again for every save, if it is a pickle of live tensors and nothing else."""
        if content.name not in pickles:
            return None

        def find(tensor: torch.Tensor) -> torch.Tensor | None:
            found = _resolve("", tensor, self._by_storage)
            return None if found is None or found[1] is not None else found[0].tensor

        try:
            replay = Replay(content.name, pickles[content.name], find)
        except ValueError:
            return None
        return replay if replay.bytes() == content.data else None

    def _note_part(self, item: _Live, part: _Part) -> None:
        index = self._numbers.setdefault(id(item.tensor), len(self.divided))
        if index == len(self.divided):
            self.divided.append(item.tensor)
        self.parts.append((len(self.tensors) - 1, index, part))
        filled = self._filled.setdefault(item.name, {})
        filled[part] = part[0].numel()
        if sum(filled.values()) >= item.tensor.numel():
            self.covered.add(item.name)


def _uncovered(
    module: torch.nn.Module, live: Sequence[_Live], covered: set[str], serialized: set[int]
) -> tuple[list[_Live], list[_Live]]:
    """Of what belongs to a module's state and is in none of its safetensors files: what must be saved besides them so that
    `load` can bring the module back without unpickling, and what its `save_pretrained` leaves out on purpose.

    Left out on purpose is what is frozen and appears in no other file either, and the buffers of a model that PEFT freezes
    (they may be quantized weights) unless they are running statistics.
    """
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    storages = {value.untyped_storage().data_ptr() for value in state.values() if not _has_no_storage(value)}
    ignored = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
    adapted = [path for path, part in module.named_modules() if getattr(part, "peft_config", None)]
    held = {_memory(item) for item in live if item.name in covered}
    missing: list[_Live] = []
    left_out: list[_Live] = []
    for item in live:
        if item.name in covered or item.name in ignored or (item.tensor.numel() and _memory(item) in held):
            continue
        storage = 0 if _has_no_storage(item.tensor) else item.tensor.untyped_storage().data_ptr()
        if item.name not in state and storage not in storages:
            continue
        if storage in serialized:
            needed = True
        elif isinstance(item.tensor, torch.nn.Parameter):
            needed = item.tensor.requires_grad
        else:
            needed = isinstance(item.owner, _NormBase) or not any(_is_below(item.name, path) for path in adapted)
        if needed:
            missing.append(item)
            held.add(_memory(item))
        else:
            left_out.append(item)
    return missing, left_out


def _is_below(name: str, path: str) -> bool:
    return not path or name.startswith(path + ".")


def _memory(item: _Live) -> tuple[int, torch.Size]:
    return (0 if _has_no_storage(item.tensor) else item.tensor.data_ptr(), item.tensor.shape)


def _is_transformers_own(module: torch.nn.Module) -> bool:
    """Whether `save_pretrained` is transformers' and writes the whole model, so that `from_pretrained` brings it back."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return (
        transformers is not None
        and isinstance(module, transformers.PreTrainedModel)
        and type(module).save_pretrained is transformers.PreTrainedModel.save_pretrained
        and not getattr(module, "_hf_peft_config_loaded", False)
    )


def _live_tensors(module: torch.nn.Module) -> Iterator[_Live]:
    for path, part in module.named_modules(remove_duplicate=False):
        for holder in (part._parameters, part._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    yield _Live(f"{path}.{key}" if path else key, tensor, part)


def _has_no_storage(tensor: torch.Tensor) -> bool:
    try:
        return tensor.untyped_storage().data_ptr() == 0
    except (RuntimeError, NotImplementedError):
        return True


def _resolve(
    name: str, tensor: torch.Tensor, by_storage: Mapping[int, list[_Live]]
) -> tuple[_Live, _Part | None] | None:
    """The live tensor that `tensor` is all of (None) or a strided part of; None if it lives in none of them."""
    if _has_no_storage(tensor) or tensor.is_conj() or tensor.is_neg():
        return None
    candidates = [
        item for item in by_storage.get(tensor.untyped_storage().data_ptr(), ()) if item.tensor.dtype is tensor.dtype
    ]
    candidates.sort(key=lambda item: item.name != name)  # of tied names, the one that the file has
    view = (tensor.shape, tensor.stride(), tensor.storage_offset())
    for item in candidates:
        if (item.tensor.shape, item.tensor.stride(), item.tensor.storage_offset()) == view:
            return item, None
    for item in candidates:
        if not item.tensor.is_contiguous():
            continue  # where a part lies must not depend on the strides of this moment: `load` may meet others
        offset = view[2] - item.tensor.storage_offset()
        if offset >= 0 and offset + _extent(view[0], view[1]) <= _extent(item.tensor.shape, item.tensor.stride()):
            return item, (view[0], view[1], int(offset))
    return None


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last one of a strided tensor, both included."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _ties(live: Sequence[_Live], stored: set[str]) -> tuple[dict[str, str], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Names that are not stored because they share memory with one that is; and the pairs, to notice when they part."""
    owner: dict[tuple[int, torch.Size], _Live] = {}
    for item in live:
        if item.name in stored:
            owner[item.tensor.data_ptr(), item.tensor.shape] = item
    aliases, pairs = {}, []
    for item in live:
        kept = owner.get((item.tensor.data_ptr(), item.tensor.shape)) if item.name not in stored else None
        if kept is not None and item.tensor.numel():
            aliases[item.name] = kept.name
            pairs.append((item.tensor, kept.tensor))
    return aliases, pairs


def _changed_by_forward(item: _Live) -> bool:
    return getattr(item.owner, "max_norm", None) is not None  # Embedding(max_norm) renormalizes its weight in forward


def _files_of(module: torch.nn.Module, options: Mapping[str, Any]) -> tuple[Captured, tuple[BytesContent, ...]]:
    """What `save_pretrained` of a model saves, by the names of its files, and the files that it wrote itself.

    A `save_pretrained` that is not transformers' or PEFT's may write what it likes, in its own pickles too: it runs on this
    thread, and all it writes but safetensors is taken as it is.
    """
    save_pretrained = getattr(module, "save_pretrained", None)
    if not callable(save_pretrained):
        return Captured({names.WEIGHTS: (_plain_state(module), {"format": "pt"})}), ()
    accepted = inspect.signature(save_pretrained).parameters
    chosen = {key: value for key, value in options.items() if key in accepted or "kwargs" in accepted}
    if "save_original_format" not in accepted:
        chosen.pop("save_original_format", None)  # only the newer transformers know it
    SINK.install()
    try:
        try:
            captured, side_files = _captured(save_pretrained, chosen, in_place=True)
            compute = _parts_would_be_sharded(captured.files, options["max_shard_size"])
        except RuntimeError:
            compute = True  # a conversion needed the contiguous copy that was withheld
        if compute:  # at the price of doing so for every save
            captured, side_files = _captured(save_pretrained, chosen, in_place=False)
    except PlanError:
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
    with tempfile.TemporaryDirectory(prefix="vembed-ckpt-") as directory:
        with SINK.collecting(in_place=in_place) as captured:
            save_pretrained(directory, **options)
        captured.files = {os.path.relpath(path, directory): file for path, file in captured.files.items()}
        captured.pickles = {os.path.relpath(path, directory): pickle for path, pickle in captured.pickles.items()}
        return captured, read_files(directory)


def _parts_would_be_sharded(files: Files, max_shard_size: str | int) -> bool:
    """Whether some of the tensors are parts of one and there are several shards: transformers puts what shares memory into
    one shard, which copies would not have done."""
    from transformers.utils.hub import convert_file_size_to_int

    tensors = [tensor for file, _ in files.values() for tensor in file.values() if tensor.numel()]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    size = sum(tensor.nbytes for tensor in tensors)
    return len(storages) < len(tensors) and size > convert_file_size_to_int(max_shard_size)


def _holds_values(content: BytesContent) -> bool:
    """Whether a file that `save_pretrained` wrote itself holds weights as they were at the call."""
    return content.name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle", ".npz", ".npy", ".h5", ".msgpack"))


def _plain_file(module: torch.nn.Module, model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state_dict of `model`, whose wrappers (if any) are around `module`, as (tensors, metadata)."""
    where = next(path for path, part in model.named_modules() if part is module)
    prefix = where + "." if where else ""
    return {prefix + name: tensor for name, tensor in _plain_state(module).items()}, {"format": "pt"}


def _plain_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict of a module, each memory once: of names that share all of it the first is kept, as accelerate does."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[Any] = set()
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise PlanError(
                f"model: {name!r} in the state_dict is a {type(tensor).__qualname__}, not a tensor; "
                "safetensors holds tensors only, pass it in extra="
            )
        if tensor.numel() and tensor.layout is torch.strided and not tensor.is_meta and not _has_no_storage(tensor):
            identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if identity in seen:
                continue
            seen.add(identity)
        kept[name] = tensor
    return kept
