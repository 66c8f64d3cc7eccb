"""The states of random generators that are read from memory are what the generators themselves say."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from vembed_async_ckpt._capture import mersenne, random_state, tree


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    before = random.getstate(), np.random.get_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])


def draw(count: int) -> None:
    """Draw normal numbers: every other time, one is left for the next call."""
    for _ in range(count):
        random.gauss(0, 1)
        np.random.standard_normal()


def restored() -> None:
    """The same position as now, and one normal number is left: nothing but that tells it from the state before."""
    np.random.set_state((*np.random.get_state()[:3], 1, -0.25))
    random.setstate((*random.getstate()[:2], 1.5))


STATES: dict[str, Callable[[], Any]] = {
    "as it is": lambda: None,
    "one normal number left": lambda: draw(1),
    "none left": lambda: draw(2),
    "seeded": lambda: (random.seed(7), np.random.seed(7)),
    "seeded, one left": lambda: (random.seed(7), np.random.seed(7), draw(1)),
    "in the middle": lambda: (
        random.seed(1),
        np.random.seed(1),
        np.random.rand(1000),
        [random.random() for _ in range(500)],
    ),
    "put back": restored,
}


def captured() -> tuple[Any, Any]:
    tensors: dict[str, torch.Tensor] = {}
    state = random_state.as_tree(random_state.capture(tensors.__setitem__))  # type: ignore[arg-type]
    whole = tree.refill(state, tensors.__getitem__)
    return whole["python"], whole["numpy"]


@pytest.fixture(params=["read", "asked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "asked":
        monkeypatch.setattr(mersenne, "_PYTHON_AT", None)
        monkeypatch.setattr(mersenne, "_GAUSS_AT", None)
    else:
        assert mersenne.of_python() is not None, (
            "this interpreter's generators are not read: every save asks for numbers"
        )
        assert mersenne.of_numpy() is not None, "this numpy's generators are not read: every save asks for numbers"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("state", STATES)
def test_what_is_captured_is_what_the_generators_say(state: str) -> None:
    STATES[state]()
    python, numpy = captured()
    assert python == random.getstate()
    kind, keys, *rest = np.random.get_state()
    assert (numpy[0], *numpy[2:]) == (kind, *rest)
    assert numpy[1].dtype == keys.dtype
    assert np.array_equal(numpy[1], keys)


@pytest.mark.usefixtures("way")
def test_what_is_captured_does_not_change_later() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = random_state.capture(tensors.__setitem__)  # type: ignore[arg-type]
    then = random.getstate(), np.random.get_state()
    draw(700)
    random.setstate(random_state.as_tree(state)["python"])
    assert random.getstate() == then[0]
    assert np.array_equal(tensors["rng.numpy"].numpy(), then[1][1])


def test_other_generators_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have other states: one of numpy's other kinds, and a subclass of a program's."""

    class Own(random.Random):
        pass

    monkeypatch.setattr(random, "getstate", Own(3).getstate)
    assert mersenne.of_python() is None
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(7))
    try:
        assert mersenne.of_numpy() is None
        assert captured()[0] == random.getstate()
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("find", [mersenne._find_python, mersenne._find_gauss])
def test_a_layout_that_is_not_found_is_not_used(
    find: Callable[[], int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another interpreter, or with a later version of numpy."""
    assert find() is not None
    monkeypatch.setattr(mersenne.ctypes, "string_at", lambda address, size: bytes(size))
    assert mersenne._or_none(find) is None
    monkeypatch.setattr(mersenne.ctypes, "string_at", lambda address, size: (_ for _ in ()).throw(OSError))
    assert mersenne._or_none(find) is None
