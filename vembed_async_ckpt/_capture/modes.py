"""Disables torch's modes while our own code runs."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

from .. import _signals

_P = ParamSpec("_P")
_T = TypeVar("_T")


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Context manager: disable the modes of this thread, and restore them afterwards.

    The modes are: the default device (from `set_default_device` or `with torch.device(...)`), every other function or
    dispatch mode (FakeTensorMode too), inference mode, and autocast. So tensors made inside are on the device that we
    name, are real, and are not inference tensors. The default dtype stays, because all threads share it; our code
    always names the dtype.
    """
    with contextlib.ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        functions = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
        stack.callback(_push, functions)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


_AUTOCAST = ("cpu", "cuda")
_NOTHING = contextlib.nullcontext()


def _some_mode_is_on() -> bool:
    """Return whether `neutral` would change anything."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.is_inference_mode_enabled()
        or any(map(torch.is_autocast_enabled, _AUTOCAST))
    )


def _push(functions: list[Any]) -> None:
    for mode in reversed(functions):
        torch._C._push_on_torch_function_stack(mode)


def in_neutral_modes(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a function to run in `neutral()` modes. Inside a torch.compile region the call is not traced."""

    def neutrally(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _signals.held(), neutral() if _some_mode_is_on() else _NOTHING:
            return function(*args, **kwargs)

    @functools.cache
    def not_recorded() -> Callable[_P, _T]:
        return torch.compiler.disable(neutrally)  # type: ignore[no-untyped-call, no-any-return]

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        recording = "torch._dynamo" in sys.modules  # importing it takes a second
        return (not_recorded() if recording else neutrally)(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call
