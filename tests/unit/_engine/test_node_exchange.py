"""Who may copy into which arena, message by message; the other rank is a bare connection."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vembed_async_ckpt._engine.channel import Address, Message, connect
from vembed_async_ckpt._engine.node_exchange import ADDRESS, NodeExchange, NodeExchanges, Plan
from vembed_async_ckpt._memory.arena import Arena
from vembed_async_ckpt._shared.protocol import GENERATION, GENERATION_AT
from vembed_async_ckpt.errors import StageError
from vembed_async_ckpt.handle import SaveState

BOUND = 10.0


class Store:
    """The job's store."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def delete_key(self, key: str) -> None:
        self.values.pop(key, None)


class TwoRanks:
    """Stands for `Ranks`: tasks are polled once, when they are added."""

    world_size, rank = 2, 0

    def __init__(self) -> None:
        self.store = Store()

    def add(self, task: Any) -> None:
        task.poll()


class Other:
    """The second rank, as a connection."""

    def __init__(self, address: Address) -> None:
        self.line = connect(address, 1)
        self.kept: list[Message] = []

    def call(self, number: int, directory: str, step: int, digest: str = "plan") -> None:
        self.line.send(Message("call", {"call": number, "directory": directory, "step": step}))
        self.line.send(Message("plan", {"call": number, "digest": digest, "outline": []}, (b"",)))

    def send(self, kind: str, **values: Any) -> None:
        self.line.send(Message(kind, values))

    def expect(self, kind: str) -> Message:
        """The next message of this kind; the others are passed over."""
        deadline = time.monotonic() + BOUND
        while True:
            while self.kept:
                message = self.kept.pop(0)
                if message.kind == kind:
                    return message
            assert select.select([self.line], [], [], max(deadline - time.monotonic(), 0))[0], f"no {kind}"
            self.kept += self.line.receive()

    def hears_nothing_of(self, kind: str) -> bool:
        select.select([self.line], [], [], 0.3)
        self.kept += self.line.receive()
        return all(message.kind != kind for message in self.kept)


class Memory:
    """An arena, and what became of it."""

    def __init__(self, number: int) -> None:
        self.arena = Arena(number, 1 << 16)
        self.became: list[str] = []

    def hand_back(self, save: NodeExchange) -> None:
        save.hand_back(
            self.arena, lambda arena: self.became.append("free"), lambda arena: self.became.append("retired")
        )


@pytest.fixture
def exchanges() -> Iterator[NodeExchanges]:
    ranks: Any = TwoRanks()
    exchanges = NodeExchanges(ranks)
    assert Address.parse(ranks.store.get(ADDRESS).decode()) == exchanges.address
    yield exchanges
    exchanges.close(BOUND)
    assert not ranks.store.values, "the address is gone with the checkpointer"


@pytest.fixture
def other(exchanges: NodeExchanges) -> Iterator[Other]:
    other = Other(exchanges.address)
    _until(lambda: not exchanges.missing())
    yield other
    other.line.close()


def _until(true: Any) -> None:
    deadline = time.monotonic() + BOUND
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def agreed(exchanges: NodeExchanges, directory: str, step: int) -> NodeExchange:
    save = exchanges.begin(directory, step, of_every_rank=True)
    exchanges.agree(save, "plan", lambda: Plan("plan"), lambda claims: None)
    return save


def committed(exchanges: NodeExchanges, other: Other) -> None:
    """One save, so that the plan is agreed on."""
    other.call(1, "first", 1)
    save, memory = agreed(exchanges, "first", 1), Memory(1)
    save.grant(memory.arena, "id")
    number = other.expect("grant").values["save"]
    assert GENERATION.unpack_from(memory.arena.memory, GENERATION_AT) == (number,)
    found: list[Any] = []
    save.gather(found.append)
    assert found == []
    other.send("staged", save=number, names=[])
    _until(lambda: found)
    assert found[0].files == []
    memory.hand_back(save)
    save.say(SaveState.COMMITTED)
    assert memory.became == ["free"]
    assert other.expect("said").values["call"] == 1


def test_nobody_is_told_of_an_arena_that_was_handed_back(exchanges: NodeExchanges, other: Other) -> None:
    """The save has failed here, but that was not said yet when the other rank connects again and calls."""
    committed(exchanges, other)
    other.line.close()
    _until(exchanges.missing)
    save, memory = agreed(exchanges, "second", 2), Memory(2)
    save.grant(memory.arena, "id")
    memory.hand_back(save)
    late = Other(exchanges.address)
    late.call(1, "second", 2)
    assert late.hears_nothing_of("grant")
    save.say(SaveState.FAILED, error=StageError("failed here"))
    assert "failed here" in late.expect("said").values["said"]
    assert memory.became == ["free"]
    late.line.close()


def test_an_arena_is_retired_until_the_rank_lets_go(exchanges: NodeExchanges, other: Other) -> None:
    committed(exchanges, other)
    save, memory = agreed(exchanges, "second", 2), Memory(2)
    save.grant(memory.arena, "id")
    number = other.expect("grant").values["save"]
    memory.hand_back(save)
    save.say(SaveState.FAILED, error=StageError("failed here"))
    assert memory.became == ["retired"]
    other.send("release", save=number, error=None, keeps=True)  # a device may still write
    next_save, next_memory = agreed(exchanges, "third", 3), Memory(3)
    next_save.grant(next_memory.arena, "id")
    assert other.hears_nothing_of("grant"), "who still uses an arena gets a new one when it calls"
    other.call(2, "third", 3)
    assert other.expect("grant").values["arena"] == 3
    other.send("release", save=number, error=None, keeps=False)
    _until(lambda: memory.became == ["retired", "free"])
    next_memory.hand_back(next_save)
    next_save.say(SaveState.FAILED, error=StageError("failed here"))


def test_a_closed_connection_does_not_free_an_arena(exchanges: NodeExchanges, other: Other) -> None:
    """The process goes on, and may still copy. Only its end would free the arena."""
    committed(exchanges, other)
    save, memory = agreed(exchanges, "second", 2), Memory(2)
    save.grant(memory.arena, "id")
    other.expect("grant")
    other.line.close()
    _until(lambda: save.error is not None)
    assert "has closed its checkpointer" in str(save.error)
    memory.hand_back(save)
    save.say(SaveState.FAILED, error=save.error)
    assert memory.became == ["retired"]
    begun = time.monotonic()
    exchanges.wait_for_stragglers()
    assert 0.5 < time.monotonic() - begun < 5.0, "the next save waits a moment for it, and then takes another arena"


def test_a_rank_that_let_go_too_early_is_noticed(exchanges: NodeExchanges, other: Other) -> None:
    """Its part is not in the arena, whatever it says afterwards."""
    committed(exchanges, other)
    save, memory = agreed(exchanges, "second", 2), Memory(2)
    save.grant(memory.arena, "id")
    number = other.expect("grant").values["save"]
    other.send("release", save=number, error=None, keeps=False)
    other.send("staged", save=number, names=[])
    found: list[Any] = []
    save.gather(found.append)
    _until(lambda: found)
    assert "rank 1 did not copy its part" in str(found[0])
    memory.hand_back(save)
    save.say(SaveState.FAILED, error=found[0])
