"""torch's modes, out of the way of our own work."""

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
    """Meanwhile this thread's modes are off: a default device, whether set or by `with torch.device(...)`, every other function or
    dispatch mode (FakeTensorMode too), inference mode, and autocast. They are all back afterwards.

    So tensors are made where we say, are real, and are no inference tensors. The default dtype, which all threads share, stays:
    our own code names dtypes.
    """
    with contextlib.ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        functions = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
        stack.callback(_push, functions)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _push(functions: list[Any]) -> None:
    for mode in reversed(functions):
        torch._C._push_on_torch_function_stack(mode)


def in_neutral_modes(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let a function run in `neutral()` modes, and outside of what torch.compile records where it is called in such a region."""

    def neutrally(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _signals.held(), neutral():
            return function(*args, **kwargs)

    @functools.cache
    def not_recorded() -> Callable[_P, _T]:
        return torch.compiler.disable(neutrally)  # type: ignore[no-untyped-call, no-any-return]

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        recording = "torch._dynamo" in sys.modules  # loading it takes a second
        return (not_recorded() if recording else neutrally)(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call
