"""Modules that wrap another module and add nothing to its state.

The part that they add to a tensor's name is removed everywhere. So a checkpoint fits the model with or without
torch.compile, activation checkpointing or DistributedDataParallel around parts of it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

_PARTS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_MODULE = re.compile(r"(?<![^.])module\.")


def inner_name(module: torch.nn.Module) -> str | None:
    """Return the attribute under which a wrapper holds the module inside it; None if the module is no wrapper."""
    held = module._modules  # not getattr: some models forward it to their base model
    for name in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        if held.get(name) is not None:
            return name
    kinds = type(module).__mro__  # isinstance is slow for DistributedDataParallel, which has an abstract base class
    if torch.nn.parallel.DistributedDataParallel in kinds or torch.nn.DataParallel in kinds:
        return "module"
    return "_original_module" if type(module).__name__ == "_FabricModule" else None  # of Lightning Fabric


def has_fsdp1(module: torch.nn.Module) -> bool:
    """Return whether FSDP version 1 wraps a module inside this one."""
    return any(part._modules.get("_fsdp_wrapped_module") is not None for part in module.modules())


def named_parts(module: torch.nn.Module, path: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield every module inside one, itself included, with its path. A wrapper has the path of the module inside it."""
    yield path, module
    inner = inner_name(module)
    for name, part in module._modules.items():
        if part is not None:
            yield from named_parts(part, path if name == inner else f"{path}.{name}" if path else name)


def spellings(name: str) -> Iterator[str]:
    """Yield a name, and then the same name without the parts that wrappers add.

    Older checkpoints may contain these parts.
    """
    yield name
    clean = _PARTS.sub("", name)
    yield clean
    yield _MODULE.sub("", clean)


def innermost(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside all the wrappers, or the module itself."""
    while (name := inner_name(module)) is not None:
        module = module._modules[name]  # type: ignore[assignment]
    return module


@contextlib.contextmanager
def unwrapped_inside(module: torch.nn.Module) -> Iterator[None]:
    """Context manager: remove the wrappers inside a module.

    Meanwhile its tensors have the names that they have without wrappers.
    """
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
