"""What must lie under a root after any fault: told from what a training said alone, and compared with what is there."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vembed_async_ckpt import verify
from vembed_async_ckpt._disk.catalog import scan
from vembed_async_ckpt._format import names
from vembed_async_ckpt._format.manifest import Manifest

Rule = list[list[Any]]  # [["last", 2], ["best", 1]]: what any of these keeps


@dataclass(frozen=True)
class Save:
    """One save: its serial number (no two are alike), its step, the steps made (every number in it), and its loss."""

    serial: int
    step: int
    count: int
    loss: float


def kept(rule: Rule, present: list[Save], rivals: list[Save] | None = None) -> list[Save]:
    """Which of `present`, oldest first, a rule keeps; among the best, `rivals` compete too."""
    found: set[Save] = set()
    for kind, n in rule:
        if kind == "last":
            found |= set(present[-n:])
        elif kind == "every":
            found |= {save for save in present if save.step % n == 0}
        else:  # of two that are equally good the newer one; no two losses are equal here
            ranked = sorted(dict.fromkeys(present + (rivals or [])), key=lambda save: save.loss)
            found |= set(ranked[:n])
    return [save for save in present if save in found]


@dataclass
class Said:
    """What a training said until it ended."""

    saves: list[Save] = field(default_factory=list)
    staged: int = 0  # how many of them, counted from the first
    committed: int = 0
    found: str = ""
    complaints: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, messages: list[str], failures_are_expected: bool = False) -> Said:
        said = cls()
        position: dict[int, int] = {}
        for message in messages:
            verb, _, rest = message.partition(" ")
            if verb == "SAVE":
                serial, step, count, loss = rest.split()
                said.saves.append(Save(int(serial), int(step), int(count), float(loss)))
                position[int(serial)] = len(said.saves)
            elif verb == "STAGED":
                said.staged = max(said.staged, position[int(rest)])
            elif verb == "COMMITTED":
                said.committed = max(said.committed, position[int(rest)])
            elif verb == "FOUND":
                said.found = rest
            elif verb == "FAILED" and not failures_are_expected:
                said.complaints.append(message)
        return said


class Model:
    """The checkpoints under one root as they have to be, from its first day on."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.present: list[Save] = []  # oldest first, as they were after the last check
        self.foreign: set[str] = set()  # names of files that somebody put into checkpoints: no two are alike

    def after(self, said: Said, rule: Rule, *, floor: int, late: bool, closed: bool) -> list[str]:
        """What is wrong with the root now that a training with this `rule` ended.

        At least the first `floor` saves must have been committed. `late`: retention may have been interrupted more than once.
        `closed`: the training ended well, so that nothing is left to do.
        """
        problems = list(said.complaints)
        there, broken = self._read(said)
        problems += broken
        newest = there[-1] if there else None
        committed = said.saves.index(newest) + 1 if newest in said.saves else 0
        if not committed and newest != (self.present[-1] if self.present else None):
            problems.append(f"newest is {newest}, which is none of this training; before it was {self.present[-1:]}")
        if committed < floor:
            promised = said.saves[floor - 1]
            problems.append(f"{promised} was promised, newest is {newest}")
        must, may = self._expected(said.saves[:committed], rule, late)
        if closed and committed:
            may = [save for save in may if save in must or any(kind == "best" for kind, _ in rule)]
        problems += [f"missing: {save}" for save in must if save not in there]
        problems += [f"should be gone: {save}" for save in there if save not in may]
        if there != [save for save in may if save in there] and not problems:
            problems.append(f"order: {there}, expected {may}")
        problems += self._foreign_files()
        if closed:
            problems += [f"left over: {entry}" for entry in self._leftovers()]
        self.present = there
        return problems

    def _expected(self, commits: list[Save], rule: Rule, late: bool) -> tuple[list[Save], list[Save]]:
        """What must be there after these commits, and what may be: retention of the last one may not have taken place."""
        must = may = self.present
        for save in commits:
            must = [*(old for old in must if old.step != save.step), save]
            may = [*(old for old in may if old.step != save.step), save]
            before = may
            must = kept(rule, must, rivals=may)
            if not late and save is not commits[-1]:
                may = [old for old in before if old in must]
        return must, may

    def _read(self, said: Said) -> tuple[list[Save], list[str]]:
        """The saves that are there, oldest first, and what is wrong with what is visible."""
        known = {save.serial: save for save in [*self.present, *said.saves]}
        there, problems = [], []
        for entry in scan(self.root):
            if entry.manifest is None:
                problems.append(f"visible but broken: {entry.error}")
                continue
            try:
                verify(entry.path)
                there.append(known[_check_numbers(entry.path, entry.manifest, known)])
            except Exception as error:
                problems.append(f"visible but broken: {entry.path}: {type(error).__name__}: {error}")
        return there, problems

    def _foreign_files(self) -> list[str]:
        found = [name for _, _, files in os.walk(self.root) for name in files if name.startswith("notes-")]
        if set(found) == self.foreign:
            return []
        return [f"files of others: lost {sorted(self.foreign - set(found))}, new {sorted(set(found) - self.foreign)}"]

    def _leftovers(self) -> list[str]:
        work = names.work_directory(self.root)
        found = set(os.listdir(work)) - {names.LOCK, names.REPLACED} if os.path.isdir(work) else set()
        replaced = names.replaced_directory(self.root)
        if os.path.isdir(replaced):  # files of others are kept there for ever
            found |= {entry for entry in os.listdir(replaced) if not entry.startswith("kept-")}
        return sorted(found)

    def plant(self, number: int) -> None:
        """Somebody puts a file of his own into the newest checkpoint."""
        if not self.present:
            return
        name = f"notes-{number}.txt"
        with open(os.path.join(self.root, names.checkpoint(self.present[-1].step), name), "w") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
        self.foreign.add(name)


def _check_numbers(path: str, manifest: Manifest, known: dict[int, Save]) -> int:
    """The serial number of a checkpoint. Asserts that every number in it is the one of that save."""
    with open(os.path.join(path, names.TRAINING_STATE)) as file:
        serial = int(json.load(file)["extra"]["serial"])
    save = known.get(serial)
    assert save, f"it is save {serial}, which should be gone or never was"
    assert os.path.basename(path) == names.checkpoint(save.step), f"save {serial} is not of this step"
    assert manifest.step == save.step, f"the manifest says step {manifest.step}, not {save.step}"
    assert manifest.metrics["loss"] == save.loss, f"the manifest says loss {manifest.metrics['loss']}, not {save.loss}"
    for name, values in _tensors(path, manifest):
        expected = serial if name == "tag" else save.count
        assert (values == expected).all(), f"{name} of save {serial} holds {np.unique(values)[:5]}, not {expected}"
    return serial


def _tensors(path: str, manifest: Manifest) -> Any:
    """Name and numbers of the model's and the optimizer's tensors."""
    with open(os.path.join(path, names.WEIGHTS), "rb") as file:
        data = file.read()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    assert len(header) == 5, f"it has the tensors {sorted(header)}"
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        yield name, np.frombuffer(data[start + begin : start + end], "<f4")
    with open(os.path.join(path, names.optimizer(0)), "rb") as file:
        data = file.read()
    tensors = manifest.tensors[names.optimizer(0)]
    assert len(tensors) == 3, f"its optimizer has the tensors {sorted(tensors)}"
    for name, (_, shape, offset) in tensors.items():
        yield name, np.frombuffer(data[offset : offset + 4 * shape[0]], "<f4")
