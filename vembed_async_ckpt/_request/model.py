"""Models: which files `save_pretrained` would write, under which names, and where each tensor of them lives.

Learned once on the caller's thread, by letting `save_pretrained` run with safetensors' writer replaced by a sink for that thread,
and replayed until structure, identity, dtype or shape changes. What does not resolve to live storage was computed by the save
itself (conversions between formats): such a model is read anew for every save.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode

from .._plan.plan import BytesContent, Content, TensorContent
from .._store import names
from ..errors import PlanError
from .dtypes import spec
from .processor import read_files


@dataclass(frozen=True)
class ModelState:
    """A model as it will stand on disk. `contents` is the same object as long as nothing but values changed.

    `tensors`, `labels`, `owners` run in parallel, in the order of the contents: the tensor to copy, its name in errors, and the
    parameter or buffer it belongs to (None: computed for this save). `volatile`: ids of owners that forward itself changes.
    `names`: what the manifest keeps so that `load` finds the way back.
    """

    contents: tuple[Content, ...]
    tensors: list[torch.Tensor]
    labels: Sequence[str]
    owners: Sequence[torch.Tensor | None]
    volatile: frozenset[int]
    names: Mapping[str, Any]


def unwrap(model: Any) -> torch.nn.Module:
    """The module inside DistributedDataParallel, torch.compile and the like. Raises `PlanError` for what is no module."""
    return _unwrapped(model)[0]


def _unwrapped(model: Any) -> tuple[torch.nn.Module, str]:
    """The module, and what its wrappers put before the names in its state_dict."""
    prefix = ""
    while isinstance(model, torch.nn.Module):
        inner = getattr(model, "_orig_mod", None)
        if inner is not None:
            prefix += "_orig_mod."
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            prefix += "module."
            inner = model.module
        else:
            return model, prefix
        model = inner
    raise PlanError(f"model: a {type(model).__module__}.{type(model).__qualname__} is not a torch.nn.Module")


_Part = tuple[torch.Size, tuple[int, ...], int]


@dataclass(frozen=True)
class _Source:
    """Where a tensor of a file is found again: an entry of a module's dict, or a strided part of it."""

    holder: dict[str, torch.Tensor | None]
    key: str
    shape: torch.Size
    dtype: torch.dtype
    stride: tuple[int, ...]
    part: _Part | None  # size, stride, offset in elements from the owner's first


@dataclass
class _Learned:
    contents: tuple[Content, ...]
    sources: list[_Source]
    labels: list[str]
    names: dict[str, Any]
    volatile: frozenset[int]
    structure: list[tuple[dict[str, Any], str, Any]]
    sizes: list[tuple[Sized, int]]
    ties: list[tuple[torch.Tensor, torch.Tensor]]
    configuration: Any
    lasting: (
        bool  # holds for later saves too; otherwise values of this very call are in `computed` or in the files' bytes
    )
    computed: dict[int, torch.Tensor]  # by place among all tensors; values of this very call
    empty: dict[int, torch.Tensor]


class ModelReader:
    """Reads one model again and again. Holds on to nothing of a model that is gone."""

    def __init__(
        self, prefix: str, max_shard_size: str | int, save_original_format: bool, state_dict_file: str | None = None
    ) -> None:
        """`prefix`: directory of its files inside the checkpoint, "" for the top. `state_dict_file`: not as `save_pretrained`
        would, but the state_dict as it is, wrappers' prefixes included, in this one file."""
        self._prefix = prefix
        self._options = {"max_shard_size": max_shard_size, "save_original_format": save_original_format}
        self._state_dict_file = state_dict_file
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._learned: _Learned | None = None

    def read(self, model: Any) -> ModelState:
        """The model as it is now. Raises `PlanError` naming the tensor that cannot be saved."""
        module, wrappers = _unwrapped(model)
        learned = self._learned
        if learned is None or self._model is None or self._model() is not module or not _still_true(learned, module):
            learned = self._learn(module, wrappers)
        owners: list[Any] = [source.holder[source.key] for source in learned.sources]
        tensors: list[torch.Tensor] = [
            owner if source.part is None else _part(owner, source.part)
            for owner, source in zip(owners, learned.sources, strict=True)
        ]
        for index, tensor in sorted((learned.computed | learned.empty).items()):
            tensors.insert(index, tensor)
            owners.insert(index, None)
        if not learned.lasting:
            self._learned = None
        return ModelState(learned.contents, tensors, learned.labels, owners, learned.volatile, learned.names)

    def _learn(self, module: torch.nn.Module, wrappers: str) -> _Learned:
        if self._state_dict_file is None:
            files, side_files = _files_of(module, self._options)
        else:
            state = {wrappers + name: tensor for name, tensor in _plain_state(module).items()}
            files, side_files = {self._state_dict_file: (state, {"format": "pt"})}, ()
        learned = _learn(module, self._prefix, files, side_files)
        self._learned = learned

        def forget(_: Any) -> None:
            self._learned = None

        self._model = weakref.ref(module, forget)
        return learned


def _part(owner: torch.Tensor, part: _Part) -> torch.Tensor:
    size, stride, offset = part
    return owner.detach().as_strided(size, stride, owner.storage_offset() + offset)


def _still_true(learned: _Learned, module: torch.nn.Module) -> bool:
    for holder, key, value in learned.structure:
        if holder.get(key) is not value:
            return False
    for sized, count in learned.sizes:
        if len(sized) != count:
            return False
    for source in learned.sources:
        tensor = source.holder[source.key]
        assert tensor is not None
        if tensor.shape != source.shape or tensor.dtype is not source.dtype:
            return False
        if source.part is not None and tensor.stride() != source.stride:
            return False
    for one, other in learned.ties:
        if one.data_ptr() != other.data_ptr():
            return False
    return bool(_configuration(module) == learned.configuration)


def _configuration(module: torch.nn.Module) -> Any:
    configs = (getattr(module, "config", None), getattr(module, "generation_config", None))
    return [_settings(config) for config in configs]


def _settings(value: Any) -> Any:
    """A copy of the containers of a config and of the configs in it, for comparing; other objects stand for themselves."""
    if isinstance(value, dict):
        return {key: _settings(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_settings(item) for item in value]
    if callable(getattr(value, "to_dict", None)) and hasattr(value, "__dict__"):
        return _settings(vars(value))
    return value


@dataclass(frozen=True)
class _Live:
    name: str
    holder: dict[str, torch.Tensor | None]
    key: str
    tensor: torch.Tensor


def _learn(module: torch.nn.Module, prefix: str, files: _Files, side_files: tuple[BytesContent, ...]) -> _Learned:
    live = list(_live_tensors(module))
    by_storage: dict[int, list[_Live]] = {}
    for item in live:
        if item.tensor.layout is torch.strided and not item.tensor.is_meta and not _has_no_storage(item.tensor):
            by_storage.setdefault(item.tensor.untyped_storage().data_ptr(), []).append(item)
    where = prefix + "/" if prefix else ""
    contents: list[Content] = []
    sources: list[_Source] = []
    labels: list[str] = []
    computed: dict[int, torch.Tensor] = {}
    empty: dict[int, torch.Tensor] = {}
    renamed: dict[str, Any] = {}
    stored: set[str] = set()
    for file, (tensors, metadata) in files.items():
        specs = tuple(spec(name, tensor, file=where + file) for name, tensor in tensors.items())
        contents.append(TensorContent(where + file, specs, metadata))
        for name, tensor in tensors.items():
            labels.append(f"{where}{file}: {name}")
            if tensor.numel() == 0:
                empty[len(labels) - 1] = torch.empty_like(tensor)
                continue
            found = _resolve(name, tensor, by_storage)
            if found is None:
                computed[len(labels) - 1] = tensor
                continue
            item, part = found
            sources.append(
                _Source(item.holder, item.key, item.tensor.shape, item.tensor.dtype, item.tensor.stride(), part)
            )
            stored.add(item.name)
            if part is not None or item.name != name:
                renamed[name] = [item.name, None if part is None else [list(part[0]), list(part[1]), part[2]]]
    contents += [BytesContent(where + content.name, content.data) for content in side_files]
    aliases, ties = _ties(live, stored)
    return _Learned(
        contents=tuple(contents),
        sources=sources,
        labels=labels,
        names={
            "files": [where + file for file in files],
            "renamed": renamed,
            "ties": aliases,
            "computed": [labels[index] for index in computed],
        },
        volatile=frozenset(id(item.tensor) for item in live if _changed_by_forward(item, module)),
        structure=[(m._modules, key, child) for m in module.modules() for key, child in m._modules.items()]
        + [
            (d, key, tensor) for m in module.modules() for d in (m._parameters, m._buffers) for key, tensor in d.items()
        ],
        sizes=[
            (holder, len(holder))
            for m in module.modules()
            for holder in (m._modules, m._parameters, m._buffers, m._non_persistent_buffers_set)
        ],
        ties=ties,
        configuration=_configuration(module),
        lasting=not computed and not any(_holds_values(content) for content in side_files),
        computed=computed,
        empty=empty,
    )


def _live_tensors(module: torch.nn.Module) -> Iterator[_Live]:
    for path, part in module.named_modules():
        for holder in (part._parameters, part._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    yield _Live(f"{path}.{key}" if path else key, holder, key, tensor)


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


def _changed_by_forward(item: _Live, module: torch.nn.Module) -> bool:
    parent = module.get_submodule(item.name.rpartition(".")[0])
    return getattr(parent, "max_norm", None) is not None  # Embedding(max_norm) renormalizes its weight in forward


_Files = dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]


def _files_of(module: torch.nn.Module, options: Mapping[str, Any]) -> tuple[_Files, tuple[BytesContent, ...]]:
    """The safetensors files of a model as (tensors, metadata), and the other files as bytes.

    A `save_pretrained` that is not transformers' or PEFT's may write what it likes, in its own pickles too: it runs on this
    thread, and all it writes but safetensors is taken as it is.
    """
    save_pretrained = getattr(module, "save_pretrained", None)
    if not callable(save_pretrained):
        return {names.WEIGHTS: (_plain_state(module), {"format": "pt"})}, ()
    accepted = inspect.signature(save_pretrained).parameters
    chosen = {key: value for key, value in options.items() if key in accepted or "kwargs" in accepted}
    if "save_original_format" not in accepted:
        chosen.pop("save_original_format", None)  # only the newer transformers know it
    _SINK.install()
    try:
        try:
            files, side_files = _captured(save_pretrained, chosen, in_place=True)
            compute = _parts_would_be_sharded(files, options["max_shard_size"])
        except RuntimeError:
            compute = True  # a conversion needed the contiguous copy that was withheld
        if compute:  # at the price of doing so for every save
            files, side_files = _captured(save_pretrained, chosen, in_place=False)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"model: {type(module).__qualname__}.save_pretrained failed: {type(error).__name__}: {error}"
        ) from error
    if not files and not any(_holds_values(content) for content in side_files):
        raise PlanError(
            f"model: {type(module).__qualname__}.save_pretrained wrote no weights; "
            "this version of safetensors or transformers is not supported"
        )
    return files, side_files


def _captured(
    save_pretrained: Callable[..., Any], options: Mapping[str, Any], *, in_place: bool
) -> tuple[_Files, tuple[BytesContent, ...]]:
    mode = _ContiguousInPlace() if in_place else contextlib.nullcontext()
    with tempfile.TemporaryDirectory(prefix="vembed-ckpt-") as directory:
        with torch.no_grad(), _SINK.collecting() as files, _quiet_progress_bars(), mode:
            save_pretrained(directory, **options)
        return {os.path.relpath(path, directory): file for path, file in files.items()}, read_files(directory)


def _parts_would_be_sharded(files: _Files, max_shard_size: str | int) -> bool:
    """Whether some of the tensors are parts of one and there are several shards: transformers puts what shares memory into
    one shard, which copies would not have done."""
    from transformers.utils.hub import convert_file_size_to_int

    tensors = [tensor for file, _ in files.values() for tensor in file.values() if tensor.numel()]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    size = sum(tensor.nbytes for tensor in tensors)
    return len(storages) < len(tensors) and size > convert_file_size_to_int(max_shard_size)


def _holds_values(content: BytesContent) -> bool:
    """Whether a file that `save_pretrained` wrote itself holds weights as they were at the call."""
    return content.name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npz", ".npy", ".h5", ".msgpack"))


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


class _ContiguousInPlace(TorchFunctionMode):
    """`contiguous()` gives the tensor itself: whatever its strides are, staging copies it into contiguous memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        return func(*args, **(kwargs or {}))


class _Sink:
    """Stands in safetensors.torch between `save_file` and the disk. Threads that are not collecting pass through."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._installed = False
        self._local = threading.local()

    def install(self) -> None:
        """Put it in place, once per process. Raises `PlanError` if this version of safetensors has no such place."""
        with self._lock:
            if self._installed:
                return
            flatten = getattr(safetensors.torch, "_flatten_as_ptr", None)
            serialize_file = getattr(safetensors.torch, "serialize_file", None)
            if flatten is None or serialize_file is None:
                raise PlanError("this version of safetensors is not supported; install safetensors>=0.8")

            def sink_flatten(tensors: dict[str, torch.Tensor], keep: Any) -> Any:
                if self._files() is None:
                    return flatten(tensors, keep)
                self._local.tensors = dict(tensors)
                return {}

            def sink_serialize(flat: Any, filename: Any, metadata: Any = None) -> None:
                files = self._files()
                if files is None:
                    serialize_file(flat, filename, metadata=metadata)
                    return
                files[os.fspath(filename)] = (self._local.tensors, dict(metadata or {}))

            safetensors.torch._flatten_as_ptr = sink_flatten
            safetensors.torch.serialize_file = sink_serialize
            self._installed = True

    def _files(self) -> _Files | None:
        return getattr(self._local, "files", None)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[_Files]:
        self._local.files = {}
        try:
            yield self._local.files
        finally:
            self._local.files = None
            self._local.tensors = None


_SINK = _Sink()


@contextlib.contextmanager
def _quiet_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
