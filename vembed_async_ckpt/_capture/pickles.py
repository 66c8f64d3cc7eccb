"""Makes the pickles of a foreign `save_pretrained` again for every save, without running it again."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch

from .._disk.filesystem import read_regular
from .interception import Pickle
from .scratch import in_scratch


class Replay:
    """A recorded `torch.save` of live tensors in plain containers. The bytes also depend on the name of the file."""

    def __init__(self, name: str, pickle: Pickle, find: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """`find` returns the live tensor of which a tensor is an alias, or None.

        Raises `ValueError` if anything else is pickled.
        """
        self._name = os.path.basename(name)
        obj, self._args, self._kwargs = pickle
        self._found: dict[int, _Live] = {}
        self._skeleton = self._bones(obj, find)
        self._found.clear()

    def bytes(self) -> bytes:
        """Return what `torch.save` would write now."""

        def render(directory: str) -> bytes:
            path = os.path.join(directory, self._name)
            torch.save(_flesh(self._skeleton, {}), path, *self._args, **self._kwargs)
            return read_regular(path)

        return in_scratch(render)

    def _bones(self, value: Any, find: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        if type(value) is torch.Tensor and not value.requires_grad:
            owner = find(value)
            if owner is not None:
                return self._found.setdefault(id(value), _Live(owner))
        if isinstance(value, dict):
            bones = copy.copy(value)  # a copy keeps the attributes that a state_dict has
            for key, item in value.items():
                bones[key] = self._bones(item, find)
            return bones
        if type(value) in (list, tuple):
            return type(value)(self._bones(item, find) for item in value)
        raise ValueError(f"a {type(value).__qualname__} may be another one at the next save")


class _Live:
    """Marks the place of an alias of a live tensor."""

    def __init__(self, owner: torch.Tensor) -> None:
        self.owner = owner


def _flesh(bones: Any, made: dict[int, torch.Tensor]) -> Any:
    if isinstance(bones, _Live):
        if id(bones) not in made:
            made[id(bones)] = bones.owner.detach()
        return made[id(bones)]
    if isinstance(bones, dict):
        result = copy.copy(bones)
        for key, item in bones.items():
            result[key] = _flesh(item, made)
        return result
    return type(bones)(_flesh(item, made) for item in bones)
