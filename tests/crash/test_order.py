"""The order of system calls of one run, checked against rules that hold on any file system, however cautious."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from vembed_async_ckpt._format import names

from .conftest import Tally
from .faults import Call, needs_strace
from .nursery import Nursery
from .sweeps import PRUNING, Bench, Scenario, Sweep

pytestmark = needs_strace
_WRITES = {
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "pwritev2",
    "ftruncate",
    "fallocate",
    "copy_file_range",
    "sendfile",
}
_SYNCS = {"fsync", "fdatasync"}
_REMOVALS = {"unlink", "unlinkat", "rmdir"}


class Oracle:
    """Follows the calls below `root` and notes what is out of order.

    Rules: (1) a file is synced after its last write, before it is published; (2) a directory is synced after its last new entry,
    before it is published; (3) both parents of a publishing rename are synced before it is acknowledged; (4) nothing that is
    published is moved away or deleted before the newer publication is durable; (5) nothing is written into what is published;
    (6) a final name comes from a rename, never from a mkdir; (7) what retention moves away is durably gone before it is deleted.
    """

    def __init__(self, root: str) -> None:
        self.broken: list[str] = []
        self.acknowledged = 0
        self._root = root
        self._unsynced: dict[str, str] = {}  # files and directories: by what they became dirty
        self._published: set[str] = set()
        self._publishing: set[str] = set()  # directories in which a publication is not durable yet
        self._retiring: set[str] = set()  # the same for what was moved away

    def follow(self, calls: list[Call]) -> None:
        for call in calls:
            if call.succeeded:
                self._follow(call)
        if self._publishing:
            self._note("rule 3", "the end", f"what was published in {self._publishing} was never synced")

    def _follow(self, call: Call) -> None:
        if call.name == "sendto":
            if "committed" in call.arguments:
                self.acknowledged += 1
                self._acknowledge(call)
            return
        if not call.paths or not self._below(call.paths[0]):
            return
        path, last = call.paths[0], call.paths[-1]
        if call.name == "openat":
            if "O_CREAT" in call.arguments and path not in (names.lock_file(self._root)):
                self._enter(call, path)
        elif call.name in ("mkdir", "mkdirat"):
            self._enter(call, path)
            if os.path.dirname(path) == self._root and names.parse_checkpoint(os.path.basename(path)) is not None:
                self._note("rule 6", call, "a final name made by mkdir")
        elif call.name in ("link", "linkat"):
            self._enter(call, last)
            self._unsynced.pop(last)  # the bytes are those of the first name, which are dirty or not
        elif call.name in _WRITES and path != names.lock_file(self._root):
            self._unsynced[path] = str(call.name)
            if self._is_published(path):
                self._note("rule 5", call, "written into what is published")
        elif call.name in _SYNCS:
            self._unsynced.pop(path, None)
            self._publishing.discard(path)
            self._retiring.discard(path)
        elif call.name.startswith("rename"):
            self._rename(call, path, last)
        elif call.name in _REMOVALS:
            self._remove(call, last)

    def _below(self, path: str) -> bool:
        return (path + "/").startswith(self._root + "/")

    def _is_published(self, path: str) -> bool:
        return any((path + "/").startswith(root + "/") for root in self._published)

    def _enter(self, call: Call, path: str) -> None:
        if self._is_published(path):
            self._note("rule 5", call, "a new entry in what is published")
        self._unsynced[os.path.dirname(path)] = f"{call.name} {path}"
        self._unsynced[path] = call.name

    def _rename(self, call: Call, source: str, target: str) -> None:
        if os.path.dirname(target) == self._root:
            for path, why in self._unsynced.items():
                if (path + "/").startswith(source + "/"):
                    self._note("rules 1 and 2", call, f"{path} is not synced since {why}")
            self._published.add(target)
            self._publishing |= {os.path.dirname(source), os.path.dirname(target)}
        elif source in self._published:
            if self._publishing:
                self._note("rule 4", call, "moved away while a newer one is not durable")
            self._published.discard(source)
            self._retiring.add(os.path.dirname(source))

    def _remove(self, call: Call, path: str) -> None:
        if self._is_published(path):
            self._note("rule 4", call, "deleted under its final name")
        if self._retiring:
            self._note("rule 7", call, "deleted before its way out is durable")
        self._unsynced.pop(path, None)

    def _acknowledge(self, call: Call) -> None:
        if self._publishing:
            self._note("rule 3", call, f"acknowledged while what was published in {self._publishing} is not synced")

    def _note(self, rule: str, where: Call | str, what: str) -> None:
        self.broken.append(
            f"{rule}: {what} ({where if isinstance(where, str) else f'{where.name}({where.arguments})'})"
        )


def broken_rules(calls: list[Call], root: str) -> list[str]:
    oracle = Oracle(root)
    oracle.follow(calls)
    return oracle.broken


@pytest.fixture(scope="module", params=["trainer", "writer"])
def traced(
    request: pytest.FixtureRequest, victims: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Call], str]:
    """The calls of two saves and a retention, by a writer thread and by a writer process; and the root."""
    bench = Bench(tmp_path_factory.mktemp("order"))
    return Sweep(victims, Scenario(request.param, 1, **PRUNING[1]), [bench]).trace()


def test_every_rule_is_kept(traced: tuple[list[Call], str], tally: Tally) -> None:
    """No rule is broken, and both saves were acknowledged under the oracle's eyes."""
    calls, root = traced
    oracle = Oracle(root)
    oracle.follow(calls)
    tally.faults, tally.what = len(calls), "calls"
    tally.violations += oracle.broken
    assert (oracle.broken, oracle.acknowledged) == ([], 2)


@pytest.fixture(scope="module")
def replacing(victims: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Call], str]:
    """The calls of a save that replaces the same step."""
    bench = Bench(tmp_path_factory.mktemp("order"))
    return Sweep(victims, Scenario("trainer", 3, [(2, 1)], [(1, 1)]), [bench]).trace()


def test_replacing_a_step_keeps_every_rule(replacing: tuple[list[Call], str]) -> None:
    """An exchange is acknowledged when it is durable, and what it replaced goes afterwards."""
    assert any("RENAME_EXCHANGE" in call.arguments for call in replacing[0])
    assert broken_rules(*replacing) == []


def without(what: Callable[[Call, str], bool]) -> Callable[[list[Call], str], list[Call]]:
    """Leaves out the calls that are `what`."""
    return lambda calls, root: [call for call in calls if not what(call, root)]


def sync_of(suffix: str) -> Callable[[Call, str], bool]:
    return lambda call, root: call.name == "fsync" and call.paths[0].endswith(suffix)


def publishing(call: Call) -> bool:
    return call.name == "renameat2"


def earlier(what: Callable[[Call], bool]) -> Callable[[list[Call], str], list[Call]]:
    """Moves each call that is `what` to right behind the publication before it."""

    def move(calls: list[Call], root: str) -> list[Call]:
        moved: list[Call] = []
        for call in calls:
            at = (
                max((n + 1 for n, other in enumerate(moved) if publishing(other)), default=0)
                if what(call)
                else len(moved)
            )
            moved.insert(at, call)
        return moved

    return move


def write_into_published(calls: list[Call], root: str) -> list[Call]:
    path = os.path.join(root, "checkpoint-2", "config.json")
    return [*calls, Call("1", "pwrite64", "late", (path,), True)]


def made_in_place(calls: list[Call], root: str) -> list[Call]:
    return [Call("1", "mkdir", "in place", (os.path.join(root, "checkpoint-7"),), True), *calls]


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        ("rules 1 and 2", without(sync_of("/model.safetensors"))),
        ("rules 1 and 2", without(sync_of("/inner/tokens.bin"))),
        ("rules 1 and 2", without(sync_of(names.MANIFEST))),
        ("rules 1 and 2", without(sync_of("/inner"))),
        ("rules 1 and 2", without(sync_of(".0"))),
        ("rule 3", without(lambda call, root: call.name == "fsync" and call.paths[0] == root)),
        ("rule 3", without(sync_of(names.WORK))),
        ("rule 3", earlier(lambda call: "committed" in call.arguments)),
        ("rule 4", earlier(lambda call: call.name == "renameat")),
        ("rule 5", write_into_published),
        ("rule 6", made_in_place),
        ("rule 7", without(lambda call, root: call.name == "fsync" and call.paths[0] == root)),
    ],
)
def test_the_oracle_notices(
    traced: tuple[list[Call], str], rule: str, spoil: Callable[[list[Call], str], list[Call]]
) -> None:
    """A trace from which a sync is taken out, or in which a call comes too early, breaks the rule it should."""
    calls, root = traced
    assert any(problem.startswith(rule) for problem in broken_rules(spoil(calls, root), root))
