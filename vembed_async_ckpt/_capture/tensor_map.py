"""Maps the tensors in the files of a model to the model's tensors, and finds tensors of the model that are in no file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from .._format.plan import BytesContent, Content, TensorContent
from .._format.safetensors import TensorSpec
from .dtypes import spec
from .interception import Pickle
from .pickles import Replay
from .wrappers import has_fsdp1, named_parts

Part = tuple[torch.Size, tuple[int, ...], int]  # size, stride, offset in elements from the owner's first element


@dataclass(frozen=True)
class ModelTensor:
    """A parameter or buffer of a model.

    `name`: its name in the whole module, without what wrappers add.
    `tensor`: the live tensor.
    `owner`: the module to which it belongs directly.
    """

    name: str
    tensor: torch.Tensor
    owner: torch.nn.Module


def live_tensors(module: torch.nn.Module) -> Iterator[ModelTensor]:
    for path, part in named_parts(module):
        for holder in (part._parameters, part._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    yield ModelTensor(f"{path}.{key}" if path else key, tensor, part)


def is_fake(tensor: torch.Tensor) -> bool:
    """Return whether it is a FakeTensor, which has no values."""
    return type(tensor).__name__ == "FakeTensor"


def memory_of(tensor: torch.Tensor) -> int:
    """Return a number that is equal for tensors in the same memory, and 0 if the tensor has none.

    It is the address of the storage. On the meta device a storage has no address, but views share the storage object.
    """
    if is_fake(tensor):
        return 0
    try:
        storage = tensor.untyped_storage()
        return storage._cdata if tensor.is_meta else storage.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def has_no_storage(tensor: torch.Tensor) -> bool:
    return memory_of(tensor) == 0


def by_storage(live: Iterable[ModelTensor]) -> dict[int, list[ModelTensor]]:
    """Return the tensors that have memory, by the address of their storage."""
    found: dict[int, list[ModelTensor]] = {}
    for item in live:
        memory = memory_of(item.tensor) if item.tensor.layout is torch.strided else 0
        if memory:
            found.setdefault(memory, []).append(item)
    return found


def resolve(
    name: str, tensor: torch.Tensor, by_storage: Mapping[int, list[ModelTensor]]
) -> tuple[ModelTensor, Part | None] | None:
    """Find the live tensor with the memory that `tensor` uses.

    Return it with None if `tensor` is all of it, or with the strided part that `tensor` is. Return None if `tensor`
    uses the memory of no live tensor.
    """
    if has_no_storage(tensor) or tensor.is_conj() or tensor.is_neg():
        return None
    candidates = [item for item in by_storage.get(memory_of(tensor), ()) if item.tensor.dtype is tensor.dtype]
    candidates.sort(key=lambda item: item.name != name)  # of tied names, prefer the one in the file
    view = (tensor.shape, tensor.stride(), tensor.storage_offset())
    for item in candidates:
        if (item.tensor.shape, item.tensor.stride(), item.tensor.storage_offset()) == view:
            return item, None
    for item in candidates:
        if not item.tensor.is_contiguous():
            continue  # the place of a part must not depend on strides, which may differ at `load`
        offset = view[2] - item.tensor.storage_offset()
        if offset >= 0 and offset + _extent(view[0], view[1]) <= _extent(item.tensor.shape, item.tensor.stride()):
            return item, (view[0], view[1], int(offset))
    return None


def shown(module: torch.nn.Module) -> dict[str, tuple[str, Part | None]]:
    """Return {name in the module's state_dict: (name of the parameter or buffer, part of it or None for all)}.

    FSDP version 1 would gather the whole model for its state_dict. Then it is what a module without hooks has.
    """
    tensors = list(live_tensors(module))
    if has_fsdp1(module):
        return {item.name: (item.name, None) for item in tensors if not _is_transient(item)}
    known, storages = {item.name for item in tensors}, by_storage(tensors)
    found: dict[str, tuple[str, Part | None]] = {}
    for key, value in module.state_dict().items():
        if key in known:
            found[key] = key, None
        elif isinstance(value, torch.Tensor) and value.numel():
            item = resolve(key, value, storages)
            if item is not None:
                found[key] = item[0].name, item[1]
    return found


def _is_transient(item: ModelTensor) -> bool:
    """Return whether a buffer is not a part of the state_dict."""
    return item.name.rpartition(".")[2] in item.owner._non_persistent_buffers_set


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements from the first to the last one of a strided tensor, both included."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def ties_of(
    live: Sequence[ModelTensor], stored: set[str]
) -> tuple[dict[str, str], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the names that are not stored because they share memory with a stored name, mapped to that name.

    Also returns the pairs of tied tensors, to notice when they no longer share memory.
    """
    owner = {_memory(item): item for item in live if item.name in stored}
    aliases, pairs = {}, []
    for item in live:
        kept = owner.get(_memory(item)) if item.name not in stored else None
        if kept is not None and item.tensor.numel() and not has_no_storage(item.tensor):
            aliases[item.name] = kept.name
            pairs.append((item.tensor, kept.tensor))
    return aliases, pairs


def changed_by_forward(item: ModelTensor) -> bool:
    return getattr(item.owner, "max_norm", None) is not None  # Embedding(max_norm) renormalizes its weight in forward()


class TensorMap:
    """The tensors of all files, in order, and the place of each in the model.

    `computed`: for each file, the names of tensors that use no memory of the model.
    `renamed`: for each file, {name: [name in the model, part or None]} where the two names differ or the tensor is a
        part.
    `covered`: names of the live tensors of which all elements are in the files.
    """

    def __init__(self, live: Sequence[ModelTensor], where: str, *, stand_ins: bool = False) -> None:
        """`stand_ins`: tensors on the meta device are wholes of which this rank holds a share (see `stand_ins`)."""
        self.where = where
        self._stand_ins = stand_ins
        self.contents: list[Content] = []
        self.file_names: list[str] = []
        self.labels: list[str] = []
        self.owners: list[torch.Tensor | None] = []
        self.tensors: list[torch.Tensor] = []
        self.parts: list[tuple[int, int, Part]] = []
        self.divided: list[torch.Tensor] = []
        self.computed: dict[str, list[str]] = {}
        self.renamed: dict[str, dict[str, Any]] = {}
        self.covered: set[str] = set()
        self._numbers: dict[int, int] = {}  # {id of a tensor: its index in `divided`}
        self._by_storage = by_storage(live)
        self._filled: dict[str, dict[Part, int]] = {}  # number of elements in each stored part of a live tensor
        self._empty = {item.name for item in live if not item.tensor.numel()}

    def add_file(self, file: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Add a file with its tensors by name. Raises `PlanError` for a tensor that cannot be saved."""
        file = self.where + file
        self.file_names.append(file)
        self.contents.append(
            TensorContent(file, tuple(self._spec(name, tensor, file) for name, tensor in tensors.items()), metadata)
        )
        for name, tensor in tensors.items():
            self._enter_tensor(file, name, tensor)

    def _spec(self, name: str, tensor: torch.Tensor, file: str) -> TensorSpec:
        return spec(name, tensor, file=file, needs_data=not (self._stand_ins and tensor.is_meta))

    def _enter_tensor(self, file: str, name: str, tensor: torch.Tensor) -> None:
        self.labels.append(f"{file}: {name}")
        if not tensor.numel():
            self.owners.append(None)
            self.tensors.append(torch.empty_like(tensor))
            self.covered |= {name} & self._empty
            return
        found = resolve(name, tensor, self._by_storage)
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
        """Return a `Replay` that makes this file again for every save.

        Returns None unless it is a pickle of live tensors only.
        """
        pickle = pickles.get(content.name.removeprefix(self.where))
        if pickle is None:
            return None

        def find(tensor: torch.Tensor) -> torch.Tensor | None:
            found = resolve("", tensor, self._by_storage)
            return None if found is None or found[1] is not None else found[0].tensor

        try:
            replay = Replay(content.name, pickle, find)
        except ValueError:
            return None
        return replay if replay.bytes() == content.data else None

    def _note_part(self, item: ModelTensor, part: Part) -> None:
        index = self._numbers.setdefault(id(item.tensor), len(self.divided))
        if index == len(self.divided):
            self.divided.append(item.tensor)
        self.parts.append((len(self.tensors) - 1, index, part))
        filled = self._filled.setdefault(item.name, {})
        filled[part] = part[0].numel()
        if sum(filled.values()) >= item.tensor.numel():
            self.covered.add(item.name)


def uncovered(
    module: torch.nn.Module, live: Sequence[ModelTensor], covered: set[str], serialized: set[int]
) -> tuple[list[ModelTensor], list[ModelTensor]]:
    """Find the state of a module that is in none of its safetensors files. Return (missing, left_out).

    `missing`: must be saved in addition, so that `load` can restore the module without unpickling.
    `left_out`: what its `save_pretrained` omits on purpose. These are frozen parameters that are in no other file
        either, and the buffers of a model that PEFT freezes (they may be quantized weights) unless they are running
        statistics.
    """
    everything = type(module).state_dict(module)  # not a replacement on the instance, which may show only a part
    state = {name: value for name, value in everything.items() if isinstance(value, torch.Tensor)}
    storages = {memory_of(value) for value in state.values()} - {0}
    ignored = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
    adapted = [path for path, part in named_parts(module) if getattr(part, "peft_config", None)]
    held = {_memory(item) for item in live if item.name in covered}
    missing: list[ModelTensor] = []
    left_out: list[ModelTensor] = []
    for item in live:
        if item.name in covered or item.name in ignored or (item.tensor.numel() and _memory(item) in held):
            continue
        storage = memory_of(item.tensor)
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


def _memory(item: ModelTensor) -> tuple[int, torch.Size]:
    tensor = item.tensor
    return (0 if has_no_storage(tensor) else memory_of(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape)
