"""What the parity tests compare: directories byte by byte, models bit by bit, ties by memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vembed_async_ckpt._format import names

BOUND = 30
OURS = {names.MANIFEST, names.TRAINING_STATE, names.TRAINING_TENSORS, names.random_states(0), names.optimizer(0)}


def files(directory: Path) -> dict[str, bytes]:
    """What `save_pretrained` would have written of a checkpoint."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name not in OURS}


def stock(model: Any, directory: Path, **options: Any) -> dict[str, bytes]:
    """What `save_pretrained` writes."""
    directory.mkdir(exist_ok=True)
    model.save_pretrained(directory, **options)
    return files(directory)


def tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def change(module: torch.nn.Module) -> None:
    """Every parameter and buffer, in place, unseen by any version counter."""
    for tensor in tensors(module):
        if tensor.is_floating_point():
            tensor.data.add_(0.5)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's state_dict."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Names that only one of two states has, or whose tensors are not the same bit for bit."""
    names = one.keys() ^ other.keys()
    names |= {
        name
        for name in one.keys() & other.keys()
        if one[name].dtype is not other[name].dtype
        or one[name].shape != other[name].shape
        or not torch.equal(one[name], other[name])
    }
    return sorted(names)


def ties(module: torch.nn.Module) -> set[frozenset[str]]:
    """The names of a state_dict that share their memory."""
    groups: dict[Any, set[str]] = {}
    for name, tensor in module.state_dict().items():
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.shape), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}
