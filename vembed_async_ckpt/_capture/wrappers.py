"""Modules that wrap another one and add nothing to its state.

Their part of a tensor's name is left out everywhere, so that a checkpoint fits the model whether torch.compile, activation
checkpointing or DistributedDataParallel is around parts of it or not.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

_PARTS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module)\.")
_MODULE = re.compile(r"(?<![^.])module\.")


def inner_name(module: torch.nn.Module) -> str | None:
    """The name under which a wrapper holds the module inside it; None if the module is no wrapper."""
    held = module._modules  # not getattr: some models answer for their base
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        if held.get(name) is not None:
            return name
    kinds = type(module).__mro__  # isinstance takes long: the class of DistributedDataParallel is abstract
    if torch.nn.parallel.DistributedDataParallel in kinds or torch.nn.DataParallel in kinds:
        return "module"
    return "_original_module" if type(module).__name__ == "_FabricModule" else None  # Lightning Fabric's


def named_parts(module: torch.nn.Module, path: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Every module inside one, itself included, with its path; wrappers have that of the module inside them."""
    yield path, module
    inner = inner_name(module)
    for name, part in module._modules.items():
        if part is not None:
            yield from named_parts(part, path if name == inner else f"{path}.{name}" if path else name)


def spellings(name: str) -> Iterator[str]:
    """A name as it stands in a checkpoint, then without the parts that wrappers added to it before they were left out."""
    yield name
    clean = _PARTS.sub("", name)
    yield clean
    yield _MODULE.sub("", clean)


def innermost(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside all the wrappers, or the module itself."""
    while (name := inner_name(module)) is not None:
        module = module._modules[name]  # type: ignore[assignment]
    return module


@contextlib.contextmanager
def unwrapped_inside(module: torch.nn.Module) -> Iterator[None]:
    """Take the wrappers inside a module out of it for a while, for whoever writes or reads its state by names: they are then those
    that it has without any."""
    wrapped = [
        (part._modules, name, child)
        for part in module.modules()
        for name, child in part._modules.items()
        if child is not None and inner_name(child) is not None
    ]
    try:
        for children, name, child in wrapped:
            children[name] = innermost(child)
        yield
    finally:
        for children, name, child in wrapped:
            children[name] = child
