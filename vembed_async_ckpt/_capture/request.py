"""Builds the request: everything that a save will put on disk, as it was at the call."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch

from .._format import names
from .._format.plan import Content
from .._format.ranges import Region
from ..errors import PlanError, warn
from . import accelerator as accelerators
from . import config as configs
from . import mistakes, training_state
from .dialect import Accelerate, Dialect
from .model import ModelReader, ModelState
from .model import unwrap as unwrap_model
from .optimizer import OptimizerReader, OptimizerState, RegisteredReader
from .parameters import Names
from .processor import ProcessorFiles
from .scratch import Scratch
from .sharding import refuse_shares
from .state_dict import MappingReader, StateDict
from .training_state import TrainingState, torch_save


@dataclass(frozen=True)
class Request:
    """Everything that one save will put on disk.

    `directory`: name of the checkpoint under the root.
    `contents`: the files with a layout that is known before their values.
    `parts`, `tensors`: the models and optimizers, and their tensors, in the order of the contents.
    `volatile`: ids of owners that change without an optimizer step.
    `state`: the small values.
    `files`: (name, bytes) of further files.
    `links`: [file, second name of it].
    `manifest`: values for the manifest.
    """

    directory: str
    step: int | None
    save_id: str
    contents: tuple[Content, ...]
    parts: list[ModelState | OptimizerState]
    tensors: list[torch.Tensor]
    volatile: frozenset[int]
    optimizers: tuple[OptimizerState, ...]
    state: TrainingState
    files: list[tuple[str, bytes]]
    links: list[list[str]]
    manifest: dict[str, Any]
    regions: list[tuple[int, Region]] | None = None
    wrappers: list[torch.Tensor | None] | None = None
    digest: bytes = b""

    def outline(self) -> list[str]:
        return []

    def claims(self) -> bytes:
        return b""

    def check_claims(self, claims: list[bytes]) -> str | None:
        return None

    def labels(self) -> list[str]:
        """Return the name of each tensor in errors."""
        return list(chain.from_iterable(part.labels for part in self.parts))

    def owners(self) -> list[Any]:
        """Return the parameter, buffer or optimizer of each tensor; None if the tensor was computed for this save."""
        return list(chain.from_iterable(part.owners for part in self.parts))

    def release_tensors(self) -> None:
        """Release all live tensors."""
        for part in self.parts:
            part.tensors.clear()
        self.parts.clear()
        self.tensors.clear()
        self.state.tensors.clear()


@dataclass(frozen=True)
class Objects:
    """The objects that a caller passes to be saved, as in `AsyncCheckpointer.save`.

    `files`: further files as bytes by name, or a function that returns them.
    `weights_name`: a second name for the weights file, used if there is exactly one.
    `older_readers`: also write the processor files that transformers 4 wrote and that older readers open.
    `state_dicts`: models (one, or a mapping) whose whole state_dict is saved at the top, under its own names, as
        `accelerator.save_state` does. A `StateDict` may take the place of a model. A function that returns all this is
        called after `files`.
    `clean_names`: leave out what wrappers add to the names in `state_dicts`.
    `tensors`: a state_dict without its module, saved under its names as the weights file at the top. All of it is
        copied before the call returns.
    `accelerator`: save its registered objects, dataloader positions and micro-batch counter too.
    `dialect`: the program, beside our `load`, for which the training state is written.
    `of_every_rank`: whether the state of every rank of a distributed training is saved, or only that of the first.
    """

    model: Any = None
    optimizer: Any = None
    scheduler: Any = None
    dataloader: Any = None
    scaler: Any = None
    processor: Any = None
    config: Any = None
    extra: Any = None
    metrics: Any = None
    files: Mapping[str, bytes] | Callable[[], Mapping[str, bytes]] = field(default_factory=dict)
    weights_name: str | None = None
    older_readers: bool = False
    state_dicts: Any = None
    clean_names: bool = False
    tensors: Mapping[str, torch.Tensor] | None = None
    accelerator: Any = None
    dialect: Dialect = field(default_factory=Accelerate)
    of_every_rank: bool = True

    def is_sharded(self) -> bool:
        return False

    def further_files(self) -> list[tuple[str, bytes]]:
        return list((self.files() if callable(self.files) else self.files).items())

    def refuse_shares(self) -> None:
        """Raise `PlanError` if this process holds only a share of a model. Calls no method of the models."""
        models = [] if callable(self.state_dicts) else named("model", self.state_dicts).values()
        refuse_shares([*named("model", self.model).values(), *models, *getattr(self.accelerator, "_models", ())])

    def whole_models(self) -> Any:
        models = self.state_dicts
        return models() if callable(models) and not isinstance(models, torch.nn.Module) else models


class RequestReader:
    """Turns the arguments of `save()` into a request. Keeps what it learned about each model and optimizer, by name."""

    def __init__(
        self,
        max_shard_size: str | int,
        save_original_format: bool,
        world_size: int = 1,
        scratch: Scratch | None = None,
        rank: int = 0,
        gather: Any = None,
    ) -> None:
        self._max_shard_size = max_shard_size
        self._save_original_format = save_original_format
        self._world_size = world_size
        self._scratch = scratch or Scratch()
        self._models: dict[str, ModelReader] = {}
        self._state_dicts: dict[tuple[int, bool], ModelReader] = {}
        self._mappings: dict[int, MappingReader] = {}
        self._optimizers: dict[tuple[str, str], OptimizerReader] = {}
        self._registered: dict[str, RegisteredReader] = {}
        self._names = Names()
        self._strange = mistakes.StrangeOptimizers()
        self._processor = ProcessorFiles()

    def read(self, directory: str, step: int | None, objects: Objects) -> Request:
        """Return the request as of now, to be published as `directory`. Touches no checkpoint.

        Raises `PlanError` in the caller's stack for what cannot be saved, and `WriteError` if no disk has room to
        render files.
        """
        with self._scratch.in_use():
            return self._read(directory, step, objects)

    def _read(self, directory: str, step: int | None, objects: Objects) -> Request:
        if step is not None and (type(step) is not int or step < 0):
            raise PlanError(f"step is {step!r}; use a whole number of at least 0")
        given = {key: getattr(objects, key) for key in ("model", "optimizer", "scheduler", "scaler", "dataloader")}
        mistakes.refuse_wrong_kinds(given)
        files = objects.further_files()
        models = {name: self._read_model(name, value) for name, value in named("model", objects.model).items()}
        whole = named("model", objects.whole_models())
        plain = {
            name: self._read_state_dict(index, value, as_it_is=not objects.clean_names)
            for index, (name, value) in enumerate(whole.items())
        }
        if objects.tensors is not None:
            plain[""] = self._read_state_dict(0, StateDict(objects.tensors))
        of_optimizers = named("model", objects.model) or whole
        modules = [
            (name, unwrap_model(value)) for name, value in of_optimizers.items() if isinstance(value, torch.nn.Module)
        ]
        self._names.update(modules, [(models or plain)[name] for name, _ in modules])
        optimizers = {
            name: self._read_optimizer(name, objects.dialect.optimizer(index), value)
            for index, (name, value) in enumerate(named("optimizer", objects.optimizer).items())
        }
        self._names.forget_models()
        registered = {}
        for index, value in enumerate(getattr(objects.accelerator, "_custom_objects", ())):
            registered[names.custom_checkpoint(index)] = self._read_registered(index, value, files)
        if directory and modules and len(modules) == len(of_optimizers):
            alone = objects.extra is None and not registered
            self._strange.check([module for _, module in modules], optimizers, alone=alone)
        zipped = [*optimizers.values(), *filter(None, registered.values())]
        world_size = self._world_size if objects.of_every_rank else 1
        state = training_state.capture(
            objects.dialect,
            world_size,
            step,
            optimizers,
            named("scheduler", objects.scheduler),
            objects.scaler,
            objects.dataloader,
            objects.extra,
            registered,
            None if objects.accelerator is None else accelerators.state(objects.accelerator),
        )
        _refuse_second_weights(models, plain)
        states = [*models.values(), *plain.values()]
        files += [file for m in states for file in m.files]
        contents: list[Content] = [content for m in states for content in m.contents]
        contents += [state.content for state in zipped]
        if objects.processor is not None:
            contents += self._processor.contents(objects.processor, older_readers=objects.older_readers)
        if objects.config is not None:
            files.append((names.CONFIG, _render_config(objects.config)))
        _refuse_clashes(contents, state, files)
        parts: list[ModelState | OptimizerState] = [*states, *zipped]
        return Request(
            directory=directory,
            step=step,
            save_id=os.urandom(16).hex(),
            contents=tuple(contents),
            parts=parts,
            tensors=list(chain.from_iterable(part.tensors for part in parts)),
            volatile=frozenset().union(*(m.volatile for m in states)),
            optimizers=tuple(zipped),
            state=state,
            files=files,
            links=_links(models, objects.weights_name),
            manifest={
                "world_size": world_size,
                "time": time.time(),
                "versions": VERSIONS,
                "metrics": _metrics(objects.metrics),
                "names": {name: m.names for name, m in (models or plain).items()},
            },
        )

    def _read_model(self, name: str, model: Any) -> ModelState:
        reader = self._models.get(name)
        if reader is None:
            reader = self._models[name] = ModelReader(name, self._max_shard_size, self._save_original_format)
        return reader.read(model)

    def _read_state_dict(self, index: int, model: Any, *, as_it_is: bool = True) -> ModelState:
        file = names.plain_weights(index)
        if isinstance(model, StateDict):
            return self._mappings.setdefault(index, MappingReader(file)).read(model.tensors)
        reader = self._state_dicts.get((index, as_it_is))
        if reader is None:
            options = (self._max_shard_size, self._save_original_format)
            reader = self._state_dicts[index, as_it_is] = ModelReader("", *options, file, as_it_is=as_it_is)
        return reader.read(model)

    def _read_optimizer(self, name: str, file: str, optimizer: Any) -> OptimizerState:
        reader = self._optimizers.get((name, file))
        if reader is None:
            reader = self._optimizers[name, file] = OptimizerReader(file)
        return reader.read(optimizer, self._names)

    def _read_registered(self, index: int, value: Any, files: list[tuple[str, bytes]]) -> OptimizerState | None:
        """Return the state of a registered object.

        If it is not plain data, add a pickle of it to `files`, warn, and return None.
        """
        file = names.custom_checkpoint(index)
        reader = self._registered.setdefault(file, RegisteredReader(file))
        try:
            return reader.read(value)
        except PlanError as error:
            warn(
                f"the registered object {index}, a {type(value).__qualname__}, is pickled: only accelerator.load_state will "
                f"restore it, not our load. {error}"
            )
            files.append((file, torch_save(value.state_dict())))
            return None


VERSIONS = {"python": platform.python_version()} | {
    name: version(name) for name in ("torch", "transformers", "accelerate", "safetensors")
}


def named(what: str, value: Any) -> dict[str, Any]:
    """Return one object, a mapping of names to objects, or None as a mapping. A single object is named "".

    Raises `PlanError` for a name that cannot be a directory.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or isinstance(value, torch.nn.Module):
        return {"": value}
    for name in value:
        if type(name) is not str or not name or "/" in name or name.startswith((".", "_")):
            raise PlanError(f"{what}: the name {name!r} cannot be a directory; use letters, digits, `-` and `_`")
    return dict(value)


def _links(models: Mapping[str, ModelState], further_name: str | None) -> list[list[str]]:
    if further_name is None:
        return []
    weights = [file for model in models.values() for file in model.names["files"]]
    if len(weights) != 1 or "/" in weights[0]:
        warn(f"{further_name} was left out: the weights are not one file at the top ({weights})")
        return []
    return [[weights[0], further_name]]


def _refuse_second_weights(models: Mapping[str, ModelState], plain: Mapping[str, ModelState]) -> None:
    written = {file for model in models.values() for file in model.names["files"]}
    for model in plain.values():
        for file in written.intersection(model.names["files"]):
            raise PlanError(
                f"{file} is what save_pretrained writes: there is no place for the whole state_dict; "
                "leave base_model out, and resume with our load or after integrations.accelerate.attach(accelerator)"
            )


def _refuse_clashes(contents: list[Content], state: TrainingState, files: list[tuple[str, bytes]]) -> None:
    given = {name for name, _ in files}
    for name in given & {names.MANIFEST, *state.file_names()}:
        raise PlanError(f"a file that a hook or caller adds is named {name!r}, which this save needs; rename it")
    taken = {names.MANIFEST, names.CONFIG, *state.file_names(), *given}
    for content in contents:
        if content.name in taken:
            raise PlanError(
                f"a file of the model or processor is named {content.name!r}, which this save needs; rename it"
            )


def _render_config(config: Any) -> bytes:
    try:
        return configs.render(config)
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"config: {error}") from error


def _metrics(metrics: Any) -> dict[str, float]:
    if metrics is not None and not isinstance(metrics, Mapping):
        raise PlanError(f"metrics is a {type(metrics).__qualname__}; use a mapping of names to numbers")
    result = {}
    for name, value in (metrics or {}).items():
        try:
            result[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise PlanError(f"metrics: {name!r} is {value!r}, not a number") from error
    return result
