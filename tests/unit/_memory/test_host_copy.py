"""Copies within host memory: every byte of every kind of tensor, whatever thread copies it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from vembed_async_ckpt import StageError
from vembed_async_ckpt._memory import host_copy
from vembed_async_ckpt._memory.host_copy import (
    PIECE_BYTES,
    SERIAL,
    SMALL_BYTES,
    SmallPlaces,
    _copy_serially,
    copy_alone,
    copy_blocking,
    is_small,
)

Copy = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
COUNTS = [0, 1, SERIAL, SERIAL + 1, 3 * SERIAL + 7]


def sources() -> list[torch.Tensor]:
    """Every dtype in sizes around what is copied in one thread, one tensor of several pieces, and views that are not plain."""
    made = []
    for dtype in DTYPES:
        for count in COUNTS:
            made.append(torch.randint(0, 100, (count,)).to(dtype))
    made.append(torch.rand(2 * PIECE_BYTES // 4 + 3))
    square = torch.rand(300, 301)
    turned = torch.rand(200, 400, dtype=torch.complex64)
    return [
        *made,
        square.t(),
        square[:, ::2],
        square[7:],
        turned.conj(),
        turned.conj().imag,
        torch.rand(1).expand(50_000),
    ]


@pytest.mark.parametrize("copy", [_copy_serially, copy_alone, copy_blocking])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_tensor_arrives_whole(copy: Copy, threads: int) -> None:
    """Bit for bit, contiguous at its place, with one thread and with several."""
    made = sources()
    places = [torch.full(source.shape, 1, dtype=source.dtype) for source in made]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        copy(places, made)
    finally:
        torch.set_num_threads(before)
    for place, source in zip(places, made, strict=True):
        plain = source.resolve_conj().resolve_neg().contiguous()
        assert torch.equal(place.reshape(-1).view(torch.uint8), plain.reshape(-1).view(torch.uint8)), source.dtype


def test_threads_share_the_pieces_and_are_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that must both have a piece before either goes on; none is left that could slow the training down."""
    both, copying = threading.Barrier(2), set()

    class Libc:
        @staticmethod
        def memcpy(*piece: Any) -> None:
            if len(copying) < 2:
                copying.add(threading.get_ident())
                both.wait(20)
            memcpy(*piece)

    memcpy = host_copy._libc.memcpy
    monkeypatch.setattr(host_copy, "_libc", Libc)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    source, alive = torch.rand(3 * PIECE_BYTES // 4), threading.active_count()
    place = torch.zeros_like(source)
    copy_blocking([place], [source])
    assert len(copying) == 2
    assert threading.active_count() == alive
    assert torch.equal(place, source)


def test_an_interrupted_copy_leaves_no_thread_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arena may be another save's afterwards: what was not begun is not copied, what was begun has ended."""
    begun, go = threading.Event(), threading.Event()

    class Libc:
        @staticmethod
        def memcpy(*piece: Any) -> None:
            begun.set()
            go.wait(20)
            memcpy(*piece)

    def interrupted(*_: Any) -> None:
        assert begun.wait(20)
        threading.Timer(0.1, go.set).start()
        raise KeyboardInterrupt

    memcpy = host_copy._libc.memcpy
    monkeypatch.setattr(host_copy, "_libc", Libc)
    monkeypatch.setattr(host_copy, "_copy_serially", interrupted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    source = torch.ones(4 * PIECE_BYTES // 4)
    place = torch.zeros_like(source)
    with pytest.raises(KeyboardInterrupt):
        copy_blocking([place], [source])
    after = place.sum().item()
    assert go.is_set()
    assert after == PIECE_BYTES // 4
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(_copy_pieces)")]


@pytest.mark.parametrize("count", [3, SERIAL + 1])
def test_storage_that_was_freed_is_refused(count: int) -> None:
    """By name of what it is, instead of reading from address zero."""
    source = torch.rand(count)
    place = torch.zeros_like(source)
    source.untyped_storage().resize_(0)
    with pytest.raises(StageError, match="no memory"):
        copy_blocking([place], [source])


def test_a_process_that_may_have_no_more_threads_copies_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it did before there were any."""

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    source = torch.rand(3 * PIECE_BYTES // 4)
    place = torch.zeros_like(source)
    copy_blocking([place], [source])
    assert torch.equal(place, source)


def test_small_tensors_arrive_whole() -> None:
    """Bit for bit, nothing beside their places; what bytes cannot say is none of them."""
    made = [*sources(), torch.rand(SMALL_BYTES // 4), torch.rand(SMALL_BYTES // 4 + 1), torch.rand(0)]
    small = [source for source in made if is_small(source)]
    assert {source.dtype for source in small} > {torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn}
    assert max(source.nbytes for source in small) == SMALL_BYTES
    assert not any(source.is_conj() or source.is_neg() or not source.is_contiguous() for source in small)
    places = [torch.full((source.nbytes + 64,), 7, dtype=torch.uint8) for source in small]
    SmallPlaces([place[: s.nbytes].view(s.dtype).view(s.shape) for place, s in zip(places, small, strict=True)]).fill(
        small
    )
    for place, source in zip(places, small, strict=True):
        assert torch.equal(place[: source.nbytes], source.reshape(-1).view(torch.uint8)), source.dtype
        assert place[source.nbytes :].eq(7).all()


def test_a_small_tensor_that_was_freed_is_refused() -> None:
    """Before it is read."""
    square = torch.rand(3, 3)
    places = SmallPlaces([torch.zeros(3, 3)])
    square.untyped_storage().resize_(0)
    with pytest.raises(StageError, match=r"\(3, 3\) has no memory"):
        places.fill([square])
