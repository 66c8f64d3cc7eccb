"""Builds the request: everything that a save will put on disk, as it was at the call."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch

from .._format import names
from .._format.plan import Content, TensorContent
from .._format.ranges import Region
from ..errors import PlanError, warn
from . import accelerator as accelerators
from . import config as configs
from . import mistakes, training_state
from .agreement import Agreement, Gather
from .dialect import Accelerate, Dialect
from .divided_model import DividedModelReader, DividedState
from .divided_optimizer import DividedOptimizerReader, DividedOptimizerState
from .model import ModelReader, ModelState
from .model import unwrap as unwrap_model
from .optimizer import OptimizerReader, OptimizerState, RegisteredReader
from .parameters import Names
from .pieces import Divider, Pieces, fault_of_claims
from .processor import ProcessorFiles
from .scratch import Scratch
from .sharding import is_sharded, refuse_shares
from .shares import Sharding
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
    `regions`: if the state is divided among ranks, for each of the tensors the index of the whole in the order of the
        contents and the region of it. The contents are the same on every rank, except that only the first rank has those
        without tensors of a model or optimizer. They come last.
    `wrappers`: for each of the tensors another one that counts changes of the same memory, or None.
    `digest`: equal on two ranks if they plan the same files.
    `pieces`: all this together.
    """

    directory: str
    step: int | None
    save_id: str
    contents: tuple[Content, ...]
    parts: list[ModelState | OptimizerState | Pieces]
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
    pieces: Pieces | None = None

    def outline(self) -> list[str]:
        """Return one line for each file and tensor that all ranks plan, to find the first difference."""
        return [] if self.pieces is None else self.pieces.outline()

    def claims(self) -> bytes:
        """Return which parts of the files this rank writes, for `check_claims`."""
        return b"[]" if self.pieces is None else self.pieces.claims()

    def check_claims(self, claims: Sequence[bytes]) -> str | None:
        """Return what is wrong if all ranks together do not write every tensor exactly once, else None.

        `claims`: what `claims()` returned on each rank.
        """
        return fault_of_claims([content for content in self.contents if isinstance(content, TensorContent)], claims)

    def stepped(self) -> list[OptimizerState | DividedOptimizerState]:
        """Return the optimizers."""
        return list(self.state.optimizers.values())

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
        if self.wrappers is not None:
            self.wrappers.clear()


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
        """Return whether a model is divided among ranks in a way that can be saved. Calls no method of the models."""
        return any(isinstance(model, torch.nn.Module) and is_sharded(model) for model in self._models())

    def further_files(self) -> list[tuple[str, bytes]]:
        return list((self.files() if callable(self.files) else self.files).items())

    def refuse_shares(self) -> None:
        """Raise `PlanError` if this process holds only a share of a model. Calls no method of the models."""
        refuse_shares(self._models())

    def _models(self) -> list[Any]:
        decided = isinstance(self.state_dicts, torch.nn.Module) or not callable(self.state_dicts)
        models = named("model", self.state_dicts).values() if decided else ()
        return [*named("model", self.model).values(), *models, *getattr(self.accelerator, "_models", ())]

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
        gather: Gather | None = None,
    ) -> None:
        """`gather`: sends a message to all ranks and returns theirs. Without it, divided models are refused."""
        self._max_shard_size = max_shard_size
        self._save_original_format = save_original_format
        self._world_size = world_size
        self._rank = rank
        self._scratch = scratch or Scratch()
        self._models: dict[str, ModelReader] = {}
        self._state_dicts: dict[tuple[int, bool], ModelReader] = {}
        self._mappings: dict[int, MappingReader] = {}
        self._optimizers: dict[tuple[str, str], OptimizerReader] = {}
        self._registered: dict[str, RegisteredReader] = {}
        self._names = Names()
        self._strange = mistakes.StrangeOptimizers()
        self._processor = ProcessorFiles()
        self._divided_models: dict[tuple[Any, ...], DividedModelReader] = {}
        self._divided_optimizers: dict[tuple[str, int], DividedOptimizerReader] = {}
        self._gather = gather
        self._agreement = Agreement(gather)
        self._divider = Divider()

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
        if self._gather is not None and objects.is_sharded():
            return self._read_divided(directory, step, objects)
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
        parts: list[ModelState | OptimizerState | Pieces] = [*states, *zipped]
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
            manifest=self._manifest(world_size, objects, models or plain),
        )

    def _read_divided(self, directory: str, step: int | None, objects: Objects) -> Request:
        """Return the request of a save whose models are divided among the ranks. Every rank calls this."""
        leads = self._rank == 0
        files = objects.further_files()
        models = {name: self._read_divided_model(name, value) for name, value in named("model", objects.model).items()}
        whole = named("model", objects.whole_models())
        plain = {
            name: self._read_divided_model("", value, names.plain_weights(index), as_it_is=not objects.clean_names)
            for index, (name, value) in enumerate(whole.items())
        }
        if objects.tensors is not None or any(isinstance(value, StateDict) for value in whole.values()):
            raise PlanError("a state_dict without its module cannot be saved beside a divided model; pass the module")
        of_optimizers = named("model", objects.model) or whole
        sharding = Sharding(*of_optimizers.values())
        named_parameters: dict[int, str] = {}
        for name, value in (models or plain).items():
            for number, of_parameter in value.named.items():
                named_parameters.setdefault(number, f"{name}/{of_parameter}" if name else of_parameter)
        optimizers = {
            name: self._read_divided_optimizer(name, index, value, sharding, named_parameters)
            for index, (name, value) in enumerate(named("optimizer", objects.optimizer).items())
        }
        registered = {}
        for index, value in enumerate(getattr(objects.accelerator, "_custom_objects", ()) if leads else ()):
            registered[names.custom_checkpoint(index)] = self._read_registered(index, value, files)
        world_size = self._world_size if objects.of_every_rank else 1
        state = training_state.capture(
            objects.dialect,
            world_size,
            step,
            optimizers,
            named("scheduler", objects.scheduler) if leads else {},
            objects.scaler if leads else None,
            objects.dataloader if leads else None,
            objects.extra if leads else None,
            registered,
            accelerators.state(objects.accelerator) if leads and objects.accelerator is not None else None,
        )
        _refuse_second_weights(models, plain)
        zipped = [value for value in registered.values() if value is not None]
        divided = [*models.values(), *plain.values(), *optimizers.values()]
        pieces = self._divider.pieces(divided, zipped)
        contents: list[Content] = [*pieces.contents, *(value.content for value in zipped)]
        if leads:
            contents += [content for value in divided for content in value.further]
            if objects.processor is not None:
                contents += self._processor.contents(objects.processor, older_readers=objects.older_readers)
            if objects.config is not None:
                files.append((names.CONFIG, _render_config(objects.config)))
        _refuse_clashes(contents, state, files)
        return Request(
            directory=directory,
            step=step,
            save_id=os.urandom(16).hex(),
            contents=tuple(contents),
            parts=[pieces],
            tensors=pieces.tensors,
            volatile=frozenset().union(*(value.volatile for value in divided)),
            optimizers=tuple(zipped),
            state=state,
            files=files,
            links=_links(models, objects.weights_name),
            manifest=self._manifest(world_size, objects, models or plain),
            regions=pieces.regions,
            wrappers=pieces.wrappers,
            digest=pieces.digest,
            pieces=pieces,
        )

    def _manifest(
        self, world_size: int, objects: Objects, models: Mapping[str, ModelState | DividedState]
    ) -> dict[str, Any]:
        return {
            "world_size": world_size,
            "time": time.time(),
            "versions": VERSIONS,
            "metrics": _metrics(objects.metrics),
            "names": {name: model.names for name, model in models.items()},
        }

    def _read_divided_model(
        self, prefix: str, model: Any, file: str | None = None, *, as_it_is: bool = True
    ) -> DividedState:
        key = (prefix, file, as_it_is)
        reader = self._divided_models.get(key)
        if reader is None:
            options = (self._max_shard_size, self._save_original_format)
            reader = self._divided_models[key] = DividedModelReader(prefix, *options, file, as_it_is=as_it_is)
        return reader.read(model)

    def _read_divided_optimizer(
        self, name: str, index: int, optimizer: Any, sharding: Sharding, named_parameters: Mapping[int, str]
    ) -> DividedOptimizerState:
        reader = self._divided_optimizers.get((name, index))
        if reader is None:
            file = names.divided_optimizer(index)
            reader = self._divided_optimizers[name, index] = DividedOptimizerReader(file, self._agreement)
        return reader.read(optimizer, sharding, lambda parameter: named_parameters.get(id(parameter)))

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


def _links(models: Mapping[str, ModelState | DividedState], further_name: str | None) -> list[list[str]]:
    if further_name is None:
        return []
    weights = [file for model in models.values() for file in model.names["files"]]
    if len(weights) != 1 or "/" in weights[0]:
        warn(f"{further_name} was left out: the weights are not one file at the top ({weights})")
        return []
    return [[weights[0], further_name]]


def _refuse_second_weights(
    models: Mapping[str, ModelState | DividedState], plain: Mapping[str, ModelState | DividedState]
) -> None:
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
