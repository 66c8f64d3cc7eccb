"""Host memory by address: what is read and copied is what the tensors hold, wherever they begin."""

from __future__ import annotations

import pytest
import torch

from vembed_async_ckpt._memory.addresses import FewBytes, TailProbe


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def beginning_at(offset: int, size: int, step: int = 64) -> list[torch.Tensor]:
    """Tensors of random bytes that begin `offset` bytes behind a boundary."""
    return [torch.randint(0, 256, (step + size,), dtype=torch.uint8)[offset : offset + size] for _ in range(5)]


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8, 12])
@pytest.mark.parametrize("size", [8, 9, 12, 30, 64, 4096])
def test_the_last_bytes_are_read_wherever_they_are(offset: int, size: int) -> None:
    """The same numbers for the same bytes, however they are aligned; and when all of them have moved."""
    tensors = beginning_at(offset, size)
    tails = TailProbe([size] * 5)
    for live in (tensors, tensors[::-1], beginning_at(0, size)):
        found = tails.read([tensor.data_ptr() for tensor in live])
        expected = [int.from_bytes(bytes_of(tensor)[-8:], "little") for tensor in live]
        assert found.tolist() == expected


def test_each_tail_has_its_own_size() -> None:
    tensors = [torch.rand(n) for n in (2, 3, 100)] + [torch.rand(5).bfloat16(), torch.rand(7, dtype=torch.complex128)]
    found = TailProbe([tensor.nbytes for tensor in tensors]).read([tensor.data_ptr() for tensor in tensors])
    assert found.tolist() == [int.from_bytes(bytes_of(tensor)[-8:], "little") for tensor in tensors]
    tensors[1][-1] += 1
    again = TailProbe([tensor.nbytes for tensor in tensors]).read([tensor.data_ptr() for tensor in tensors])
    assert (again != found).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_few_bytes_arrive_and_nothing_beside_them(offset: int) -> None:
    """Of several sizes; again after the values have changed, and after the tensors have moved."""
    sizes = [1, 2, 3, 4, 8, 24, 64]
    places = [torch.full((80,), 7, dtype=torch.uint8)[offset:] for _ in sizes]
    few = FewBytes([place.data_ptr() for place in places], sizes)

    def fill(sources: list[torch.Tensor]) -> None:
        few.fill([source.data_ptr() for source in sources])
        for place, source, size in zip(places, sources, sizes, strict=True):
            assert torch.equal(place[:size], source)
            assert place[size:].eq(7).all()

    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    fill(sources)
    for source in sources:
        source += 1
    fill(sources)
    fill([torch.randint(0, 256, (size + 1,), dtype=torch.uint8)[1:] for size in sizes])


def test_nothing_to_read() -> None:
    assert TailProbe([]).read([]).tolist() == []
    FewBytes([], []).fill([])
