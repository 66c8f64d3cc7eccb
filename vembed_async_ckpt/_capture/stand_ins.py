"""Shows a divided model as one process has it, without its data.

`save_pretrained` and `state_dict()` decide by names, shapes and shared memory what goes into which file. So for their
sake the tensors of which this rank holds only a share are replaced by tensors on the meta device with the whole's shape.
Nothing is gathered, and no hook of FSDP runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .shares import Sharding

FSDP1 = "_fsdp_wrapped_module"  # the attribute under which it holds the module inside it


@contextlib.contextmanager
def standing_in(module: torch.nn.Module, sharding: Sharding) -> Iterator[dict[int, torch.Tensor]]:
    """Context manager: show wholes in the place of shares in `module`.

    Yields {id of the whole: the parameter or buffer that it stands for}. Tied tensors share one whole.
    """
    wholes: dict[int, torch.Tensor] = {}
    shown: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by the id of the live tensor, which is kept too

    def whole_of(live: torch.Tensor) -> torch.Tensor:
        if id(live) not in shown:
            whole = _whole(live, sharding)
            shown[id(live)], wholes[id(whole)] = (live, whole), live
        return shown[id(live)][1]

    with contextlib.ExitStack() as stack:
        _remove_fsdp1(module, stack)
        # A gathered unit of FSDP version 1 shows tensors that are no parameters; so its own record is asked.
        for piece in sharding.pieces:
            _put(stack, piece.owner._parameters, piece.key, whole_of(piece.parameter))
        for part in module.modules():
            for holder in (part._parameters, part._buffers):
                for key, live in holder.items():
                    if live is not None and id(live) not in wholes and sharding.is_divided(live):
                        _put(stack, holder, key, whole_of(live))
            _put_attributes(stack, part)
        yield wholes


def _whole(live: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    piece = sharding.flat.get(id(live))
    shape, dtype = (live.shape, live.dtype) if piece is None else (piece.shape, piece.local().dtype)
    whole = torch.empty(shape, dtype=dtype, device="meta")
    if isinstance(live, torch.nn.Parameter):
        return torch.nn.Parameter(whole, requires_grad=live.requires_grad)
    return whole


def _put(stack: contextlib.ExitStack, holder: dict[str, Any], key: str, value: Any) -> None:
    """Set an entry until the stack ends. An entry that was there keeps its place in the order."""
    if key in holder:
        stack.callback(holder.__setitem__, key, holder[key])
    else:
        stack.callback(holder.pop, key)
    holder[key] = value


def _put_attributes(stack: contextlib.ExitStack, part: torch.nn.Module) -> None:
    """Let `save_pretrained` of transformers write on every rank, and gather nothing."""
    if hasattr(part, "should_save_on_this_rank"):
        _put(stack, vars(part), "should_save_on_this_rank", lambda is_main_process: is_main_process)
    config = vars(part).get("config")
    if getattr(config, "distributed_config", None) is not None:
        _put(stack, vars(config), "distributed_config", None)


def _remove_fsdp1(module: torch.nn.Module, stack: contextlib.ExitStack) -> None:
    """Take the wrappers of FSDP version 1 out of a module. Their hooks would gather the whole model."""
    for part in list(module.modules()):
        for name, child in part._modules.items():
            inner = child
            while inner is not None and inner._modules.get(FSDP1) is not None:
                inner = inner._modules[FSDP1]
            if inner is not child and name != FSDP1:
                _put(stack, part._modules, name, inner)
