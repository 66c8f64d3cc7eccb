"""Which parts of a checkpoint the caller of `load` wants: everything, what fits, or everything except some names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from ..errors import CheckpointError, CorruptCheckpoint, warn

OBJECTS = ("optimizer", "scheduler", "dataloader", "scaler", "rng")

_T = TypeVar("_T")


def check_names(exclude: str | Iterable[str]) -> list[str]:
    """Return one name or several as a list. Raises `TypeError` for a value that is not a name."""
    found = [exclude] if isinstance(exclude, str) else list(exclude)
    for name in found:
        if not isinstance(name, str) or not name:
            raise TypeError(f"exclude: {name!r} is no name; use names of parameters, patterns, or {', '.join(OBJECTS)}")
    return found


class Selection:
    """The arguments `strict` and `exclude` of `load`.

    `strict`: whether something that does not fit is an error. Otherwise it is left out, and `tell` warns about it.
    `exclude`: names of what stays as it is.
    """

    def __init__(self, *, strict: bool = True, exclude: Sequence[str] = ()) -> None:
        self._strict = strict
        self._patterns = exclude
        self._used = {pattern for pattern in exclude if pattern in OBJECTS}
        self._left: list[str] = []

    def excludes(self, name: str, *, model: str = "") -> bool:
        """Return whether the parameter, buffer or object of this name stays as it is.

        `model`: name of the model it belongs to.
        """
        spellings = {name, f"{model}.{name}" if model else name}
        matching = [pattern for pattern in self._patterns if any(_matches(each, pattern) for each in spellings)]
        self._used.update(matching)
        return bool(matching)

    def misfits(self, directory: str, name: str, wrong: Sequence[str]) -> None:
        """Record what does not fit a model. Raises `CheckpointError` if `strict`."""
        if wrong:
            shown = "; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
            said = f"does not fit the model{' ' + name if name else ''}: {shown}"
            if self._strict:
                raise CheckpointError(f"{directory}: {said}. To load what fits, pass strict=False")
            self._left.append(said)

    def attempt(self, plan: Callable[[], _T]) -> _T | None:
        """Return what `plan` returns, or None if its object does not fit and `strict` is False.

        The object then stays as it is.
        """
        try:
            return plan()
        except CorruptCheckpoint:
            raise
        except CheckpointError as error:
            if self._strict:
                raise
            self._left.append(str(error))
            return None

    def tell(self, directory: str) -> None:
        """Warn about what was not loaded though it was not excluded.

        Raises `CheckpointError` if a name in `exclude` matches nothing. If `strict` is False, that is part of the
        warning instead.
        """
        unused = [pattern for pattern in self._patterns if pattern not in self._used]
        if unused:
            said = f"exclude: nothing is named {', '.join(map(repr, unused))}"
            if self._strict:
                raise CheckpointError(f"{directory}: {said}")
            self._left.append(said)
        if self._left:
            left = "; ".join(said.removeprefix(f"{directory}: ") for said in self._left)
            warn(f"{directory}: not loaded: {left}")


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)
